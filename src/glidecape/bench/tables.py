"""The figures of a run as tables: on the terminal, and as rows of text for Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..disturbance import LEAST_SHARE
from ..tables import TextTable, several, wide_console

Row = Mapping[str, Any]

COLUMNS = {
    "method": "method",
    "tokens_per_s": "tokens/s",
    "over_plain": "over plain",
    "interval": "95 % interval",
    "p": "p",
    "expected": "expected: papers', ours",
    "acceptance_length": "acceptance length",
    "alpha": "alpha",
    "draft_efficiency": "draft efficiency",
    "overlap": "overlap",
    "nodes": "nodes a round",
    "c": "c",
    "v": "v",
    "share": "draft / verify / rest, %",
    "first_token_ms": "first token, ms",
    "peak": "peak, MiB",
    "equal": "tokens equal plain's",
}
MAIN = ("method", "tokens_per_s", "over_plain", "interval", "acceptance_length", "equal")  # what most readers need
LEGEND = """\
tokens/s: all tokens over all seconds.
over plain: from each prompt's own pace, so it is not exactly the ratio of two tokens/s."""


def cells(row: Row) -> dict[str, str]:
    """A row of figures as text, "" where a figure does not apply; `over_NAME` for each peer, too."""
    over = row["over"].get("plain")
    share, expected = row.get("share"), row.get("expected")
    made = {
        "method": row["method"],
        "tokens_per_s": f"{row['tokens_per_s']:.1f}",
        "over_plain": f"{over['ratio']:.2f}" if over else "1",
        "interval": "{:.2f} to {:.2f}".format(*over["interval"]) if over else "",
        "p": f"{over['p']:.2g}" if over else "",
        "expected": f"{expected['papers']:.2f}, {expected['ours']:.2f}" if expected else "",
        "nodes": f"{row['nodes']['proposed']:.1f}" if "nodes" in row else "",
        "share": " / ".join(f"{100 * share[k]:.0f}" for k in ("draft", "verify", "overhead")) if share else "",
        "first_token_ms": f"{row['first_token_ms']:.1f}" if "first_token_ms" in row else "",
        "peak": f"{row['peak_bytes'] / 2**20:.0f}" if row.get("peak_bytes") else "",
        "equal": _equal(row),
    }
    for name, digits in (
        ("acceptance_length", 2),
        ("alpha", 3),
        ("draft_efficiency", 3),
        ("overlap", 3),
        ("c", 3),
        ("v", 2),
    ):
        made[name] = f"{row[name]:.{digits}f}" if row.get(name) is not None else ""
    for other, figures in row["over"].items():
        made[f"over_{other}"] = f"{figures['ratio']:.2f}"
    return made


def _equal(row: Row) -> str:
    if row["equal"] is None:
        return "not compared"
    return "yes" if row["equal"] else f"NO ({row['differing']})"


def columns_of(
    rows: list[Row], wanted: tuple[str, ...] = tuple(COLUMNS), peers: Sequence[str] | None = None
) -> dict[str, str]:
    """Heads of the columns that hold anything, by name; a column for each peer (all, if None) after "over plain"."""
    if peers is None:
        peers = list(dict.fromkeys(other for row in rows for other in row["over"] if other != "plain"))
    heads: dict[str, str] = {}
    for name in wanted:
        heads[name] = COLUMNS[name]
        if name == "interval":
            heads |= {f"over_{peer}": f"over {peer}" for peer in peers}
    texts = [cells(row) for row in rows]
    return {name: head for name, head in heads.items() if any(text.get(name) for text in texts)}


def title_of(group: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """What a table shows, in one line."""
    kind = "continuations that loop" if group["kind"] == "looping" else "continuations"
    if group["kind"] == "steady" and settings["temperature"] == 0:
        kind = "continuations that don't loop"
    repeated = group["repeated_4grams"]
    parts = [
        f"{group['prompts']} {kind}",
        "greedy" if settings["temperature"] == 0 else f"T={settings['temperature']:g}, {settings['sampling']}",
        f"batch {settings['batch']}",
        *([] if repeated is None else [f"{repeated:.0%} repeated spans of 4"]),
    ]
    return ("" if group["category"] == "all" else f"{group['category']}: ") + ", ".join(parts)


def markdown(rows: list[Row], wanted: tuple[str, ...] = tuple(COLUMNS)) -> str:
    """A Markdown table."""
    heads = columns_of(rows, wanted)
    texts = [[text.get(name, "") for name in heads] for text in map(cells, rows)]
    return TextTable("", list(heads.values()), texts).markdown()


def circumstances_line(summary: Mapping[str, Any]) -> str:
    """Where and on what the figures were measured."""
    where, settings = summary["circumstances"], summary["settings"]
    return (
        f"commit {where['commit']}, torch {where['torch']}, transformers {where['transformers']}, Python {where['python']}, "
        f"{where['processor']} ({where['device']}), {several(where['threads'], 'thread')}, {where['dtype']}, "
        f"{'compiled programs' if summary['compiled'] else 'eager'}, {several(settings['repeats'], 'repeat')}"
    )


def disturbed(summary: Mapping[str, Any]) -> str:
    """A sentence where other programs took the processors while the run measured; else ""."""
    shares = [one["share"] for one in summary["sessions"] if one.get("share") is not None]
    if not shares or min(shares) >= LEAST_SHARE:
        return ""
    return (
        f"Other programs were running: decoding had its processor for {min(shares):.0%} of the time. The figures are worth "
        "little: measure again when the machine is idle."
    )


def sheet(
    group: Mapping[str, Any],
    settings: Mapping[str, Any],
    wanted: tuple[str, ...] = tuple(COLUMNS),
    peers: Sequence[str] | None = None,
) -> TextTable:
    """The rows of a group as a table, see `columns_of`."""
    heads, texts = columns_of(group["rows"], wanted, peers), [cells(row) for row in group["rows"]]
    rows = [[text.get(name, "") for name in heads] for text in texts]
    return TextTable(title_of(group, settings), list(heads.values()), rows)


def by_category(summary: Mapping[str, Any], kind: str) -> tuple[list[str], list[list[str]]]:
    """Speed-up over plain of each method in each category: heads and rows of text; no rows for a single category."""
    groups = [group for group in summary["groups"] if group["kind"] == kind and group["category"] != "all"]
    heads = ["method", *(f"{group['category']} ({group['prompts']})" for group in groups)]
    texts = [{row["method"]: cells(row)["over_plain"] for row in group["rows"]} for group in groups]
    names = dict.fromkeys(name for text in texts for name in text if name != "plain")
    return heads, [[name, *(text.get(name, "") for text in texts)] for name in names]


def show(summary: Mapping[str, Any], folder: Path | None) -> None:
    """Print the main tables, and how to see the rest; `folder`: where the records are kept."""
    console = wide_console()
    for group in (group for group in summary["groups"] if group["category"] == "all"):
        sheet(group, summary["settings"], MAIN, peers=[]).print(console, narrow=True)
        over, rows = by_category(summary, group["kind"])
        if rows:
            TextTable(f"{group['kind']}: speed-up over plain by category (prompts)", over, rows).print(console)
    console.print(LEGEND, highlight=False)
    for name, fit in summary["fits"].items():
        console.print(f"{name}: SVIP threshold fitted, {fit['threshold']}")
    console.print(circumstances_line(summary), highlight=False)
    if why := disturbed(summary):
        console.print(why, highlight=False, style="bold")
    first = "" if folder else "give --output FOLDER, then "
    console.print(f"All other columns: {first}glidecape report {folder or 'FOLDER'}", highlight=False, soft_wrap=True)
