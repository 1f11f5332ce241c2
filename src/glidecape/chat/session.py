"""`Session`: reads messages, shows answers, keeps the conversation. Standard output gets answers, standard error all else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

from rich.console import Console

from ..errors import GlideCapeError, InputError
from .figures import COLOURS, Figures, Piece
from .interrupt import until_interrupted

HELP = """/stats  show figures after each answer, and colour its tokens by origin; again: no more
/reset  begin a new conversation
/help   these lines
/quit   end; so does Ctrl-D
Ctrl-C stops an answer. A line that ends with \\ goes on in the next one."""
# What could move a terminal's cursor or change its state is shown as a sign.
CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], "\ufffd") | {ord("\t"): "\t", ord("\n"): "\n"}


class Model(Protocol):
    """Who answers.

    Attributes:
        figures: of the last answer, whole or not.
        origins: that tokens may have, as far as they are told.
    """

    figures: Figures
    origins: tuple[str, ...]

    def answer(self, turns: Sequence[dict[str, str]]) -> Iterator[Piece]:
        """The answer to a conversation, in pieces."""


class Session:
    """A conversation.

    Args:
        model: who answers.
        system: a first turn that tells the model how to answer; "": none.
    """

    def __init__(self, model: Model, system: str = "") -> None:
        self.model, self.stats, self.total = model, False, Figures()
        self._start = [{"role": "system", "content": system}] if system else []
        self.turns = list(self._start)
        self.console = Console(highlight=False)
        self.typed = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Until /quit or the end of the input.

        Raises:
            InputError: there is no standard input, or it is no text.
        """
        if sys.stdin is None:
            raise InputError("there is no standard input to read messages from")
        if self.typed:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (lines can be edited, and come back)
            _say("Type a message, or /help.")
        while True:
            try:
                text = self._read()
                if text == "/quit":
                    return
                if text.strip():
                    self._take(text)
            except EOFError:
                break
            except KeyboardInterrupt:  # at the prompt, or a moment after an answer
                _say("\n/quit or Ctrl-D ends the program.")
        if self.typed:
            _say("")

    def _read(self) -> str:
        """The next message.

        Raises:
            EOFError: there is none.
            InputError: it is no text.
        """
        lines: list[str] = []
        while not lines or lines[-1].endswith("\\"):
            try:
                lines.append(input(("... " if lines else "> ") if self.typed else ""))
            except UnicodeDecodeError as error:
                raise InputError(f"standard input is not UTF-8 text ({error})") from None
            except EOFError:
                if not lines:
                    raise
                break
        return "\n".join(line.removesuffix("\\") for line in lines[:-1]) + ("\n" if lines[1:] else "") + lines[-1]

    def _take(self, text: str) -> None:
        match text.strip():
            case "/help":
                _say(HELP)
            case "/reset":
                self.turns = list(self._start)
                _say("A new conversation.")
            case "/stats":
                self._switch_stats()
            case word if word.startswith("/") and word[1:].isalpha():
                _say(f"no command {word}: /help lists them")
            case _:
                self._answer(text)

    def _switch_stats(self) -> None:
        self.stats = not self.stats
        if not self.stats:
            _say("Figures are off.")
            return
        if self.console.is_terminal and self.model.origins:
            shown = ", ".join(f"[{COLOURS[name]}]{name}[/]" for name in self.model.origins)
            Console(stderr=True).print(f"Figures are on. Tokens: {shown}.")
        if self.total.tokens:
            _say(f"[all answers: {self.total}]")

    def _answer(self, text: str) -> None:
        """Show the answer to a message; the two become part of the conversation, unless there is none."""
        turns, said = [*self.turns, {"role": "user", "content": text}], ""
        try:
            for piece in until_interrupted(self.model.answer(turns)):
                said += piece.text
                self._show(piece)
        except GlideCapeError as error:
            if said and self.typed:
                print(flush=True)
            _say(f"error: {error}")
            if not said:
                return
        print(flush=True)
        self.total.add(self.model.figures)
        if self.stats:
            _say(f"[{self.model.figures}]")
        if said:
            self.turns = [*turns, {"role": "assistant", "content": said}]

    def _show(self, piece: Piece) -> None:
        if not self.console.is_terminal:
            print(piece.text, end="", flush=True)
            return
        style = COLOURS.get(piece.origin) if self.stats else None
        self.console.out(piece.text.translate(CONTROLS), style=style, highlight=False, end="")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
