"""Training data in the target's own words: its continuations of a corpus's prompts, by our own engine or by a
server.

A draft learns best from the text that it will meet while decoding, which is the target's. Each continuation is one line of
a `.jsonl` file, `tokens` with a `loss_mask`, as `glidecape train --data` takes it. With shared noise a row's tokens depend on
its prompt and seed alone, so a draft, the batch and interruptions change the time, never the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..core.params import SamplingParams
from ..drafting.drafter import Drafter, NoDraft
from ..engine.decode import decode
from ..errors import CheckpointError, DataError, InputError
from ..files import write_atomic
from ..progress import bar, say
from ..sources import read_rows
from ..target.target import Target
from .corpus import MARKS
from .data import load_streams
from .endpoint import Answer, DescribedTarget, Endpoint
from .loop import differences
from .rows import pieces_of, prompt_of
from .stream import places_of


@dataclass(frozen=True)
class Regeneration:
    """What is made.

    Attributes:
        prompt_tokens: a document is cut to so many; a row's own prompt or messages are never cut.
        new_tokens: emitted at most.
        temperature, top_p: of sampling; temperature 0 is greedy.
        seed: row i of the file draws with seed + i.
        limit: rows made in all; 0: one of every row of the data.
    """

    prompt_tokens: int = 64
    new_tokens: int = 192
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    limit: int = 0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.new_tokens < 1 or self.limit < 0:
            raise InputError(
                "regenerating takes prompts of at least 1 token, at least 1 new token, and no negative limit"
            )

    def params(self, row: int) -> SamplingParams:
        """The sampling of a row, counted from 0."""
        return SamplingParams(self.temperature, top_p=self.top_p, seed=self.seed + row, max_new_tokens=self.new_tokens)


class Known(Protocol):
    """What a prompt is made by, and must fit."""

    @property
    def tokenizer(self) -> Any:
        """transformers' tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its continuation."""


def prompts_of(target: Known, data: Path, plan: Regeneration) -> Iterator[list[int]]:
    """The token ids to continue, one list a document or row of `data`, read as they are asked for.

    A document begins with the end-of-text token, as in training.

    Raises:
        DataError: unreadable data, or a row that cannot be continued: no known column, nothing in it, ids outside the
            vocabulary, or longer with its continuation than the target's context; with its number.
    """
    for place, ids in islice(_prompts(target, data, plan.prompt_tokens), plan.limit or None):
        if not ids:
            raise DataError(f"{place} is empty: there is nothing to continue")
        if bad := [i for i in ids if not 0 <= i < target.vocab_size]:
            raise DataError(f"{place} holds token {bad[0]}, outside the target's vocabulary of {target.vocab_size}")
        if len(ids) + plan.new_tokens > target.context:
            raise DataError(
                f"{place}: its prompt of {len(ids)} tokens and {plan.new_tokens} new ones don't fit in the target's context "
                f"of {target.context}: leave it out, or ask for fewer"
            )
        yield ids


def _prompts(target: Known, data: Path, length: int) -> Iterator[tuple[str, list[int]]]:
    start = target.tokenizer.eos_token_id
    if (data / "train.bin").is_file():
        tokens = load_streams(data, target.tokenizer, target.vocab_size)["train"].tokens
        chat = set(MARKS) <= target.tokenizer.get_vocab().keys()
        first, assistant = target.tokenizer.convert_tokens_to_ids([MARKS[0], MARKS[-1]]) if chat else (start, None)
        begins = places_of(tokens, [first])
        for number, (at, end) in enumerate(zip(begins, np.append(begins[1:], len(tokens)), strict=True), 1):
            document = tokens[at:end].astype(int)
            if chat:  # a talk up to where its last answer begins; one without an answer has nothing to continue
                answers = np.flatnonzero(document == assistant)
                document = document[: answers[-1] + 1] if len(answers) else document[:1]
            else:
                document = document[:length]
            if len(document) > 1:
                yield f"{data} document {number}", document.tolist()
        return
    for place, row in read_rows(data):
        prompt = prompt_of(row, place, target.tokenizer)
        if prompt is not None:
            # A chat template writes its own special tokens.
            special = "prompt" in row or not getattr(target.tokenizer, "chat_template", None)
            yield place, target.tokenizer.encode(prompt, add_special_tokens=special) if prompt.strip() else []
            continue
        ids: list[int] = []
        for piece, _ in pieces_of(row, place, target.tokenizer):
            ids += target.tokenizer.encode(piece, add_special_tokens=False) if isinstance(piece, str) else piece
        yield place, ([start, *ids] if ids and start is not None else ids)[:length]


def row_of(prompt: list[int], new: list[int], finish: str, start: int | None) -> dict[str, Any]:
    """One line of the file.

    The end-of-text tokens around it are left out: training puts one before each document. It is learned as the end of what
    comes before it, unless the last token's mask is 0: so that it is where the limit, not the target, ended the row.

    >>> row_of([0, 5], [6, 7, 0], "stop", 0)
    {'tokens': [5, 6, 7], 'loss_mask': [0, 1, 1], 'finish': 'stop'}
    >>> row_of([0, 5], [6, 7], "length", 0)
    {'tokens': [5, 6, 7], 'loss_mask': [0, 1, 0], 'finish': 'length'}
    """
    before = prompt[1:] if prompt[:1] == [start] else prompt
    after = new[:-1] if new[-1:] == [start] else new
    mask = [0] * len(before) + [1] * len(after)
    if finish == "length" and after:
        mask[-1] = 0
    return {"tokens": [*before, *after], "loss_mask": mask, "finish": finish}


