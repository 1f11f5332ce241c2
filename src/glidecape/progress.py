"""What is said while something runs, on standard error: notes, and bars with the time left where that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_said = {"quiet": False}


def be_quiet(quiet: bool) -> None:
    """Say nothing from now on, or something again."""
    _said["quiet"] = quiet


def note(text: str) -> None:
    """Say a sentence."""
    if not _said["quiet"]:
        print(f"note: {text}", file=sys.stderr)


def console() -> Console:
    """Where bars are drawn."""
    from rich.console import Console

    return Console(stderr=True, quiet=_said["quiet"])


def say(text: str) -> None:
    """Say a line: figures, or what was written."""
    if not _said["quiet"]:
        print(text, file=sys.stderr)


@contextmanager
def bar(what: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
    """A bar while the block runs; gives a function that is told how much of `total` is done by now.

    Args:
        total: None: nobody knows, so that only the time that has passed is shown.

    >>> with bar("certifying", 2) as done:
    ...     done(1)
    """
    if _said["quiet"] or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    if total is not None:
        columns += [TextColumn("left:"), TimeRemainingColumn()]
    with Progress(*columns, console=console(), transient=True, redirect_stdout=False) as drawn:
        task = drawn.add_task(what, total=total)
        yield lambda done: drawn.update(task, completed=done)
