"""Tables of text: the same cells as Markdown and on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 200  # columns of a table that is piped: none is wrapped


@dataclass(frozen=True)
class TextTable:
    """Heads and rows of text; the first column names the row.

    >>> print(TextTable("Two", ["method", "speed-up"], [["plain", "1"], ["glide", "2"]]).markdown())
    | method | speed-up |
    |---|---:|
    | plain | 1 |
    | glide | 2 |
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table as Markdown, without its title and a last line break."""
        lines = [f"| {' | '.join(line)} |" for line in (self.heads, *self.rows)]
        lines.insert(1, "|---" + "|---:" * (len(self.heads) - 1) + "|")
        return "\n".join(lines)

    def print(self, console: Console | None = None, narrow: bool = False) -> None:
        """Draw the table on the terminal, numbers to the right; `narrow`: heads are broken between words."""
        from rich.table import Table

        drawn = Table(title=self.title)
        for i, head in enumerate(self.heads):
            cells = [row[i] for row in self.rows]
            most = max(map(len, (*head.split(), *cells))) if narrow else None
            drawn.add_column(head, justify="right" if i else "left", no_wrap=not i, max_width=most)
        for row in self.rows:
            drawn.add_row(*row)
        (console or wide_console()).print(drawn)


def wide_console(file: TextIO | None = None) -> Console:
    """A console for tables, on standard output or a file: wide enough where it is no terminal."""
    from rich.console import Console

    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=WIDTH)


def several(count: int, what: str) -> str:
    """A count with its noun.

    >>> several(1, "thread"), several(2, "thread")
    ('1 thread', '2 threads')
    """
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def millions(count: float) -> str:
    """A number of parameters, in millions unless it is small.

    >>> millions(7_241_732_096), millions(15_733_632), millions(1_050_000), millions(260_032), millions(33_920), millions(800)
    ('7,242 M', '15.7 M', '1.05 M', '0.26 M', '0.034 M', '800')
    """
    value = count / 1e6
    if value < 0.01:
        return f"{count:,.0f}"
    decimals = next(places for least, places in ((100, 0), (10, 1), (0.1, 2), (0, 3)) if value >= least)
    return f"{value:,.{decimals}f} M"
