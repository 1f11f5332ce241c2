"""Methods by name: a base, which says what drafts, and what is added to it, joined by "+".

An addition is an expansion ("chain", "cape", "beam", "tree", "static") or a stop policy ("svip", "heuristic"; without one,
a fixed length), or "auto", which takes the place of both. Without an expansion a base has its usual one: EAGLE-2's dynamic
"tree" for "eagle", the "static" tree for "medusa", a chain for the others. So EAGLE-1 is "eagle+static".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..drafts.base import DepthModel, DraftModel
from ..errors import InputError, did_you_mean
from .auto.drafter import CHAIN, AutoDrafter
from .auto.stored import begin_with_stored
from .drafter import Drafter, ModelDrafter, NoDraft
from .expansions.base import Expansion
from .expansions.beam import Beam
from .expansions.cape import Cape
from .expansions.chain import Chain
from .expansions.eagle_tree import EagleTree
from .expansions.static_tree import StaticTree
from .lookup import LookupDrafter
from .medusa import MedusaDrafter
from .options import AUTO_PARTS, MethodOptions
from .stop import Entropy, FixedLength, Heuristic, StopPolicy

BASES = ("plain", "lookup", "vanilla", "glide", "eagle", "medusa")
DRAFTLESS = ("plain", "lookup")  # bases without a draft model
EXPANSIONS = ("chain", "cape", "beam", "tree", "static")
STOPS = ("svip", "heuristic")
AUTO = "auto"
BY_DRAFT = ("usual", AUTO)  # stand for a method that the draft decides, see `method_for`
BY_DRAFT_ONLY = "only generate, chat, serve and glidecape.load take it: name the method, such as glide or glide+auto"
USUAL = {"eagle": "tree", "medusa": "static"}  # expansions of bases that are no chain if none is named
METHODS = (
    *DRAFTLESS,
    *(f"{base}+{AUTO}" for base in BASES[1:]),
    *(
        base + added
        for base in ("vanilla", "glide")
        for added in ("", "+svip", "+heuristic", "+cape", "+cape+svip", "+beam", "+beam+svip")
    ),
    *("glide+tree", "glide+tree+svip"),
    *("eagle", "eagle+svip", "eagle+static", "eagle+chain", "eagle+chain+svip"),
    *("medusa", "medusa+svip", "medusa+chain"),
)


AnyDraft = DraftModel | DepthModel
WANTS = {
    "vanilla": "a draft LM",
    "glide": "a GliDe draft",
    "eagle": "an EAGLE draft",
    "medusa": "a draft of Medusa heads",
}


def parse_method(method: str) -> tuple[str, set[str]]:
    """The base and the additions of a method's name.

    Raises:
        InputError: an unknown or repeated part, or two of a kind.

    >>> parse_method("glide+svip")
    ('glide', {'svip'})
    """
    base, *added = method.strip().lower().split("+")
    if base not in BASES or not set(added) <= {*EXPANSIONS, *STOPS, AUTO} or len(added) != len(set(added)):
        advice = did_you_mean(method, METHODS, f"choose from {', '.join(METHODS)}")
        raise InputError(f"unknown method '{method}': {BY_DRAFT_ONLY if method in BY_DRAFT else advice}")
    if base == "plain" and added:
        raise InputError(f"'{method}': plain decoding drafts nothing, so there is nothing to expand or stop")
    if AUTO in added and len(added) > 1:
        raise InputError(f"'{method}': auto chooses nodes and length itself, so nothing is added to it")
    if base == "lookup" and added and AUTO not in added:
        raise InputError(f"'{method}': prompt lookup copies tokens and has no draft law to expand or stop by")
    for part, names in (("expansion", EXPANSIONS), ("stop policy", STOPS)):
        if len(set(names) & set(added)) > 1:
            raise InputError(f"'{method}' names more than one {part}: choose one of {', '.join(names)}")
    return base, set(added)


def base_for(kind: str) -> str:
    """The base of the methods that a draft of this kind is for: of the same name, and "vanilla" for an "lm"."""
    return "vanilla" if kind == "lm" else kind


def form_of(base: str, added: set[str]) -> str:
    """The expansion of a method: the one that is named, or the base's usual one."""
    return next((name for name in EXPANSIONS if name in added), USUAL.get(base, "chain"))


