"""What a training saved of itself, as tests look at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from glidecape.train.state import BEFORE, MODULE, RUN, STATE

__all__ = ["BEFORE", "RUN", "STATE", "clock_in", "weights_in"]


def clock_in(folder: Path) -> dict[str, Any]:
    """Of the last save; of the one before it, where a kill fell between two renames."""
    last = folder / STATE
    return dict(json.loads(((last if last.exists() else folder / BEFORE) / RUN).read_text())["clock"])


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the module that was trained, without its optimizers' moments."""
    found: dict[str, torch.Tensor] = {}
    for path in (folder / STATE).glob("*.safetensors"):
        found |= load_file(path)
    return {name.removeprefix(MODULE): value for name, value in found.items() if name.startswith(MODULE)}
