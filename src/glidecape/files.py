"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .errors import CheckpointError, first_line

# A full disk is an OSError to Python, a RuntimeError to torch.save, and to safetensors an error of its own.
WRITING = (OSError, RuntimeError, SafetensorError)
FOLDER = "GLIDECAPE_CACHE"  # environment variable that names another folder for what is kept
EXPORT = "export"  # temporary folders are called .export.PID


def user_folder() -> Path:
    """Where this user's compiled programs and measured times are kept; it may not be there yet."""
    base = os.environ.get("XDG_CACHE_HOME") or ("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return Path(os.environ.get(FOLDER) or Path(base) / "glidecape").expanduser()


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename: a kill, a full disk or a power cut leaves the old
    file whole.

    Raises:
        CheckpointError: the disk is full or the folder not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        _settle(temporary, path)
    except WRITING as error:
        raise not_written(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], object], last: str) -> None:
    """Let `write` fill a temporary folder inside `folder`, then move its files into place, `last` the last of them.

    Readers see whole files only; those that look for `last` first see all of one version or the old one's beginnings.

    Raises:
        CheckpointError: the disk is full or the folder not writable.
    """
    temporary = folder / f".{EXPORT}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        write(temporary)
        for path in sorted(temporary.iterdir(), key=lambda path: (path.name == last, path.name)):
            _settle(path, folder / path.name)
    except WRITING as error:
        raise not_written(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def only_writer(out: Path, folder: bool = True) -> Iterator[None]:
    """While it lasts, no other process that asks here writes to the folder `out`, or file. A killed one frees it.

    Raises:
        CheckpointError: another process does already, `out` is a file where a folder is wanted or the other way round, or
            the folder above is not writable.
    """
    if out.exists() and out.is_dir() != folder:
        there, wanted = ("file", "folder") if folder else ("folder", "file")
        raise CheckpointError(f"{out} is a {there}, and a {wanted} is to be written: name another --output")
    path = out.absolute().with_name(f".{out.absolute().name}.lock")
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lock that cannot be made looks like one that is held, so writing is tried first.
        with tempfile.TemporaryFile(dir=out if out.is_dir() else path.parent):
            pass
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"another run is writing to {out}: wait until it has ended, or name another --output"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {out} ({error.strerror or first_line(error)}): name another --output"
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def remove_leftovers(folder: Path, names: tuple[str, ...]) -> None:
    """Delete temporary files and folders of these names whose writers were killed: `.NAME.PID` where no process of that
    number lives."""
    for name in (*names, EXPORT):
        for path in folder.glob(f".{name}.*"):
            pid = path.suffix[1:]
            if not pid.isdigit() or _lives(int(pid)):
                continue
            remove(path)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _settle(temporary: Path, path: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        return
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())  # else a power cut may keep the new name and lose the content
    os.replace(temporary, path)


def not_written(path: Path, error: Exception) -> CheckpointError:
    """What is said of a file or folder that could not be replaced."""
    reason = error.strerror if isinstance(error, OSError) else None
    return CheckpointError(f"could not write {path} ({reason or first_line(error)}); the last good one is kept")


def _lives(pid: int) -> bool:
    if os.name != "posix":
        return True  # there, asking would be killing
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's
    return True
