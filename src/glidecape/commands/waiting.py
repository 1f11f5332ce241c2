"""Bars of what cannot be counted: the time left is taken from how long the same took last time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from ..files import user_folder
from ..progress import bar, on_terminal

KEPT, SHORT_S = 100, 2.0  # how many times are kept; what takes less is not


@contextlib.contextmanager
def waiting(what: str, shown: bool = True) -> Iterator[None]:
    """A bar while the block runs, if it is `shown`. On a terminal the time it took is kept in the user's folder."""
    if not shown:
        yield
        return
    path, there = user_folder() / "seconds.json", on_terminal()
    kept = _read(path) if there else {}
    with bar(what, seconds=kept.get(what)) as drawn:
        yield
    if there and drawn.elapsed > SHORT_S:
        kept = dict([*((name, s) for name, s in kept.items() if name != what), (what, round(drawn.elapsed, 1))][-KEPT:])
        with contextlib.suppress(OSError):  # no place to keep it: then nobody knows next time
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, float]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(seconds) for name, seconds in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
