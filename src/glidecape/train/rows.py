"""One row of training data: its pieces of text, and which of them the target itself would have written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from ..batch.text import Prompt
from ..errors import DataError
from ..sources import read_rows

Piece = tuple[str | list[int], bool]  # text or token ids, and whether it is a completion


def pieces_of(row: Any, place: str, tokenizer: Any) -> list[Piece]:
    """The pieces of a row in order.

    Columns, the first that is there counts: `tokens` (ids, with an optional `loss_mask` of 0 and 1), `text`, `prompt` with
    an optional `completion`, or `messages` (chat: `role` and `content`; through the tokenizer's chat template if it has
    one, else joined by line ends).

    Raises:
        DataError: none of these, or of another type; the message begins with `place`.
    """
    if isinstance(row, dict):
        if "tokens" in row:
            return _of_tokens(row, place)
        if isinstance(row.get("text"), str):
            return [(row["text"], False)]
        if "prompt" in row:
            _check_prompt(row, place)
            completion = row.get("completion", "")
            if not isinstance(completion, str):
                raise DataError(f"{place}: its completion is no text, but {type(completion).__name__}")
            return [(row["prompt"], False), (completion, True)]
        if isinstance(row.get("messages"), list):
            return _of_messages(row["messages"], place, tokenizer)
    columns = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise DataError(f"{place} has no text, prompt, messages or tokens column, but {columns}")


def _check_prompt(row: dict[str, Any], place: str) -> None:
    if not isinstance(row["prompt"], str):
        raise DataError(f"{place}: its prompt is no text, but {type(row['prompt']).__name__}")


def turns_before_the_answer(row: Any, place: str) -> list[dict[str, Any]] | None:
    """The messages of a row without the assistant's that ends them; None: a row without messages.

    Raises:
        DataError: messages that are no talk, or nothing before the assistant's turn.
    """
    first = ("tokens", "text", "prompt")
    if not isinstance(row, dict) or any(name in row for name in first) or not isinstance(row.get("messages"), list):
        return None
    messages = row["messages"]
    _check_messages(messages, place)
    before = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
    if not before:
        raise DataError(f"{place} has no turn before the assistant's: there is nothing to continue")
    return before


def prompt_of(row: Any, place: str, tokenizer: Any) -> str | None:
    """What a target is to continue in a row with a `prompt` or `messages`: the prompt, or the talk without the assistant's
    turn that ends it. None: a row with neither, or with `tokens` or `text`, which count first.

    Raises:
        DataError: messages that are no talk, or nothing before the assistant's turn.
    """
    if not isinstance(row, dict) or "tokens" in row or isinstance(row.get("text"), str):
        return None
    if "prompt" in row:
        _check_prompt(row, place)
        return row["prompt"]
    before = turns_before_the_answer(row, place)
    if before is None:
        return None
    if getattr(tokenizer, "chat_template", None):
        return _rendered(tokenizer, before, True, place)
    return "".join(message["content"] + "\n" for message in before)


def _of_tokens(row: dict[str, Any], place: str) -> list[Piece]:
    tokens = row["tokens"]
    if not isinstance(tokens, list) or not all(type(i) is int for i in tokens):
        raise DataError(f"{place}: tokens must be a list of whole numbers")
    mask = row.get("loss_mask")
    if mask is None:
        return [(tokens, False)]
    if not isinstance(mask, list) or len(mask) != len(tokens) or not all(m in (0, 1) for m in mask):
        length = len(mask) if isinstance(mask, list) else type(mask).__name__
        raise DataError(f"{place}: loss_mask must be {len(tokens)} numbers 0 or 1, one a token, not {length}")
    return [([token], bool(m)) for token, m in zip(tokens, mask, strict=True)]


def _of_messages(messages: list[Any], place: str, tokenizer: Any) -> list[Piece]:
    _check_messages(messages, place)
    if not getattr(tokenizer, "chat_template", None):
        ends = ["\n"] * (len(messages) - 1) + [""]
        return [(m["content"] + end, m.get("role") == "assistant") for m, end in zip(messages, ends, strict=True)]
    pieces: list[Piece] = []
    done = ""
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        # The template as decoding uses it: up to where the assistant begins, then with its turn.
        for end, generates, counted in ((i, True, False), (i + 1, False, True)):
            text = _rendered(tokenizer, messages[:end], generates, place)
            more, done = _after(done, text, end, place), text
            if counted and i == 0:  # nothing could be rendered before it, so its header is still to be told apart
                at = max(0, more.find(message["content"]))
                pieces.append((more[:at], False))
                more = more[at:]
            pieces.append((more, counted))
    if messages and messages[-1].get("role") != "assistant":
        pieces.append((_after(done, _rendered(tokenizer, messages, False, place), len(messages), place), False))
    return pieces


def _after(done: str, text: str, messages: int, place: str) -> str:
    """What a chat of so many messages adds to what was rendered of it before."""
    if not text.startswith(done):
        raise DataError(
            f"{place}: this tokenizer's chat template rewrites earlier turns when message {messages} is added; split "
            "the conversation into rows that end with one assistant message each"
        )
    return text[len(done) :]


def _check_messages(messages: list[Any], place: str) -> None:
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{place}: each of its messages needs a role and a content of plain text")


def _rendered(tokenizer: Any, messages: list[Any], generates: bool, place: str) -> str:
    if not messages:
        return ""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generates)
    except Exception as error:  # templates raise what they like
        raise DataError(f"{place}: the tokenizer's chat template refuses it ({error})") from None


def check_completion(pieces: list[Piece], row: dict[str, Any], place: str) -> None:
    """Refuse a row from which `--loss-on completion` would learn nothing.

    Raises:
        DataError: no completion, or an empty one.
    """
    if any(counted and len(piece) for piece, counted in pieces):
        return
    if "loss_mask" in row:
        raise DataError(f"{place} counts no token: its loss_mask is all zero")
    if "completion" in row or ("messages" in row and any(counted for _, counted in pieces)):
        raise DataError(f"{place} has an empty completion: nothing is to be learned from it")
    raise DataError(
        f"{place} has no completion but {sorted(row)}: --loss-on completion takes prompt and completion, messages with an "
        "assistant's, or tokens with a loss_mask"
    )


@dataclass(frozen=True)
class Preview:
    """A decoded window as training sees it: pieces of text, and whether their tokens are learned.

    Attributes:
        tokens, learned: counts.
        pieces: in order, learned and not in turn.
    """

    tokens: int
    learned: int
    pieces: list[tuple[str, bool]]

    def __str__(self) -> str:
        """Plain text: what is learned stands between \u27e6 and \u27e7."""
        text = "".join(f"\u27e6{text}\u27e7" if learned else text for text, learned in self.pieces)
        return f"{self._counts}, between \u27e6 and \u27e7:\n{text}"

    def __rich__(self) -> Text:
        """For a terminal: what is learned in green, the rest dim."""
        styled = Text(f"{self._counts}, in green:\n")
        for text, learned in self.pieces:
            styled.append(text, "green" if learned else "dim")
        return styled

    @property
    def _counts(self) -> str:
        return f"{self.tokens} tokens, {self.learned} learned ({self.learned / self.tokens:.0%})"


def preview(tokenizer: Any, tokens: list[int], learned: list[bool] | None) -> Preview:
    """A window of tokens for reading; `learned`: its loss mask, None: all."""
    marks = [True] * len(tokens) if learned is None else learned
    pieces: list[tuple[str, bool]] = []
    first = 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or marks[end] != marks[first]:
            pieces.append((tokenizer.decode(tokens[first:end]), marks[first]))
            first = end
    return Preview(len(tokens), sum(marks), pieces)


def read_prompts(path: Path) -> Iterator[Prompt]:
    """What there is to continue in a file, folder or data set: the text of a document, a row's prompt without its completion, a
    talk without the assistant's turn that ends it.

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
