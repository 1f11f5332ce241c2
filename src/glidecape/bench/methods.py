"""The methods of a run by name: `DRAFT:METHOD@OPTION=VALUE`, draft and options optional.

`nocross:glide` is the method glide with the draft named nocross; `glide@length=8@cap=16` sets options for this one method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..drafting.drafter import Drafter
from ..drafting.methods import DRAFTLESS, AnyDraft, make_drafter, parse_method
from ..drafting.options import MethodOptions
from ..errors import InputError


@dataclass(frozen=True)
class Method:
    """A method as it is named on the command line.

    Attributes:
        name: all of it; the name of its row.
        draft: name of its draft model; None where it needs none.
        method: as `make_drafter` knows it.
        options: of the run, with this method's own.
    """

    name: str
    draft: str | None
    method: str
    options: MethodOptions

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
        own = self.options if threshold is None else replace(self.options, threshold=threshold)
        return make_drafter(self.method, None if self.draft is None else drafts[self.draft], own)


def read_method(text: str, options: MethodOptions) -> Method:
    """A method from its name.

    Raises:
        InputError: an unknown method or option, or a value that is no number.

    >>> one = read_method("nocross:glide+cape@length=8@bins=2/1", MethodOptions())
    >>> one.draft, one.method, one.options.length, one.options.bins
    ('nocross', 'glide+cape', 8, (2, 1))
    """
    name, *given = text.strip().split("@")
    key, _, method = name.rpartition(":")
    base, _ = parse_method(method)
    try:
        own = options.changed(**dict(word.partition("=")[::2] for word in given))
    except InputError as error:
        raise InputError(f"'{text}': {error}") from None
    return Method(text.strip(), None if base in DRAFTLESS else key or base, method, own)


def read_methods(texts: list[str], options: MethodOptions) -> list[Method]:
    """All methods of a run; plain is put first when it is missing.

    Raises:
        InputError: see `read_method`; or one named twice.
    """
    methods = [read_method(text, options) for text in texts]
    names = [one.name for one in methods]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"method '{twice}' is named twice: name each once")
    return methods if "plain" in names else [read_method("plain", options), *methods]
