"""The options of a call, by the names that users bring; what is not among them is refused with what to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

from ..core.constraint import Constraint
from ..core.params import Ends, Processor, SamplingParams
from ..errors import InputError, UnsupportedError, did_you_mean
from ..integrations.huggingface import ends_of, processor_of, refuse_stateful


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams`, `max_tokens` as a second name of `max_new_tokens`, and lists of transformers.

    Attributes:
        logits_processor: transformers' logits processors. Each must depend on its arguments alone.
        stopping_criteria: transformers' stopping criteria, asked after every token. They get no scores.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_new_tokens: int
    max_tokens: int
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    sampling: str
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    min_new_tokens: int
    constraint: Constraint | None
    processor: Processor | None
    ends: Ends | None
    logits_processor: Any
    stopping_criteria: Any


_SAMPLE = "temperature=0 decodes greedily, and any other temperature samples"
_ENDS = "ends a row: give stop_token_ids=(…), or ignore_eos=True to go on after the model's own"
_LOAD = "belongs to glidecape.load"
# Names of transformers, vLLM, llama.cpp and the OpenAI interface that mean something else here, or nothing.
ADVICE = {
    "do_sample": _SAMPLE,
    "num_beams": "beam search gives another output than decoding; here it is greedy or sampled",
    "best_of": "take the best of lm.batch(prompt, n=…) yourself",
    "num_return_sequences": "call lm.batch(prompts, n=…)",
    "n": "call lm.batch(prompts, n=…)",
    "max_length": "max_new_tokens counts the output without the prompt",
    "n_predict": "the name here is max_new_tokens",
    "max_completion_tokens": "the name here is max_new_tokens",
    "min_tokens": "the name here is min_new_tokens",
    "eos_token_id": _ENDS,
    "stop_strings": "the name here is stop",
    "repeat_penalty": "the name here is repetition_penalty",
    "bad_words_ids": "logit_bias={id: -100} forbids a token",
    "generation_config": "give its fields as options, such as temperature=0.8",
    "streamer": "iterate over lm.stream(prompt)",
    "stream": "iterate over lm.stream(prompt)",
    "messages": "give the list of messages as the prompt: lm(messages)",
    "draft": _LOAD,
    "method": _LOAD,
    "assistant_model": "a draft belongs to glidecape.load(model, draft=…)",
    "num_assistant_tokens": "write glidecape.load(…, options=glidecape.MethodOptions(length=…))",
    "num_speculative_tokens": "write glidecape.load(…, options=glidecape.MethodOptions(length=…))",
}


def params_of(options: Mapping[str, Any], params: SamplingParams | None = None) -> SamplingParams:
    """`SamplingParams` from the options of a call, in the place of those in `params`.

    Raises:
        InputError: an unknown option, a value out of range, one thing said twice.
        UnsupportedError: a logits processor that keeps a state.

    >>> params_of({"max_tokens": 20, "stop_token_ids": [2]}).max_new_tokens
    20
    """
    given = dict(options)
    if unknown := [name for name in given if name not in SamplingOptions.__annotations__]:
        raise InputError(f"unknown option '{unknown[0]}': {_advice_on(unknown[0])}")
    for theirs, ours in (
        ("max_tokens", "max_new_tokens"),
        ("logits_processor", "processor"),
        ("stopping_criteria", "ends"),
    ):
        if theirs in given and ours in given:
            raise InputError(f"{theirs} and {ours} are one option: give one of them")
    if "max_tokens" in given:
        given["max_new_tokens"] = given.pop("max_tokens")
    if processors := _listed(given.pop("logits_processor", None), "logits_processor"):
        refuse_stateful(processors)
        given["processor"] = processor_of(processors, row=0)
    if criteria := _listed(given.pop("stopping_criteria", None), "stopping_criteria"):
        if any(type(one).__name__ == "MaxTimeCriteria" for one in criteria):
            raise UnsupportedError(
                "MaxTimeCriteria ends a text by the clock, so outputs would differ from run to run: give max_new_tokens"
            )
        given["ends"] = ends_of(criteria)
    if "stop_token_ids" in given:
        given["stop_token_ids"] = tuple(given["stop_token_ids"])
    try:
        return replace(params or SamplingParams(), **given)
    except TypeError as error:
        raise InputError(f"an option has a value of the wrong type ({error})") from None


def _listed(found: Any, name: str) -> list[Any]:
    found = [] if found is None else [found] if callable(found) and not isinstance(found, list) else list(found)
    if wrong := [one for one in found if not callable(one)]:
        raise InputError(f"{name} takes transformers' objects, not {wrong[0]!r}")
    return found


def _advice_on(name: str) -> str:
    known = SamplingOptions.__annotations__
    return ADVICE.get(name, did_you_mean(name, known, f"choose from {', '.join(known)}"))
