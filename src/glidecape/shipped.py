"""The pair of models that comes with a checkout of the repository."""

from __future__ import annotations

from pathlib import Path

from .errors import CheckpointError


def shipped_pair(how: str = "name a pair with MODEL and --draft") -> tuple[Path, Path]:
    """The target and draft folders of a checkout; `how`: what else there is to do, for the error.

    Raises:
        CheckpointError: this is an installed wheel, which holds no weights.
    """
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        folder = root / "models" / "pysource"
        if (folder / "target" / "config.json").is_file():
            return folder / "target", folder / "glide"
    raise CheckpointError(
        f"no model is named, and the wheel holds no weights: {how}, or run this in a checkout of the repository"
    )
