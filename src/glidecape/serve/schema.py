"""The requests that are understood. A field that is not here is refused, and one that is here has its effect.

`user`, `metadata`, `store`, `service_tier`, `safety_identifier` and `prompt_cache_key` change no output, at OpenAI's neither:
they are accepted and forgotten.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from ..core.constraint import Constraint
from ..core.params import SamplingParams
from ..errors import InputError

Penalty = Annotated[float, Field(ge=-2, le=2)]
SEED = 2**63
STOPS = 16  # stop strings of a request
STOP_LENGTH = 256  # characters of one: each token's text is compared with it
PROMPTS = 1024  # of a request
FIELDS = 100  # of an object; no request has nearly as many
LOGPROBS = 2**19  # log-probabilities of a request, all answers together: what they take in memory is to be bounded
First = Field(fail_fast=True)  # of the items of a list that are wrong, only the first is told


def _token_ids(given: Any) -> Any:
    """A `logit_bias` from token ids to numbers; the first item that is wrong is told."""
    for key, value in given.items() if isinstance(given, dict) else ():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError(f"keys are token ids, not {key[:20]!a}")
        if type(value) not in (int, float) or not -100 <= value <= 100:
            raise ValueError(f"values are numbers from -100 to 100, and that of '{key}' is something else")
    return given


def _few(most: int) -> BeforeValidator:
    """So many items at most, seen before any of them is looked at."""

    def check(given: Any) -> Any:
        if isinstance(given, (dict, list)) and len(given) > most:
            raise ValueError(f"there are {len(given)} of them, and at most {most} are taken")
        return given

    return BeforeValidator(check)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > FIELDS:
            raise ValueError(f"this object has {len(given)} fields, and at most {FIELDS} are taken")
        return given


class StreamOptions(Strict):
    include_usage: bool = False


class JsonSchema(Strict):
    """A schema that the answer follows. `name` is for the client alone; the schema is kept whatever `strict` says."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    text: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """What the answer is: text, a JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema: give both, or neither")
        return self


class StructuredOutputs(Strict):
    """vLLM's extension, of which only this is taken: a pattern that the whole answer matches."""

    regex: str


class Request(Strict):
    """What both kinds of request have."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-SEED, lt=SEED)] | None = None
    stop: str | Annotated[list[str], Field(max_length=STOPS), First] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_token_ids)] | None = (
        None
    )
    response_format: ResponseFormat | None = None
    # Beyond OpenAI's, as other local servers have them.
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="-1 and 0: all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=1024), First] | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = Field(None, description="vLLM's: the answer tells token ids, and the prompt's.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="Only requests with the same one share prefixes."
    )
    # Without effect on the output.
    user: str | None = None
    metadata: Annotated[dict[str, str], _few(16)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop")
    @classmethod
    def _short_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if too_long := [one for one in ([stop] if isinstance(stop, str) else stop or ()) if len(one) > STOP_LENGTH]:
            raise ValueError(f"a stop string has at most {STOP_LENGTH} characters, and one has {len(too_long[0])}")
        return stop

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options has no effect without stream: leave it out, or set stream to true")
        return self

    @model_validator(mode="after")
    def _one_constraint(self) -> Request:
        kinds = [
            self.structured_outputs is not None,
            self.response_format is not None and self.response_format.type != "text",
        ]
        if all(kinds):
            raise ValueError("response_format and structured_outputs both constrain the answer: give one of them")
        if any(kinds) and self.min_tokens:
            raise ValueError("min_tokens cannot be kept beside response_format or structured_outputs: leave it out")
        return self

    @property
    def constraint_field(self) -> str | None:
        """The field that `constraint` is made of; None without one."""
        if self.structured_outputs is not None:
            return "structured_outputs.regex"
        if self.response_format is None or self.response_format.type == "text":
            return None
        return "response_format" if self.response_format.json_schema is None else "response_format.json_schema.schema"

    @property
    def constraint(self) -> Constraint | None:
        """What the answer must be.

        Raises:
            InputError: a schema is no JSON.
        """
        wanted = self.response_format
        if self.structured_outputs is not None:
            return Constraint.regex(self.structured_outputs.regex)
        if wanted is not None and wanted.json_schema is not None:
            return Constraint.json_schema(wanted.json_schema.text)
        return Constraint.json_object() if wanted is not None and wanted.type == "json_object" else None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def tokens_asked(self) -> int | None:
        """Most tokens of an answer; None: the server's choice."""
        return self.max_tokens

    @property
    @abstractmethod
    def top_logprobs_asked(self) -> int | None:
        """How many most probable tokens are told of each emitted one; None: no log-probabilities."""

    def sampling(self, max_new_tokens: int) -> list[SamplingParams]:
        """The options of each of the `n` answers; they differ in seed.

        Raises:
            InputError: values that the core refuses.
        """
        asked = max_new_tokens * (self.n or 1) * (1 + (self.top_logprobs_asked or 0))
        if self.top_logprobs_asked is not None and asked > LOGPROBS:
            raise InputError(
                f"{asked} log-probabilities are asked for, and at most {LOGPROBS} are given: lower n or max_tokens"
            )
        seed = secrets.randbits(62) if self.seed is None else self.seed
        common: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p or 1.0,
            "top_k": max(0, self.top_k or 0),
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logit_bias": {int(token): value for token, value in (self.logit_bias or {}).items()},
            "stop": self.stop or (),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": bool(self.ignore_eos),
            "min_new_tokens": self.min_tokens or 0,
            "max_new_tokens": max_new_tokens,
            "logprobs": self.top_logprobs_asked,
            "constraint": self.constraint,
        }
        return [SamplingParams(seed=(seed + i + SEED) % 2**64 - SEED, **common) for i in range(self.n or 1)]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn of a conversation. `developer` is the newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1), First]

    def turn(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1), First]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one number, and differ: give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs has no effect without logprobs: leave it out, or set logprobs to true")
        return self

    @property
    def tokens_asked(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top_logprobs_asked(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


Ids = Annotated[list[int], First]


class CompletionRequest(Request):
    prompt: str | Annotated[list[str], First, _few(PROMPTS)] | Ids | Annotated[list[Ids], First, _few(PROMPTS)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    @field_validator("prompt")
    @classmethod
    def _some(cls, prompt: Any) -> Any:
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token to continue")
        return prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]

    @property
    def tokens_asked(self) -> int | None:
        return self.max_tokens or 16  # the number that this old interface documents

    @property
    def top_logprobs_asked(self) -> int | None:
        return self.logprobs
