"""Programs on a GPU: what they launch, captured in CUDA graphs and replayed.

A graph replays all launches of a program at once, with no Python between them, on tensors of fixed sizes in fixed places. So
there is one for each combination of sizes that comes back. Caches are read and written where they are, other inputs are
copied to the graph's own, and outputs are copied out of it, because graphs share memory.

How many slots of a cache are read grows with the text; that number is rounded up, and masks hide what is past the end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import writes_of
from ..errors import first_line

MOST = 64  # graphs of a program that are kept
STORES = {"slots", "target_slots"}  # sizes of caches; which of them bounds how many slots are read:
BOUNDS = {"keys": "slots", "target_keys": "target_slots", "ends": "slots"}

Run = Callable[[list[Tensor]], list[Tensor]]


class Graphs:
    """A program's runs, by graphs from the second run of the same sizes on.

    Args:
        run: the program, of flat inputs.
        sizes: the dynamic sizes of its inputs, as `Program.make` gives them.
        say: told once if it cannot be captured; it runs without graphs then.
    """

    def __init__(self, run: Run, sizes: Any, say: Callable[[str], None]) -> None:
        self.run, self.say = run, say
        self.kept: OrderedDict[tuple[object, ...], _Graph | None] = OrderedDict()  # None: seen once
        self.eager = False
        named = [{axis: size.__name__ for axis, size in one.items()} for one in _leaves(sizes)]
        self.stores = {i for i, one in enumerate(named) if STORES & set(one.values())}
        # Of each input that tells by its length how many slots are read: a store, and the axis of its slots.
        place = {size: (i, axis) for i, one in enumerate(named) for axis, size in one.items() if size in STORES}
        self.reads = {i: place[BOUNDS[one[0]]] for i, one in enumerate(named) if one.get(0) in BOUNDS}

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """See `packages.Run`."""
        if self.eager:
            return self.run(inputs)
        slots = {i: _rounded(len(inputs[i]), inputs[store].shape[axis]) for i, (store, axis) in self.reads.items()}
        key = tuple(
            (one.shape, one.data_ptr()) if i in self.stores else slots.get(i) or one.shape
            for i, one in enumerate(inputs)
        )
        if key not in self.kept:  # rare sizes are not worth a graph
            self.kept[key] = None
            if len(self.kept) > MOST:
                self.kept.popitem(last=False)
            return self.run(inputs)
        graph = self.kept[key]
        if graph is None:
            try:
                graph = self.kept[key] = _Graph(self.run, inputs, self.stores, slots)
            except RuntimeError as error:
                self.eager = True
                self.say(f"a program cannot be captured as a CUDA graph and runs eagerly ({first_line(error)})")
                return self.run(inputs)
        self.kept.move_to_end(key)
        return graph(inputs)


class _Graph:
    """One graph, and the tensors that it reads and writes."""

    def __init__(self, run: Run, inputs: list[Tensor], stores: set[int], slots: dict[int, int]) -> None:
        fixed = list(inputs)
        for i in set(range(len(inputs))) - stores:
            fixed[i] = torch.arange(slots[i], device=inputs[i].device) if i in slots else inputs[i].clone()
        # Its tensor of each input that is copied, and what was copied last, as it was then.
        copied = set(range(len(inputs))) - stores - set(slots)
        self.copied = [(i, fixed[i], inputs[i], writes_of(inputs[i])) for i in copied]
        self.numbers = [fixed[i] for i in slots]  # the graph reads them: they must not be freed
        self.replay, self.outputs = capture_graph(lambda: run(fixed))

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        for number, (i, own, last, version) in enumerate(self.copied):
            given, now = inputs[i], writes_of(inputs[i])
            if given is not last or now != version or now is None:
                own.copy_(given, non_blocking=True)
                self.copied[number] = i, own, given, now
        self.replay()
        return [one.clone() for one in self.outputs]


def capture_graph(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """Capture what `run` launches; how to replay it, and the outputs that a replay writes.

    Raises:
        RuntimeError: it waits for the device, or copies from the host.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):
        outputs = run()
    return graph.replay, outputs


@cache
def _pool() -> Any:
    """The memory of all graphs: none runs beside another."""
    return torch.cuda.graph_pool_handle()


def _rounded(slots: int, most: int) -> int:
    """Slots to read, rounded up to one of eight sizes an octave, 128 apart at least, and at most all.

    >>> [_rounded(slots, 9000) for slots in (1, 129, 1025, 2049, 4097, 8999)]
    [128, 256, 1152, 2304, 4608, 9000]
    """
    step = max(128, (1 << (slots.bit_length() - 1)) // 8)
    return min(-(-slots // step) * step, most)


def flat_run(module: nn.Module, example: Any) -> Run:
    """A module called with flat inputs; those of `example` tell how they are nested."""

    def run(inputs: list[Tensor]) -> list[Tensor]:
        found = module(*_like(example, iter(inputs)))
        return [found] if isinstance(found, Tensor) else list(found)

    return run


def _leaves(nested: Any) -> list[Any]:
    return [leaf for one in nested for leaf in (_leaves(one) if isinstance(one, list | tuple) else [one])]


def _like(nested: Any, flat: Iterator[Tensor]) -> Any:
    """The structure of `nested` with other leaves."""
    parts = [_like(one, flat) if isinstance(one, list | tuple) else next(flat) for one in nested]
    return parts if isinstance(nested, list) else tuple(parts)
