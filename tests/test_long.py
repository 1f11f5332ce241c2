"""512 greedy tokens, float32, 12 families, every method, alone and in a ragged batch: transformers' own tokens, all of them.

A quarter of an hour on one quiet core. `KINDS=llama,gpt2 pytest -m slow tests/test_long.py` runs some families only.
"""

import copy
import os

import pytest
import torch

import zoo
from glidecape.core.params import SamplingParams
from glidecape.drafting.methods import DRAFTLESS, METHODS, make_drafter
from glidecape.drafts.glide.adapter import GlideDraft
from glidecape.drafts.glide.config import GlideConfig
from glidecape.drafts.glide.network import GlideModel
from glidecape.engine.decode import generate
from glidecape.errors import GlideCapeError
from glidecape.target.target import Target
from test_against_transformers import PROMPTS, Agreeing, reference_tokens

FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3"),
    *("gpt2", "gpt_neox", "olmo2", "cohere", "mixtral", "smollm3"),
)
KINDS = [kind for kind in FAMILIES if kind in os.environ.get("KINDS", ",".join(FAMILIES)).split(",")]
NEW, CONTEXT = 512, 640


def first_difference(found, expected):
    pairs = enumerate(zip(found, expected, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(found), len(expected)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_512_greedy_tokens_equal_transformers(kind, record_property, capsys):
    """The draft LM is the target itself, always right, or a noisy copy; GliDe's is untrained, mostly wrong."""
    # Two layers: with and without a window where the family has both.
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if kind == "gemma3_text" else {}
    model = zoo.build(kind, max_position_embeddings=CONTEXT, num_hidden_layers=2, **layers)
    reference, noisy = copy.deepcopy(model), copy.deepcopy(model)
    for p in noisy.parameters():
        if p.ndim > 1:
            p.data += 0.004 * torch.randn_like(p)
    target = Target(model)
    itself, often = Agreeing(Target(copy.deepcopy(reference))), Agreeing(Target(noisy))
    try:
        rarely = GlideDraft(GlideModel.new(GlideConfig.for_target(target), target))
    except GlideCapeError:
        rarely = often
    references = [reference_tokens(reference, p, max_new_tokens=NEW, pad_token_id=0) for p in PROMPTS]
    margin = min(m for _, m in references)
    record_property("smallest top-2 margin", margin)
    with capsys.disabled():
        print(f"\n{kind}: smallest top-2 margins {', '.join(f'{m:.1e}' for _, m in references)}")
    expected = [tokens for tokens, _ in references]
    params, accepted = SamplingParams(max_new_tokens=NEW, ignore_eos=True), 0
    for method in METHODS:
        for rows, draft in (([2], itself), ([0, 1, 2, 3], often), ([1, 2], rarely)):
            if draft is rarely and method not in ("glide", "glide+cape", "glide+beam+svip"):
                continue
            drafter = make_drafter(method, None if method.split("+")[0] in DRAFTLESS else draft)
            out = generate(target, [PROMPTS[i] for i in rows], drafter, params)
            accepted += sum(origin != "bonus" for one in out for origin in one.origins)
            for i, one in zip(rows, out, strict=True):
                at = first_difference(one.tokens, expected[i])
                assert one.tokens == expected[i], (
                    f"{kind}, {method}, {len(rows)} row(s), prompt {i}: token {at} differs; the reference's smallest top-2 "
                    f"margin is {references[i][1]:.1e}" + (" (too small to tell)" if references[i][1] < 1e-5 else "")
                )
    assert accepted > len(METHODS) * NEW, "hardly anything was accepted: the test would not see a wrong cache"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_outputs_of_one_token_and_up_to_the_very_end_of_the_context(kind):
    """With learned positions the last of them is used, and drafts must not ask for the one after."""
    model = zoo.build(kind, max_position_embeddings=48)
    reference = copy.deepcopy(model)
    target, draft = Target(model), Agreeing(Target(copy.deepcopy(reference)))
    prompts = [PROMPTS[1], PROMPTS[2], PROMPTS[1]]
    room = [48 - len(p) for p in prompts[:2]]
    expected = [reference_tokens(reference, p, max_new_tokens=n)[0] for p, n in zip(prompts, room, strict=False)]
    each = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (*room, 1)]
    for method in METHODS:
        drafter = make_drafter(method, None if method.split("+")[0] in DRAFTLESS else draft)
        out = generate(target, prompts, drafter, each)
        assert [one.tokens for one in out] == [*expected, expected[0][:1]], method
        assert [one.finish for one in out] == ["length"] * 3
