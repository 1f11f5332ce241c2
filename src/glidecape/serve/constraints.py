"""`Constraints`: a constraint of a request is read first in a process of its own, which ends when that takes too much.

Reading one can take minutes or gigabytes, whatever the library's limits say, and nothing ends a thread. So a child process
reads it under limits of the kernel; only what it could read is read here. The limits are of processor time, so that a busy
machine refuses nothing, and hold when the server is killed, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from ..core.constraint import Constraint
from ..errors import GlideCapeError, InputError

LONGEST = 128 * 1024  # characters of a constraint
SECONDS = 5  # of processor time to read one, for all answers of a request
MEMORY = 256 * 2**20  # bytes to read one
KNOWN = 256  # constraints that are remembered as good


class Constraints:
    """Reads constraints for one model; called by one thread at a time.

    Args:
        tokenizer: of the target.
        size: tokens of the target.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size
        self._child: subprocess.Popen[str] | None = None
        self._known: dict[Constraint, float] = {}

    def check(self, constraint: Constraint, answers: int) -> None:
        """Let a constraint pass that can be read for so many answers.

        Raises:
            InputError: it takes too much time or memory, or it is too long.
        """
        if len(constraint.text) > LONGEST:
            raise InputError(f"the constraint has {len(constraint.text)} characters, and at most {LONGEST} are taken")
        if constraint not in self._known:
            seconds = self._ask(constraint)
            self._known = dict([*self._known.items()][1 - KNOWN :]) | {constraint: seconds}
        if (needed := self._known[constraint] * answers) > SECONDS:
            raise InputError(
                f"the constraint takes {needed:.1f} seconds to read for {answers} answers, and at most {SECONDS} are taken: "
                "ask for fewer answers, or write a smaller constraint"
            )

    def _ask(self, constraint: Constraint) -> float:
        """Seconds that the child took; 0 where it refused, which the caller will find out itself."""
        child = self._child
        if child is None or child.poll() is not None:
            child = self._child = self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        answer = ""
        with contextlib.suppress(OSError):
            child.stdin.write(json.dumps([constraint.kind, constraint.text]) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        if not answer:
            self.close()
            raise InputError(
                f"the {constraint.kind.replace('_', ' ')} cannot be read in {SECONDS} seconds and {MEMORY // 2**20} MiB: "
                "write a smaller one"
            )
        return float(answer)

    def _start(self) -> subprocess.Popen[str]:
        """A child that has the tokenizer and waits for constraints."""
        command = [sys.executable, "-m", "glidecape.serve.constraints"]
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert child.stdin is not None
        child.stdin.write(json.dumps([self.tokenizer.backend_tokenizer.to_str(), self.size]) + "\n")
        return child

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None


class _Tokenizer:
    """As much of a tokenizer as `Vocabulary.of` reads."""

    def __init__(self, text: str) -> None:
        from tokenizers import Tokenizer

        self.backend_tokenizer = Tokenizer.from_str(text)


def read_all(lines: IO[str]) -> None:
    """The child: answer each constraint with the seconds that reading it took."""
    from ..batch.grammar import Grammar, Vocabulary

    text, size = json.loads(next(lines))
    vocabulary = Vocabulary.of(_Tokenizer(text), size)
    os.nice(5)
    for line in lines:
        _limit()
        began = time.process_time()
        with contextlib.suppress(GlideCapeError):
            Grammar(vocabulary, Constraint(*json.loads(line)), ()).allowed(())
        print(time.process_time() - began, flush=True)


def _limit() -> None:
    """Let the kernel end this process after so much more time or memory than it has taken so far."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + SECONDS, resource.RLIM_INFINITY))
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    read_all(sys.stdin)
