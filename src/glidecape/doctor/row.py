"""One possible cause: what was found, and what to change if it is one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        cause: what was looked at.
        found: what was found there.
        change: what to do; "": it is no cause.
        known: False where the draft does not say, or nothing could be measured.
    """

    cause: str
    found: str
    change: str = ""
    known: bool = True

    @property
    def is_finding(self) -> bool:
        return bool(self.change)

    @property
    def verdict(self) -> str:
        """ "cause", "fine" or "unknown"."""
        return "cause" if self.is_finding else "fine" if self.known else "unknown"
