"""What the files of a run's folder may hold: a damaged one, or one of another version, is one sentence and no traceback."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from ..errors import DataError
from ..fit import Fit
from .settings import Settings

EXACT = ConfigDict(extra="forbid", allow_inf_nan=False)  # dataclasses inside take it over
T = TypeVar("T")


class _Form(BaseModel):
    model_config = EXACT


class Session(_Form):
    """One start of a run; `share` as in `costs.Share`, None where it is not known."""

    command: str
    started: str
    share: float | None = None


class Circumstances(_Form):
    """See `provenance.circumstances`."""

    commit: str
    torch: str
    transformers: str
    python: str
    processor: str
    device: str
    dtype: str
    threads: int


class Identity(_Form):
    """See `runner.Plan.identity`."""

    settings: Settings
    methods: list[str]
    peers: dict[str, str]
    suites: dict[str, str]
    prompts: dict[str, int]
    calibration: str | None
    target: str
    drafts: dict[str, str]
    compiled: bool
    circumstances: Circumstances

    @field_validator("settings", mode="before")
    @classmethod
    def _whole(cls, settings: Any) -> Any:
        """Raises ValueError where one is missing: a default would be a guess at what was run."""
        wanted = asdict(Settings())
        if not isinstance(settings, dict) or not isinstance(settings.get("options"), dict):
            raise ValueError("no settings")
        for known, held in ((wanted, settings), (wanted["options"], settings["options"])):
            if missing := known.keys() - held.keys():
                raise ValueError(f"no {min(missing)}")
        return settings


class SuiteFacts(_Form):
    name: str
    source: str
    sha256: str
    prompts: int


class Costs(_Form):
    """See `costs.measure_costs`."""

    context: int
    verify_s: dict[int, float]
    draft_step_s: dict[str, float]
    v: dict[int, float]
    c: dict[str, float]

    @model_validator(mode="after")
    def _ratios_of_all(self) -> Costs:
        if self.verify_s.keys() != self.v.keys() or self.draft_step_s.keys() != self.c.keys():
            raise ValueError("times and ratios of different things")
        return self


class Header(_Form):
    """`run.json`."""

    format: int
    identity: Identity
    sessions: Annotated[list[Session], Field(min_length=1)]
    suites: list[SuiteFacts] = Field(default_factory=list)
    drawn: dict[str, dict[str, int]] = Field(default_factory=dict)
    fits: dict[str, Fit] = Field(default_factory=dict)
    costs: Costs | None = None


HEADER = TypeAdapter(Header)


def checked(form: TypeAdapter[T], value: Any, path: Path) -> T:
    """What a file holds, as the form says; of a list the number of the line is told.

    Raises:
        DataError: it is something else.
    """
    try:
        return form.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        names = [
            f"line {name + 1}" if i == 0 and isinstance(name, int) else name for i, name in enumerate(first["loc"])
        ]
        raise unreadable(path, " ".join([*(f"{name}:" for name in names), first["msg"].removesuffix(".")])) from None


def unreadable(path: Path, why: str) -> DataError:
    """The error of a file that this version did not write."""
    return DataError(
        f"{path} is damaged, or of another version of GlideCape ({why}): run the benchmark again with another --output"
    )
