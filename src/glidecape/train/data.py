"""Token windows to train on, from whatever text a user has.

Accepted by `load_streams`: a folder written by `glidecape data` (when the target shares its tokenizer), a
`.jsonl` or `.jsonl.gz` file (columns: see `rows.pieces_of`), a text file, or a folder of such files.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batch.text import Prompt
from ..errors import DataError, first_line
from ..progress import bar
from .corpus import MARKS
from .rows import check_completion, pieces_of, prompt_of, turns_before_the_answer

TEXT_SUFFIXES = {".txt", ".md", ".py", ".rst"}


@dataclass(frozen=True)
class Stream:
    """Token ids one document after the other, and which of them are to be learned (bool, same length; None: all)."""

    tokens: np.ndarray
    learned: np.ndarray | None = None

    def __getitem__(self, part: slice) -> Stream:
        return Stream(self.tokens[part], None if self.learned is None else self.learned[part])

    @property
    def digest(self) -> str:
        """What tells streams apart: a short sha256 of all that they hold."""
        learned = b"" if self.learned is None else self.learned.tobytes()
        return hashlib.sha256(np.ascontiguousarray(self.tokens).tobytes() + learned).hexdigest()[:16]


class Windows:
    """Non-overlapping windows of a token stream, visited in a seeded order, epoch after epoch.

    `batch(step, rows, length)` depends on its arguments and the seed alone: resuming needs no iterator state. Windows
    in which nothing is to be learned are passed over.
    """

    def __init__(self, tokens: np.ndarray, seed: int = 0, learned: np.ndarray | None = None) -> None:
        self.tokens, self.seed, self.learned = tokens, seed, learned
        self._usable: dict[int, np.ndarray] = {}

    def batch(self, step: int, rows: int, length: int) -> torch.Tensor:
        """Token ids `(rows, length)`, int64."""
        return self._cut(self.tokens, np.int64, step, rows, length)

    def batch_learned(self, step: int, rows: int, length: int) -> torch.Tensor | None:
        """Which tokens of that batch are to be learned, `(rows, length)` bool; None: all."""
        return None if self.learned is None else self._cut(self.learned, np.bool_, step, rows, length)

    def _cut(self, values: np.ndarray, dtype: Any, step: int, rows: int, length: int) -> torch.Tensor:
        numbers, picked = self.usable(length), []
        for i in range(step * rows, (step + 1) * rows):
            epoch, at = divmod(i, len(numbers))
            start = int(numbers[self._order(epoch, len(numbers))[at]]) * length
            picked.append(values[start : start + length].astype(dtype))
        return torch.from_numpy(np.stack(picked))

    def usable(self, length: int) -> np.ndarray:
        """Windows of that length that can be used, by their number in the stream.

        Raises:
            DataError: there is none.
        """
        if length not in self._usable:
            count = len(self.tokens) // length
            if count < 1:
                raise DataError(
                    f"the data holds {len(self.tokens)} tokens, fewer than one window of {length}: add text"
                )
            numbers = np.arange(count)
            if self.learned is not None:  # a window's first token has nothing before it to be predicted from
                numbers = numbers[self.learned[: count * length].reshape(count, length)[:, 1:].any(1)]
            if not len(numbers):
                raise DataError(f"no window of {length} tokens holds a token of a completion: add text")
            self._usable[length] = numbers
        return self._usable[length]

    def _order(self, epoch: int, count: int) -> np.ndarray:
        cached: tuple[tuple[int, int], np.ndarray] | None = getattr(self, "_cached", None)
        if cached is None or cached[0] != (epoch, count):
            self._cached = cached = ((epoch, count), np.random.default_rng([self.seed, epoch]).permutation(count))
        return cached[1]


def _open(path: Path) -> Any:
    # Some editors begin a file with a byte-order mark, which "utf-8-sig" leaves out.
    return gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig")


def check_exists(path: Path) -> None:
    """
    Raises:
        DataError: there is no such file or folder.
    """
    if not path.exists():
        raise DataError(f"no data at {path}: name a .jsonl or text file, a folder of them, or a corpus folder")


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file or folder, each with its place in words; a text file is one row with a `text` column.

    Raises:
        DataError: nothing there, not UTF-8, or a row that is not JSON.
    """
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix in TEXT_SUFFIXES or ".jsonl" in p.suffixes]
        if not files:
            raise DataError(f"no .jsonl, .txt, .md or .py file below {path}")
        for file in files:
            yield from read_rows(file)
        return
    check_exists(path)
    if tables := {".csv", ".tsv", ".parquet", ".xlsx", ".arrow"} & set(path.suffixes):
        raise DataError(f"{path} is a table ({tables.pop()}), which is not read: write its rows as .jsonl")
    number = 0
    try:
        with _open(path) as lines:
            if ".json" in path.suffixes:
                yield from _rows_of_array(json.load(lines), path)
                return
            if ".jsonl" not in path.suffixes:
                yield str(path), {"text": lines.read()}
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path} row {number}", json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} row {number} is not readable as UTF-8 text or JSON lines ({error})") from None


