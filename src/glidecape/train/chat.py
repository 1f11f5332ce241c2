"""A training corpus from chats of a user's own, with a tokenizer and a chat template of its own.

The folder has the layout of `corpus.build_pysource`. A document is `<|endoftext|>`, then each turn as its role's token, its
text and `<|end|>`, which ends generation too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..progress import bar
from ..sources import read_rows, reading
from .corpus import END_OF_TEXT, END_OF_TURN, MARKS, ROLES, encoded, rank

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the roles are system, user and assistant, not ' ~ m['role']) }}{% endif %}"
    "{{ '<|' ~ m['role'] ~ '|>' ~ m['content'] ~ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LEARNED_BYTES = 20_000_000


@dataclass(frozen=True)
class ChatSource:
    """A file or folder of rows, and how many bytes of its text to take at most (None: all)."""

    path: Path
    max_bytes: int | None = None

    @property
    def name(self) -> str:
        """The file's name up to its first dot."""
        return self.path.name.split(".")[0]


@dataclass
class Taken:
    """What was taken from a source."""

    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    rows: int = 0
    bytes: int = 0


def rendered(row: Any, place: str) -> tuple[str, str]:
    """The text of a row as a document without its first token, and its opening: what a model would be asked.

    `messages` (role and content) and `prompt` with `completion` become turns; a prompt alone and `text` stay plain text.

    Raises:
        DataError: no such column, no message, an unknown role, or text that holds one of the tokens which mark turns.
    """
    columns = row if isinstance(row, dict) else {}
    turns = columns.get("messages")
    prompt, completion = columns.get("prompt"), columns.get("completion")
    if not isinstance(turns, list) and isinstance(prompt, str) and isinstance(completion, str):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if isinstance(turns, list):
        return _as_chat(turns, place)
    for plain in (columns.get("text"), prompt):
        if isinstance(plain, str) and plain:
            _refuse_marks([plain], place)
            return plain + END_OF_TURN, plain
    found = sorted(columns) or type(row).__name__
    raise DataError(f"{place} has no messages, prompt or text column with anything in it, but {found}")


def _as_chat(turns: list[Any], place: str) -> tuple[str, str]:
    if not turns:
        raise DataError(f"{place} has no message: leave the row out")
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise DataError(f"{place}: each of its messages needs a role and a content of plain text")
        if turn.get("role") not in ROLES:
            raise DataError(f"{place}: the roles are {', '.join(ROLES)}, not {turn.get('role')!r}")
    _refuse_marks([turn["content"] for turn in turns], place)
    opening = next((turn["content"] for turn in turns if turn["role"] == "user"), turns[0]["content"])
    return "".join(f"<|{t['role']}|>{t['content']}{END_OF_TURN}" for t in turns), opening


def _refuse_marks(texts: list[str], place: str) -> None:
    found = [mark for mark in MARKS if any(mark in text for text in texts)]
    if found:
        raise DataError(f"{place} holds {found[0]} in its text, which marks turns here: take it out")


def take(source: ChatSource, valid_share: float, seen: set[str]) -> Taken:
    """Rows of a source in a fixed pseudo-random order, each text once, up to its bytes.

    Rows with an equal opening fall on the same side of the split, in every source.
    """
    documents: dict[str, tuple[str, str]] = {}
    with reading(source.path) as read:
        for place, row in read_rows(source.path):
            text, opening = rendered(row, place)
            documents[rank(text)] = (text, opening)
            read(row)
    taken = Taken()
    for key in sorted(documents.keys() - seen):
        text, opening = documents[key]
        size = len(text.encode())
        if source.max_bytes is not None and taken.bytes + size > source.max_bytes:
            continue
        seen.add(key)
        held = int(rank("hold out", opening)[:8], 16) < valid_share * 2**32
        (taken.valid if held else taken.train).append(text)
        taken.rows += 1
        taken.bytes += size
    return taken


def build_chat(
    out: Path,
    sources: list[ChatSource],
    vocab_size: int = 8192,
    licences: dict[str, str] | None = None,
    max_row_tokens: int = 2048,
    valid_share: float = 0.01,
) -> dict[str, int]:
    """Tokenize rows of chats into `out`; `valid_share` of the openings are held out for validation.

    Rows of more than `max_row_tokens` are left out: a chat without its end teaches that answers have none.

    Returns:
        Counts: rows, too_long, train_tokens, valid_tokens.
    Raises:
        DataError: a row that cannot be used (with its number), two sources of one name, or too few rows to hold any out.
    """
    if len({source.name for source in sources}) < len(sources):
        raise DataError("two sources of one name: rename a file, its name stands for its licence in sources.json")
    seen: set[str] = set()
    taken = {source.name: take(source, valid_share, seen) for source in sources}
    parts = {
        "train": sorted((text for one in taken.values() for text in one.train), key=rank),
        "valid": sorted((text for one in taken.values() for text in one.valid), key=rank),
    }
    if not parts["train"] or not parts["valid"]:
        raise DataError(
            f"of {len(seen)} row(s) {len(parts['valid'])} fall to the held-out share of {valid_share}, and both sides need "
            "some: add rows, or change --valid-share"
        )
    bpe = _tokenizer(parts["train"], vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    _save(bpe, out)
    counts = {"rows": len(seen), "too_long": 0}
    for name, texts in parts.items():
        rows = encoded(bpe, texts)
        kept = [row for row in rows if len(row) <= max_row_tokens]
        if not kept:
            raise DataError(f"all rows for {name} are longer than {max_row_tokens} tokens: allow longer ones")
        counts["too_long"] += len(rows) - len(kept)
        tokens = np.concatenate(kept)
        tokens.tofile(out / f"{name}.bin")
        counts[f"{name}_tokens"] = len(tokens)
    table = [
        {"source": name, "rows": one.rows, "bytes": one.bytes, "licence": (licences or {}).get(name, "unknown")}
        for name, one in taken.items()
    ]
    (out / "sources.json").write_text(json.dumps({"counts": counts, "sources": table}, indent=1) + "\n")
    return counts


def _tokenizer(texts: list[str], vocab_size: int) -> Any:
    """A byte-level BPE with single digits, learned from the first `LEARNED_BYTES` of `texts`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    digits: Any = pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")  # arithmetic is learned digit by digit
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(MARKS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample, size = [], 0
    for text in texts:
        if size > LEARNED_BYTES:
            break
        sample.append(text)
        size += len(text)
    with bar("learning a vocabulary"):
        bpe.train_from_iterator(_without_marks(sample), trainer=trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, bpe.token_to_id(END_OF_TEXT))]
    )
    return bpe


def _without_marks(texts: list[str]) -> Iterator[str]:
    """Learning a vocabulary does not cut at special tokens by itself, and would spend merges on their letters."""
    anywhere = re.compile("|".join(re.escape(mark) for mark in MARKS))
    return (anywhere.sub("\n", text) for text in texts)


def _save(bpe: Any, out: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TURN)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(out)
