"""Ctrl-C while an answer comes: it ends the answer, never what is being printed, and never the program."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def until_interrupted(pieces: Iterator[T]) -> Iterator[T]:
    """The pieces until Ctrl-C; then the source is closed.

    A wait for the next piece is broken off. Between two pieces Ctrl-C is only noted: an exception in the middle of printing
    would leave the terminal's buffers half written, and one that a callback swallows would be lost.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield from pieces
        return
    waiting, asked = False, False

    def heard(*_: Any) -> None:
        nonlocal asked
        again, asked = asked, True
        if waiting and not again:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, heard)
    try:
        while not asked:
            try:
                waiting = True
                piece = next(pieces, None)
                waiting = False
            except KeyboardInterrupt:
                break
            if piece is None:
                return
            yield piece
        waiting = False
        pieces.close()  # type: ignore[attr-defined]
    finally:
        signal.signal(signal.SIGINT, before)
