"""Plots of a run's figures as SVG, by matplotlib (the extra `plots`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .bars import MOST, PALETTE
from .curves import svip_bound
from .headline import overall

Summary = Mapping[str, Any]
SIZE = (6.0, 3.7)
INK, LINES = "#010203", "#040506"  # stand for the page's own colours, light or dark
MARKERS = "os^Dvp"


@dataclass(frozen=True)
class Plot:
    """A picture with its caption; `svg` is markup to be put into a page as it is."""

    name: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Shown:
    """What a plot may show: the run's figures, and at most six methods and six drafts, each with its style."""

    summary: Summary
    methods: Mapping[str, Mapping[str, Any]]
    drafts: Mapping[str, Mapping[str, Any]]

    def rows(self) -> list[Mapping[str, Any]]:
        """Rows of the methods that have rates by depth."""
        group = overall(self.summary)
        return [row for row in group["rows"] if row["method"] in self.methods and row.get("by_depth")] if group else []

    def watched(self) -> Iterable[tuple[str, Any]]:
        return ((name, one) for name, one in self.summary["watched"].items() if name in self.drafts)


def have_matplotlib() -> bool:
    """Is the optional library there?"""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def plots_of(summary: Summary, colours: Mapping[str, str], fastest: Sequence[str]) -> list[Plot]:
    """The plots for which the run has figures.

    Args:
        colours: of every method of the page.
        fastest: its methods, the fastest first; six of them are drawn, and six drafts.

    Raises:
        ImportError: no matplotlib.
    """
    group = overall(summary)
    own = {row["method"] for row in group["rows"]} if group else set()
    chosen = [name for name in fastest[:MOST] if name in own]
    methods = {name: _style(colours[name], i) for i, name in enumerate(fastest[:MOST]) if name in own}
    shown = Shown(summary, methods, _drafts(summary, methods, fastest))
    more = len([name for name in fastest if name in own]) - len(chosen)
    drawn = []
    for name, (caption, draw) in PLOTS.items():
        svg = _svg(draw, shown, name)
        if svg:
            left_out = f" The {len(chosen)} fastest methods; {more} more are in the tables." if more else ""
            drawn.append(Plot(name, caption + (left_out if name in OF_METHODS else ""), svg))
    return drawn


def _drafts(
    summary: Summary, methods: Mapping[str, Mapping[str, Any]], fastest: Sequence[str]
) -> dict[str, Mapping[str, Any]]:
    """At most six drafts, each in the style of its fastest method where that has one of its own."""
    used: dict[str, Mapping[str, Any]] = {}
    wanted = list(summary["watched"])
    for draft in wanted:
        own = [name for name in fastest if summary["drafts"].get(name) == draft and name in methods]
        if own:
            used[draft] = methods[own[0]]
    spare = [
        _style(colour, i) for i, colour in enumerate(PALETTE) if colour not in {s["color"] for s in methods.values()}
    ]
    for draft in wanted:
        if draft not in used and spare:
            used[draft] = spare.pop()
    return dict(list(used.items())[:MOST])


def _style(colour: str, number: int) -> dict[str, Any]:
    return {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markersize": 4}


def _svg(draw: Callable[[Any, Shown], bool], shown: Shown, name: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    options = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "axes.spines.top": False}
    options |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK)
    options |= {"grid.color": LINES, "axes.spines.right": False, "axes.grid": True}
    with rc_context(options):
        figure = Figure(figsize=SIZE, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        if not draw(axes, shown):
            return ""
        handles, names = axes.get_legend_handles_labels()
        if names:  # below the axes, where it covers no data
            figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # a page without any address in it
        figure.savefig(text, format="svg", metadata=nothing)
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    return svg.replace(INK, "currentColor").replace(LINES, "var(--line)")


def _speed(axes: Any, shown: Shown) -> bool:
    groups = [group for group in shown.summary["groups"] if group["category"] != "all"]
    groups = [group for group in groups if group["kind"] == groups[0]["kind"]]
    names = list(shown.methods)
    for i, name in enumerate(names if groups else []):
        rows = [next(row for row in group["rows"] if row["method"] == name) for group in groups]
        over = [row["over"]["plain"] for row in rows]
        ratios = [one["ratio"] for one in over]
        below = [max(0.0, one["ratio"] - one["interval"][0]) for one in over]
        above = [max(0.0, one["interval"][1] - one["ratio"]) for one in over]
        places = [place + 0.7 * ((i + 0.5) / len(names) - 0.5) for place in range(len(groups))]
        style = {**shown.methods[name], "linestyle": "", "capsize": 2, "label": name}
        axes.errorbar(places, ratios, yerr=[below, above], **style)
    axes.axhline(1, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(groups)), [group["category"] for group in groups], rotation=20, ha="right")
    axes.set_ylabel("speed-up over plain decoding")
    return bool(names and groups)


