"""Processes that tests kill or signal, forked from one that has imported PyTorch already: that takes five seconds a process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "transformers", "glidecape.cli", "glidecape.target.target", "glidecape.train.draft"]
)


class Child:
    """A process that runs `function(*args)`, which a module of the tests defines.

    Args:
        said: the file of what it prints; None: a pipe, whose end is `stderr`.
    """

    def __init__(self, function: Callable[..., Any], *args: Any, said: Path | None = None) -> None:
        reader, writer = (None, None) if said else CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=_run, args=(said or writer, function, args))
        self.process.start()
        if writer is not None:
            writer.close()
        if said:
            said.touch()
        self.stderr: TextIO = said.open() if said else os.fdopen(os.dup(reader.fileno()))

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.process.exitcode

    def wait(self, seconds: float = 200) -> int | None:
        """See `poll`, after at most so long."""
        self.process.join(seconds)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)


def _run(said: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if isinstance(said, Path) else said.fileno()
    os.dup2(file, 1)
    os.dup2(file, 2)
    # The old streams believe that they may seek.
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    torch.set_num_threads(1)
    function(*args)


def glidecape(*words: Any) -> None:
    """The command line."""
    from glidecape import cli

    sys.argv = ["glidecape", *map(str, words)]
    cli.main()
