"""Where figures come from: command, commit, versions, machine, threads; and how much memory was in use."""

from __future__ import annotations

import datetime
import hashlib
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from ..target.target import Target


def commit() -> str:
    """The checkout's commit, "-dirty" with changes in the code; the installed version outside a checkout."""
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    # Elsewhere the repository around the package is somebody else's.
    if package == root / "src" / "glidecape" and (root / ".git").exists():
        found = _git(root, "describe", "--always", "--abbrev=9", "--exclude=*")
        if found:
            return found + ("-dirty" if _git(root, "status", "--porcelain", "--", str(package)) else "")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"glidecape {version('glidecape')}"
    except PackageNotFoundError:
        return "unknown"


def _git(root: Path, *words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def processor(device: torch.device) -> str:
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names[0] if names else platform.processor()) or platform.machine()


def circumstances(target: Target) -> dict[str, Any]:
    """What figures depend on beside the settings; part of a run's identity."""
    import transformers

    return {
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": processor(target.device),
        "device": str(target.device),
        "dtype": str(target.dtype).removeprefix("torch.")
        + (f", {target.quantized} weights" if target.quantized else ""),
        "threads": torch.get_num_threads(),
    }


def session(command: str) -> dict[str, str]:
    """One start of a run: the command and when."""
    return {"command": command, "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


def digest_of_model(name: str) -> str:
    """sha256 of the weights and settings in a model folder; the name itself where it is a Hub model's."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".bin")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


class Peak:
    """Most memory in use since `reset`: the GPU's allocator, or on Linux the process's resident memory.

    On Linux the kernel's own mark is lowered by writing to /proc/self/clear_refs; where that is not allowed, `read` gives
    None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.works = device.type == "cuda" or self._lower()

    @staticmethod
    def _lower() -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.works:
            self._lower()

    def read(self) -> int | None:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if not self.works:
            return None
        lines = Path("/proc/self/status").read_text().splitlines()
        found = [line.split() for line in lines if line.startswith("VmHWM:")]
        return int(found[0][1]) * 1024 if found else None
