"""`glidecape report`: the figures of one or several runs as one self-contained HTML page, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ..tables import TextTable
from .metrics import summarise
from .plots import Plot, have_matplotlib, plots_of
from .records import RunFolder
from .tables import by_category, cells, circumstances_line, columns_of, title_of

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Drawing:
    """A plot and what it shows the figures of."""

    caption: str
    svg: str
    of: str


@dataclass(frozen=True)
class Section:
    """One run of the page; `tables` are shown, `details` folded."""

    number: int
    name: str
    where: str
    command: str
    provenance: list[tuple[str, str]]
    unfinished: str
    tables: list[TextTable]
    details: list[TextTable]
    plots: list[Drawing] = field(default_factory=list)


def write_report(folders: Sequence[Path], out: Path) -> tuple[Path, Path]:
    """Write `out/report.html` and `out/report.md` from the records of runs; returns the two paths.

    Raises:
        InputError: a folder without a run.
        DataError: one that is torn.
    """
    summaries = [summarise(RunFolder(folder)) for folder in folders]
    out.mkdir(parents=True, exist_ok=True)
    names = [folder.resolve().name for folder in folders]
    page, text = out / "report.html", out / "report.md"
    page.write_text(html(summaries, names), encoding="utf-8")
    text.write_text(markdown(summaries, names), encoding="utf-8")
    return page, text


def html(summaries: Sequence[Summary], names: Sequence[str], title: str = "GlideCape benchmark") -> str:
    """The page; without matplotlib it has tables only, and says so."""
    from jinja2 import Environment, StrictUndefined

    there = have_matplotlib()
    runs = list(_sections(summaries, names, there))
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    made = Environment(autoescape=True, undefined=StrictUndefined).from_string(template)
    return made.render(title=title, runs=runs, plots_there=there)


def markdown(summaries: Sequence[Summary], names: Sequence[str]) -> str:
    """The shown tables, each with the run that it comes from."""
    parts = []
    for run in _sections(summaries, names, False):
        parts.append(f"## {run.name}")
        if run.unfinished:
            parts.append(f"Not finished: {run.unfinished}.")
        for table in run.tables:
            parts += [f"{table.title}:", table.markdown(), f"`{run.command}`; {run.where}"]
    return "\n\n".join(parts) + "\n"


def _sections(summaries: Sequence[Summary], names: Sequence[str], plots: bool) -> Iterable[Section]:
    for number, (summary, name) in enumerate(zip(summaries, names, strict=True), 1):
        finished = summary["finished"]
        left = finished["of"] - finished["records"]
        overall = [g for g in summary["groups"] if g["category"] == "all"]
        what = title_of(overall[0], summary["settings"]) if overall else ""
        drawings = [_drawing(plot, what) for plot in plots_of(summary)] if plots else []
        yield Section(
            number=number,
            name=name,
            where=circumstances_line(summary),
            command=summary["sessions"][-1]["command"],
            provenance=_provenance(summary),
            unfinished=f"{left} of {finished['of']} measurements are missing" if left else "",
            tables=[sheet for group in overall for sheet in _main(summary, group)],
            details=_details(summary),
            plots=drawings,
        )


def _drawing(plot: Plot, what: str) -> Drawing:
    return Drawing(plot.caption, plot.svg, what)


def _provenance(summary: Summary) -> list[tuple[str, str]]:
    where, settings = summary["circumstances"], summary["settings"]
    found = [(f"command, {one['started']}", one["command"]) for one in summary["sessions"]]
    found += [(name, str(value)) for name, value in where.items()]
    found += [
        (f"suite {one['name']}", f"{one['prompts']} prompts, {one['source']}, sha256 {one['sha256']}")
        for one in summary["suites"]
    ]
    for category, counts in summary["drawn"].items():
        found.append(
            (f"drawn from {category}", ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in counts.items()))
        )
    found.append(("settings", ", ".join(f"{name} {value}" for name, value in settings.items())))
    for name, fit in summary["fits"].items():
        found.append((f"threshold of {name}", f"{fit['threshold']}, fitted; expected {fit['speedup']:.2f}x"))
    return found


def _main(summary: Summary, group: Mapping[str, Any]) -> Iterable[TextTable]:
    yield _sheet(group, summary)
    heads, rows = by_category(summary, group["kind"])
    if rows:
        yield TextTable(f"Speed-up over plain by category (prompts), {group['kind']}", heads, rows)


def _sheet(group: Mapping[str, Any], summary: Summary) -> TextTable:
    heads, texts = columns_of(group["rows"]), [cells(row) for row in group["rows"]]
    rows = [[text.get(name, "") for name in heads] for text in texts]
    return TextTable(title_of(group, summary["settings"]), list(heads.values()), rows)


def _details(summary: Summary) -> list[TextTable]:
    made = [_sheet(group, summary) for group in summary["groups"] if group["category"] != "all"]
    for kind, pairs in summary["pairs"].items():
        heads = [
            "a",
            "b",
            "a over b, speed",
            "95 % interval",
            "p",
            "alpha, a - b",
            "p",
            "acceptance length, a - b",
            "p",
        ]
        rows = [
            [
                pair["a"],
                pair["b"],
                f"{pair['speed']['ratio']:.2f}",
                "{:.2f} to {:.2f}".format(*pair["speed"]["interval"]),
                f"{pair['speed']['p']:.2g}",
                *(
                    f"{pair[k][x]:{f}}"
                    for k in ("alpha", "acceptance_length")
                    for x, f in (("gain", "+.3f"), ("p", ".2g"))
                ),
            ]
            for pair in pairs
        ]
        if rows:
            made.append(TextTable(f"Every two methods on the same prompts, {kind}", heads, rows))
    made += _depth_sheets(summary)
    if costs := summary["costs"]:
        heads = ["verification of so many nodes beside the root", "ms", "v(n)"]
        rows = [[n, f"{1e3 * s:.3f}", f"{costs['v'][n]:.3f}"] for n, s in costs["verify_s"].items()]
        made.append(TextTable(f"Verification ratio, measured alone after {costs['context']} tokens", heads, rows))
        rows = [[name, f"{1e3 * s:.3f}", f"{costs['c'][name]:.3f}"] for name, s in costs["draft_step_s"].items()]
        if rows:
            made.append(TextTable("Cost ratio, measured alone", ["draft", "ms a step", "c"], rows))
    for draft, one in summary["watched"].items():
        heads = ["stop policy", "value", "depths drafted", "accepted", "acceptance length", "expected speed-up"]
        rows = [
            [
                p["policy"],
                f"{p['value']:g}",
                f"{p['drafted']:.2f}",
                f"{p['accepted']:.2f}",
                f"{p['acceptance_length']:.2f}",
                f"{p['expected']:.2f}" if "expected" in p else "",
            ]
            for p in one["policies"]
        ]
        made.append(TextTable(f"Stop policies replayed, {draft} ({one['prompts']} prompts, chains)", heads, rows))
    return made


def _depth_sheets(summary: Summary) -> list[TextTable]:
    made = []
    for group in (g for g in summary["groups"] if g["category"] == "all"):
        rows = [row for row in group["rows"] if row.get("by_depth")]
        if not rows:
            continue
        deepest = max(len(row["by_depth"]) for row in rows)
        heads = ["method", *(f"depth {d}" for d in range(1, deepest + 1))]
        texts = [[row["method"], *(f"{rate:.2f} ({n})" for rate, n in row["by_depth"])] for row in rows]
        texts = [text + [""] * (len(heads) - len(text)) for text in texts]
        made.append(TextTable(f"Acceptance rate by depth (rounds that tested it), {group['kind']}", heads, texts))
        longest = max(int(n) for row in rows for n in row["accepted_lengths"])
        heads = ["method", *(str(n) for n in range(longest + 1))]
        texts = [
            [row["method"], *(str(row["accepted_lengths"].get(str(n), 0)) for n in range(longest + 1))] for row in rows
        ]
        made.append(TextTable(f"Rounds by accepted nodes, {group['kind']}", heads, texts))
    return made
