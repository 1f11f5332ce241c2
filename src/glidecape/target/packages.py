"""Compiled programs, kept in the user's own cache folder: exported and compiled once, loaded in a fraction of a second.

A package is machine code that runs in this process. So packages are read from the user's own folder alone, which nobody
else may write to; nothing comes from a model folder or the Hub. A package is named by a digest of all that it depends on,
and kept beside a digest of its content: a torn one is made anew.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import inspect
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from filelock import FileLock
from torch import Tensor, nn

from ..compat import build_library, compile_for_gpu, compile_to, export_program, load_for_gpu, load_package
from ..core import pages
from ..errors import GlideCapeError, first_line
from ..files import FOLDER, remove, remove_leftovers, user_folder, write_atomic
from ..progress import bar
from .graphs import Graphs, Run, flat_run
from .operators import FUNCTIONS, KERNELS, is_panels
from .streamed import share_inputs, streamed_layers

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)  # that our kernels compute in
USUAL_S = 60.0  # of compiling a program
UNUSED_S = 60 * 86_400.0  # after so long a package that nobody loaded is removed
WORKSPACE, HEADERS = "compiling", "precompiled_headers"  # folders
LOADING = threading.Lock()  # while a program is loaded, layers are exchanged and weights moved
SOURCES = ("core", "target", "drafts", "compat.py")  # what a compiled program is made of


class CompileError(GlideCapeError):
    """A program that cannot be compiled here, or a cache folder that cannot be trusted: decoding goes on eagerly."""


def cache_folder() -> Path:
    """The folder of packages, made if it is missing.

    Raises:
        CompileError: it cannot be made, or others may write to it.
    """
    folder = user_folder() / "packages"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise CompileError(f"no place for compiled programs at {folder} ({error.strerror}): set {FOLDER}") from None
    if os.name == "posix" and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise CompileError(
            f"others may write to {folder}, and what is in it would be run: chmod 700 it, or set {FOLDER} to a folder of yours"
        )
    return folder


def have_compiler() -> bool:
    """Is there a C++ compiler?"""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))


@cache
def environment() -> dict[str, str]:
    """What every package, and every measured time, depends on besides its model."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for source in SOURCES:
        for path in sorted((root / source).rglob("*.[pch]*")) or [root / source]:
            digest.update(path.read_bytes())
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    cpu = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return {
        "sources": digest.hexdigest(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "machine": f"{platform.system()} {platform.machine()} {platform.processor()}",
        "cpu": hashlib.sha256(cpu.encode()).hexdigest(),
    }


class Weights:
    """The parameters and buffers of a program's module, which the program reads where they are.

    What several programs read, such as a draft's step and its chains, lies in memory once: while one of them is there, its
    weights are found again by their content.

    Attributes:
        named: by name.
        digests: sha256 of each, what it is and its values.
        unread: those that no program reads yet, so that they may be moved.
    """

    _kept: ClassVar[WeakValueDictionary[str, Tensor]] = WeakValueDictionary()

    def __init__(self, module: nn.Module) -> None:
        found = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        own = {name: tensor.detach() for name, tensor in sorted(found, key=lambda one: one[0])}
        self.digests = {name: _digest_of(tensor) for name, tensor in own.items()}
        self.unread: list[Tensor] = []
        self.named = {name: self._once(self.digests[name], tensor) for name, tensor in own.items()}

    @property
    def digest(self) -> str:
        """sha256 of all, names and values."""
        return hashlib.sha256(json.dumps(self.digests).encode()).hexdigest()

    def joined(self, parts: dict[str, list[str]]) -> dict[str, Tensor]:
        """By name, weights that are made of others, one after another. Then the panels that are read lie together in memory."""
        made = {name: self._joined(names) for name, names in parts.items()}
        read = {**self.named, **made}
        for name in chain.from_iterable(parts.values()):
            read.pop(name, None)
        new = {id(one) for one in self.unread}
        small = [one for one in read.values() if id(one) in new and is_panels(one) and one.nbytes < pages.WORTH]
        if small:
            pages.together(list(dict.fromkeys(small)))
        self.unread.clear()
        return made

    def _joined(self, names: list[str]) -> Tensor:
        parts = [self.named[name] for name in names]
        whole = pages.zeros(sum(len(part) for part in parts), *parts[0].shape[1:], dtype=parts[0].dtype)
        return self._once(" ".join(self.digests[name] for name in names), torch.cat(parts, out=whole))

    def _once(self, key: str, tensor: Tensor) -> Tensor:
        kept = self._kept.get(key)
        if kept is not None and torch.equal(kept, tensor):  # nobody has changed it since
            return kept
        self._kept[key] = tensor
        self.unread.append(tensor)
        return tensor


def _digest_of(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}".encode())
    digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def source_digest(module: nn.Module) -> str:
    """sha256 of the source of a module's class: a model may bring code of its own."""
    try:
        return hashlib.sha256(inspect.getsource(type(module)).encode()).hexdigest()
    except (OSError, TypeError):
        return type(module).__qualname__


@dataclass(frozen=True)
class Program:
    """What is to be compiled.

    Attributes:
        name: for messages.
        facts: all that it depends on besides weights and environment.
        modules: whose weights it reads, as it does those of the modules in attributes of `holders`. Linear layers are
            streamed ones meanwhile.
        make: gives the program, example inputs, and their dynamic sizes.
        in_8_bits: may linear layers round their weights to 8 bits? A draft's may: the output stays the target's.
        device: where it is to run. A CPU's program is compiled; a GPU's is captured in CUDA graphs, see `graphs`.
    """

    name: str
    facts: dict[str, Any]
    modules: tuple[nn.Module, ...]
    make: Callable[[], tuple[Any, ...]]
    holders: tuple[Any, ...] = ()
    in_8_bits: bool = False
    device: torch.device = CPU

    @property
    def parts(self) -> list[nn.Module]:
        """All modules whose weights it uses."""
        held = [part for one in self.holders for part in vars(one).values() if isinstance(part, nn.Module)]
        return [*self.modules, *held]


def compiled(program: Program, mode: str, say: Callable[[str], None]) -> Run | None:
    """The compiled program, made if it is not kept yet; two processes make it once. None where it cannot be.

    On a GPU it is captured in CUDA graphs while decoding, compiled or not.

    Args:
        mode: "on"; "kept": only if it is kept, and without a word if not.
        say: told in one line what takes time, or why there is none.
    """
    tell: Callable[[str], None] = say if mode == "on" else lambda _: None
    try:
        if program.device.type == "cpu":
            with LOADING:
                return _on_cpu(program, mode, tell)
        return _on_gpu(program, mode, tell)
    except (OSError, RuntimeError, CompileError) as error:
        tell(f"{program.name} is not compiled: {_reason(error)}")
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"it cannot be kept in the cache folder ({error.strerror or error})"
    return str(error) if isinstance(error, CompileError) else f"it cannot be loaded ({first_line(error)})"


def _on_cpu(program: Program, mode: str, say: Callable[[str], None]) -> Run | None:
    """A CPU's program, from its package; None if it is not kept and may not be made.

    Raises:
        CompileError, OSError, RuntimeError: it cannot be made, kept or loaded.
    """
    other = {one.dtype for part in program.parts for one in part.parameters() if one.is_floating_point()} - set(DTYPES)
    if other:
        names = ", ".join(sorted(str(one).removeprefix("torch.") for one in other))
        raise CompileError(f"its weights are {names}, which programs do not compute in: --dtype float32 or bfloat16")
    facts = program.facts | environment()
    folder, kind = cache_folder(), _name(facts)
    if mode == "kept" and not any(folder.glob(f"{kind}-*.pt2")):
        return None  # the weights, which take a while to read, need not be asked
    with streamed_layers(*program.modules, holders=program.holders, in_8_bits=program.in_8_bits):
        try:
            weights = Weights(program.make()[0])
        except Exception as error:  # quantized weights are tensors of other libraries
            raise CompileError(f"its weights cannot be read ({first_line(error)})") from None
        facts["weights"] = weights.digest
        path = folder / f"{kind}-{weights.digest[:24]}.pt2"
        if mode == "kept" and not _whole(path):
            return None
        if not _load_kernels(folder, make=mode != "kept"):
            return None

        def compile(exported: Any, to: Path) -> None:
            joined = share_inputs(exported)
            with _workspace(folder) as own:
                compile_to(str(to), exported, FUNCTIONS, joined, own)

        _make(program, facts, path, compile, say)
    return load_package(str(path), weights.named, weights.joined)


def _on_gpu(program: Program, mode: str, say: Callable[[str], None]) -> Run:
    """A GPU's program, in graphs; where it is not compiled, what it launches eagerly.

    Raises:
        CompileError: another device, or several.
    """
    if program.device.type != "cuda":
        raise CompileError(f"programs are made for CPUs and CUDA, not for devices of type {program.device.type}")
    if len({one.device for part in program.parts for one in part.parameters()} | {program.device}) > 1:
        raise CompileError("its weights lie on several devices")
    gpu = torch.cuda.get_device_properties(program.device)
    facts = {"gpu": f"{gpu.name} {gpu.major}.{gpu.minor}", "device": str(program.device), "cuda": torch.version.cuda}
    return _in_graphs(program, facts, mode, say)


def _in_graphs(program: Program, gpu: dict[str, Any], mode: str, say: Callable[[str], None]) -> Run:
    """The same, where it depends on what is in `gpu`, too."""
    module, example, sizes = program.make()
    run = flat_run(module, example)
    try:
        facts = program.facts | environment() | gpu | {"weights": shapes_digest(module)}
        path = cache_folder() / f"{_name(facts)}.gpu"
        if mode == "on":
            compile: Callable[[Any, Path], None] = lambda exported, to: compile_for_gpu(to, exported, path.parent)  # noqa: E731
            _make(program, facts, path, compile, say)
        if _whole(path):
            run = load_for_gpu(path, module, path.parent)
    except (OSError, RuntimeError, CompileError) as error:
        say(f"{program.name} is not compiled, its launches are captured as they are: {_reason(error)}")
    return Graphs(run, sizes, say)


def shapes_digest(module: nn.Module) -> str:
    """sha256 of what all parameters and buffers are, but for their values, for a program that reads them where they are.

    Raises:
        CompileError: a weight is a tensor of another library.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((*module.named_parameters(), *module.named_buffers()), key=lambda one: one[0]):
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise CompileError(f"{name} is a {type(tensor).__name__}")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    return digest.hexdigest()


def _name(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _make(
    program: Program,
    facts: dict[str, Any],
    path: Path,
    compile: Callable[[Any, Path], None],
    say: Callable[[str], None],
) -> None:
    """Make its package, unless a process has.

    Args:
        compile: writes an exported program to a file.
    """
    with FileLock(path.with_suffix(".lock")):
        if _whole(path):
            return
        started = time.monotonic()
        say(f"compiling {program.name}, once: it takes half a minute to two minutes and is kept in {path.parent}")

        def write(to: Path) -> None:
            module, inputs, dynamic = program.make()
            with torch.no_grad():
                exported = export_program(module, inputs, dynamic)
                compile(exported, to)

        _remove_unused(path.parent)
        with bar(f"compiling {program.name}", seconds=USUAL_S, ends=False):
            _keep(path, program.name, facts, write)
        say(f"compiled {program.name} in {time.monotonic() - started:.0f} s")


@contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """This process's folder for what the compiler makes on the way. Only headers outlive the block, which another program would
    have to read again, and they end with the process."""
    own = _own_workspace(folder)
    try:
        yield own
    finally:
        for one in (own / "inductor").glob("*"):
            if one.name != HEADERS:
                remove(one)


@cache
def _own_workspace(folder: Path) -> Path:
    remove_leftovers(folder, (WORKSPACE,))
    own = folder / f".{WORKSPACE}.{os.getpid()}"
    own.mkdir(exist_ok=True)
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def _remove_unused(folder: Path) -> None:
    """Remove what was not loaded for a long time: each version of GlideCape, PyTorch and the model has packages of its own."""
    for note in folder.glob("*.json"):
        with suppress(OSError):  # another process removes it, too
            if time.time() - note.stat().st_mtime > UNUSED_S:
                for one in folder.glob(f"{note.stem}.*"):
                    one.unlink(missing_ok=True)


def _load_kernels(folder: Path, make: bool) -> bool:
    """Load the functions of `operators` that programs call; False where they were not compiled yet and may not be."""
    facts = environment()
    path = folder / f"kernels-{_name(facts)}.so"
    if not make and not _whole(path):
        return False
    with FileLock(path.with_suffix(".lock")):
        if not _whole(path):
            with _workspace(folder) as own:
                _keep(path, "kernels", facts, lambda to: build_library(KERNELS, to, own))
    _load_library(path)
    return True


@cache
def _load_library(path: Path) -> None:
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _keep(path: Path, name: str, facts: dict[str, Any], write: Callable[[Path], None]) -> None:
    """A new file at `path`, whole or not at all, beside a digest of its content."""
    if not have_compiler():
        raise CompileError("there is no C++ compiler here (g++ or clang++)")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        note = {"name": name, "sha256": _digest(temporary), "facts": facts}
        os.replace(temporary, path)
        write_atomic(path.with_suffix(".json"), lambda to: to.write_text(json.dumps(note, indent=1, default=str)))
    except (OSError, CompileError):
        raise
    except Exception as error:  # exporters and compilers raise anything
        raise CompileError(f"{type(error).__name__}: {first_line(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _whole(path: Path) -> bool:
    """Is there a package at `path`, as it was written? Then it counts as used now."""
    try:
        note = json.loads(path.with_suffix(".json").read_text())
        whole = bool(note["sha256"] == _digest(path))
        if whole:
            with suppress(OSError):  # a folder that may only be read
                path.with_suffix(".json").touch()
        return whole
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
