"""Training on several processes, which torchrun starts: each takes its rows of every batch, and together they take the steps
that one process would take.

    torchrun --nproc-per-node 4 -m glidecape train path/to/model --data texts.jsonl --output draft --tokens 4e6

The draft, its gradients and its optimizers are whole in every process: gradients are averaged before each step. The frozen
target's layers are split over the processes by PyTorch's FSDP2, and gathered one after another while it runs. What is drawn
at random is drawn for the whole batch; a mean over positions is a mean over those of all processes. So the number of
processes changes nothing but the order of sums, and a run resumes on another number of them.

Without a group of processes all functions do nothing, or what they do for a group of one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import GlideCapeError, InputError, first_line
from ..progress import be_quiet
from ..target.target import Target

T = TypeVar("T")


class RankError(GlideCapeError):
    """Another process of this training ended."""


@dataclass(frozen=True)
class Ranks:
    """This process and how many there are."""

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Does this process write and speak for all?"""
        return self.number == 0

    def share(self, rows: int) -> int:
        """Rows of a process in a batch of so many.

        Raises:
            InputError: they cannot be shared evenly.
        """
        if rows % self.count:
            raise InputError(f"{self.count} processes cannot share {rows} rows evenly: make --rows a multiple of it")
        return rows // self.count


def ranks() -> Ranks:
    """Of this process; one of one where no group was begun."""
    if not dist.is_initialized():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


def started_together() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_several(command: str) -> None:
    """Raises InputError where torchrun started several processes for a command that runs in one."""
    if started_together() > 1:
        raise InputError(f"{command} runs in one process: start it without torchrun")


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, until the end of the block: NCCL where each has a GPU, else gloo. Only the
    first one shows how far it is.

    Raises:
        RankError: another process ended, in the block.
    """
    if started_together() == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        first_machine.cache_clear()
        be_quiet(not ranks().first)
        yield
    except RuntimeError as error:
        if not _says_that_one_left(error):
            raise
        raise RankError(
            "another process of this training ended, for a reason that it says itself: mend that, and give the same command "
            "again to resume"
        ) from None
    finally:
        first_machine.cache_clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def _says_that_one_left(error: RuntimeError) -> bool:
    words = first_line(error).lower()
    return isinstance(error, dist.DistError) or any(
        one in words for one in ("connection closed", "connection reset", "broken pipe", "timed out", "gloo")
    )


def own_rows(whole: Tensor) -> Tensor:
    """This process's rows of something that was made for the whole batch, `(rows, …)`."""
    here = ranks()
    rows = here.share(whole.shape[0])
    return whole[here.number * rows : (here.number + 1) * rows]


def mean_count(count: int) -> float:
    """The mean over all processes of a number of positions, 1 at least: what a process divides its sum by, so that the mean of
    all processes' quotients is the mean over all positions."""
    if ranks().count == 1:
        return max(1, count)
    total = torch.tensor(float(count), device=_device())
    dist.all_reduce(total)
    return max(1.0, float(total)) / ranks().count


def mean_of(values: Sequence[float]) -> list[float]:
    """Means over all processes."""
    if ranks().count == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(total)
    return [float(value) for value in total / ranks().count]


def largest_of(values: Sequence[float]) -> list[float]:
    """The largest of each over all processes: what one has heard, such as a signal, all act on."""
    if ranks().count == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [float(value) for value in largest]


def average_gradients(module: nn.Module) -> None:
    """Give every process the mean of all gradients, in one transfer."""
    if ranks().count == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([one.flatten() for one in gradients])
    dist.all_reduce(flat)
    flat /= ranks().count
    for one, mean in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
        one.copy_(mean.view_as(one))


def from_first(value: T) -> T:
    """What the first process has, such as a checkpoint that it read; tensors come on the CPU."""
    if ranks().count == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


@dataclass(frozen=True)
class Writers:
    """The processes that share the writing and reading of a state: those of the first machine, which has its folder.

    Attributes:
        member: is this process one of them?
        group: None: there is one alone.
    """

    member: bool = True
    group: dist.ProcessGroup | None = None


@cache
def first_machine() -> Writers:
    """All processes ask for it at the same time: making a group takes all of them."""
    here, count = ranks(), of_machine().count
    member = here.number < count
    if count == 1:
        return Writers(member)
    return Writers(member, dist.group.WORLD if count == here.count else dist.new_group(range(count)))


def to_other_machines(tensors: Iterable[Tensor]) -> None:
    """Fill them on all machines but the first with what the first process has."""
    if of_machine().count == ranks().count:
        return
    for tensor in tensors:
        moved = tensor.to(_device())
        dist.broadcast(moved, 0)
        tensor.copy_(moved)


def shard(target: Target) -> None:
    """Split the frozen layers of a target over the processes. Its embedding and its head stay whole: drafts use them.

    Source: PyTorch's FSDP2, `fully_shard`, a layer at a time.
    """
    if ranks().count == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    target.keep_digest()  # it names the weights, which no process has whole from here on
    mesh = init_device_mesh(target.device.type, (ranks().count,))
    for layer in _decoder_layers(target):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def _decoder_layers(target: Target) -> Sequence[nn.Module]:
    """The layers of its decoder; none where the model does not keep them in one list."""
    count = target.text_config.num_hidden_layers
    lists = (one for one in target.model.modules() if isinstance(one, nn.ModuleList) and len(one) == count)
    return list(next(lists, []))


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def of_machine() -> Ranks:
    """This process among those of its machine."""
    here = ranks()
    if here.count == 1:
        return here
    return Ranks(int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", here.count)))


def machine_number() -> int:
    """Of this machine among those of the training."""
    return int(os.environ.get("GROUP_RANK", "0"))


def together(work: Iterable[object], meet_every_s: float = 20.0) -> None:
    """Do the steps of `work`, and return when all processes have done theirs. They meet every few seconds, so that none waits
    longer for another than its network allows, and one that fails ends all."""
    steps, left = iter(work), True
    while True:
        until = time.monotonic() + meet_every_s
        while left and time.monotonic() < until:
            left = next(steps, steps) is not steps
        if not largest_of([float(left)])[0]:
            return
