"""Plots of a run's figures as SVG, by matplotlib (the extra `plots`)."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .curves import svip_bound

Summary = Mapping[str, Any]
SIZE = (7.2, 3.8)


@dataclass(frozen=True)
class Plot:
    """A picture with its caption; `svg` is markup to be put into a page as it is."""

    name: str
    caption: str
    svg: str


def have_matplotlib() -> bool:
    """Is the optional library there?"""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def plots_of(summary: Summary) -> list[Plot]:
    """The plots for which the run has figures.

    Raises:
        ImportError: no matplotlib.
    """
    drawn = []
    for name, (caption, draw) in PLOTS.items():
        svg = _svg(draw, summary, name)
        if svg:
            drawn.append(Plot(name, caption, svg))
    return drawn


def _svg(draw: Callable[[Any, Summary], bool], summary: Summary, name: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    options = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "axes.spines.top": False}
    with rc_context({**options, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        if not draw(axes, summary):
            return ""
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, frameon=False)
        text = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # a page without any address in it
        figure.savefig(text, format="svg", metadata=nothing)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _groups(summary: Summary, kind: str = "steady") -> list[Any]:
    return [group for group in summary["groups"] if group["kind"] == kind]


def _overall(summary: Summary) -> list[Any]:
    groups = [group for group in summary["groups"] if group["category"] == "all"]
    return groups[0]["rows"] if groups else []


def _speed(axes: Any, summary: Summary) -> bool:
    groups = _groups(summary) or _groups(summary, "looping")
    if not groups:
        return False
    names = [row["method"] for row in groups[0]["rows"] if row["method"] != "plain"]
    for i, name in enumerate(names):
        rows = [next(row for row in group["rows"] if row["method"] == name) for group in groups]
        over = [row["over"]["plain"] for row in rows]
        ratios = [one["ratio"] for one in over]
        below = [max(0.0, one["ratio"] - one["interval"][0]) for one in over]
        above = [max(0.0, one["interval"][1] - one["ratio"]) for one in over]
        places = [place + 0.7 * ((i + 0.5) / len(names) - 0.5) for place in range(len(groups))]
        axes.errorbar(places, ratios, yerr=[below, above], fmt="o", markersize=4, capsize=2, label=name)
    axes.axhline(1, color="0.4", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [group["category"] for group in groups], rotation=20, ha="right")
    axes.set_ylabel("speed-up over plain decoding")
    return bool(names)


def _depth(axes: Any, summary: Summary) -> bool:
    rows = [row for row in _overall(summary) if row.get("by_depth")]
    for row in rows:
        rates = [rate for rate, _ in row["by_depth"]]
        axes.plot(range(1, len(rates) + 1), rates, marker="o", markersize=3, label=row["method"])
    axes.set_xlabel("depth")
    axes.set_ylabel("accepted / tested")
    axes.set_ylim(0, 1.02)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return bool(rows)


def _lengths(axes: Any, summary: Summary) -> bool:
    rows = [row for row in _overall(summary) if row.get("by_depth")]
    for row in rows:
        counts = {int(n): count for n, count in row["accepted_lengths"].items()}
        most = max(counts)
        shares = [counts.get(n, 0) / row["rounds"] for n in range(most + 1)]
        axes.plot(range(most + 1), shares, marker="o", markersize=3, label=row["method"])
    axes.set_xlabel("accepted nodes of a round")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("share of rounds")
    return bool(rows)


def _entropy(axes: Any, summary: Summary) -> bool:
    for name, one in summary["watched"].items():
        found = one["entropy"]
        axes.plot([b["x"] for b in found], [b["y"] for b in found], marker="o", markersize=3, label=name)
    if summary["watched"]:
        highest = max(b["x"] for one in summary["watched"].values() for b in one["entropy"])
        places = [highest * i / 60 for i in range(61)]
        bound = [max(0.0, svip_bound(x)) for x in places]
        axes.plot(places, bound, color="0.3", linestyle="--", label="SVIP's bound, 1 - sqrt(0.15 H)")
    axes.set_xlabel("entropy of the draft's law, nats")
    axes.set_ylabel("overlap of the two laws, T=1")
    axes.set_ylim(0, 1.02)
    return bool(summary["watched"])


def _confidence(axes: Any, summary: Summary) -> bool:
    for name, one in summary["watched"].items():
        found = one["confidence"]
        axes.plot([b["x"] for b in found], [b["y"] for b in found], marker="o", markersize=3, label=name)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    axes.set_xlabel("confidence: the draft's largest probability")
    axes.set_ylabel("its token is the target's")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    return bool(summary["watched"])


def _oracle(axes: Any, summary: Summary) -> bool:
    for i, (name, one) in enumerate(summary["watched"].items()):
        for kind, style in (("constant", "-"), ("svip", "--")):
            own = [p for p in one["policies"] if p["policy"] == kind]
            xs, ys = [p["drafted"] for p in own], [p["acceptance_length"] for p in own]
            axes.plot(xs, ys, style, color=f"C{i}", marker="o", markersize=3, label=f"{name}, {kind}")
        best = next(p for p in one["policies"] if p["policy"] == "oracle")
        place = ([best["drafted"]], [best["acceptance_length"]])
        axes.plot(*place, "*", color=f"C{i}", markersize=11, label=f"{name}, oracle")
    axes.set_xlabel("depths drafted a round")
    axes.set_ylabel("acceptance length")
    return bool(summary["watched"])


PLOTS: dict[str, tuple[str, Callable[[Any, Summary], bool]]] = {
    "speed": ("Speed-up over plain decoding by category, with 95 % intervals over prompts.", _speed),
    "depth": ("Acceptance rate by depth: rounds that accepted a node of the depth, of those that tested one.", _depth),
    "lengths": ("Rounds by the number of nodes they accepted.", _lengths),
    "entropy": ("The draft's entropy against the overlap of the two laws, and SVIP's lower bound.", _entropy),
    "confidence": (
        "The draft's confidence against how often its token is the target's (the GliDe paper's figure 1b).",
        _confidence,
    ),
    "oracle": (
        "Depths drafted against tokens emitted a round, replayed on the target's own output: constant lengths, SVIP's "
        "thresholds, and the oracle that knows how much will be accepted.",
        _oracle,
    ),
}
