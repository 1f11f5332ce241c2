"""Text out of tokens: stop strings, and streaming that never shows what it would have to take back.

A stop string may begin and end in the middle of tokens. It is looked for after every token, in the text of all emitted
tokens, so that where a row ends depends on its tokens alone, never on how rounds fell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from ..target.target import Target

CONTEXT = 4  # tokens of a prompt that are decoded with what follows
HALF = "\ufffd"  # what a decoder makes of the first bytes of a character


def text_of(tokenizer: Any, tokens: Sequence[int], prompt: Sequence[int] = ()) -> str:
    """The text of emitted tokens, special tokens left out, as it follows the prompt's.

    Many decoders (SentencePiece's) drop the space that a text begins with: so the end of the prompt is decoded before the
    tokens, and its text cut off.
    """
    before = list(prompt[-CONTEXT:])
    head = tokenizer.decode(before, skip_special_tokens=True).rstrip(HALF) if before else ""
    if head:
        whole: str = tokenizer.decode([*before, *tokens], skip_special_tokens=True)
        if whole.startswith(head):
            return whole[len(head) :]
    return tokenizer.decode(list(tokens), skip_special_tokens=True)


@dataclass(frozen=True)
class Prompt:
    """What is to be continued: text, or a conversation.

    Attributes:
        text: of a conversation all its turns, one after the other.
        messages: turns with `role` and `content`, the last of them not the assistant's; None: plain text.
    """

    text: str
    messages: tuple[dict[str, Any], ...] | None = None

    def ids(self, target: Target, chat: bool = False) -> list[int]:
        """Token ids for a target; with `chat` through its tokenizer's chat template, up to where the assistant's answer
        begins, each turn in its own role. Text is then one turn of the user's.

        Raises:
            InputError: the prompt is empty, the tokenizer has no chat template, or the template refuses the conversation.
        """
        if not chat:
            return target.encode(self.text)
        tokenizer = target.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "this target's tokenizer has no chat template: leave --chat out, and write the prompt as it is"
            )
        messages = self.messages or ({"role": "user", "content": self.text},)
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise InputError(f"the tokenizer's chat template refuses the prompt ({error})") from None
        return list(tokenizer.encode(text, add_special_tokens=False))


class GrowingText:
    """The text of tokens that come one by one, without half a character at its end.

    It is `text_of` all of them, but only the newest tokens are decoded, those since the last one that ended a character.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.before = tokenizer, list(prompt[-CONTEXT:])
        self.whole, self.open = "", list[int]()

    def push(self, token: int) -> str:
        """The text up to this token."""
        self.open.append(token)
        new = text_of(self.tokenizer, self.open, self.before)
        if not new or new.endswith(HALF):
            return self.whole + new.rstrip(HALF)
        self.whole, self.before, self.open = self.whole + new, [*self.before, *self.open][-CONTEXT:], []
        return self.whole


@dataclass(frozen=True)
class Cut:
    """Where a stop string ended a row.

    Attributes:
        tokens: emitted tokens until the stop string was complete.
        kept: of these, the ones to hand out. All that come before the stop string if it begins at a token's beginning;
            else up to the token in which it begins, and `text` is a beginning of their text.
        text: the text before the stop string.
    """

    tokens: int
    kept: int
    text: str


class StopStrings:
    """Looks for stop strings in the emitted tokens of one row.

    Args:
        tokenizer: of the target.
        strings: the stop strings.
        least: a string completed by an earlier token than this one (counted from 1) is no stop.
        prompt: token ids before the emitted ones (see `text_of`).

    >>> class Letters:
    ...     def decode(self, tokens, skip_special_tokens):
    ...         return "".join(chr(t) for t in tokens)
    >>> stops = StopStrings(Letters(), ("END",))
    >>> stops.find([ord(c) for c in "a END b"], 0)
    Cut(tokens=5, kept=2, text='a ')
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], least: int = 0, prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.strings, self.least, self.prompt = tokenizer, tuple(strings), least, prompt
        self._restart()

    def _restart(self) -> None:
        self._growing, self._text = GrowingText(self.tokenizer, self.prompt), ""
        self._lengths = [0]  # of the text after so many tokens

    def _read(self, token: int) -> str:
        self._text = self._growing.push(token)
        self._lengths.append(len(self._text))
        return self._text

    def find(self, tokens: list[int], searched: int) -> Cut | None:
        """The first stop string that is complete after one of `tokens`, of which the first `searched` hold none.

        The row's tokens are read once, as long as each call continues the one before.
        """
        if len(self._lengths) != searched + 1:
            self._restart()
            for token in tokens[:searched]:
                self._read(token)
        for count in range(searched + 1, len(tokens) + 1):
            before, after = self._text, self._read(tokens[count - 1])
            if count >= self.least:
                # It must end in this token's text: what ended earlier was found, or came before `least`.
                found = [after.find(text, max(0, len(before) - len(text) + 1)) for text in self.strings]
                if begins := [at for at in found if at >= 0]:
                    text = after[: min(begins)]
                    return Cut(count, self._boundary(tokens[:count], text), text)
        return None

    def _boundary(self, tokens: list[int], text: str) -> int:
        settled, lengths = len(text.rstrip(HALF)), self._lengths
        for count in reversed(range(len(tokens))):
            if lengths[count] == settled and text_of(self.tokenizer, tokens[:count], self.prompt) == text:
                return count
        return next((n for n in range(1, len(tokens)) if lengths[n] > len(text)), len(tokens))


def held_back(text: str, strings: Sequence[str]) -> int:
    """Characters at the end of `text` that may turn out to be the beginning of a stop string.

    >>> held_back("the EN", ("END", "N!")), held_back("the", ("END",))
    (2, 0)
    """
    return max((_begun(text[max(0, len(text) - len(one) + 1) :], one) for one in strings), default=0)


def _begun(end: str, string: str) -> int:
    """Characters at the end of a text that begin this string; `end` is shorter than it."""
    at = end.find(string[0])
    while at >= 0 and not string.startswith(end[at:]):
        at = end.find(string[0], at + 1)
    return len(end) - at if at >= 0 else 0


class TextStream:
    """Turns a row's events into text to show: no half characters, and nothing that may be part of a stop string.

    >>> from glidecape import Target, TextStream
    >>> target = Target.from_pretrained("path/to/model")
    >>> prompt, text = target.encode("def load("), target.encode("table):")
    >>> stream = TextStream(target.tokenizer, stop=("END",), prompt=prompt)
    >>> "".join([*(stream.push([token]) for token in text), stream.push([], ended=True)])
    'table):'
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self.tokenizer, self.stop, self.prompt = tokenizer, tuple(stop), prompt
        self.growing, self.text = GrowingText(tokenizer, prompt), ""
        self.tokens: list[int] = []
        self.shown = 0
        self.settled = True  # is all text of the tokens shown?

    def push(self, tokens: list[int], ended: bool = False, text: str | None = None) -> str:
        """The text that may be shown after these tokens.

        Args:
            tokens: what the row emitted.
            ended: the row ended; nothing is held back any more.
            text: the row's whole text where a stop string cut it (`Emitted.text`).
        """
        self.tokens += tokens
        if ended:
            whole = text_of(self.tokenizer, self.tokens, self.prompt) if text is None else text
            until, self.settled = len(whole), True
        else:
            for token in tokens:
                self.text = self.growing.push(token)
            whole = self.text
            until = len(whole) - held_back(whole, self.stop)
            self.settled = until == len(whole) and not self.growing.open
        new = whole[self.shown : until]
        self.shown = max(self.shown, until)
        return new
