"""Token windows to train on, from whatever text a user has.

Accepted by `load_tokens`: a folder written by `glidecape data pysource` (when the target shares its tokenizer), a
`.jsonl` or `.jsonl.gz` file with a `text` column, `prompt` and `completion` columns or chat `messages`, a text file, or
a folder of such files.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError

TEXT_SUFFIXES = {".txt", ".md", ".py", ".rst"}


class Windows:
    """Non-overlapping windows of a token stream, visited in a seeded order, epoch after epoch.

    `batch(step, rows, length)` depends on its arguments and the seed alone: resuming needs no iterator state.
    """

    def __init__(self, tokens: np.ndarray, seed: int = 0) -> None:
        self.tokens, self.seed = tokens, seed

    def batch(self, step: int, rows: int, length: int) -> torch.Tensor:
        """Token ids `(rows, length)`, int64."""
        per_epoch = len(self.tokens) // length
        if per_epoch < 1:
            raise DataError(f"the data holds {len(self.tokens)} tokens, fewer than one window of {length}: add text")
        picked = []
        for i in range(step * rows, (step + 1) * rows):
            epoch, at = divmod(i, per_epoch)
            order = self._order(epoch, per_epoch)
            start = int(order[at]) * length
            picked.append(self.tokens[start : start + length].astype(np.int64))
        return torch.from_numpy(np.stack(picked))

    def _order(self, epoch: int, count: int) -> np.ndarray:
        cached: tuple[tuple[int, int], np.ndarray] | None = getattr(self, "_cached", None)
        if cached is None or cached[0] != (epoch, count):
            self._cached = cached = ((epoch, count), np.random.default_rng([self.seed, epoch]).permutation(count))
        return cached[1]


def _open(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a file or folder.

    Raises:
        DataError: nothing there, not UTF-8, a row that is not JSON, or a row without a known column (with its number).
    """
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.suffix in TEXT_SUFFIXES or ".jsonl" in p.suffixes]
        if not files:
            raise DataError(f"no .jsonl, .txt, .md or .py file below {path}")
        for file in files:
            yield from read_texts(file)
        return
    if not path.is_file():
        raise DataError(f"no data at {path}: name a .jsonl or text file, a folder of them, or a corpus folder")
    try:
        with _open(path) as lines:
            if ".jsonl" not in path.suffixes:
                yield lines.read()
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(json.loads(line), path, number)
    except (UnicodeDecodeError, json.JSONDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} is not readable as UTF-8 text or JSON lines ({error})") from None


def _text_of(row: Any, path: Path, number: int) -> str:
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return row["text"]
        if isinstance(row.get("prompt"), str):
            return row["prompt"] + str(row.get("completion", ""))
        if isinstance(row.get("messages"), list):
            return "\n".join(str(m.get("content", "")) for m in row["messages"])
    columns = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise DataError(f"{path} row {number} has no text, prompt or messages column, but {columns}")


def load_tokens(path: Path, tokenizer: Any, split: str = "train", max_tokens: int | None = None) -> np.ndarray:
    """The token stream of `path` under `tokenizer`; each document begins with the end-of-text token, if there is one.

    For a file without splits, the last 2 % (at least one window's worth) are "valid".

    Raises:
        DataError: nothing readable, empty, or a corpus that was made with another tokenizer.
    """
    if (path / f"{split}.bin").is_file():
        from transformers import AutoTokenizer

        own = AutoTokenizer.from_pretrained(path)
        if own.get_vocab() != tokenizer.get_vocab():
            raise DataError(
                f"{path} was tokenized for another vocabulary than the target's: pass the text itself as --data"
            )
        return np.fromfile(path / f"{split}.bin", dtype=np.uint16)
    ids: list[np.ndarray] = []
    count = 0
    start = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for text in read_texts(path):
        ids.append(np.array(start + tokenizer.encode(text, add_special_tokens=False), dtype=np.uint32))
        count += len(ids[-1])
        if max_tokens and count >= max_tokens:
            break
    if count < 2:
        raise DataError(f"{path} holds no text")
    tokens = np.concatenate(ids)
    cut = max(1, len(tokens) - max(512, len(tokens) // 50))
    return tokens[:cut] if split == "train" else tokens[cut:]