@contextmanager
def reading(path: Path) -> Iterator[Callable[[Any], None]]:
    """A bar while the rows of a file or folder are read; gives a function that is told each row that was."""
    files = [one for one in (path.rglob("*") if path.is_dir() else [path]) if one.is_file()]
    packed = any(one.suffix == ".gz" for one in files)
    with bar(f"reading {path}", None if packed else sum(one.stat().st_size for one in files)) as shown:
        yield lambda row: shown.advance(len(str(row)))  # about as long as its line


def _rows_of_array(rows: Any, path: Path) -> Iterator[tuple[str, Any]]:
    if not isinstance(rows, list):
        raise DataError(f"{path} holds no JSON list of rows, but {type(rows).__name__}: write one, or .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


def read_prompts(path: Path) -> Iterator[Prompt]:
    """What there is to continue in a file or folder: the text of a document, a row's prompt without its completion, a talk
    without the assistant's turn that ends it.

    Raises:
        DataError: see `read_rows`; or a row without a known column, or with token ids (with its number).
    """
    for place, row in read_rows(path):
        prompt = prompt_of(row, place, None)
        if prompt is None:
            texts = [text for text, _ in pieces_of(row, place, None)]
            if not all(isinstance(text, str) for text in texts):
                raise DataError(f"{place} holds token ids, where text is wanted")
            prompt = "".join(map(str, texts))
        turns = turns_before_the_answer(row, place)
        yield Prompt(prompt, None if turns is None else tuple(turns))


def load_streams(
    path: Path,
    tokenizer: Any,
    vocab_size: int | None = None,
    loss_on: str = "all",
) -> dict[str, Stream]:
    """The streams "train" and "valid" of `path`; each document begins with the end-of-text token, if there is one.

    For a file without splits, the last 2 % are "valid", or 512 tokens, where that is no more than half.

    Args:
        vocab_size: the target's; ids beyond it are refused.
        loss_on: "all", or "completion": completions, assistant's turns and tokens under a `loss_mask` are learned, and
            the end-of-text token that follows a document which ends in one.

    Raises:
        DataError: nothing readable, empty, or a corpus that was made with another tokenizer; a row that cannot be used
            (with its number).
    """
    if (path / "train.bin").is_file():
        return _corpus(path, tokenizer, vocab_size, loss_on)
    ids: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    count, before = 0, False
    start = tokenizer.eos_token_id
    with reading(path) as read:
        for place, row in read_rows(path):
            document = [] if start is None else [start]
            marks = [before] * len(document)
            pieces = pieces_of(row, place, tokenizer)
            if loss_on == "completion":
                check_completion(pieces, row, place)
            for piece, counted in pieces:
                # Piece by piece, as in decoding, where a prompt is tokenized before its completion exists.
                more = tokenizer.encode(piece, add_special_tokens=False) if isinstance(piece, str) else piece
                document += more
                marks += [counted] * len(more)
            before = marks[-1] if marks else before
            if vocab_size is not None and document and not 0 <= min(document) <= max(document) < vocab_size:
                wrong = next(i for i in document if not 0 <= i < vocab_size)
                raise DataError(f"{place} holds token {wrong}, outside the target's vocabulary of {vocab_size}")
            ids.append(np.array(document, dtype=np.uint32))
            learned.append(np.array(marks, dtype=np.bool_))
            count += len(document)
            read(row)
    if count < 2:
        raise DataError(f"{path} holds no text")
    whole = Stream(np.concatenate(ids), np.concatenate(learned) if loss_on == "completion" else None)
    return _split(whole)


def _split(whole: Stream) -> dict[str, Stream]:
    count = len(whole.tokens)
    cut = count - min(max(512, count // 50), count // 2)
    return {"train": whole[:cut], "valid": whole[cut:]}


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
    found = {name: np.fromfile(path / f"{name}.bin", dtype=np.uint16) for name in ("train", "valid")}
    for name, tokens in found.items():
        if vocab_size is not None and len(tokens) and int(tokens.max()) >= vocab_size:
            raise DataError(
                f"{path}/{name}.bin holds token {tokens.max()}, outside the target's vocabulary of {vocab_size}"
            )
    if loss_on == "all":
        return {name: Stream(tokens) for name, tokens in found.items()}
    if not set(MARKS) <= tokenizer.get_vocab().keys():
        raise DataError(f"{path} is a corpus of plain text: there is no completion in it, so leave --loss-on all")
    return {name: Stream(tokens, answered(tokens, tokenizer)) for name, tokens in found.items()}


def answered(tokens: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Which tokens of a corpus of chats an assistant said, the end of its turn among them; bool, same length."""
    marks = np.flatnonzero(np.isin(tokens, tokenizer.convert_tokens_to_ids(list(MARKS))))
    last = np.searchsorted(marks, np.arange(len(tokens))) - 1  # the mark before each token
    assistant = tokenizer.convert_tokens_to_ids(MARKS[-1])
    return np.asarray((last >= 0) & (tokens[marks[last]] == assistant))


def load_tokens(path: Path, tokenizer: Any, vocab_size: int | None = None, split: str = "train") -> np.ndarray:
    """The token ids of one of `load_streams`' streams."""
    return load_streams(path, tokenizer, vocab_size)[split].tokens
