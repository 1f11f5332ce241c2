"""What `auto` goes by on this machine: prices, the fixed lengths that would be best under them, and what it has learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .core.params import SamplingParams
from .costmodel import Prices, RoundCosts, best_length
from .costs import prices_file, prices_of
from .drafting.auto.drafter import DEPTH, NODES, AutoDrafter
from .engine.decode import decode
from .tables import TextTable
from .target.target import Target

ACCEPTANCE = (0.5, 0.6, 0.7, 0.8, 0.9)
HEAT = ("greedily", "at T=1")
FREE = Prices((1,), (1,), (1, 2), (((1.0, 1.0),),), ((0.0,),), ((0.0,),))


@dataclass(frozen=True)
class Length:
    """The chain that is fastest at a rate of acceptance, the same at every depth; 0: none is faster than plain decoding.

    Attributes:
        rows, context: side by side, and tokens before them.
        copied: from the text, so that only verification costs; else the draft drafts them.
    """

    rows: int
    context: int
    copied: bool
    acceptance: float
    length: int
    speedup: float


@dataclass(frozen=True)
class Tuned:
    """What auto goes by.

    Attributes:
        file: where the prices are kept; None: nowhere on this machine.
        measured: just now, or by an earlier process.
        prices: greedily and at temperature 1.
        lengths: for each of them.
    """

    file: Path | None
    measured: bool
    prices: list[Prices]
    lengths: list[list[Length]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = [
            asdict(one) | {"lengths": list(map(asdict, own))}
            for one, own in zip(self.prices, self.lengths, strict=True)
        ]
        return {
            "file": None if self.file is None else str(self.file),
            "measured_now": self.measured,
            "greedy": found[0],
            "t1": found[1],
        }


def tuned(target: Target, drafter: AutoDrafter, say: Callable[[str], None], again: bool = False) -> Tuned:
    """The prices of a pair, measured where they are not kept or `again`, and what follows from them."""
    file = prices_file(target, drafter)
    there = file is not None and file.is_file()
    prices = prices_of(target, drafter, say, again)
    deepest = 0 if drafter.runner is None else min(DEPTH, drafter.runner.model.max_lag)
    return Tuned(file, again or not there, prices, [lengths_of(one, deepest) for one in prices])


def lengths_of(prices: Prices, deepest: int) -> list[Length]:
    """The best fixed lengths by rows and acceptance, drafted ones up to `deepest`, and copied ones, at the shortest context.

    >>> one = Prices((1,), (128,), (1, 25), (((1.0, 3.4),),), ((0.1,),), ((0.0,),))
    >>> [(n.copied, n.acceptance, n.length) for n in lengths_of(one, 8)][::4]
    [(False, 0.5, 2), (False, 0.9, 7), (True, 0.8, 6)]
    """
    found, context = [], prices.contexts[0]
    for rows in prices.rows:
        costs = prices.at(rows, context)
        free = RoundCosts(0.0, costs.sizes, costs.verification)
        for copied, most, own in ((False, deepest, costs), (True, NODES, free)):
            for acceptance in ACCEPTANCE if most else ():
                length, speedup = best_length(own, [acceptance] * most)
                found.append(Length(rows, context, copied, acceptance, length, round(speedup, 3)))
    return found


def tables_of(one: Tuned) -> list[TextTable]:
    """The prices and the lengths, greedily and sampled."""
    made = []
    for heat, prices, lengths in zip(HEAT, one.prices, one.lengths, strict=True):
        made.append(_prices_table(heat, prices))
        columns = list(dict.fromkeys((length.copied, length.rows) for length in lengths))
        heads = [f"{'copied' if copied else 'drafted'}, {rows} row{'s' * (rows > 1)}" for copied, rows in columns]
        cells = {(n.acceptance, n.copied, n.rows): f"{n.length} ({n.speedup:.2f}x)" for n in lengths}
        rows = [[f"{a:g}", *(cells[a, *column] for column in columns)] for a in ACCEPTANCE]
        title = f"the best fixed length, and its speed-up, {heat}"
        made.append(TextTable(title, ["accepted at each depth", *heads], rows))
    return made


def _prices_table(heat: str, prices: Prices) -> TextTable:
    rows = []
    for r, count in enumerate(prices.rows):
        for c, context in enumerate(prices.contexts):
            times = prices.verify[r][c]
            milliseconds = (times[0], prices.draft[r][c], prices.start[r][c])
            rows.append(
                [
                    f"{count} × {context}",
                    *(f"{1e3 * s:.2f}" for s in milliseconds),
                    *(f"{s / times[0]:.2f}" for s in times[1:]),
                ]
            )
    heads = ["rows × tokens before", "plain round, ms", "draft step, ms", "to begin a draft, ms"]
    return TextTable(f"what a round costs, {heat}", [*heads, *(f"v({n})" for n in prices.sizes[1:])], rows)


def learn(target: Target, drafter: AutoDrafter, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Decode the prompts, greedily and at temperature 1, for `auto` to learn what this draft's tokens are worth. It goes by no
    prices afterwards: everything is free, so that it drafts deep in every round.

    Raises:
        InputError: a prompt that does not fit the context.
    """
    drafter.set_prices([FREE, FREE])
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature, max_new_tokens=max_new_tokens, seed=1)
        for number, prompt in enumerate(prompts):
            for _ in decode(target, drafter, [prompt], replace(params, seed=params.seed + number)):
                pass
