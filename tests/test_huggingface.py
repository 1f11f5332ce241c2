"""`model.generate(…, custom_generate=glidecape_generate)` gives what `model.generate` gives, and leaves the model as it was."""

import copy
import warnings

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from glidecape import glidecape_generate
from glidecape.compat import DynamicCache, cache_argument
from glidecape.core.params import SamplingParams
from glidecape.core.stats import Stats
from glidecape.drafting.auto.drafter import AutoDrafter
from glidecape.drafting.drafter import ModelDrafter
from glidecape.drafting.options import MethodOptions
from glidecape.engine.decode import generate
from glidecape.errors import GlideCapeError, InputError, UnsupportedError
from glidecape.target.packages import FOLDER
from glidecape.target.target import Target
from test_against_transformers import PROMPTS, build

NEW = 16
METHODS = ("lookup", "vanilla+cape", "vanilla+beam+svip")


def build_pair(kind):
    """A plain transformers model, and another one that drafts for it and is often right."""
    _, model, _, noisy = build(kind)
    draft = noisy.model.model
    draft.set_attn_implementation("sdpa")
    return model, draft


@pytest.fixture(scope="module")
def pair():
    return build_pair("llama")


def padded(rows):
    """The prompts of a ragged batch, padded on the left."""
    prompts = [PROMPTS[i] for i in rows]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def call(model, inputs, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(**inputs, **({"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0} | options))


class AfterItself(LogitsProcessor):
    """No token twice in a row, and a bonus for the token one above the last but one: depends on the path, and on the row."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        rows = torch.arange(len(scores))
        scores[rows, input_ids[:, -1]] = float("-inf")
        scores[rows, (input_ids[:, -2:-1].flatten() + 1) % scores.shape[1]] += 1.0 + 0.5 * rows
        return scores


class InPlace(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, 7] += 0.1 * input_ids.shape[1]
        return scores


def only_some(row, tokens):
    return [t for t in range(97) if t % 3 != (int(tokens[-1]) + row) % 3]


PROCESSORS = {
    "repetition penalty": {"repetition_penalty": 1.4},
    "n-grams and bad words": {"no_repeat_ngram_size": 2, "bad_words_ids": [[5], [11, 12]]},
    "bias on a sequence": {"sequence_bias": {(7, 8): 4.0, (3,): 2.0}, "suppress_tokens": [20, 21]},
    "allowed tokens by row": {"prefix_allowed_tokens_fn": only_some},
    "one of the user's": {"logits_processor": LogitsProcessorList([AfterItself(), InPlace()])},
    "first and last": {"begin_suppress_tokens": [30, 31], "forced_eos_token_id": 9},
}


@pytest.mark.parametrize("rows", [[1], [0, 1, 2, 3]], ids=["batch 1", "ragged batch 4"])
def test_greedy_tokens_are_those_of_generate_with_every_processor(pair, rows):
    model, draft = pair
    inputs = padded(rows)
    plain = call(model, inputs, eos_token_id=None)
    for name, options in PROCESSORS.items():
        expected = call(model, inputs, eos_token_id=None, **options)
        assert not torch.equal(expected, plain), f"{name}: the processor changed nothing"
        for method in METHODS:
            found = call(
                *(model, inputs),
                custom_generate=glidecape_generate,
                draft=None if method == "lookup" else draft,
                **({"method": method, "eos_token_id": None} | options),
            )
            assert torch.equal(found, expected), (name, method)


def test_a_windowed_model_too():
    model, draft = build_pair("gemma3_text")
    options = {"eos_token_id": None, **PROCESSORS["repetition penalty"]}
    expected = call(model, padded(range(4)), **options)
    assert torch.equal(
        call(model, padded(range(4)), custom_generate=glidecape_generate, draft=draft, **options), expected
    )
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"sdpa"}


def test_drafts_are_accepted_with_processors(pair):
    """The draft's law is processed as the target's is, or it would guess what verify rejects."""
    model, draft = pair
    stats = Stats()
    options = {"custom_generate": glidecape_generate, "draft": draft, "method": "vanilla", "glide_stats": stats}
    call(model, padded([1]), eos_token_id=None, **options, **PROCESSORS["one of the user's"])
    assert stats.acceptance_length > 2


@pytest.mark.parametrize("rows", [[1], [0, 1, 2, 3]], ids=["batch 1", "ragged batch 4"])
@pytest.mark.parametrize("least", [0, 9])
def test_ends_are_those_of_generate(pair, rows, least):
    """End-of-text in some rows, padding after it, min_new_tokens."""
    model, draft = pair
    inputs = padded(rows)
    length = inputs["input_ids"].shape[1]
    ends = call(model, inputs, eos_token_id=None)[:, length + 3].tolist()[:2]
    options = {"eos_token_id": ends, "min_new_tokens": least or None, "pad_token_id": 90}
    expected = call(model, inputs, **options)
    assert least or expected.shape[1] < length + NEW or (expected[:, -1] == 90).any(), "no row ended early"
    for method in METHODS:
        own = None if method == "lookup" else draft
        found = call(model, inputs, custom_generate=glidecape_generate, draft=own, method=method, **options)
        assert torch.equal(found, expected), method


class After(StoppingCriteria):
    """Ends a row after two tokens."""

    def __init__(self, one, two):
        self.one, self.two = one, two

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -2] == self.one) & (input_ids[:, -1] == self.two)


@pytest.mark.parametrize("row", range(4))
def test_stopping_criteria_end_a_row_after_the_very_token(pair, row):
    model, draft = pair
    inputs = padded([row])
    known = call(model, inputs, eos_token_id=None)[0, -NEW:].tolist()
    most = inputs["input_ids"].shape[1] + 11
    for criteria in ([After(*known[4:6])], [MaxLengthCriteria(most)], [EosTokenCriteria(known[2]), After(1, 1)]):
        options = {"stopping_criteria": StoppingCriteriaList(criteria), "eos_token_id": None}
        expected = call(model, inputs, **options)
        assert expected.shape[1] < inputs["input_ids"].shape[1] + NEW
        for method in ("plain", "vanilla", "vanilla+cape"):
            own = None if method == "plain" else draft
            found = call(model, inputs, custom_generate=glidecape_generate, draft=own, method=method, **options)
            assert torch.equal(found, expected), (criteria, method)


class Collects(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_prompt_and_then_each_round(pair):
    model, draft = pair
    streamer = Collects()
    found = call(model, padded([1]), custom_generate=glidecape_generate, draft=draft, glide_streamer=streamer)
    assert streamer.ended
    assert streamer.pieces[0] == PROMPTS[1]
    assert [token for piece in streamer.pieces for token in piece] == found[0].tolist()
    assert 3 < len(streamer.pieces) < NEW, "neither all at once nor token by token"


def test_sampling_has_the_law_of_the_generation_config(pair):
    """Temperature, top-k, top-p and min-p through transformers' processors: the tokens of our own options, seed by seed."""
    model, draft = pair
    target = Target(copy.deepcopy(model))
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02}
    for sampling in ("noise", "residual"):
        wanted = {"do_sample": True, "seed": 5, "sampling": sampling, "eos_token_id": None, **options}
        each = [
            SamplingParams(seed=5 + i, ignore_eos=True, max_new_tokens=NEW, sampling=sampling, **options)
            for i in range(4)
        ]
        expected = [one.tokens for one in generate(target, PROMPTS, None, each)]
        plain = call(model, padded(range(4)), custom_generate=glidecape_generate, method="plain", **wanted)
        assert plain[:, -NEW:].tolist() == expected
        drafted = call(model, padded(range(4)), custom_generate=glidecape_generate, draft=draft, **wanted)
        assert (drafted[:, -NEW:].tolist() == expected) == (sampling == "noise")


def test_a_seed_decides_and_without_one_torch_does(pair):
    model, _ = pair
    options = {"do_sample": True, "custom_generate": glidecape_generate, "eos_token_id": None}
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(call(model, padded([1]), **options).tolist())
    assert found[0] == found[1] != found[2]
    rows = call(model, padded([1]), num_return_sequences=3, seed=4, **options)
    assert len({tuple(row) for row in rows.tolist()}) == 3
    assert torch.equal(call(model, padded([1]), seed=5, **options), rows[1:2])


def test_the_model_is_left_as_it_was(pair):
    model, draft = pair
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = call(model, padded([1]), eos_token_id=None)
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    with pytest.raises(GlideCapeError):
        call(model, padded([1]), custom_generate=glidecape_generate, draft=draft, method="glide")
    call(model, padded([1]), custom_generate=glidecape_generate, draft=draft, eos_token_id=None)
    assert [module.training for module in model.modules()] == flags
    for one in (model, draft):
        assert one.config._attn_implementation == "sdpa"
        assert {m.config._attn_implementation for m in one.modules() if hasattr(m, "config")} == {"sdpa"}
    model.eval()
    assert torch.equal(call(model, padded([1]), eos_token_id=None), expected)
    assert torch.equal(call(copy.deepcopy(model), padded([1]), eos_token_id=None), expected)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_sequences_in_transformers_own_class(pair):
    model, draft = pair
    out = call(model, padded([1]), custom_generate=glidecape_generate, draft=draft, return_dict_in_generate=True)
    assert type(out).__name__ == "GenerateDecoderOnlyOutput"
    assert torch.equal(out.sequences, call(model, padded([1])))


def test_a_draft_folder_is_loaded_once_and_keeps_the_tokens(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(world["target"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world["target"], padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(["def save_record(", "def"], return_tensors="pt", padding=True)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = call(model, inputs, repetition_penalty=1.1)
    for folder in (str(world["glide"]), world["lm"]):
        for _ in range(2):
            found = call(model, inputs, repetition_penalty=1.1, custom_generate=glidecape_generate, draft=folder)
            assert torch.equal(found, expected)
    assert set(model._glidecape.drafts) == {str(world["glide"]), str(world["lm"])}


def test_measured_costs_decide_where_no_method_is_asked_for(world, monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv(FOLDER, str(tmp_path))  # no costs are known
    monkeypatch.setattr("glidecape.usual.is_idle", lambda *_: True)
    model = AutoModelForCausalLM.from_pretrained(world["target"], dtype=torch.float32)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    own = {"custom_generate": glidecape_generate, "draft": world["glide"]}
    expected = call(model, inputs)
    assert torch.equal(call(model, inputs, **own), expected)
    (drafter,) = model._glidecape.usual.values()
    assert isinstance(drafter, AutoDrafter)
    assert [one.rows for one in drafter.prices] == [(1,), (1,)]
    assert torch.equal(call(model, inputs, **own), expected)
    assert list(model._glidecape.usual.values()) == [drafter]  # what it learned is not lost
    asked = Stats()
    assert torch.equal(call(model, inputs, **own, options=MethodOptions(length=2), glide_stats=asked), expected)
    assert 0 < asked.depths <= 2 * asked.rounds


def test_on_a_busy_machine_a_chain_decodes_and_nothing_is_measured_twice(world, monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv(FOLDER, str(tmp_path))
    looked: list[int] = []
    monkeypatch.setattr("glidecape.usual.is_idle", lambda *_: bool(looked.append(1)))
    model = AutoModelForCausalLM.from_pretrained(world["target"], dtype=torch.float32)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    for _ in range(2):
        call(model, inputs, custom_generate=glidecape_generate, draft=world["glide"])
    assert looked == [1]
    assert isinstance(*model._glidecape.usual.values(), ModelDrafter)


REFUSED = {
    "beams": ({"num_beams": 2}, "beam_search"),
    "scores": ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
    "classifier-free guidance": ({"guidance_scale": 2.0}, "state"),
    "streamed batch": ({"glide_streamer": Collects()}, "one row"),
    "length 0": ({"options": MethodOptions(length=0), "method": "lookup"}, "at least 1"),
    "unknown method": ({"method": "magic"}, "unknown method"),
    "no draft": ({"method": "vanilla"}, "draft"),
    "positions": ({"position_ids": torch.arange(3, 43).expand(2, -1)}, "position_ids"),
    "holes": ({"attention_mask": torch.ones(2, 40, dtype=torch.long).index_fill(1, torch.tensor([20]), 0)}, "holes"),
    "embeddings": ({"inputs_embeds": torch.zeros(2, 40, 64)}, "inputs_embeds"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_honoured_is_refused_with_a_sentence(pair, what):
    model, _ = pair
    options, reason = REFUSED[what]
    inputs = {"input_ids": torch.tensor([PROMPTS[3]] * 2), "attention_mask": torch.ones(2, 40, dtype=torch.long)}
    with pytest.raises((InputError, UnsupportedError), match=reason):
        call(model, inputs | options, custom_generate=glidecape_generate)


def test_what_this_generate_would_refuse_itself_is_refused_by_us_too(pair):
    """Token types, unless they are all zero, and a quantized cache."""
    model, _ = pair
    config = copy.copy(model.generation_config)
    config.max_length, config._eos_token_tensor, config._pad_token_tensor = 8, None, None
    ids = torch.tensor([PROMPTS[1]])
    glidecape_generate(model, ids, None, None, config, token_type_ids=torch.zeros_like(ids))
    with pytest.raises(InputError, match="token_type_ids"):
        glidecape_generate(model, ids, None, None, config, token_type_ids=torch.ones_like(ids))
    config.cache_implementation = "quantized"
    with pytest.raises(UnsupportedError, match="quantized cache"):
        glidecape_generate(model, ids, None, None, config)


def test_a_cache_of_ones_own_is_refused(pair):
    model, _ = pair
    name = cache_argument(model)
    with pytest.raises(InputError, match=f"a cache of its own: leave {name} out"):
        call(model, padded([1]), custom_generate=glidecape_generate, **{name: DynamicCache()})
