"""Methods by name: a base ("plain", "lookup", "vanilla", "glide") and what is added to it, joined by "+".

An addition is an expansion ("cape", "beam"; without one, a chain) or a stop policy ("svip", "heuristic"; without one, a
fixed length).
"""

from __future__ import annotations

from ..errors import InputError
from .drafter import Drafter, DraftModel, ModelDrafter, NoDraft
from .expansion import Beam, Cape, Chain, Expansion
from .lookup import LookupDrafter
from .stop import Entropy, FixedLength, Heuristic, StopPolicy

BASES = ("plain", "lookup", "vanilla", "glide")
DRAFTLESS = ("plain", "lookup")  # bases without a draft model
EXPANSIONS = ("cape", "beam")
STOPS = ("svip", "heuristic")
METHODS = (
    *DRAFTLESS,
    *(
        base + expansion + stop
        for base in ("vanilla", "glide")
        for expansion, stop in (
            ("", ""),
            ("", "+svip"),
            ("", "+heuristic"),
            ("+cape", ""),
            ("+cape", "+svip"),
            ("+beam", ""),
            ("+beam", "+svip"),
        )
    ),
)


def parse_method(method: str) -> tuple[str, set[str]]:
    """The base and the additions of a method's name.

    Raises:
        InputError: an unknown or repeated part, or two of a kind.

    >>> parse_method("glide+svip")
    ('glide', {'svip'})
    """
    base, *added = method.strip().lower().split("+")
    if base not in BASES or not set(added) <= {*EXPANSIONS, *STOPS} or len(added) != len(set(added)):
        raise InputError(f"unknown method '{method}': choose from {', '.join(METHODS)}")
    if base == "plain" and added:
        raise InputError(f"'{method}': plain decoding drafts nothing, so there is nothing to expand or stop")
    if base == "lookup" and added:
        raise InputError(f"'{method}': prompt lookup copies tokens and has no draft law to expand or stop by")
    for kind, names in (("expansion", EXPANSIONS), ("stop policy", STOPS)):
        if set(names) <= set(added):
            raise InputError(f"'{method}' names more than one {kind}: choose one of {', '.join(names)}")
    return base, set(added)


def make_drafter(
    method: str,
    draft: DraftModel | None,
    length: int = 5,
    bins: tuple[int, ...] = Cape.PAPER,
    threshold: float = 0.3,
    cap: int = 40,
    *,
    over: str = "best",
    beams: int = 4,
    ngram: int = 3,
) -> Drafter:
    """The drafter of a method.

    Args:
        length: tokens drafted a round; with "heuristic", in the first round; not used by SVIP.
        bins: CaPE's siblings by confidence.
        threshold, cap: SVIP's; the cap is the heuristic length's, too.
        over: whose entropy SVIP takes of several frontier nodes: "best", "mean" or "min".
        beams: of the beam expansion.
        ngram: longest match of prompt lookup.

    Raises:
        InputError: unknown method, no draft model for a method that needs one, or options out of range.
    """
    base, added = parse_method(method)
    if base == "plain":
        return NoDraft()
    if base == "lookup":
        return LookupDrafter(length, ngram)
    if draft is None:
        kind = "a GliDe draft" if base == "glide" else "a draft LM"
        raise InputError(f"method '{method}' needs {kind}: name its folder with --draft")
    expansion: Expansion = Cape(bins) if "cape" in added else Beam(beams) if "beam" in added else Chain()
    stop: StopPolicy = FixedLength(length)
    if "svip" in added:
        stop = Entropy(threshold, cap, over)
    elif "heuristic" in added:
        stop = Heuristic(length, cap)
    return ModelDrafter(draft, expansion, stop)
