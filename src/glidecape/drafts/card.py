"""The description that a draft file carries: what it must hold, checked as a whole before anything is made of it."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

FORMAT = 4
WEIGHTS, CARD = "draft.safetensors", "card.json"
STATE = "training"  # folder of a training's state; beside no weights: it has not ended

# Every field of a configuration must be known, of its own type and in range: a draft file is somebody else's.
STRICT = ConfigDict(extra="forbid", strict=True)
Size = Annotated[int, Field(gt=0, le=2**20)]
Count = Annotated[int, Field(ge=0, le=2**20)]
Vocabulary = Annotated[int, Field(gt=0, le=2**24)]
Lag = Annotated[int, Field(gt=0, le=1024)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Config = TypeVar("Config")


class Fingerprint(BaseModel):
    """Which target a draft was trained for; sha256 in hexadecimal digits."""

    model_config = STRICT
    shape: Digest
    tokenizer: Digest
    weights: Digest


class Card(BaseModel):
    """The description of a draft file.

    Attributes:
        kind: of the draft network, which says what `config` holds.
        command: that trained it.
        figures: measured after training; for readers only.
        target: folder, seen from the draft's, or Hub name of the model that it was trained for; None: not known. Formats
            before 4 had no such field.
    """

    model_config = STRICT
    format: int
    kind: str
    config: dict[str, Any]
    fingerprint: Fingerprint
    command: str
    figures: dict[str, Any]
    target: str | None = None


def read_card_text(text: str, kinds: tuple[str, ...]) -> Card:
    """The card in a draft file's metadata.

    Raises:
        ValueError: it is not a card, or it has a newer format or an unknown kind; the message says which field is wrong.
    """
    try:
        fields = json.loads(text)
    except RecursionError:
        raise ValueError("its description is nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError("its description is no JSON object")
    if fields.get("format") not in range(1, FORMAT + 1):
        raise ValueError(f"it has format {fields.get('format')}, this version reads {FORMAT}: update GlideCape")
    if fields.get("kind") not in list(kinds):
        raise ValueError(f"it holds a draft of kind '{fields.get('kind')}', unknown here: update GlideCape")
    return checked(Card, fields)


def checked(form: type[Config], fields: dict[str, Any]) -> Config:
    """An object of a model or dataclass from JSON fields, all of them checked.

    Raises:
        ValueError: a field is missing, unknown, of another type or out of range; the message names the first ones.
    """
    try:
        # Through JSON, where a list is the only way to write a tuple.
        return TypeAdapter(form).validate_json(json.dumps(fields))
    except ValidationError as error:
        some = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False)[:3]]
        raise ValueError("; ".join(some)) from None
