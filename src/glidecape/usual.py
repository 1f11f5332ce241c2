"""The usual method: what decodes where nobody asked for a method.

It is `auto` once the costs of rounds are known, because they decide best what is drafted. Costs are measured when a pair is
first used, if that takes a few seconds. Else it is a fixed length, as the draft's kind has it.
"""

from __future__ import annotations

from collections.abc import Callable

from .costs import ALONE_ROWS, ROWS, are_kept, is_idle, prices_file, prices_of
from .drafting.auto.drafter import AutoDrafter
from .drafting.drafter import Drafter
from .drafting.methods import AnyDraft, make_drafter, method_for
from .progress import note
from .target.target import Target

QUICK = 1e9  # parameters of a target whose rounds are measured in some seconds


def kind_of(draft: AnyDraft | None) -> str | None:
    """The kind of a draft; None: there is none."""
    return None if draft is None else getattr(draft, "kind", "lm")


def auto_drafter(draft: AnyDraft | None) -> tuple[str, AutoDrafter]:
    """The method `auto` of a draft, and its drafter without costs; lookup where there is no draft."""
    method = method_for("auto", kind_of(draft))
    drafter = make_drafter(method, draft)
    assert isinstance(drafter, AutoDrafter)
    return method, drafter


def take_prices(target: Target, drafter: AutoDrafter, many: bool = False, say: Callable[[str], None] = note) -> bool:
    """Let `auto` know what rounds cost: kept, or measured now, which is said; False where they stay unknown.

    They do for a large model, where measuring some dozens of rounds takes long, and on a busy machine.

    Args:
        many: so much is decoded that half a minute is made up for.
    """
    rows = _rows_to_price(target, drafter, many)
    if rows is not None:
        drafter.set_prices(prices_of(target, drafter, say, rows=rows), timed=True)
    return rows is not None


def usual_drafter(target: Target, draft: AnyDraft | None) -> Drafter:
    """The drafter of the usual method, for a target and a draft that stay as they are."""
    _, drafter = auto_drafter(draft)
    if take_prices(target, drafter):
        return drafter
    return make_drafter(method_for("usual", kind_of(draft)), draft)


def _rows_to_price(target: Target, drafter: AutoDrafter, many: bool) -> tuple[int, ...] | None:
    """Numbers of rows whose costs are known or are to be measured now; None: they are unknown, and would take too long."""
    if many or are_kept(prices_file(target, drafter, ROWS)):
        return ROWS
    if are_kept(prices_file(target, drafter, ALONE_ROWS)):
        return ALONE_ROWS
    return ALONE_ROWS if target.num_parameters <= QUICK and is_idle(target, drafter) else None
