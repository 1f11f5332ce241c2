"""`MethodOptions`: what a method can be told, whoever asks: Python, the command line, the benchmark or an integration."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import InputError, did_you_mean
from ..options import option, option_of

PAPER_BINS = (7, 7, 7, 5, 5, 5, 3, 3, 1, 1)
SMALL_BINS = (3, 3, 3, 2, 2, 1, 1, 1, 0, 0)  # for CPUs, where 32 nodes cost several times one node (dev/LOG.md)
NAMED_BINS = {"paper": PAPER_BINS, "small": SMALL_BINS}

SVIP, CAPE, BEAM, TREE, LOOKUP = "+svip", "+cape", "+beam", "+tree or +static", "lookup"
CAPPED, FIXED = "+svip or +heuristic", "a fixed length"
PRICED = "+auto"
AUTO_PARTS = ("copying", "siblings", "calibration", "cost")


def bins_from(text: str) -> tuple[int, ...]:
    """CaPE's bins from "paper", "small", or numbers joined by commas or slashes.

    Raises:
        InputError: something else.
    """
    try:
        return NAMED_BINS.get(text) or tuple(int(part) for part in text.replace("/", ",").split(","))
    except ValueError:
        raise InputError(f"CaPE's bins (--cape-bins) are paper, small or numbers like 7,5,3,1, not '{text}'") from None


def bins_text(bins: tuple[int, ...]) -> str:
    """The shortest text of these bins that `bins_from` reads."""
    return next((name for name, known in NAMED_BINS.items() if known == bins), ",".join(map(str, bins)))


def parts_from(text: str) -> tuple[str, ...]:
    """Parts of `auto` from their names joined by commas or slashes.

    Raises:
        InputError: something else.
    """
    parts = tuple(part.strip() for part in text.replace("/", ",").split(",") if part.strip())
    if unknown := [part for part in parts if part not in AUTO_PARTS]:
        raise InputError(f"auto has no part '{unknown[0]}' (--auto-without): choose from {', '.join(AUTO_PARTS)}")
    return parts


@dataclass(frozen=True)
class MethodOptions:
    """The options of all methods; a method uses those of its parts, see docs/methods.md.

    Attributes:
        length: tokens drafted a round, depth of a tree; with "heuristic", in the first round; not used by SVIP.
        bins: CaPE's siblings by confidence.
        threshold, cap: SVIP's; the cap is the heuristic length's, too.
        over: whose entropy SVIP takes of several frontier nodes: "best", "mean" or "min".
        beams: of the beam expansion.
        top, total: of a tree: choices of a node that may go on, and nodes of the proposal, the root included.
        ngram: longest match of prompt lookup.
        without: parts that auto leaves out, to see what each of them brings.

    >>> MethodOptions().changed(length="8", bins="2/1").bins
    (2, 1)
    """

    length: int = option(
        5,
        "Without SVIP: tokens drafted a round, or the depth of a tree. With heuristic: the length of the first round.",
        flag="draft-length",
        needs=FIXED,
    )
    bins: tuple[int, ...] = option(
        SMALL_BINS,
        "Siblings by confidence: paper, small, or numbers like 7,5,3,1.",
        flag="cape-bins",
        needs=CAPE,
        type=str,
        read=bins_from,
        write=bins_text,
    )
    threshold: float = option(
        0.3,
        "Higher values draft longer: drafting stops once sqrt(0.15 entropy) exceeds this.",
        flag="svip-threshold",
        needs=SVIP,
    )
    cap: int = option(
        40,
        "Most tokens drafted a round with svip or heuristic; never more than the draft's max lag.",
        flag="svip-cap",
        needs=CAPPED,
    )
    over: str = option(
        "best",
        "With beam or a tree, SVIP takes the entropy of the frontier's best node, or its mean or min.",
        flag="svip-over",
        needs=SVIP,
    )
    beams: int = option(4, "Nodes at each depth, with beam.", needs=BEAM)
    top: int = option(
        10,
        "With tree or static: children of a node; with tree also the nodes that the draft runs at each depth.",
        flag="tree-top",
        needs=TREE,
    )
    total: int = option(60, "With tree or static: nodes verified, the root included.", flag="tree-total", needs=TREE)
    ngram: int = option(3, "Longest n-gram that prompt lookup matches.", flag="lookup-ngram", needs=LOOKUP)

    without: tuple[str, ...] = option(
        (),
        f"With auto, for comparisons: parts to leave out, {', '.join(AUTO_PARTS)}, joined by commas.",
        flag="auto-without",
        needs=PRICED,
        type=str,
        read=parts_from,
        write=",".join,
    )

    def changed(self, **changes: Any) -> MethodOptions:
        """These options with some changed; text becomes what the field holds.

        Raises:
            InputError: no option has that name, or the text is no value of it.
        """
        known = {one.name: one for one in fields(self)}
        if unknown := [name for name in changes if name not in known]:
            advice = did_you_mean(unknown[0], known, f"choose from {', '.join(known)}")
            raise InputError(f"unknown option '{unknown[0]}': {advice}")
        return replace(self, **{name: _value(known[name], value) for name, value in changes.items()})


def _value(one: Any, value: Any) -> Any:
    how = option_of(one)
    if not isinstance(value, str) or how is None:
        return value
    if how.type is str:
        return how.read(value)
    try:
        return {"int": int, "float": float}.get(one.type, str)(value)
    except ValueError:
        raise InputError(f"{one.name} takes a number, not '{value}'") from None
