"""Errors as OpenAI's clients expect them: a status, and a body that says what was wrong and with which field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from ..errors import GlideCapeError, did_you_mean

LONGEST = 600  # characters of a message
# Fields of other servers, and what to send here.
INSTEAD = {
    "guided_json": "write a response_format of type json_schema",
    "guided_regex": 'write "structured_outputs": {"regex": …}',
    "guided_choice": 'write "structured_outputs": {"regex": "yes|no"}',
    "guided_grammar": "grammars are not supported",
    "structured_outputs.json": "write a response_format of type json_schema",
    "structured_outputs.json_object": "write a response_format of type json_object",
    "structured_outputs.choice": 'write it as a regex, such as "yes|no"',
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """The body of every error."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        param: the field that is wrong.
        code: a word that programs can look for.
        headers: to be sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, _sendable(message), code
        self.param = None if param is None else _sendable(param)
        self.headers = dict(headers or {})

    @property
    def reply(self) -> ErrorReply:
        kind = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        detail = ErrorDetail(message=self.message, type=kind.get(self.status, usual), param=self.param, code=self.code)
        return ErrorReply(error=detail)

    @property
    def event(self) -> str:
        """The last event of a stream that ends with it."""
        return f"data: {self.reply.model_dump_json()}\n\n"


def _sendable(text: str) -> str:
    """What a request said may be in it: of any length, and with halves of characters, which UTF-8 has not."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def refused(error: GlideCapeError, param: str | None = None) -> ApiError:
    """The answer to a request that the core refuses."""
    return ApiError(400, str(error), param)


def invalid(errors: Sequence[Any], known: Iterable[str] = ()) -> ApiError:
    """The answer to a request that is not of the schema: about the first of pydantic's errors.

    Args:
        known: fields that the request may have.

    >>> invalid([{"type": "extra_forbidden", "loc": ("body", "tools"), "msg": ""}]).message
    "this server does not support the field 'tools': leave it out"
    >>> invalid([{"type": "extra_forbidden", "loc": ("body", "max_token"), "msg": ""}], ["max_tokens", "n"]).message
    "this server does not support the field 'max_token': did you mean max_tokens?"
    """
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    field = ".".join(place) or None
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}", code="json_invalid"
        )
    if field is None and isinstance(first.get("input"), bytes):
        return ApiError(
            400, "the body was not sent as JSON: add the header Content-Type: application/json", code="no_content_type"
        )
    if first["type"] == "extra_forbidden":
        advice = did_you_mean(str(field), known, "leave it out")
        return ApiError(
            400,
            f"this server does not support the field '{field}': {INSTEAD.get(str(field), advice)}",
            field,
            "unsupported_field",
        )
    if first["type"] == "missing":
        return ApiError(
            400, f"the field '{field}' is missing" if field else "the body is missing", field, "missing_field"
        )
    said = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{field}: {said}" if field else said, field, "invalid_value")
