"""The outcome of a study: tables with their provenance, as JSON, as Markdown and on the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_atomic
from ..tables import TextTable, wide_console


@dataclass
class Table:
    """One table: rows are values by column; a column that no row has is left out."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def columns(self) -> list[str]:
        """In the order of the row that has most of them."""
        return list(dict.fromkeys(key for row in sorted(self.rows, key=len, reverse=True) for key in row))

    def text(self) -> TextTable:
        """The table as text.

        >>> rows = [{"method": "plain", "over_plain": 1.0}, {"method": "glide", "over_plain": 2.0, "equal": True}]
        >>> print(Table("Two", rows).text().markdown())
        | method | over plain | equal |
        |---|---:|---:|
        | plain | 1.0 |  |
        | glide | 2.0 | yes |
        """
        heads = [column.replace("_", " ") for column in self.columns]
        return TextTable(self.title, heads, [[cell(row.get(column)) for column in self.columns] for row in self.rows])


@dataclass
class Study:
    """What one command found: settings, tables, and sentences that the tables need."""

    name: str
    provenance: dict[str, Any]
    settings: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        made = [
            f"`{self.provenance.get('command', '')}`",
            *self.notes,
            *(f"{t.title}:\n\n{t.text().markdown()}" for t in self.tables),
        ]
        facts = ", ".join(f"{key} {value}" for key, value in self.provenance.items() if key != "command")
        return "\n\n".join([*made, f"({facts})"]) + "\n"

    def write(self, path: Path) -> None:
        """JSON to `path`, Markdown beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1) + "\n"
        write_atomic(path, lambda temporary: temporary.write_text(text))
        write_atomic(path.with_suffix(".md"), lambda temporary: temporary.write_text(self.markdown()))

    def print(self) -> None:
        console = wide_console()
        for table in self.tables:
            table.text().print(console)
        for note in self.notes:
            console.print(note)
        console.print(self.provenance)


def cell(value: Any) -> str:
    """A value as a table shows it.

    >>> [cell(v) for v in (None, True, 0.12345678, (1.0, 1.25), [7, 5, 3])]
    ['', 'yes', '0.1235', '1.00 to 1.25', '7,5,3']
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return str(round(value, 4))
    if isinstance(value, list | tuple):
        pair = len(value) == 2 and all(isinstance(v, float) for v in value)
        return f"{value[0]:.2f} to {value[1]:.2f}" if pair else ",".join(map(str, value))
    return str(value)
