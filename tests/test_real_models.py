"""Token equality on trained weights: the shipped pair, and a public checkpoint where it is at hand."""

import copy
from pathlib import Path

import pytest
import torch

from glidecape.decode import generate
from glidecape.drafting.methods import METHODS, make_drafter
from glidecape.models.checkpoint import load_draft
from glidecape.models.standalone import StandaloneDraft
from glidecape.models.target import Target
from glidecape.sampling import SamplingParams
from test_against_transformers import Agreeing, reference_tokens

ROOT = Path(__file__).resolve().parents[1]
PAIR = ROOT / "models" / "pysource"
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
NEW = 48


def reference_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check(target, reference, drafts, texts):
    prompts = [target.encode(text) for text in texts]
    expected = [reference_tokens(reference, prompt) for prompt in prompts]
    margin = min(m for _, m in expected)
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    for method in METHODS:
        for draft in drafts.get(method.split("+")[0], [None]):
            drafter = make_drafter(method, draft)
            batch = generate(target, prompts, drafter, params)
            assert [o.tokens for o in batch] == [e for e, _ in expected], f"{method}, ragged batch, margin {margin:.1e}"
            alone = generate(target, prompts[:1], drafter, params)[0]
            assert alone.tokens == expected[0][0], f"{method}, batch 1, margin {margin:.1e}"


def test_the_shipped_pair_equals_transformers():
    if not (PAIR / "target" / "config.json").is_file():
        pytest.skip("the shipped pair models/pysource is not in this checkout")
    target = Target.from_pretrained(PAIR / "target", dtype=torch.float32)
    drafts = {"plain": [None], "vanilla": [load_draft(PAIR / "lm", target)]}
    drafts["glide"] = [load_draft(PAIR / name, target) for name in ("glide", "glide-no-cross")]
    texts = ["import os\n", "def add(a, b):\n    return", "class Queue:\n    def __init__(self, size):\n", "x"]
    check(target, reference_of(PAIR / "target"), drafts, texts)


def test_the_shipped_draft_is_worth_its_cross_attention():
    """A regression gate: on fixed prompts GliDe's acceptance length stays well above its ablation's."""
    if not (PAIR / "target" / "config.json").is_file():
        pytest.skip("the shipped pair models/pysource is not in this checkout")
    import json

    from glidecape.stats import Stats

    target = Target.from_pretrained(PAIR / "target", dtype=torch.float32)
    lines = (ROOT / "evaluation" / "prompts" / "python.jsonl").read_text().splitlines()[:8]
    prompts = [target.encode(json.loads(line)["prompt"])[:128] for line in lines]
    length = {}
    for name in ("glide", "glide-no-cross"):
        stats = Stats()
        drafter = make_drafter("glide", load_draft(PAIR / name, target), 5)
        each = [SamplingParams(temperature=1.0, seed=i, max_new_tokens=48, ignore_eos=True) for i in range(8)]
        generate(target, prompts, drafter, each, stats)
        length[name] = stats.acceptance_length
    assert length["glide"] > length["glide-no-cross"] + 0.2, length


def test_a_public_checkpoint_equals_transformers():
    if not STORIES.is_dir():
        pytest.skip("the public checkpoint ../shared/models/stories260K is not at hand")
    target, reference = Target.from_pretrained(STORIES, dtype=torch.float32), reference_of(STORIES)
    noisy = copy.deepcopy(reference)
    torch.manual_seed(0)
    for p in noisy.parameters():
        if p.ndim > 1:
            p.data += 0.01 * torch.randn_like(p)
    draft = Target(noisy)
    drafts = {"plain": [None], "vanilla": [StandaloneDraft(draft)], "glide": [Agreeing(draft)]}
    texts = ["Once upon a time", "Lily and Tom went to the park. They saw a big", "One day", "The dog"]
    check(target, reference, drafts, texts)
