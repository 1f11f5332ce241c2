"""The state of a training in its folder: written by all processes of a machine together, read by any number of them.

    training/*.safetensors   weights and optimizer moments: a file for each process that wrote
    training/run.json        clock, identity, and a checksum of each of the files; written last
    training-before/         the state that `training` replaced, in case the disk damages that one

PyTorch's distributed checkpoints (`torch.distributed.checkpoint`, DCP) share the tensors among the processes, and give each
reader what it asks for by name, however many wrote. Their safetensors storage is used, because the usual one is a pickle, which
could run code when it is read.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..drafts.card import STATE
from ..errors import CheckpointError, first_line
from ..files import not_written, remove, remove_leftovers
from ..progress import note
from .loop import WRITTEN, Clock, differences
from .ranks import first_machine, from_first, ranks, to_other_machines

BEFORE, RUN = "training-before", "run.json"
OLD = "training.pt"  # of versions that wrote one file
MODULE, MOMENTS = "module.", "moments."  # names of tensors begin so
PIECE = 2**24  # bytes that are read at once
Description = dict[str, tuple[torch.Size, torch.dtype]]


def save_state(
    folder: Path,
    module: nn.Module,
    made: list[torch.optim.Optimizer],
    clock: Clock,
    identity: dict[str, Any] | None = None,
) -> None:
    """Write weights, optimizer moments and clock: all that a resumed run needs to go on bit for bit. The processes of the first
    machine write, each its share of the tensors.

    Raises:
        CheckpointError: the disk is full or the folder not writable; the last state is kept.
    """
    fresh = Path(from_first(str(folder / f".{STATE}.{os.getpid()}")))
    if not first_machine().member:
        return
    try:
        _write_tensors(fresh, module, made)
        if ranks().first:
            run = {"clock": vars(clock), "identity": identity or {}, "files": _checksums(fresh)}
            with (fresh / RUN).open("w") as file:
                json.dump(run, file)
                file.flush()
                os.fsync(file.fileno())
            _put_in_place(fresh, folder)
    except OSError as error:
        raise not_written(folder / STATE, error) from None
    finally:
        if ranks().first:
            remove(fresh)


def _write_tensors(fresh: Path, module: nn.Module, made: list[torch.optim.Optimizer]) -> None:
    import torch.distributed.checkpoint as dcp

    fresh.mkdir(parents=True, exist_ok=True)
    with _by_these_processes() as how:
        dcp.save(
            _tensors(module, made),
            storage_writer=dcp.HuggingFaceStorageWriter(str(fresh), save_distributed=True),
            **how,
        )


def _put_in_place(fresh: Path, folder: Path) -> None:
    """At any moment one of the two states is whole."""
    state, before = folder / STATE, folder / BEFORE
    if state.exists():
        remove(before)
        os.replace(state, before)
    os.replace(fresh, state)


def load_state(
    folder: Path, module: nn.Module, made: list[torch.optim.Optimizer], identity: dict[str, Any] | None = None
) -> Clock:
    """Take up the run saved in `folder` by `save_state`, or begin one; returns its clock.

    `identity` is what makes a run the one it is (recipe, data). A budget is no part of it: a run may be prolonged.

    Raises:
        CheckpointError: the state is torn, belongs to another module, or to a run with another identity.
    """
    # The folder may lie on the first process's machine alone.
    found = from_first(_found(folder) if ranks().first else None)
    if found is None:
        return Clock()
    path, run, described = found
    if other := differences(run["identity"], identity or {}):
        raise CheckpointError(
            f"the run in {folder} was started with {'; '.join(other)}: give the same options, or name another --output"
        )
    try:
        _read_tensors(path, described, module, made)
        return Clock(**run["clock"])
    except (OSError, KeyError, TypeError) as error:
        raise _cannot_resume(path, error) from None


def identity_in(folder: Path) -> dict[str, Any] | None:
    """The identity of the run that is saved in `folder`; None: there is none.

    Raises:
        CheckpointError: its state is torn.
    """
    found = _found(folder)
    return None if found is None else dict(found[1]["identity"])


def forget_before(folder: Path) -> None:
    """Of a run that has ended, its last state is enough."""
    remove(folder / BEFORE)


def forget(folder: Path) -> None:
    """Delete the state: what comes later begins anew. A kill leaves all of it or nothing."""
    forget_before(folder)
    gone = folder / f".{STATE}.{os.getpid()}"
    if (folder / STATE).exists():
        os.replace(folder / STATE, gone)
    remove(gone)


def _found(folder: Path) -> tuple[Path, dict[str, Any], Description] | None:
    """Where the last whole state lies, what its run.json holds, and its tensors; None where there is no state."""
    remove_leftovers(folder, WRITTEN)
    damaged: list[tuple[Path, Exception]] = []
    for path in (folder / STATE, folder / BEFORE):
        if not path.exists():
            continue
        try:
            run, described = _described(path)
        except Exception as error:  # whatever a torn file makes of it
            damaged.append((path, error))
            continue
        if damaged:
            note(
                f"{damaged[0][0]} is damaged ({type(damaged[0][1]).__name__}): resuming from the save before it, step "
                f"{run['clock']['step']}"
            )
            remove(damaged[0][0])  # else the next save would let it replace the good one
        return path, run, described
    if damaged:
        raise _cannot_resume(*damaged[0])
    if (folder / OLD).exists():
        raise CheckpointError(
            f"{folder / OLD} is the state of a run of an older version, which is not read: name another --output"
        )
    return None


def _described(path: Path) -> tuple[dict[str, Any], Description]:
    """What the run.json of a state holds, and the shape and type of each tensor.

    Raises:
        OSError, ValueError, KeyError: it is not whole.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    run = json.loads((path / RUN).read_text())
    if _checksums(path) != run["files"]:
        raise ValueError("its files are not those that were written")
    tensors: dict[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return run, {name: (one.size, one.properties.dtype) for name, one in tensors.items()}


def _checksums(path: Path) -> dict[str, int]:
    found = {}
    for one in sorted(path.glob("*.safetensors")):
        found[one.name] = 0
        with one.open("rb") as file:
            while piece := file.read(PIECE):
                found[one.name] = zlib.crc32(piece, found[one.name])
    return found


def _read_tensors(path: Path, described: Description, module: nn.Module, made: list[torch.optim.Optimizer]) -> None:
    import torch.distributed.checkpoint as dcp

    _make_room(described, module, made)
    tensors = _tensors(module, made)
    if tensors.keys() != described.keys():
        raise KeyError("it holds other tensors")
    if first_machine().member:
        with _by_these_processes() as how:
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), **how)
    to_other_machines(tensors.values())


