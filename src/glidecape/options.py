"""Options that stand once: a dataclass field with its default, its help and its name on the command line.

The command line derives its options from such classes (`commands/flatten.py`); Python takes the classes as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Option:
    """How the command line offers a field.

    Attributes:
        help: one sentence.
        flag: its name there, without the dashes; "": the field's own.
        least: smallest number that is taken.
        environment: the variable that gives it where nothing is typed.
        needs: the part of a method's name that uses it, as an error names it; "": every method.
        type: what is typed, where it is not of the field's own type.
        read, write: from what is typed to the field's value, and back for the default.
    """

    help: str
    flag: str = ""
    least: float | None = None
    environment: str | None = None
    needs: str = ""
    type: Any = None
    read: Callable[[Any], Any] = lambda typed: typed
    write: Callable[[Any], Any] = lambda value: value

    def parameter(self, name: str) -> str:
        """The name of the command's parameter for a field of this name."""
        return (self.flag or name).replace("-", "_")


def option(default: Any, help: str, **how: Any) -> Any:
    """A dataclass field that the command line offers; `how` as in `Option`."""
    return field(default=default, metadata={"option": Option(help, **how)})


def option_of(one: Field[Any]) -> Option | None:
    """How a field is offered; None: not at all."""
    return one.metadata.get("option")


def tokens_from(typed: list[Any] | None) -> tuple[Any, ...]:
    """What an option that may be repeated gives, as a tuple."""
    return tuple(typed or ())
