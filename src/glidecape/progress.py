"""What is said while something runs, on standard error: notes, and how far it is, with the time left.

On a terminal that is a bar; elsewhere a plain line now and then, less often the longer it takes. `--quiet` says nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

FIRST_LINE_S = 10.0  # where there is no terminal, nothing is said of what takes less
LATER_LINES = 0.05  # of the time that has passed, until the next line


@dataclass
class _Said:
    """What all bars of a process share; `drawn` is there while one of them is open on a terminal."""

    quiet: bool = False
    drawn: Progress | None = None


_said = _Said()


def be_quiet(quiet: bool) -> None:
    """Say nothing from now on, or something again."""
    _said.quiet = quiet


def note(text: str) -> None:
    """Say a sentence."""
    say(f"note: {text}")


def say(text: str) -> None:
    """Say a line: figures, or what was written."""
    if not _said.quiet:
        print(text, file=sys.stderr)


def console() -> Console:
    """Where bars are drawn."""
    from rich.console import Console

    return Console(stderr=True)


def on_terminal() -> bool:
    """Are bars drawn?"""
    if _said.quiet:
        return False
    # An open bar stands in for standard error, and before rich 15 its stand-in is no terminal.
    return _said.drawn is not None or (sys.stderr.isatty() and not console().is_dumb_terminal)


class Bar:
    """How far one thing is; `bar` makes it.

    Args:
        total: what there is to do; None: nobody knows, so that the time that has passed is shown alone.
        start: how much of it was done before, by a run that was interrupted.
        seconds: how long it will take as far as anybody knows, in the place of `total`.
        drawn: where it is drawn; None: said in lines.
        ends: say that it is done, where it is said in lines? Not where the caller says more of it.
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        start: float,
        seconds: float | None,
        drawn: Progress | None,
        ends: bool = True,
    ) -> None:
        self.what, self.total, self.done, self.seconds = what, total, start, seconds
        self._start, self._began, self._drawn, self._ends = start, time.monotonic(), drawn, ends
        self._next_line_s = FIRST_LINE_S
        self._task = None if drawn is None else drawn.add_task("", total=None, bar=self)

    @property
    def elapsed(self) -> float:
        """Seconds since it was begun."""
        return time.monotonic() - self._began

    def advance(self, count: float = 1, what: str | None = None) -> None:
        """So much more is done; `what` is now done instead of what was named before."""
        self.at(self.done + count, what)

    def at(self, done: float, what: str | None = None) -> None:
        """So much is done by now; `what` as in `advance`."""
        self.done, self.what = done, self.what if what is None else what
        if (
            self._drawn is None and self.elapsed >= self._next_line_s and self.share() != 1.0
        ):  # the end has its own line
            self._next_line_s = self.elapsed + max(FIRST_LINE_S, LATER_LINES * self.elapsed)
            say(f"{self.what}: {self.told()}")

    def share(self) -> float | None:
        """How much of it is done, from 0 to 1; None: nobody knows."""
        if self.seconds:
            return min(0.99, self.elapsed / self.seconds)
        return min(1.0, self.done / self.total) if self.total else None

    def told(self) -> str:
        """Such as "40 %, 0:12 so far, 0:18 left"."""
        share, passed = self.share(), f"{clock(self.elapsed)} so far"
        if share is None:
            return passed
        made = share - (self._start / self.total if self.total else 0.0)  # in this time
        left = f", {clock(self.elapsed * (1 - share) / made)} left" if made > 0 else ""
        return f"{share:.0%}".replace("%", " %") + f", {passed}{left}"

    def close(self) -> None:
        if self._drawn is not None and self._task is not None:
            self._drawn.remove_task(self._task)
        elif self._ends and self.elapsed >= FIRST_LINE_S:
            say(f"{self.what}: done in {clock(self.elapsed)}")


@contextmanager
def bar(
    what: str, total: float | None = None, start: float = 0.0, seconds: float | None = None, ends: bool = True
) -> Iterator[Bar]:
    """How far something is while the block runs, which tells the `Bar` that it gets. Arguments as there.

    Bars may be opened inside each other: they are drawn below each other.

    >>> with bar("certifying", 2) as done:
    ...     done.advance()
    """
    if not on_terminal():
        one = Bar(what, total, start, seconds, None, ends)
        yield one
        one.close()
        return
    outermost = _said.drawn is None
    drawn = _said.drawn = _said.drawn or _new_progress()
    try:
        if outermost:
            drawn.start()
        one = Bar(what, total, start, seconds, drawn)
        try:
            yield one
        finally:
            one.close()
    finally:
        if outermost:
            drawn.stop()
            _said.drawn = None


def clock(seconds: float) -> str:
    """
    >>> clock(75.4), clock(3661)
    ('1:15', '1:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _new_progress() -> Progress:
    from rich.progress import Progress, ProgressColumn, Task
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    class What(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(task.fields["bar"].what)

    class Drawn(ProgressColumn):
        def render(self, task: Task) -> ProgressBar:
            share = task.fields["bar"].share()
            return ProgressBar(1.0, share or 0.0, width=30, pulse=share is None, animation_time=task.get_time())

    class Told(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(task.fields["bar"].told())

    columns: list[Any] = [What(), Drawn(), Told()]
    return Progress(
        *columns, console=console(), transient=True, refresh_per_second=4, redirect_stdout=sys.stdout.isatty()
    )
