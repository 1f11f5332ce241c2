"""Ctrl-C and SIGTERM while something is trained: the step that runs is finished and saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Stopped(KeyboardInterrupt):
    """A training was asked to end, and has saved what it learned.

    Attributes:
        signal: the number of the signal that asked.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@dataclass
class Asked:
    """The signal that asked for the end; None: none did."""

    signal: int | None = None


@contextmanager
def stop_requests() -> Iterator[Asked]:
    """Note the first Ctrl-C or SIGTERM instead of obeying it, while the block runs. A second one acts at once."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():  # which alone hears signals
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def heard(number: int, _: object) -> None:
        asked.signal = number
        restore()

    for number in before:
        signal.signal(number, heard)
    try:
        yield asked
    finally:
        restore()
