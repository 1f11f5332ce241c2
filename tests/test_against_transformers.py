"""Token equality with transformers' own `generate`, float32, greedy, for every method; and T=1 equality with plain."""

import copy
import warnings

import pytest
import torch

from glidecape.core.params import SamplingParams
from glidecape.drafting.methods import DRAFTLESS, METHODS, make_drafter
from glidecape.drafts.causal_lm import StandaloneDraft
from glidecape.drafts.eagle.adapter import EagleDraft
from glidecape.drafts.eagle.config import EagleConfig
from glidecape.drafts.eagle.network import EagleModel
from glidecape.drafts.glide.adapter import GlideDraft
from glidecape.drafts.glide.config import GlideConfig
from glidecape.drafts.glide.network import GlideModel
from glidecape.drafts.medusa.adapter import MedusaDraft
from glidecape.drafts.medusa.config import MedusaConfig
from glidecape.drafts.medusa.network import MedusaModel
from glidecape.engine.decode import generate
from glidecape.target.target import Target

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 12},
    "gemma3_text": {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
NEW = 48


def build(kind, **changes):
    """A random target, a reference copy of it, and drafts that agree with it often and rarely; `changes` to its sizes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **(BASE | FAMILIES[kind] | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.12)
    reference, noisy = copy.deepcopy(model), copy.deepcopy(model)
    for p in noisy.parameters():
        if p.ndim > 1:
            p.data += 0.004 * torch.randn_like(p)
    target = Target(model)
    glide = GlideDraft(GlideModel.new(GlideConfig.for_target(target), target))
    return target, reference, glide, Agreeing(Target(noisy))


class Agreeing(StandaloneDraft):
    """Stands in for a good draft of any kind, so that chains and siblings of every length are accepted."""

    kind = None


# Qwen3 differs from Llama by its normalised queries and keys alone, which tests/test_families.py decodes too.
SLOW = {"qwen3"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=pytest.mark.slow) if kind in SLOW else kind for kind in FAMILIES],
)
def family(request):
    return build(request.param)


def reference_tokens(reference, prompt, **more):
    """transformers' tokens, and the smallest gap between its two largest (processed) logits on the way."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_scores": True}
        options |= {"max_new_tokens": NEW} | more
        out = reference.generate(torch.tensor([prompt]), **options)
    top = torch.stack(out.scores)[:, 0].topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), float((top[:, 0] - top[:, 1]).min())


PROMPTS = [[5], [7, 11, 13, 17, 19], list(range(10, 27)), [(i * 37) % 90 + 3 for i in range(40)]]


def drafts_of(method, target, glide, noisy):
    base = method.split("+")[0]
    if base in DRAFTLESS:
        return [None]
    if base == "vanilla":
        return [noisy]
    if base == "medusa":
        return [MedusaDraft(MedusaModel.new(MedusaConfig.for_target(target), target))]
    if method in ("eagle", "eagle+chain"):
        torch.manual_seed(5)
        return [EagleDraft(EagleModel.new(EagleConfig.for_target(target), target)), noisy]
    # A draft that is never right costs a round a token: once with each expansion will do.
    return [glide, noisy] if method in ("glide", "glide+cape", "glide+beam") else [noisy]


def form_of(drafter):
    """Its class, expansion and stop policy with their settings; of one without a draft model, itself."""
    inner = getattr(drafter, "runner", drafter)
    if not hasattr(inner, "expansion"):
        return drafter
    return type(drafter), str([(type(one), vars(one)) for one in (inner.expansion, inner.stop)])


def different_drafters(drafts):
    """The methods' names and drafters, with the drafts that `drafts(method)` names. `vanilla+cape`, `glide+cape` and others are
    one and the same expansion and stop policy where they have one and the same draft: that comes once."""
    seen = set()
    for method in METHODS:
        for draft in drafts(method):
            drafter = make_drafter(method, draft)
            if (draft, form_of(drafter)) not in seen:
                yield method, drafter
            seen.add((draft, form_of(drafter)))


def test_no_expansion_or_stop_policy_is_left_out(family):
    target, _, glide, noisy = family
    made = list(different_drafters(lambda method: drafts_of(method, target, glide, noisy)))
    with_draft = [m for m in METHODS if m.split("+")[0] in ("vanilla", "glide", "eagle")]
    assert {form_of(make_drafter(m, noisy)) for m in with_draft} <= {form_of(drafter) for _, drafter in made}
    assert {m for m in METHODS if m not in with_draft} <= {m for m, _ in made}
    assert len(made) < len(METHODS)


