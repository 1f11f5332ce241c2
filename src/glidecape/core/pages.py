"""Memory in huge pages, where the system has them.

A decoding step reads all weights and the whole cache once. In pages of 4 KiB the processor then looks up an address every
4 KiB, which takes as long as reading them does: in pages of 2 MiB weights in bfloat16 are read 1.6 times as fast (dev/LOG.md).
Linux gives such pages to programs that ask for them; elsewhere the memory is PyTorch's own.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

HUGE = 2 * 1024 * 1024
WORTH = 2 * HUGE  # bytes from which rounding up to whole pages does not matter
LINE = 64  # bytes that a processor reads at once


def zeros(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """`torch.zeros`, in huge pages if it is large and on the CPU.

    >>> zeros(4096, 4096, dtype=torch.bfloat16).count_nonzero().item()
    0
    """
    size = prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < WORTH or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(*shape, dtype=dtype, device=device)
    room = -(-size // HUGE) * HUGE + HUGE
    held = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # zeros, as the system gives them
    with suppress(OSError):  # a kernel without huge pages: these are pages like any others
        held.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(held, dtype=torch.uint8)  # keeps `held`
    first = -whole.data_ptr() % HUGE
    return whole[first : first + size].view(dtype).view(shape)


@torch.no_grad()
def together(tensors: Sequence[Tensor]) -> None:
    """Move dense tensors on the CPU into one piece of memory, in this order. Each stays the same object, with the same numbers.

    In pages of their own small tensors would lie in pages of 4 KiB.
    """
    sizes = [-(-one.nbytes // LINE) * LINE for one in tensors]
    room = zeros(sum(sizes), dtype=torch.uint8)
    for one, end, size in zip(tensors, accumulate(sizes), sizes, strict=True):
        first = end - size
        to = room[first : first + one.nbytes].view(one.dtype).view(one.shape).copy_(one)
        one.set_(to.untyped_storage(), to.storage_offset(), to.shape, to.stride())
