"""The table of a study: a line a row, compared with the first one prompt by prompt."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from ..significance import paired_permutation
from ..tables import TextTable, millions

COLUMNS = {
    "row": "row",
    "alpha_greedy": "alpha",
    "difference_greedy": "difference",
    "p_greedy": "p",
    "length_greedy": "acceptance length",
    "cape_greedy": "with CaPE",
    "alpha_t1": "alpha T=1",
    "difference_t1": "difference",
    "p_t1": "p",
    "length_t1": "acceptance length T=1",
    "cape_t1": "with CaPE T=1",
    "parameters": "parameters",
    "tokens_per_s": "tokens/s",
    "seeds": "seeds",
}


def summary(results: Mapping[str, Mapping[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line a row, of its figures by seed.

    alpha and acceptance length are those of a chain of 5, means over seeds; `spread` is the standard deviation of
    alpha over seeds. `difference` is that of alpha to the first row, p the paired permutation test over prompts, each
    prompt's alpha being its mean over seeds.
    """
    first = next(iter(results.values()))
    lines = []
    for name, by_seed in results.items():
        each = list(by_seed.values())
        line: dict[str, Any] = {"row": name, "seeds": len(each)}
        for heat in ("greedy", "t1"):
            alphas = [one[f"chain_{heat}"]["alpha"] for one in each]
            line[f"alpha_{heat}"] = round(statistics.mean(alphas), 4)
            if len(alphas) > 1:
                line[f"spread_{heat}"] = round(statistics.stdev(alphas), 4)
            line[f"length_{heat}"] = _mean(each, f"chain_{heat}", "acceptance_length")
            line[f"cape_{heat}"] = _mean(each, f"cape_{heat}", "acceptance_length")
            if by_seed is not first:
                line[f"difference_{heat}"] = round(line[f"alpha_{heat}"] - _mean(first.values(), f"chain_{heat}"), 4)
                pair = (_by_prompt(by_seed, heat), _by_prompt(first, heat))
                line[f"p_{heat}"] = round(paired_permutation(*pair), 5)
        line["parameters"] = each[0]["parameters"]
        speeds = [one["tokens_per_s"] for one in each if one["tokens_per_s"] is not None]
        line["tokens_per_s"] = round(statistics.mean(speeds)) if speeds else None
        lines.append(line)
    return lines


def _mean(each: Iterable[Mapping[str, Any]], measured: str, figure: str = "alpha") -> float:
    return round(statistics.mean(one[measured][figure] for one in each), 4)


def _by_prompt(by_seed: Mapping[str, dict[str, Any]], heat: str) -> list[float]:
    lists = [one[f"chain_{heat}"]["alpha_by_prompt"] for one in by_seed.values()]
    return [statistics.mean(values) for values in zip(*lists, strict=True)]


def _cells(line: dict[str, Any]) -> list[str]:
    cells = []
    for name in COLUMNS:
        value = line.get(name)
        if value is None:
            cells.append("")
        elif name.startswith("difference"):
            cells.append(f"{value:+.4f}")
        elif name.startswith("alpha") and (spread := line.get(name.replace("alpha", "spread"))) is not None:
            cells.append(f"{value:.4f} ± {spread:.4f}")
        elif name == "parameters":
            cells.append(millions(value))
        elif name.startswith("p_"):
            cells.append(f"{value:.5f}")
        else:
            cells.append(f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if name != "row" else value)
    return cells


def table_of(lines: list[dict[str, Any]]) -> TextTable:
    """The lines as text."""
    title = "alpha and acceptance length of a chain of 5 on held-out text; differences to the first row"
    return TextTable(title, list(COLUMNS.values()), [_cells(line) for line in lines])
