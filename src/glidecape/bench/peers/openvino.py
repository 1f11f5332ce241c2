"""OpenVINO GenAI as a peer: plain, by prompt lookup, and with a draft LM, on the target's weights exported by optimum-intel.

It runs in an environment of its own, which `make peers` makes, as a child process that speaks JSON lines
(`openvino_child.py`).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...core.params import SamplingParams
from ...errors import InputError
from .base import PeerSource
from .llama_cpp import find_program
from .transformers import LOOKUP_TOKENS

PYTHON = "openvino-python"  # the environment's interpreter, beside llama.cpp's programs
CHILD = Path(__file__).with_name("openvino_child.py")
LOOKUP_NGRAM = 3  # of OpenVINO's documentation
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@cache
def _exports() -> tempfile.TemporaryDirectory[str]:
    """A folder for exported models, of this process."""
    return tempfile.TemporaryDirectory(prefix="glidecape-openvino-")


class OpenVinoPeer:
    """OpenVINO GenAI as a `Peer`.

    Args:
        draft: folder of an independent draft LM; None: plain decoding, or lookup.
        lookup: propose what followed the same n-gram earlier.

    Raises:
        InputError: its environment is not there, the export or the pipeline fails, or a target in another dtype than
            float32 and bfloat16 or not on the CPU.
    """

    def __init__(self, source: PeerSource, draft: str | None = None, lookup: bool = False) -> None:
        target = source.target
        if target.device.type != "cpu" or target.dtype not in DTYPES:
            raise InputError("OpenVINO runs on the CPU here, in float32 or bfloat16: leave it out of --peers")
        self.name = "openvino" + ("+lookup" if lookup else "") + ("+draft" if draft else "")
        self.eos = list(target.eos_token_ids)
        started = {
            "target": str(source.source),
            "draft": draft,
            "exports": _exports().name,
            "dtype": DTYPES[target.dtype],
            "threads": torch.get_num_threads(),
            "lookup": (LOOKUP_TOKENS, LOOKUP_NGRAM) if lookup else None,
            "draft_length": source.draft_length,
        }
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the child)
        words = [str(find_program(PYTHON)), "-P", str(CHILD), json.dumps(started)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.close = weakref.finalize(self, _end, self.process)
        self.version = str(self._answer()["version"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            if "error" not in answer:
                return answer
            reason = answer["error"]
        else:
            self.log.seek(0)
            said = self.log.read().decode(errors="replace").strip().splitlines()
            reason = f"it ended with code {self.process.wait()}: {said[-1] if said else 'it said nothing'}"
        raise InputError(f"{self.name} failed: {reason}")

    def run(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
        """See `Peer.run`; its own measure, by the times of its rounds.

        Raises:
            InputError: it failed.
        """
        asked = {
            "prompt": prompt,
            "max_new_tokens": params.max_new_tokens,
            "ignore_eos": params.ignore_eos,
            "eos": self.eos,
            "temperature": params.temperature,
            "seed": params.seed,
        }
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
        answer = self._answer()
        return list(answer["tokens"]), float(answer["seconds"])


def _end(process: subprocess.Popen[str]) -> None:
    """The child ends when its input does."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.wait(60)
