"""The methods of a run by name: `DRAFT:METHOD@OPTION=VALUE`, draft and options optional.

`nocross:glide` is the method glide with the draft named nocross; `glide@length=8@cap=16` sets options for this one method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..drafting.drafter import Drafter
from ..drafting.expansions.cape import Cape
from ..drafting.methods import DRAFTLESS, AnyDraft, make_drafter, parse_method
from ..errors import InputError
from .settings import Settings

OPTIONS = {
    "length": "draft_length",
    "bins": "bins",
    "threshold": "threshold",
    "cap": "cap",
    "over": "over",
    "beams": "beams",
    "ngram": "ngram",
    "top": "top",
    "total": "total",
}


@dataclass(frozen=True)
class Method:
    """A method as it is named on the command line.

    Attributes:
        name: all of it; the name of its row.
        draft: name of its draft model; None where it needs none.
        method: as `make_drafter` knows it.
        settings: of the run, with this method's own options.
    """

    name: str
    draft: str | None
    method: str
    settings: Settings

    @property
    def open_threshold(self) -> bool:
        """Does it stop by SVIP, with no threshold of its own?"""
        return "svip" in parse_method(self.method)[1] and "@threshold=" not in self.name

    def drafter(self, drafts: Mapping[str, AnyDraft], threshold: float | None = None) -> Drafter:
        """Its drafter; `threshold`: a fitted one.

        Raises:
            InputError: no draft of that name, or options out of range.
        """
        if self.draft is not None and self.draft not in drafts:
            raise InputError(f"'{self.name}' needs a draft named '{self.draft}': give --draft {self.draft}=FOLDER")
        own = self.settings
        return make_drafter(
            self.method,
            None if self.draft is None else drafts[self.draft],
            own.draft_length,
            own.bins,
            own.threshold if threshold is None else threshold,
            own.cap,
            over=own.over,
            beams=own.beams,
            ngram=own.ngram,
            top=own.top,
            total=own.total,
        )


def read_method(text: str, settings: Settings) -> Method:
    """A method from its name.

    Raises:
        InputError: an unknown method or option, or a value that is no number.

    >>> one = read_method("nocross:glide+cape@length=8@bins=2/1", Settings())
    >>> one.draft, one.method, one.settings.draft_length, one.settings.bins
    ('nocross', 'glide+cape', 8, (2, 1))
    """
    name, *options = text.strip().split("@")
    key, _, method = name.rpartition(":")
    base, _ = parse_method(method)
    own = settings
    for option in options:
        word, _, value = option.partition("=")
        if word not in OPTIONS:
            raise InputError(f"'{text}': unknown option '{word}'; choose from {', '.join(OPTIONS)}")
        own = replace(own, **{OPTIONS[word]: _value(text, word, value)})
    return Method(text.strip(), None if base in DRAFTLESS else key or base, method, own)


def _value(text: str, word: str, value: str) -> Any:
    named = {"paper": Cape.PAPER, "small": Cape.SMALL}
    try:
        if word == "bins":
            return named[value] if value in named else tuple(int(part) for part in value.split("/"))
        if word == "over":
            return value
        return float(value) if word == "threshold" else int(value)
    except ValueError:
        raise InputError(f"'{text}': {word} takes a number, or numbers like 7/5/3/1 for bins, not '{value}'") from None


def read_methods(texts: list[str], settings: Settings) -> list[Method]:
    """All methods of a run; plain is put first when it is missing.

    Raises:
        InputError: see `read_method`; or one named twice.
    """
    methods = [read_method(text, settings) for text in texts]
    names = [one.name for one in methods]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"method '{twice}' is named twice: name each once")
    return methods if "plain" in names else [read_method("plain", settings), *methods]
