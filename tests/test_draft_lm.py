"""Independent draft LMs of other depths and widths than the target's."""

import torch

from glidecape.drafts.base import Queries
from glidecape.drafts.causal_lm import StandaloneDraft
from glidecape.target.target import Target
from glidecape.train.draft import make_draft
from glidecape.train.recipe import DraftRecipe
from test_against_transformers import build


def test_layers_and_width_of_a_draft_lm():
    target = build("llama")[0]
    whole = make_draft(target, DraftRecipe(kind="lm")).config
    small = make_draft(target, DraftRecipe(kind="lm", layers=3, width=0.5))
    assert whole.num_hidden_layers == 1
    assert whole.hidden_size == target.text_config.hidden_size
    assert small.config.num_hidden_layers == 3
    assert small.config.hidden_size == whole.hidden_size // 2
    assert small.config.num_attention_heads == whole.num_attention_heads // 2
    draft = StandaloneDraft(Target(small.eval()))
    cache = draft.new_cache(1, 4)
    logits = draft.step(Queries(torch.tensor([[5]]), torch.tensor([[0]]), torch.tensor([[0]])), cache, cache)
    assert logits.shape == (1, 1, target.vocab_size)