def _depth(axes: Any, shown: Shown) -> bool:
    for row in shown.rows():
        rates = [rate for rate, _ in row["by_depth"]]
        axes.plot(range(1, len(rates) + 1), rates, label=row["method"], **shown.methods[row["method"]])
    axes.set_xlabel("depth")
    axes.set_ylabel("accepted / tested")
    axes.set_ylim(0, 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return bool(shown.rows())


def _lengths(axes: Any, shown: Shown) -> bool:
    for row in shown.rows():
        counts = {int(n): count for n, count in row["accepted_lengths"].items()}
        most = max(counts)
        shares = [counts.get(n, 0) / row["rounds"] for n in range(most + 1)]
        axes.plot(range(most + 1), shares, label=row["method"], **shown.methods[row["method"]])
    axes.set_xlabel("accepted nodes of a round")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("share of rounds")
    return bool(shown.rows())


def _entropy(axes: Any, shown: Shown) -> bool:
    highest = 0.0
    for name, one in list(shown.watched())[: MOST - 1]:
        found = one["entropy"]
        axes.plot([b["x"] for b in found], [b["y"] for b in found], label=name, **shown.drafts[name])
        highest = max(highest, *(b["x"] for b in found))
    if highest:
        places = [highest * i / 60 for i in range(61)]
        bound = [max(0.0, svip_bound(x)) for x in places]
        axes.plot(places, bound, color=INK, linestyle="--", label="SVIP's bound, 1 - sqrt(0.15 H)")
    axes.set_xlabel("entropy of the draft's law, nats")
    axes.set_ylabel("overlap of the two laws, T=1")
    axes.set_ylim(0, 1.02)
    return bool(highest)


def _confidence(axes: Any, shown: Shown) -> bool:
    for name, one in shown.watched():
        found = one["confidence"]
        axes.plot([b["x"] for b in found], [b["y"] for b in found], label=name, **shown.drafts[name])
    axes.plot([0, 1], [0, 1], color=LINES, linewidth=1)
    axes.set_xlabel("confidence: the draft's largest probability")
    axes.set_ylabel("its token is the target's")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    return bool(list(shown.watched()))


def _reliability(axes: Any, shown: Shown) -> bool:
    rows = [row for row in shown.rows() if "calibration" in row]
    for row in rows:
        found = row["calibration"]
        label = f"{row['method']}, expected calibration error {found['error']:.3f}"
        places = [one[0] for one in found["bins"]], [one[1] for one in found["bins"]]
        axes.plot(*places, label=label, **shown.methods[row["method"]])
    axes.plot([0, 1], [0, 1], color=LINES, linewidth=1)
    axes.set_xlabel("predicted probability that the target takes a node")
    axes.set_ylabel("share that it took")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    return bool(rows)


def _oracle(axes: Any, shown: Shown) -> bool:
    for name, one in list(shown.watched())[:2]:  # three lines each
        style = shown.drafts[name]
        for kind, line in (("constant", "-"), ("svip", "--")):
            own = [p for p in one["policies"] if p["policy"] == kind]
            xs, ys = [p["drafted"] for p in own], [p["acceptance_length"] for p in own]
            axes.plot(xs, ys, linestyle=line, label=f"{name}, {kind}", **style)
        best = next(p for p in one["policies"] if p["policy"] == "oracle")
        place = ([best["drafted"]], [best["acceptance_length"]])
        axes.plot(*place, "*", color=style["color"], markersize=11, label=f"{name}, oracle")
    axes.set_xlabel("depths drafted a round")
    axes.set_ylabel("acceptance length")
    return bool(list(shown.watched()))


OF_METHODS = ("speed", "depth", "lengths", "reliability")
PLOTS: dict[str, tuple[str, Callable[[Any, Shown], bool]]] = {
    "speed": ("Speed-up over plain decoding by category, with 95 % intervals over prompts.", _speed),
    "depth": ("Acceptance rate by depth: rounds that accepted a node of the depth, of those that tested one.", _depth),
    "lengths": ("Rounds by the number of nodes they accepted.", _lengths),
    "entropy": ("The draft's entropy against the overlap of the two laws, and SVIP's lower bound.", _entropy),
    "confidence": (
        "The draft's confidence against how often its token is the target's (the GliDe paper's figure 1b).",
        _confidence,
    ),
    "reliability": (
        "Reliability of auto's estimates: of the offered nodes whose ancestors were accepted, the predicted probability "
        "against the share that was accepted, by tenths.",
        _reliability,
    ),
    "oracle": (
        "Depths drafted against tokens emitted a round, replayed on the target's own output: constant lengths, SVIP's "
        "thresholds, and the oracle that knows how much will be accepted.",
        _oracle,
    ),
}
