"""Methods by name: a base ("plain", "vanilla", "glide") and what is added to it ("cape", "svip"), joined by "+"."""

from __future__ import annotations

from ..errors import InputError
from .drafter import Drafter, DraftModel, ModelDrafter, NoDraft
from .expansion import Cape, Chain
from .stop import Entropy, FixedLength

BASES = ("plain", "vanilla", "glide")
ADDITIONS = ("cape", "svip")
METHODS = ("plain", "vanilla", "vanilla+svip", "glide", "glide+cape", "glide+svip", "glide+cape+svip")


def parse_method(method: str) -> tuple[str, set[str]]:
    """The base and the additions of a method's name.

    Raises:
        InputError: an unknown or repeated part.

    >>> parse_method("glide+svip")
    ('glide', {'svip'})
    """
    base, *added = method.strip().lower().split("+")
    if base not in BASES or not set(added) <= set(ADDITIONS) or len(added) != len(set(added)):
        raise InputError(f"unknown method '{method}': choose from {', '.join(METHODS)}")
    if base == "plain" and added:
        raise InputError(f"'{method}': plain decoding drafts nothing, so there is nothing to expand or stop")
    return base, set(added)


def make_drafter(
    method: str,
    draft: DraftModel | None,
    length: int = 5,
    bins: tuple[int, ...] = Cape.PAPER,
    threshold: float = 0.3,
    cap: int = 40,
) -> Drafter:
    """The drafter of a method.

    Args:
        length: tokens drafted a round, without SVIP.
        bins: CaPE's siblings by confidence.
        threshold, cap: SVIP's.

    Raises:
        InputError: unknown method, no draft model for a method that needs one, or options out of range.
    """
    base, added = parse_method(method)
    if base == "plain":
        return NoDraft()
    if draft is None:
        kind = "a GliDe draft" if base == "glide" else "a draft LM"
        raise InputError(f"method '{method}' needs {kind}: name its folder with --draft")
    expansion = Cape(bins) if "cape" in added else Chain()
    return ModelDrafter(draft, expansion, Entropy(threshold, cap) if "svip" in added else FixedLength(length))
