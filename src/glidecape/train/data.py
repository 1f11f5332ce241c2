"""Token streams to train on, from whatever text a user has.

Accepted by `load_streams`: a folder written by `glidecape data` (when the target shares its tokenizer), and everything that
`sources` reads.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, first_line
from .corpus import MARKS
from .ranks import from_first
from .stream import Stream, places_of
from .tokenized import forget_empty, tokenized


def load_streams(
    path: Path,
    tokenizer: Any,
    vocab_size: int | None = None,
    loss_on: str = "all",
    keep: Path | None = None,
) -> dict[str, Stream]:
    """The streams "train" and "valid" of `path`; each document begins with the end-of-text token, if there is one.

    For data without splits, the last 2 % are "valid", or 512 tokens, where that is no more than half.

    Args:
        vocab_size: the target's; ids beyond it are refused.
        loss_on: "all", or "completion": completions, assistant's turns and tokens under a `loss_mask` are learned, and
            the end-of-text token that follows a document which ends in one.
        keep: folder for the token ids, which are mapped from files there (`tokenized`); found there, they are not made again.
            None: a temporary one.

    Raises:
        DataError: nothing readable, empty, or a corpus that was made with another tokenizer; a row that cannot be used
            (with its number); or another process of this training reads other data.
        InputError: the data needs a library that is not installed.
    """
    if (path / "train.bin").is_file():
        return _corpus(path, tokenizer, vocab_size, loss_on)
    if keep is None:
        # What is mapped stays readable when its name is gone.
        with tempfile.TemporaryDirectory(prefix="glidecape-", ignore_cleanup_errors=True) as folder:
            return tokenized(path, Path(folder), tokenizer, vocab_size, loss_on).split()
    try:
        streams = tokenized(path, keep, tokenizer, vocab_size, loss_on).split()
    except BaseException:
        forget_empty(keep)
        raise
    if from_first(streams["train"].digest) != streams["train"].digest:
        raise DataError(f"{path} is other data here than for the first process: give every machine the same")
    return streams


def corpus_tokenizer(path: Path) -> Any:
    """The tokenizer of a corpus folder.

    Raises:
        DataError: it has none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever a torn folder makes of it
        raise DataError(
            f"{path} is a corpus without its tokenizer ({first_line(error)}): make the corpus again"
        ) from None


def _corpus(path: Path, tokenizer: Any, vocab_size: int | None, loss_on: str) -> dict[str, Stream]:
    """The streams of a folder written by `corpus.build_pysource` or `chat.build_chat`."""
    if corpus_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise DataError(
            f"{path} was tokenized for another vocabulary than the target's: pass the text itself as --data"
        )
    found = {name: _mapped(path / f"{name}.bin") for name in ("train", "valid")}
    for name, tokens in found.items():
        if vocab_size is not None and len(tokens) and int(tokens.max()) >= vocab_size:
            raise DataError(
                f"{path}/{name}.bin holds token {tokens.max()}, outside the target's vocabulary of {vocab_size}"
            )
    first = tokenizer.get_vocab().get(MARKS[0], -1)
    begins = {name: places_of(tokens, [first]) for name, tokens in found.items()}
    if loss_on == "all":
        return {name: Stream(tokens, None, begins[name]) for name, tokens in found.items()}
    if not set(MARKS) <= tokenizer.get_vocab().keys():
        raise DataError(f"{path} is a corpus of plain text: there is no completion in it, so leave --loss-on all")
    return {name: Stream(tokens, answered(tokens, tokenizer), begins[name]) for name, tokens in found.items()}


def answered(tokens: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Which tokens of a corpus of chats an assistant said, the end of its turn among them; bool, same length."""
    marks = places_of(tokens, tokenizer.convert_tokens_to_ids(list(MARKS)))
    said = tokens[marks] == tokenizer.convert_tokens_to_ids(MARKS[-1])
    found = np.zeros(len(tokens), dtype=np.bool_)
    ends = np.append(marks[1:], len(tokens) - 1)[: len(marks)]
    for mark, end, by_assistant in zip(marks, ends, said, strict=True):
        found[mark + 1 : end + 1] = by_assistant
    return found


def _mapped(path: Path) -> np.ndarray:
    """A corpus's tokens where they lie on the disk; an empty file cannot be mapped."""
    if not path.stat().st_size:
        return np.zeros(0, dtype=np.uint16)
    return np.memmap(path, dtype=np.uint16, mode="r")