def regenerate(
    target: Target,
    data: Path,
    out: Path,
    plan: Regeneration = Regeneration(),
    drafter: Drafter | None = None,
    batch: int = 16,
    command: str = "",
) -> dict[str, Any]:
    """Continue every prompt of `data` and write the rows to `out` in order, each flushed as it is made.

    A run that was killed goes on after the last whole line, and ends with the file of one never killed. `out` with
    ".card.json" in place of its suffix says what it is made of.

    Returns:
        Figures: rows, tokens (emitted by this call), tokens_per_s.
    Raises:
        DataError: see `prompts_of`; nothing is decoded before all rows are checked.
        CheckpointError: `out` was started with another target, data or plan, or cannot be written.
    """

    def answers(prompts: Iterator[list[int]], done: int) -> Iterator[Answer]:
        while part := list(islice(prompts, batch)):
            params = [plan.params(done + i) for i in range(len(part))]
            done += len(part)
            new: list[list[int]] = [[] for _ in part]
            finish: dict[int, str] = {}
            given = 0
            for event in decode(target, drafter or NoDraft(), part, params):
                new[event.row] += event.tokens
                if event.finish is not None:
                    finish[event.row] = event.finish
                while given in finish:
                    yield new[given], finish[given]
                    given += 1

    maker = {"target": target.weights_digest[:16], "dtype": str(target.dtype)}
    return _write_rows(target, data, out, plan, maker, answers, command)


def regenerate_by(
    endpoint: Endpoint,
    target: DescribedTarget,
    data: Path,
    out: Path,
    plan: Regeneration = Regeneration(),
    side_by_side: int = 16,
    command: str = "",
) -> dict[str, Any]:
    """`regenerate` by a server that has the model, so many requests at a time; `target` is what is known of it here.

    Raises:
        InputError: see `Endpoint.answers`. The rows before are written.
    """

    def answers(prompts: Iterator[list[int]], done: int) -> Iterator[Answer]:
        asked = ((prompt, plan.params(row)) for row, prompt in enumerate(prompts, done))
        return endpoint.answers(asked, side_by_side)

    return _write_rows(target, data, out, plan, {"target": f"{endpoint.model} of a server"}, answers, command)


def _write_rows(
    target: Known,
    data: Path,
    out: Path,
    plan: Regeneration,
    maker: dict[str, str],
    answers: Callable[[Iterator[list[int]], int], Iterator[Answer]],
    command: str,
) -> dict[str, Any]:
    """Write a row for each prompt of `data`; `answers` gives those of prompts, in order, the first of which has that number.

    The data is read twice, to be checked and to be continued, so that few prompts are in memory.
    """
    count, digest = _counted(prompts_of(target, data, plan))
    if not count:
        raise DataError(f"{data} holds no row to continue")
    identity = asdict(plan) | {"data": digest} | maker
    done = _begin(out, out.with_name(out.stem + ".card.json"), identity, command)
    if done > count:
        raise CheckpointError(f"{out} holds {done} rows, more than the {count} of {data}: name another --output")
    emitted, start = 0, target.tokenizer.eos_token_id
    waiting: deque[list[int]] = deque()  # prompts whose answers have not come

    def asked() -> Iterator[list[int]]:
        for prompt in islice(prompts_of(target, data, plan), done, None):
            waiting.append(prompt)
            yield prompt

    with out.open("a", encoding="utf-8") as file, bar("regenerating", count, start=done) as shown:
        with closing(answers(asked(), done)) as made:  # type: ignore[type-var]
            for row, (new, finish) in enumerate(made, done):
                _append(file, row_of(waiting.popleft(), new, finish, start))  # in order: a resumed run counts lines
                emitted += len(new)
                pace = f"{emitted / shown.elapsed:,.0f} tokens/s"
                shown.at(row + 1, f"row {row + 1:,} of {count:,}, {pace}")
        figures = {"rows": count, "tokens": emitted, "tokens_per_s": round(emitted / shown.elapsed, 1)}
    say(f"wrote {out}: {figures}")
    return figures


def _append(file: Any, row: dict[str, Any]) -> None:
    try:
        file.write(json.dumps(row) + "\n")
        file.flush()
    except OSError as error:
        raise CheckpointError(
            f"could not write {file.name} ({error.strerror or error}); give the same command again to go on"
        ) from None


def _counted(prompts: Iterator[list[int]]) -> tuple[int, str]:
    """How many there are, and a digest of them all as one JSON list; each is let go once it was looked at."""
    hashed, count = hashlib.sha256(b"["), 0
    for count, ids in enumerate(prompts, 1):
        hashed.update((", " * (count > 1) + json.dumps(ids)).encode())
    hashed.update(b"]")
    return count, hashed.hexdigest()[:16]


def _begin(out: Path, card: Path, identity: dict[str, Any], command: str) -> int:
    """Check that `out` is this run's, drop a torn last line, and return how many rows it holds."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists() or not out.stat().st_size:
        text = json.dumps({"command": command, "settings": identity}, indent=1) + "\n"
        write_atomic(card, lambda path: path.write_text(text))
        return 0
    try:
        saved = json.loads(card.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{out} is there and no {card.name} says what it holds: remove it, or name another --output"
        ) from None
    if other := differences(saved, identity):
        raise CheckpointError(
            f"{out} was started with {'; '.join(other)}: give the same options, or name another --output"
        )
    content = out.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(out, whole)
    return content.count(b"\n")
