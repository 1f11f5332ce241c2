"""llama.cpp as a peer: its own server program, which takes and gives token ids, plain, with a draft model or n-grams.

The server runs beside the benchmark as a child process and is asked for one prompt at a time over a socket, so its runs
can be interleaved with everything else. It times itself: prompt and generation apart. `runs/peers.sh` builds it from the
source that llama-cpp-python ships.

Differs: its command-line programs (llama-speculative-simple and others) take text and print text; the server runs the same
speculative code and takes token ids, so both sides decode exactly the same prompt.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...core.params import SamplingParams
from ...errors import InputError
from .base import PeerSource
from .gguf import write_gguf

PROGRAM = "llama-server"
FOLDER = "GLIDECAPE_PEERS"  # environment variable: the folder that `make peers` made
# Its own n-gram drafts by the name of --spec-type, at its defaults but for "lookup": the sizes of transformers' lookup.
NGRAMS = {
    "lookup": ("ngram-simple", "--spec-ngram-simple-size-n", "2", "--spec-ngram-simple-size-m", "10"),
    **{kind: (kind,) for kind in ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")},
}
START_S = 120.0  # to load a model
ANSWER_S = 3600.0
# A server never outlives this process: its keeper ends it when the pipe from this process closes, even by SIGKILL.
KEEPER = 'exec 3<&0; "$@" </dev/null & pid=$!; (read -r _ <&3; kill $pid) 2>/dev/null & wait $pid'


def find_program(name: str = PROGRAM) -> Path:
    """The program built by `make peers`: in $GLIDECAPE_PEERS, in .venv-peers of the checkout or here, or on the PATH.

    Raises:
        InputError: it is nowhere.
    """
    named = os.environ.get(FOLDER)
    folders = [Path(named)] if named else [Path(__file__).resolve().parents[4] / ".venv-peers", Path(".venv-peers")]
    for folder in folders:
        program = folder / "bin" / name
        if program.is_file():
            return program
    found = shutil.which(name)
    if found is None:
        raise InputError(f"{name} is not there: run `make peers`, or set {FOLDER} to the folder that holds bin/{name}")
    return Path(found)


class _Socket(http.client.HTTPConnection):
    """HTTP over a Unix socket: no port to choose, no other program can reach it."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class LlamaServer:
    """A running server on a GGUF file; with `draft` or `ngrams`, its speculative decoding.

    Args:
        model, draft: GGUF files of the target and of an independent draft LM.
        threads: CPU threads.
        context: tokens of the longest prompt and its output together.
        draft_length: tokens drafted a round; not used without a draft.
        program: None: see `find_program`.
        ngrams: instead of a draft LM, one of `NGRAMS`.

    It ends when the last reference to it is gone, or with this process.

    Raises:
        InputError: the program is not there, or it ended before it was ready.
    """

    def __init__(
        self,
        model: Path,
        threads: int,
        context: int,
        draft: Path | None = None,
        draft_length: int = 5,
        program: Path | None = None,
        ngrams: str | None = None,
    ) -> None:
        folder = Path(tempfile.mkdtemp(prefix="glidecape-"))
        self.socket, self.log = folder / "llama.sock", folder / "log"
        words = [str(program or find_program()), "--model", str(model), "--host", str(self.socket)]
        words += ["--ctx-size", str(context), "--threads", str(threads), "--threads-batch", str(threads)]
        words += ["--parallel", "1", "--cache-ram", "0", "--no-webui"]
        if draft is not None:
            words += ["--spec-type", "draft-simple", "--spec-draft-model", str(draft)]
            words += ["--spec-draft-n-max", str(draft_length), "--spec-draft-threads", str(threads)]
        if ngrams is not None:
            words += ["--spec-type", *NGRAMS[ngrams]]
        with self.log.open("wb") as log:
            kept = ["sh", "-c", KEEPER, "sh", *words]
            self.process = subprocess.Popen(kept, stdin=subprocess.PIPE, stdout=log, stderr=log)
        self.close = weakref.finalize(self, _end, self.process, folder)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            if self.process.poll() is not None:
                said = self.log.read_text(errors="replace").strip().splitlines()
                last = said[-1] if said else "it said nothing"
                raise InputError(f"{PROGRAM} ended with code {self.process.returncode} before it was ready: {last}")
            try:
                if self._ask("GET", "/health", None, 5.0)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise InputError(f"{PROGRAM} was not ready after {START_S:.0f} seconds")

    def _ask(self, verb: str, path: str, body: dict[str, Any] | None, timeout: float) -> tuple[int, dict[str, Any]]:
        connection = _Socket(self.socket, timeout)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(verb, path, sent, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    @property
    def build(self) -> str:
        """Its number and commit, for provenance."""
        return str(self._ask("GET", "/props", None, 5.0)[1].get("build_info", "unknown"))

    def complete(self, prompt: list[int], params: SamplingParams) -> dict[str, Any]:
        """The server's whole answer on token ids; see its documentation of /completion.

        Raises:
            InputError: it refused the prompt, or it ended.
        """
        body = {
            "prompt": prompt,
            "n_predict": params.max_new_tokens,
            "ignore_eos": params.ignore_eos,
            "return_tokens": True,
            "cache_prompt": False,
            "temperature": params.temperature,
            "samplers": ["temperature"],  # its other samplers are on by default
            "seed": params.seed,
        }
        try:
            status, answer = self._ask("POST", "/completion", body, ANSWER_S)
        except OSError as error:
            code = self.process.poll()
            state = "does not answer" if code is None else f"ended with code {code}"
            raise InputError(f"{PROGRAM} {state} on a prompt of {len(prompt)} tokens: {error}") from None
        if status != 200:
            raise InputError(f"{PROGRAM} refused a prompt of {len(prompt)} tokens: {_reason(answer)}")
        return answer


def _reason(answer: dict[str, Any]) -> str:
    error = answer.get("error", answer)
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


class LlamaCppPeer:
    """llama.cpp as a `Peer`, on the target's weights written as GGUF in the target's dtype.

    Args:
        draft: folder of an independent draft LM; None: plain decoding, or by n-grams.
        ngrams: one of `NGRAMS`, drafts from the prompt and the output.
        context: tokens that a prompt and its output may have.

    Raises:
        InputError: see `write_gguf` and `LlamaServer`; or a target that does not run on the CPU.
    """

    def __init__(
        self, source: PeerSource, draft: str | None = None, ngrams: str | None = None, context: int = 8192
    ) -> None:
        target = source.target
        if target.device.type != "cpu":
            raise InputError("llama.cpp is built for the CPU here: measure it beside a target on the CPU")
        self.name = "+".join(["llama.cpp", *([ngrams] if ngrams else []), *(["draft"] if draft else [])])
        self.made = tempfile.TemporaryDirectory(prefix="glidecape-")
        files = {"model": Path(self.made.name) / "target.gguf"}
        write_gguf(source.source, files["model"], target.dtype)
        if draft is not None:
            files["draft"] = Path(self.made.name) / "draft.gguf"
            write_gguf(draft, files["draft"], target.dtype)
        self.start = partial(
            LlamaServer,
            threads=torch.get_num_threads(),
            context=min(context, target.context),
            draft_length=source.draft_length,
            ngrams=ngrams,
            **files,
        )
        # What n-grams remember of an earlier prompt is its output, too: on a repeat they would copy the answer.
        self.forgetful = ngrams in (None, "lookup", "ngram-simple")
        self.server = self.start()
        self.version = self.server.build

    def run(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
        """See `Peer.run`. The server's own time: the first token comes from the prompt's forward and is not in it."""
        answer = self.server.complete(prompt, params)
        if not self.forgetful:
            self.server.close()
            self.server = self.start()
        return list(answer["tokens"]), answer["timings"]["predicted_ms"] / 1000