def _tensors(module: nn.Module, made: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All that is saved, by name: where it lies, so that reading fills it. Tied weights have one name."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found, seen = {}, set()
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            found[MODULE + name] = value.detach()
        seen.add(id(value))
    for optimizer in made:
        for parameter, moments in optimizer.state.items():
            for key, value in moments.items():
                found[f"{MOMENTS}{names[id(parameter)]}.{key}"] = value
    return found


def _make_room(described: Description, module: nn.Module, made: list[torch.optim.Optimizer]) -> None:
    """Give optimizers that took no step the moments of those that were saved, for reading to fill."""
    parameters = dict(module.named_parameters())
    owners = {id(p): optimizer for optimizer in made for group in optimizer.param_groups for p in group["params"]}
    for name, (size, dtype) in described.items():
        if not name.startswith(MOMENTS):
            continue
        of, _, key = name.removeprefix(MOMENTS).rpartition(".")
        parameter = parameters[of]
        # Moments lie as their parameter does; AdamW's count of steps is a single number on the CPU.
        like = parameter.ndim and size == parameter.shape
        room = torch.zeros_like(parameter, dtype=dtype) if like else torch.zeros(size, dtype=dtype)
        owners[id(parameter)].state[parameter][key] = room.detach()


@contextmanager
def _by_these_processes() -> Iterator[dict[str, Any]]:
    """What DCP is told of the processes that take part.

    Raises:
        OSError: one of them failed.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    group = first_machine().group
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
        try:
            yield {"process_group": group, "no_dist": group is None}
        except CheckpointException as error:
            cause = error.failures[min(error.failures)][0]
            if isinstance(cause, OSError) or not isinstance(cause, Exception):  # such as Ctrl-C
                raise cause from None
            raise OSError(first_line(cause)) from None


def _cannot_resume(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot resume from {path} ({type(error).__name__}): delete it to start again, or name another --output"
    )
