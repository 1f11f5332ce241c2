"""`Constraint`: what the text of a row must be. Only words: `batch/grammar.py` makes tokens of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

JSON_OBJECT, JSON_SCHEMA, REGEX = "json_object", "json_schema", "regex"


@dataclass(frozen=True)
class Constraint:
    """The emitted text must be a JSON object, JSON of a schema, or match a regular expression as a whole.

    Make one with `json_object`, `json_schema` or `regex`. The text is checked when a row is made, because what is supported
    depends on the library that reads it.

    Attributes:
        kind: "json_object", "json_schema" or "regex".
        text: the schema as JSON, or the pattern.

    >>> Constraint.json_schema({"type": "integer"})
    Constraint(kind='json_schema', text='{"type": "integer"}')
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in (JSON_OBJECT, JSON_SCHEMA, REGEX):
            raise InputError(f"unknown kind of constraint '{self.kind}': use {JSON_OBJECT}, {JSON_SCHEMA} or {REGEX}")
        try:
            self.text.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"the {self.kind.replace('_', ' ')} holds half of a character, which no text has"
            ) from None

    @classmethod
    def json_object(cls) -> Constraint:
        """Any JSON object."""
        return cls(JSON_OBJECT)

    @classmethod
    def json_schema(cls, schema: str | dict[str, Any]) -> Constraint:
        """JSON that a schema describes; the properties of an object come in the schema's order.

        Args:
            schema: as JSON text, or as what `json.loads` makes of it.

        Raises:
            InputError: it is not a JSON object.
        """
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(parsed, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"the JSON schema is not JSON ({error})") from None
        if not isinstance(parsed, dict):
            raise InputError(f"a JSON schema is an object, and this is {text[:40]}")
        return cls(JSON_SCHEMA, text)

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Text that matches `pattern` from beginning to end. The syntax is that of Rust's regex crate: as Python's, without
        look-around, back references and word boundaries."""
        return cls(REGEX, pattern)
