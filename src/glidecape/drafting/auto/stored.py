"""What `auto` has learned of a draft's acceptance, kept beside its weights, so that it need not begin with another pair's."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from ...drafts.card import Digest, checked
from ...errors import CheckpointError, InputError, first_line
from ...files import write_atomic
from .acceptance import COPIED, DRAFTED, OnlineLogistic
from .drafter import AutoDrafter

FILE, FORMAT = "acceptance.json", 1
ENOUGH = 200  # tokens of each kind of law to have learned from
KINDS = ("greedy", "sampled")
Weights = list[list[float]]


class Stored(BaseModel):
    """The file.

    Attributes:
        draft: digest of the draft that it is of.
        observations: tokens that were learned from, greedily and sampled.
        drafted, copied: weights of the regressions, a list a kind of law.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    format: int
    draft: Digest
    observations: tuple[int, int]
    drafted: Weights
    copied: Weights

    @property
    def fits(self) -> bool:
        """Are these the weights of this version's features?"""
        wanted = [[len(one) for one in prior] for prior in (DRAFTED, COPIED)]
        return self.format == FORMAT and [[len(one) for one in own] for own in (self.drafted, self.copied)] == wanted


def begin_with_stored(drafter: AutoDrafter, draft: Any) -> None:
    """Let a drafter begin with what is kept beside its draft, if anything is; a file of other weights is left out, with a
    warning.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    folder = getattr(draft, "folder", None)
    path = None if folder is None else Path(folder) / FILE
    if path is None or not path.is_file():
        return
    stored = _read(path)
    if stored.draft != _digest_of(draft):
        warnings.warn(
            f"{path} is of another draft, so auto begins without it: run glidecape tune --store, or delete the file",
            stacklevel=2,
        )
        return
    drafter.accepts, drafter.copies = OnlineLogistic(stored.drafted), OnlineLogistic(stored.copied)


def _read(path: Path) -> Stored:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        stored = checked(Stored, found)
        if not stored.fits:
            raise ValueError("it is of another version")
    except (OSError, ValueError, RecursionError) as error:
        why = first_line(error)
        raise CheckpointError(
            f"{path} cannot be read ({why}): make it anew with glidecape tune --store, or delete it"
        ) from None
    return stored


def store(drafter: AutoDrafter, draft: Any) -> tuple[Path, Stored]:
    """Write what a drafter has learned beside its draft's weights.

    Raises:
        InputError: the draft is of no folder, or there was too little to learn from.
        CheckpointError: the disk is full or the folder not writable.
    """
    if getattr(draft, "folder", None) is None:
        raise InputError("the draft is of no folder: load it from one with load_draft")
    seen = [round(float(own[:, 0].sum())) for own in drafter.accepts.seen]
    for kind, count in zip(KINDS, seen, strict=True):
        if count < ENOUGH:
            raise InputError(
                f"auto has learned from {count} {kind} tokens, and {ENOUGH} is the least: give more --prompts, or more "
                "--max-new-tokens"
            )
    weights = [np.round(one.weights, 4).tolist() for one in (drafter.accepts, drafter.copies)]
    path = Path(draft.folder) / FILE
    kept = Stored(
        format=FORMAT,
        draft=_digest_of(draft),
        observations=(seen[0], seen[1]),
        drafted=weights[0],
        copied=weights[1],
    )
    write_atomic(path, lambda to: to.write_text(kept.model_dump_json(indent=1) + "\n"))
    return path, kept


def _digest_of(draft: Any) -> str:
    """Tells a training from another: of a network by its configuration and figures, of a draft LM by its weights."""
    if draft.kind == "lm":
        return str(draft.model.weights_digest)
    told = json.dumps([draft.kind, asdict(draft.module.config), draft.figures], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()
