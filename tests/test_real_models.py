"""Token equality on trained weights: the shipped pair, and a public checkpoint where it is at hand."""

import copy
from pathlib import Path

import pytest
import torch

from glidecape.core.params import SamplingParams
from glidecape.drafting.methods import DRAFTLESS, make_drafter
from glidecape.drafts.checkpoint import load_draft
from glidecape.engine.decode import generate
from glidecape.target.target import Target
from test_against_transformers import Agreeing, different_drafters, reference_tokens

ROOT = Path(__file__).resolve().parents[1]
PAIR = ROOT / "models" / "pysource"
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
NEW = 48


def reference_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check(target, reference, drafts, texts):
    prompts = [target.encode(text) for text in texts]
    expected = [reference_tokens(reference, prompt, max_new_tokens=32) for prompt in prompts]
    margin = min(m for _, m in expected)
    params = SamplingParams(max_new_tokens=32, ignore_eos=True)
    for method, drafter in different_drafters(drafts):
        batch = generate(target, prompts, drafter, params)
        assert [o.tokens for o in batch] == [e for e, _ in expected], f"{method}, ragged batch, margin {margin:.1e}"
        alone = generate(target, prompts[:1], drafter, params)[0]
        assert alone.tokens == expected[0][0], f"{method}, batch 1, margin {margin:.1e}"


def test_the_shipped_pair_equals_transformers():
    if not (PAIR / "target" / "config.json").is_file():
        pytest.skip("the shipped pair models/pysource is not in this checkout")
    target = Target.from_pretrained(PAIR / "target", dtype=torch.float32)
    folders = {"vanilla": "lm", "glide": "glide", "eagle": "eagle", "medusa": "medusa"}
    drafts = {base: load_draft(PAIR / name, target) for base, name in folders.items() if (PAIR / name).is_dir()}
    without_cross = load_draft(PAIR / "glide-no-cross", target)

    def of(method):
        base = method.split("+")[0]
        # Expansions and stop policies do not see what a draft attends to: once with each shape of a tree will do.
        more = [without_cross] if method in ("glide", "glide+cape", "glide+tree") else []
        return [None] if base in DRAFTLESS else [drafts[base], *more] if base in drafts else []

    texts = ["import os\n", "def add(a, b):\n    return", "class Queue:\n    def __init__(self, size):\n", "x"]
    check(target, reference_of(PAIR / "target"), of, texts)


def test_the_shipped_draft_is_worth_its_cross_attention():
    """A regression gate: on fixed prompts GliDe's acceptance length stays well above its ablation's."""
    if not (PAIR / "target" / "config.json").is_file():
        pytest.skip("the shipped pair models/pysource is not in this checkout")
    import json

    from glidecape.core.stats import Stats

    target = Target.from_pretrained(PAIR / "target", dtype=torch.float32)
    lines = (ROOT / "evaluation" / "prompts" / "python.jsonl").read_text().splitlines()[:8]
    prompts = [target.encode(json.loads(line)["prompt"])[:128] for line in lines]
    length = {}
    for name in ("glide", "glide-no-cross"):
        stats = Stats()
        drafter = make_drafter("glide", load_draft(PAIR / name, target), length=5)
        each = [SamplingParams(temperature=1.0, seed=i, max_new_tokens=48, ignore_eos=True) for i in range(8)]
        generate(target, prompts, drafter, each, stats)
        length[name] = stats.acceptance_length
    assert length["glide"] > length["glide-no-cross"] + 0.2, length


def rounds_on_paper(matches, first, end, length):
    """Accepted and tested tokens of a chain's rounds from root `first` on, given where a draft of each lag is right.

    `matches[lag - 1][position]`: does the draft at `position` name the next token, if its round began `lag - 1` before?
    """
    accepted = tested = 0
    root = first
    while root < end:
        cap = min(length, max(1, end - root - 1))
        hits = 0
        while hits < cap and matches[hits][root + hits]:
            hits += 1
        accepted, tested = accepted + hits, tested + hits + (hits < cap)
        root += hits + 1
    return accepted, tested


def test_acceptance_in_training_is_acceptance_in_serving():
    """Teacher-forced forwards, as training takes them, predict alpha of real decoding to one point."""
    if not (PAIR / "target" / "config.json").is_file():
        pytest.skip("the shipped pair models/pysource is not in this checkout")
    import json

    from glidecape.core.stats import Stats
    from glidecape.engine.decode import decode
    from glidecape.train.kinds.glide import GlideTraining, hidden_by_lag
    from glidecape.train.teacher import Teacher

    target = Target.from_pretrained(PAIR / "target", dtype=torch.float32)
    lines = (ROOT / "evaluation" / "prompts" / "python.jsonl").read_text().splitlines()[:6]
    for name in ("glide", "glide-no-cross"):
        draft, stats, accepted, tested = load_draft(PAIR / name, target), Stats(), 0, 0
        for line in lines:
            prompt, new = target.encode(json.loads(line)["prompt"])[:96], []
            params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
            for event in decode(target, make_drafter("glide", draft, length=5), [prompt], params, stats):
                new += event.tokens
            ids = torch.tensor([prompt + new])
            teacher = Teacher(target, 1, ids.shape[1], GlideTraining(draft.module).reads_hidden)
            teacher(ids)
            with torch.no_grad():
                states = hidden_by_lag(draft.module, ids, teacher.positions, teacher.cache, 5)
                choices = [draft.module.logits(hidden)[0].argmax(-1) for hidden in states]
            matches = [(chosen[:-1] == ids[0, 1:]).tolist() for chosen in choices]
            one = rounds_on_paper(matches, len(prompt) - 1, len(prompt) + NEW - 1, 5)
            accepted, tested = accepted + one[0], tested + one[1]
        assert stats.tested > 100
        assert accepted / tested == pytest.approx(stats.alpha, abs=0.01), name


def test_a_public_checkpoint_equals_transformers():
    if not STORIES.is_dir():
        pytest.skip("the public checkpoint ../shared/models/stories260K is not at hand")
    target, reference = Target.from_pretrained(STORIES, dtype=torch.float32), reference_of(STORIES)
    noisy = copy.deepcopy(reference)
    torch.manual_seed(0)
    for p in noisy.parameters():
        if p.ndim > 1:
            p.data += 0.01 * torch.randn_like(p)
    agreeing = Agreeing(Target(noisy))
    texts = ["Once upon a time", "Lily and Tom went to the park. They saw a big", "One day", "The dog"]
    check(target, reference, lambda method: [None if method.split("+")[0] in DRAFTLESS else agreeing], texts)