@pytest.mark.parametrize("rows", [[2], [0, 1, 2, 3]], ids=["batch 1", "ragged batch 4"])
def test_greedy_tokens_equal_transformers(family, rows):
    target, reference, glide, noisy = family
    prompts = [PROMPTS[i] for i in rows]
    expected = [reference_tokens(reference, p) for p in prompts]
    margin = min(m for _, m in expected)
    assert margin > 1e-5, f"smallest top-2 margin {margin:.1e}: this reference proves nothing"
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    accepted = 0
    for method, drafter in different_drafters(lambda method: drafts_of(method, target, glide, noisy)):
        out = generate(target, prompts, drafter, params)
        assert [o.tokens for o in out] == [e for e, _ in expected], f"{method}, margin {margin:.1e}"
        accepted += sum(origin != "bonus" for o in out for origin in o.origins)
    assert accepted > 60 * len(rows), "hardly anything was accepted: the test would not see a wrong cache"


def test_greedy_tokens_with_processors_equal_transformers(family):
    """Repetition penalty, sequence bias on single tokens and min_new_tokens with an end that both look for."""
    target, reference, glide, noisy = family
    count = 24
    end = reference_tokens(reference, PROMPTS[1])[0][3]
    stopping = {"min_new_tokens": 15, "eos_token_id": end, "pad_token_id": 0}
    settings = [
        (
            {"repetition_penalty": 1.3, "logit_bias": {7: 1.5, end: -100.0}},
            {"repetition_penalty": 1.3, "sequence_bias": {(7,): 1.5, (end,): -200.0}},
        ),
        (
            {"repetition_penalty": 0.9, "min_new_tokens": 15, "stop_token_ids": (end,)},
            {"repetition_penalty": 0.9, **stopping},
        ),
    ]
    plain = [reference_tokens(reference, p)[0][:count] for p in PROMPTS]
    for ours, theirs in settings:
        expected = [reference_tokens(reference, p, max_new_tokens=count, **theirs) for p in PROMPTS]
        assert [e for e, _ in expected] != plain, "the options changed nothing"
        assert min(m for _, m in expected) > 1e-5
        params = SamplingParams(max_new_tokens=count, ignore_eos=True, **ours)
        for method in (
            "plain",
            "lookup",
            "vanilla+heuristic",
            "vanilla+beam",
            "glide+cape",
            "glide+beam+svip",
            "eagle",
        ):
            for draft in drafts_of(method, target, glide, noisy)[-1:]:
                out = generate(target, PROMPTS, make_drafter(method, draft), params)
                assert [o.tokens for o in out] == [e for e, _ in expected], (method, ours)


def test_one_seed_gives_one_text_with_every_method_alone_and_in_a_batch(family):
    target, _, glide, noisy = family
    each = [SamplingParams(temperature=1.0, seed=40 + i, max_new_tokens=30, ignore_eos=True) for i in range(4)]
    alone = [generate(target, [p], None, own)[0].tokens for p, own in zip(PROMPTS, each, strict=True)]
    for method, drafter in different_drafters(lambda method: drafts_of(method, target, glide, noisy)):
        out = generate(target, PROMPTS, drafter, each)
        assert [o.tokens for o in out] == alone, method


def test_rows_that_end_at_different_times_do_not_disturb_the_others(family):
    target, reference, glide, noisy = family
    expected = [reference_tokens(reference, p)[0] for p in PROMPTS]
    stop = expected[1][9]
    each = [SamplingParams(max_new_tokens=n, ignore_eos=True) for n in (3, 48, 1, 30)]
    each[1] = SamplingParams(max_new_tokens=48, ignore_eos=True, stop_token_ids=(stop,))
    first = expected[1].index(stop) + 1
    wanted = [expected[0][:3], expected[1][:first], expected[2][:1], expected[3][:30]]
    for method, drafter in different_drafters(lambda method: drafts_of(method, target, glide, noisy)):
        out = generate(target, PROMPTS, drafter, each)
        assert [o.tokens for o in out] == wanted, method
        assert [o.finish for o in out] == ["length", "stop", "length", "length"]
