"""`glidecape report`: the figures of one or several runs as one self-contained HTML page, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..tables import TextTable
from .bars import colours_of, fastest_of, panels_of
from .details import details_of
from .headline import best_peer, headline, labels, overall
from .metrics import summarise
from .plots import Plot, have_matplotlib, plots_of
from .records import RunFolder
from .tables import MAIN, circumstances_line, disturbed, sheet

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """One run of the page: `tables` are shown, `details` and `plots` folded, `provenance` stands at the end."""

    number: int
    label: str
    name: str
    where: str
    command: str
    provenance: list[tuple[str, str]]
    unfinished: str
    disturbed: str
    tables: list[TextTable]
    details: list[TextTable]
    plots: list[Plot]


def write_report(folders: Sequence[Path], out: Path) -> tuple[Path, Path, str]:
    """Write `out/report.html` and `out/report.md` from the records of runs; returns the two paths and their first sentence.

    Raises:
        InputError: a folder without a run.
        DataError: one that is damaged, or of another version.
    """
    summaries = [summarise(RunFolder(folder)) for folder in folders]
    out.mkdir(parents=True, exist_ok=True)
    names = [folder.resolve().name for folder in folders]
    page, text = out / "report.html", out / "report.md"
    page.write_text(html(summaries, names), encoding="utf-8")
    text.write_text(markdown(summaries, names), encoding="utf-8")
    return page, text, headline(summaries, names)


def html(summaries: Sequence[Summary], names: Sequence[str], title: str = "GlideCape benchmark") -> str:
    """The page; without matplotlib it has no plots but the first picture, and says so."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    there = have_matplotlib()
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    made = Environment(autoescape=True, undefined=StrictUndefined).from_string(template)
    return made.render(
        title=title,
        soft=Markup("<wbr>"),  # where a long name may break
        sentence=headline(summaries, names),
        panels=panels_of(summaries, names),
        runs=_sections(summaries, names, there),
        plots_there=there,
    )


def markdown(summaries: Sequence[Summary], names: Sequence[str]) -> str:
    """The first sentence and the shown tables, with what they come from at the end."""
    sections = _sections(summaries, names, False)
    parts = [headline(summaries, names)]
    for run in sections:
        parts.append(f"## {run.label}")
        if run.unfinished:
            parts.append(f"Not finished: {run.unfinished}.")
        if run.disturbed:
            parts.append(run.disturbed)
        for table in run.tables:
            parts += [f"{table.title}:", table.markdown()]
    parts.append("## Where the figures come from")
    parts += [f"{run.label}: {run.where}.\n\n```bash\n{run.command}\n```" for run in sections]
    return "\n\n".join(parts) + "\n"


def _sections(summaries: Sequence[Summary], names: Sequence[str], plots: bool) -> list[Section]:
    colours, fastest = colours_of(summaries), fastest_of(summaries)
    made = []
    for number, (summary, label) in enumerate(zip(summaries, labels(summaries, names), strict=True), 1):
        finished = summary["finished"]
        left = finished["of"] - finished["records"]
        group = overall(summary)
        made.append(
            Section(
                number=number,
                label=label[:1].upper() + label[1:],
                name=names[number - 1],
                where=circumstances_line(summary),
                command=summary["sessions"][-1]["command"],
                provenance=_provenance(summary),
                unfinished=f"{left} of {finished['of']} measurements are missing" if left else "",
                disturbed=disturbed(summary),
                tables=[_main(group, summary)] if group else [],
                details=details_of(summary),
                plots=plots_of(summary, colours, fastest) if plots else [],
            )
        )
    return made


def _main(group: Mapping[str, Any], summary: Summary) -> TextTable:
    peer = best_peer(group["rows"])
    return sheet(group, summary["settings"], MAIN, [] if peer is None else [peer["method"]])


def _provenance(summary: Summary) -> list[tuple[str, str]]:
    where, settings = summary["circumstances"], summary["settings"]
    found = [(f"command, {one['started']}", one["command"]) for one in summary["sessions"]]
    found += [(name, str(value)) for name, value in where.items()]
    found += [
        (f"suite {one['name']}", f"{one['prompts']} prompts, {one['source']}, sha256 {one['sha256']}")
        for one in summary["suites"]
    ]
    for category, counts in summary["drawn"].items():
        told = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in counts.items())
        found.append((f"drawn from {category}", told))
    found.append(("settings", ", ".join(f"{name} {value}" for name, value in settings.items())))
    for name, fit in summary["fits"].items():
        found.append((f"threshold of {name}", f"{fit['threshold']}, fitted; expected {fit['speedup']:.2f}x"))
    return found
