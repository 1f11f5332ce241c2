"""The rows of a study: a base recipe, and what each row changes in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_type_hints

from ..errors import InputError
from .recipe import DraftRecipe

BASELINE = "baseline"
# What decides batches and steps, so is every row's.
SHARED = ("length", "rows", "seed", "loss_on", "documents", "accumulate", "clip", "positions")

# A factor's rows: what each changes in the study's base recipe.
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "cross": {"none": {"kind": "glide-no-cross"}},
    "glimpse": {"on": {"glimpse": "on"}, "alone": {"glimpse": "on", "kind": "glide-no-cross"}},
    "layers": {"2": {"layers": 2}},
    "read": {
        "first": {"read": "0"},
        "last": {"read": "last"},
        "mix": {"read": "mix"},
    },  # and quarters, see `factor_rows`
    "width": {"0.5": {"width": 0.5}, "2": {"width": 2.0}},
    "norm": {"off": {"norm": "off"}},
    "embedding": {"own": {"embedding": "own"}},
    "window": {"all": {"window": 0}, "16": {"window": 16}, "256": {"window": 256}},
    "draft-vocab": {"1024": {"draft_vocab": 1024}},
    "loss": {name: {"loss": name} for name in ("kl", "rkl", "tv", "ce", "kl+tv", "nla", "lk_hybrid")},
    "lags": {name: {"lags": name} for name in ("block-random", "block", "balanced", "shift")},
    "max-lag": {str(lag): {"max_lag": lag} for lag in (5, 8, 16)},
    "preset": {"paper": {"preset": "paper"}},
    "optimizer": {"muon": {"muon": True}, "adamw": {"muon": False}},
}


def factor_rows(factor: str, target_layers: int) -> dict[str, dict[str, Any]]:
    """The rows of a factor for a target of so many layers.

    Raises:
        InputError: an unknown factor.
    """
    if factor not in FACTORS:
        raise InputError(f"unknown factor '{factor}': choose from {', '.join(FACTORS)}")
    rows = dict(FACTORS[factor])
    if factor == "read":
        for part, name in enumerate(("quarter", "half"), 1):
            rows[name] = {"read": str(round(part * (target_layers - 1) / 4))}
    return rows


def changes_of(text: str) -> dict[str, Any]:
    """The changes in "field:value,field:value", each value as its field's type.

    Raises:
        InputError: no such field, or a value of another type.

    >>> changes_of("loss:kl+tv,read:3+5,muon:true")
    {'loss': 'kl+tv', 'read': '3+5', 'muon': True}
    """
    kinds = get_type_hints(DraftRecipe)
    changes: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition(":")
        name = name.replace("-", "_")
        if name not in kinds:
            raise InputError(f"a recipe has no field '{name}': choose from {', '.join(kinds)}")
        try:
            changes[name] = _flag(value) if kinds[name] is bool else kinds[name](value)
        except (KeyError, ValueError):
            raise InputError(f"'{value}' is no value for {name}, which takes {kinds[name].__name__}") from None
    return changes


def _flag(value: str) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[value.lower()]


def study_rows(
    base: DraftRecipe, factors: Sequence[str], given: Sequence[str] = (), target_layers: int = 1
) -> dict[str, DraftRecipe]:
    """The rows of a study by name: the base recipe, one a value of each factor, and those given as "NAME=field:value,…".

    A row that would be equal to an earlier one is left out.

    Raises:
        InputError: an unknown factor or field, two rows of one name, a name that is no file name, or a row that differs in
            what all must share.

    >>> list(study_rows(DraftRecipe(), ["max-lag", "cross"], ["wild=rate:0.1"]))
    ['baseline', 'max-lag-5', 'max-lag-8', 'max-lag-16', 'cross-none', 'wild']
    """
    changed: list[tuple[str, dict[str, Any]]] = [(BASELINE, {})]
    for factor in factors:
        changed += [(f"{factor}-{name}", change) for name, change in factor_rows(factor, target_layers).items()]
    for text in given:
        name, found, rest = text.partition("=")
        if not found or not name or not all(c.isalnum() or c in "-_+." for c in name) or name.startswith("."):
            raise InputError(
                f"--row takes NAME=field:value,field:value with a name of letters and digits, not '{text}'"
            )
        changed.append((name, changes_of(rest)))
    rows: dict[str, DraftRecipe] = {}
    for name, changes in changed:
        if name in rows:
            raise InputError(f"two rows named '{name}': give each a name of its own")
        if other := [field for field in SHARED if field in changes and changes[field] != getattr(base, field)]:
            raise InputError(f"row '{name}' changes {other[0]}, which all rows of a study share: set it for the study")
        recipe = base.changed(**changes)
        if recipe not in rows.values():
            rows[name] = recipe
    return rows