def method_for(name: str, kind: str | None) -> str:
    """The method that a name stands for with a draft of this kind; None: without a draft.

    "usual" is EAGLE's and Medusa's own tree, else a chain, which is ahead of CaPE's siblings on CPUs (docs/results.md), and
    prompt lookup without a draft. "auto" is the same draft with measured costs that decide what is drafted. Any other name
    stands for itself.

    >>> method_for("usual", "glide"), method_for("usual", None), method_for("auto", "lm"), method_for("glide+cape", "glide")
    ('glide', 'lookup', 'vanilla+auto', 'glide+cape')
    """
    if name not in BY_DRAFT:
        return name
    base = "lookup" if kind is None else base_for(kind)
    return f"{base}+{AUTO}" if name == AUTO else base


def make_drafter(
    method: str, draft: AnyDraft | None = None, options: MethodOptions | None = None, **changes: Any
) -> Drafter:
    """The drafter of a method.

    Args:
        draft: its draft model, where it needs one.
        options: of the method; None: the defaults.
        changes: single fields of `MethodOptions`, such as `length=8`, in the place of those in `options`.

    Raises:
        CheckpointError: with auto, what was stored beside the draft is damaged.
        InputError: unknown method or option, no draft model for a method that needs one, one of another kind, or options out
            of range.

    >>> make_drafter("lookup", length=8).length
    8
    """
    chosen = (options or MethodOptions()).changed(**changes)
    base, added = parse_method(method)
    if base == "plain":
        return NoDraft()
    if base == "lookup":
        return _auto(None, None, chosen) if AUTO in added else LookupDrafter(chosen.length, chosen.ngram)
    if draft is None:
        raise InputError(f"method '{method}' needs {WANTS[base]}: name its folder, as draft=… or with --draft")
    kind = getattr(draft, "kind", None)  # None: anything that can draft
    if kind is not None and (made_for := base_for(kind)) != base:
        raise InputError(
            f"method '{method}' needs {WANTS[base]}, and this is {WANTS[made_for]}: use {made_for}, {made_for}+svip, …, or "
            "name another draft"
        )
    if AUTO in added:
        return _auto(draft, drafter_of(draft, Chain(), FixedLength(CHAIN)), chosen)
    stop = _stop_policy(added, chosen)
    makers: dict[str, Callable[[], Expansion]] = {
        "chain": Chain,
        "cape": lambda: Cape(chosen.bins),
        "beam": lambda: Beam(chosen.beams),
        "tree": lambda: EagleTree(chosen.top, chosen.total),
        "static": lambda: StaticTree(chosen.top, chosen.total, min(stop.cap, draft.max_lag)),
    }
    return drafter_of(draft, makers[form_of(base, added)](), stop)


def _auto(draft: AnyDraft | None, runner: ModelDrafter | None, options: MethodOptions) -> AutoDrafter:
    """Raises CheckpointError: see `begin_with_stored`."""
    copying, siblings, calibrated, priced = (part not in options.without for part in AUTO_PARTS)
    drafter = AutoDrafter(runner, (), copying, siblings, calibrated, priced)
    begin_with_stored(drafter, draft)
    return drafter


def _stop_policy(added: set[str], options: MethodOptions) -> StopPolicy:
    if "svip" in added:
        return Entropy(options.threshold, options.cap, options.over)
    if "heuristic" in added:
        return Heuristic(options.length, options.cap)
    return FixedLength(options.length)


def drafter_of(draft: AnyDraft, expansion: Expansion, stop: StopPolicy) -> ModelDrafter:
    """The drafter of a draft of either kind: one that runs node by node, or one that predicts all depths at once."""
    if isinstance(draft, DepthModel):
        return MedusaDrafter(draft, expansion, stop)
    return ModelDrafter(draft, expansion, stop)
