"""Every error a user can meet: one sentence that says what was wrong, with the values, and what to do next."""

from collections.abc import Iterable
from difflib import get_close_matches


def first_line(error: Exception) -> str:
    """What another library's error says, in one line; its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """How the sentence on an unknown name ends: with the nearest known one, or as `otherwise` says.

    >>> did_you_mean("temprature", ["temperature", "top_p"], "leave it out")
    'did you mean temperature?'
    >>> did_you_mean("tools", ["temperature", "top_p"], "leave it out")
    'leave it out'
    """
    near = get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]}?" if near else otherwise


class GlideCapeError(Exception):
    """Base of all errors raised on purpose; the command line prints its text and exits with code 2.

    >>> import glidecape
    >>> try:
    ...     glidecape.load("path/to/nothing")
    ... except glidecape.GlideCapeError as error:
    ...     print(error)
    no model folder at path/to/nothing: name a folder with config.json, or a Hub model
    """


class InputError(GlideCapeError):
    """A prompt, option or token that cannot be used as it is."""


class DataError(GlideCapeError):
    """Training or evaluation data that is missing, unreadable or empty."""


class CheckpointError(GlideCapeError):
    """A model or draft folder that is missing, torn, or of an unknown format."""


class MismatchError(GlideCapeError):
    """A draft and a target that do not belong together."""


class UnsupportedError(GlideCapeError):
    """Something GlideCape refuses because it could not keep the output lossless, with the reason."""


class OutputError(GlideCapeError):
    """A method's output is not plain decoding's where the two must be equal: a wrong figure is worse than none."""
