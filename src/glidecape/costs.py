"""What the parts of a round cost on this machine, timed in the loop itself: v(n), a plain step, and a step of a draft.

`prices_of` measures all that `auto` wants to know, once for each pair, and keeps it beside the compiled programs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .batch.batch import Batch
from .core.params import SamplingParams
from .core.stats import Stats
from .costmodel import Prices
from .disturbance import LEAST_SHARE, Share
from .drafting.auto.drafter import AutoDrafter
from .drafting.auto.fixed import FixedRounds, Shape
from .drafting.drafter import Drafter, ModelDrafter, NoDraft
from .drafting.expansions.chain import Chain
from .drafting.priced import PricedDrafter
from .drafting.stop import FixedLength
from .drafts.base import DraftModel
from .engine.decode import start
from .engine.round import seconds
from .errors import CheckpointError, InputError
from .files import write_atomic
from .progress import bar
from .target.packages import CompileError, cache_folder, environment
from .target.target import Target
from .timed import LIMIT_S, Sized, among_its_like, forgotten_round, in_turn, unread_batch

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 24, 33, 48)
REPEATS = 15
LONG, SHORT = 4, 1  # draft lengths whose difference is the cost of steps


@dataclass(frozen=True)
class Verification:
    """v(n), the time to verify n nodes over a plain step, at `sizes` (the root counted); and the seconds of a plain step."""

    sizes: tuple[int, ...]
    ratios: tuple[float, ...]
    step_s: float


def verification_ratios(
    target: Target,
    prompts: Sequence[Sequence[int]],
    temperature: float = 0.0,
    sizes: Sequence[int] = SIZES,
    repeats: int = REPEATS,
) -> Verification:
    """v(n) for each of `sizes`; medians, sizes taking turns round by round, every round right after the prompts.

    `prompts` is the batch that is decoded. All of a round but drafting counts: the target's forward, each node's law (noise
    or arg-max), the verdict, the cache.

    Raises:
        InputError: sizes that do not begin with 1, or a prompt that leaves no room in the context for the largest.
    """
    if list(sizes)[:1] != [1]:
        raise InputError("v(n) is a ratio over one node: let the sizes begin with 1")
    sized = Sized(max(sizes) - 1)
    params = SamplingParams(temperature, max_new_tokens=max(sizes) + 1, ignore_eos=True)
    batch = start(target, sized, prompts, params)
    timed = [partial(_verified, target, sized, batch, size) for size in sizes]
    times = [statistics.median(one) for one in in_turn(timed, 1 + repeats)]
    return Verification(tuple(sizes), tuple(round(one / times[0], 4) for one in times), times[0])


@torch.no_grad()
def draft_step_s(target: Target, model: DraftModel, prompt: Sequence[int], repeats: int = REPEATS) -> float:
    """Seconds of a draft step after a prompt: the difference of a long and a short chain, medians."""
    drafters = {length: ModelDrafter(model, Chain(), FixedLength(length)) for length in (LONG, SHORT)}
    params = SamplingParams(max_new_tokens=LONG + 2)
    batches = {length: start(target, drafter, [prompt], params) for length, drafter in drafters.items()}
    timed = [partial(_drafted, drafter, batches[length]) for length, drafter in drafters.items()]
    long, short = map(statistics.median, in_turn(timed, 1 + repeats))
    return max(0.0, long - short) / (LONG - SHORT)


def _verified(target: Target, sized: Sized, batch: Batch, nodes: int) -> float:
    """Seconds of a round that verifies so many nodes, its root counted; the batch is as before then."""
    sized.limit = nodes - 1
    stats = forgotten_round(target, sized, batch)
    return stats.total_s - stats.draft_s


def _drafted(drafter: Drafter, batch: Batch) -> float:
    """Seconds of a proposal, which is forgotten: the next one begins at the same roots."""
    stats = Stats()
    started = seconds(batch, stats)
    drafter.propose(batch)
    took = seconds(batch, stats) - started
    batch.draft.own.keep([[]] * len(batch.rows))
    return took


ALONE_ROWS = (1,)
ROWS, CONTEXTS = (1, 4, 8, 16), (128, 1024)  # no more: the cache of the largest must fit
NODES = (1, 2, 3, 5, 7, 9, 13, 17, 25)
PATIENCE_S = 0.4  # a cell is measured again as long as it has taken less
ROUNDS = 2  # how they are timed: prices that were measured in another way are measured again
TOKENS = 4096  # of a row, most, where nobody says
DEAR_S = 0.1  # rounds of more nodes than one that takes so long are not timed


@torch.no_grad()
def measured_prices(
    target: Target,
    drafter: AutoDrafter,
    temperature: float = 0.0,
    rows: Sequence[int] | None = None,
    done: Callable[[float], object] = lambda _: None,
) -> Prices:
    """Prices of this pair on this machine, by rows and tokens before them; the fastest of some rounds, which other programs
    disturbed least. A few seconds.

    The caches' content doesn't matter to time, so nothing is read before.

    Args:
        done: is told each share that is measured, of the 1 that a number of rows is.
    """
    rows = rows or ROWS
    room = target.context - max(NODES) - 2
    contexts = [n for n in CONTEXTS if n <= room] or [max(2, room)]
    cells: list[list[Cell]] = [[] for _ in rows]
    share = Share()
    with share.counting():
        for own, count in zip(cells, rows, strict=True):
            for context in contexts:
                own.append(_priced(target, drafter, count, context, temperature))
                done(1 / len(contexts))

    def table(of: Callable[[Cell], float]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(of(cell) for cell in row) for row in cells)

    return Prices(
        tuple(rows),
        tuple(contexts),
        NODES,
        tuple(tuple(cell.verify for cell in row) for row in cells),
        table(lambda cell: cell.draft),
        table(lambda cell: cell.start),
        drafter.length,
        table(lambda cell: cell.whole) if drafter.length else (),
        drafter.lengths,
        tuple(tuple(tuple(cell.chains[k] for cell in row) for row in cells) for k in range(len(drafter.lengths))),
        share.value,
    )


@dataclass(frozen=True)
class Cell:
    """Seconds of one number of rows and tokens; see `Prices`."""

    verify: tuple[float, ...]
    draft: float = 0.0
    start: float = 0.0
    whole: float = 0.0
    chains: tuple[float, ...] = ()


def _priced(target: Target, drafter: AutoDrafter, count: int, context: int, temperature: float) -> Cell:
    """Of so many rows with so many tokens before them.

    Whole rounds are timed, since drafting and verification drive one another's weights out of the CPU's cache. What a plain
    round takes longer among others than among its like is a part of the price of drafting. Plain rounds and whole chains, of
    which many follow one another, are timed among their like.
    """
    rounds = FixedRounds(drafter)
    batch = unread_batch(target, rounds, count, context, temperature, max(NODES))
    deepest = 0 if drafter.runner is None else min(LONG, drafter.runner.model.max_lag)

    def round_of(shape: Shape) -> float:
        rounds.shape = shape
        return forgotten_round(target, rounds, batch).total_s

    sizes = _affordable(lambda nodes: round_of(Shape(0, nodes - 1)))
    shapes = [Shape(0, nodes - 1) for nodes in sizes]
    if deepest:
        shapes += [Shape(0, LONG), Shape(SHORT, LONG), Shape(deepest, LONG)]
    if drafter.length:
        shapes.append(Shape(drafter.length, LONG, whole=True))
    chains = [Shape(length, length, chain=True) for length in drafter.lengths]
    timed = [partial(round_of, shape) for shape in shapes]
    times = list(map(min, in_turn(timed, patience=PATIENCE_S, limit=LIMIT_S)))
    alone = among_its_like(partial(round_of, shapes[0]))
    among = max(0.0, times[0] - alone) if deepest else 0.0
    of_nodes, rest = times[: len(sizes)], times[len(sizes) :]
    # More nodes never take less time, whatever was measured.
    rising = tuple((np.maximum.accumulate(_continued(sizes, of_nodes)) - among).tolist())
    if not deepest:
        return Cell(rising)
    bare, short, long = rest[:3]
    depth = max(0.0, (long - short) / (deepest - SHORT) if deepest > SHORT else short - bare)
    start = max(0.0, short - bare - depth) + among
    whole = max(0.0, rest[3] - bare) + among if drafter.length else 0.0
    wholes = (among_its_like(partial(round_of, shape)) for shape in chains)
    return Cell(rising, depth, start, whole, tuple(max(0.0, one - alone) for one in wholes))


def _affordable(once: Callable[[int], float]) -> tuple[int, ...]:
    """Those of `NODES` up to the first with which a round takes long, three at least: on a slow machine a large batch would be
    timed for minutes at sizes that are never chosen there."""
    dear = (k for k, nodes in enumerate(NODES) if once(nodes) > DEAR_S and k >= 2)
    return NODES[: next(dear, len(NODES)) + 1]


def _continued(sizes: Sequence[int], times: Sequence[float]) -> list[float]:
    """Times at all of `NODES`: beyond `sizes` they go on with the last slope.

    >>> _continued((1, 2, 3), (0.1, 0.12, 0.15))[-1]
    0.81
    """
    slope = max(0.0, times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
    return [*times, *(round(times[-1] + slope * (n - sizes[-1]), 9) for n in NODES[len(sizes) :])]


@torch.no_grad()
def length_prices(
    target: Target,
    drafter: PricedDrafter,
    tokens: int,
    temperature: float,
    rows: Sequence[int],
    done: Callable[[float], object] = lambda _: None,
) -> Prices:
    """Prices of a method's whole rounds by their length, for `PricedDrafter`: a size is so many depths and the root.

    Args:
        tokens: of a row, most.
        done: as for `measured_prices`.
    """
    longest, inner = drafter.longest, drafter.inner
    sizes = sorted({1 + length for length in (0, 1, 2, 4, 8, 16, longest) if length <= longest})
    # A stop policy that looks at the text would end its drafts early in this one; prompt lookup would find nothing to copy.
    whole: Sized | ModelDrafter = Sized(longest)
    if isinstance(inner, ModelDrafter):
        whole = type(inner)(inner.model, inner.expansion, FixedLength(longest))
    nodes = max(whole.budget(1 + longest), 1 + longest)
    room = min(tokens, target.context) - nodes - 2
    contexts = [n for n in CONTEXTS if n <= room] or [max(2, room)]
    share = Share()

    def times(count: int, context: int) -> tuple[float, ...]:
        batch = unread_batch(target, whole, count, context, temperature, nodes)

        def round_of(size: int) -> float:
            whole.limit = size - 1
            return forgotten_round(target, whole if size > 1 else NoDraft(), batch).total_s

        timed = [partial(round_of, size) for size in sizes]
        found = list(map(min, in_turn(timed, patience=PATIENCE_S, limit=LIMIT_S)))
        # A server that drafts nothing runs plain rounds among their like.
        alone = among_its_like(partial(round_of, 1))
        done(1 / len(contexts))
        return (min(alone, found[0]), *np.maximum.accumulate(found)[1:].tolist())

    with share.counting():
        verify = tuple(tuple(times(count, context) for context in contexts) for count in rows)
    nothing = ((0.0,) * len(contexts),) * len(rows)  # drafting is in the rounds
    return Prices(tuple(rows), tuple(contexts), tuple(sizes), verify, nothing, nothing, share=share.value)


@torch.no_grad()
def is_idle(target: Target, drafter: AutoDrafter, trial_s: float = 0.3) -> bool:
    """Do rounds have the processors for themselves? Of costs that are measured beside other programs none is kept, and it takes
    minutes."""
    share, rounds = Share(), FixedRounds(drafter)
    batch = unread_batch(target, rounds, 1, min(CONTEXTS[0], target.context // 2), 0.0, 2)
    rounds.shape = Shape(0, 1)
    with share.counting():
        while share.so_far < trial_s:
            forgotten_round(target, rounds, batch)
    return share.value >= LEAST_SHARE


def prices_file(
    target: Target,
    drafter: AutoDrafter | PricedDrafter,
    rows: Sequence[int] | None = None,
    tokens: int = TOKENS,
) -> Path | None:
    """Where the prices of this pair on this machine are kept, whether they are there or not; None: nowhere."""
    runner = drafter.runner if isinstance(drafter, AutoDrafter) else drafter.inner
    model = getattr(runner, "model", None)
    own = [drafter.length, *drafter.lengths] if isinstance(drafter, AutoDrafter) else [repr(drafter), tokens]
    facts = {
        "target": target.weights_digest,
        "dtype": str(target.dtype),
        "compiled": target.compiled is not None,
        "packed": target.packed,
        "device": str(target.device),
        "threads": torch.get_num_threads(),
        "draft": repr(model),
        "config": str(getattr(model, "config", None)),
        "steps": bool(getattr(model, "compiled", False)),
        "chain": [*own, list(rows or ROWS)],
        "rounds": ROUNDS,
        **environment(),
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    try:
        return cache_folder() / f"prices-{name}.json"
    except CompileError:
        return None


def are_kept(file: Path | None) -> bool:
    """Are there prices in this file? See `prices_file`."""
    return file is not None and file.is_file()


def prices_of(
    target: Target,
    drafter: AutoDrafter | PricedDrafter,
    say: Callable[[str], None] = print,
    again: bool = False,
    rows: Sequence[int] | None = None,
    tokens: int = TOKENS,
) -> list[Prices]:
    """Prices of this pair on this machine, greedily and at temperature 1: kept, or measured now, which is said.

    Args:
        again: measure in any case.
        rows: batch sizes; None: `ROWS`.
        tokens: of `length_prices`.
    """
    rows = rows or ROWS
    path = prices_file(target, drafter, rows, tokens)
    kept = None if path is None or again else _kept(path, say)
    if kept is not None:
        return kept
    usual = "some seconds" if rows == ALONE_ROWS else "half a minute, or more on a busy machine"
    say(f"measuring what a round costs on this machine, once for this pair: {usual}")
    measure: Callable[..., Prices] = (
        partial(measured_prices, target, drafter)
        if isinstance(drafter, AutoDrafter)
        else partial(length_prices, target, drafter, tokens)
    )
    with bar("measuring what a round costs", 2 * len(rows)) as shown:
        prices = [measure(heat, rows=rows, done=shown.advance) for heat in (0.0, 1.0)]
    if min(one.share for one in prices) < LEAST_SHARE:
        say("other programs were running, so these prices are not kept, and are measured again next time")
    elif path is not None:
        with contextlib.suppress(CheckpointError):
            write_atomic(path, lambda to: to.write_text(json.dumps([asdict(one) for one in prices])))
    return prices


def _kept(path: Path, say: Callable[[str], None]) -> list[Prices] | None:
    """The prices of an earlier process; None: there are none, or none that can be read, which is said."""
    try:
        greedy, sampled = (Prices.of_json(one) for one in json.loads(path.read_text()))
        with contextlib.suppress(OSError):
            path.touch()  # what nobody uses for long is removed
        return [greedy, sampled]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError):
        say(f"{path} is damaged, and is made anew")
    return None
