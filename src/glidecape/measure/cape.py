"""CaPE against fixed sets of siblings, beams and the plain chain, with drafting and verification apart; the best bins.

Source: GliDe paper, table 3 and section 5.4. Differs: one cache that is never moved while drafting, so a beam's price is
its forwards alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from ..core.params import SamplingParams
from ..drafting.drafter import Drafter, ModelDrafter, NoDraft
from ..drafting.expansions.base import Expansion
from ..drafting.expansions.beam import Beam
from ..drafting.expansions.cape import Cape
from ..drafting.expansions.chain import Chain
from ..drafting.options import PAPER_BINS, SMALL_BINS
from ..drafting.stop import FixedLength
from ..drafts.base import DraftModel
from ..errors import InputError
from ..significance import paired_permutation
from ..target.target import Target
from .runs import PLAIN, Runs, figures, interleaved, paces
from .table import Table

# Siblings by confidence, ten equal parts of it.
GRID: dict[str, tuple[int, ...]] = {
    "paper": PAPER_BINS,
    "small": SMALL_BINS,
    "half": (4, 4, 4, 3, 3, 3, 2, 2, 1, 0),
    "unsure": (5, 4, 3, 2, 1, 0, 0, 0, 0, 0),
    "one": (1, 1, 1, 1, 1, 1, 1, 0, 0, 0),
    "two": (2, 2, 2, 2, 2, 1, 1, 1, 0, 0),
}


def expansions(
    siblings: Sequence[int], beams: Sequence[int], grid: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, Expansion]]:
    """Kind and expansion by name."""
    made: dict[str, tuple[str, Expansion]] = {"chain": ("chain", Chain())}
    made |= {f"fixed {n}": ("fixed", Cape((n,))) for n in siblings}
    made |= {f"beam {n}": ("beam", Beam(n)) for n in beams}
    return made | {f"cape {name}": ("cape", Cape(bins)) for name, bins in grid.items()}


def study_cape(
    target: Target,
    draft: DraftModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    length: int = 5,
    siblings: Sequence[int] = (2, 4, 8),
    beams: Sequence[int] = (4, 8),
    grid: Mapping[str, tuple[int, ...]] = GRID,
    repeats: int = 1,
) -> tuple[Table, list[str]]:
    """A row an expansion, and sentences: which bins are best on every other prompt, and what they do on the rest.

    Raises:
        InputError: an empty grid or fewer than two prompts; see also `interleaved` and the expansions.
    """
    if not grid or len(prompts) < 2:
        raise InputError(
            "the best bins are chosen on half of the prompts: give at least two prompts and one entry of bins"
        )
    named = expansions(siblings, beams, grid)
    drafters: dict[str, Drafter] = {PLAIN: NoDraft()}
    drafters |= {name: ModelDrafter(draft, one, FixedLength(length)) for name, (_, one) in named.items()}
    runs = interleaved(target, drafters, [[p] for p in prompts], params, repeats)
    table = Table(f"{length} tokens a draft, T={params.temperature:g}, {len(prompts)} prompts")
    for name in drafters:
        row = figures(name, runs)
        if name.startswith("cape "):
            row |= {"bins": grid[name.removeprefix("cape ")]}
        table.rows.append(row)
    return table, best_of(runs, {kind: [n for n, (k, _) in named.items() if k == kind] for kind, _ in named.values()})


def best_of(runs: Runs, kinds: Mapping[str, Sequence[str]]) -> list[str]:
    """For each kind the fastest on the even prompts, with its speed-up on the odd ones, which had no say; and the p-value
    of CaPE's against each other kind's (paired permutation of seconds a token, odd prompts)."""
    pace = {name: paces(runs, name) for name in runs}

    def speedup(name: str, first: int) -> float:
        return sum(pace[PLAIN][first::2]) / sum(pace[name][first::2])

    chosen = {kind: max(names, key=lambda n: speedup(n, 0)) for kind, names in kinds.items() if names}
    said = []
    for kind, name in chosen.items():
        sentence = (
            f"Best of {kind}: {name}, {speedup(name, 0):.3f}x plain where it was chosen, {speedup(name, 1):.3f}x on"
        )
        sentence += f" the {len(pace[name][1::2])} prompts that had no say"
        if kind != "cape" and "cape" in chosen:
            odd, other = pace[chosen["cape"]][1::2], pace[name][1::2]
            sentence += f"; CaPE's best takes {mean(odd) / mean(other):.3f} of its time there, p = "
            sentence += f"{paired_permutation(odd, other):.3g}"
        said.append(sentence + ".")
    return said
