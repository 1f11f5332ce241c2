"""llama.cpp as a peer: its own server program, which takes and gives token ids, with and without a draft model.

The server runs beside the benchmark as a child process and is asked for one prompt at a time over a socket, so its runs
can be interleaved with everything else. It times itself: prompt and generation apart. `runs/peers.sh` builds it from the
source that llama-cpp-python ships.
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
from pathlib import Path
from typing import Any

from ..errors import InputError

PROGRAM = "llama-server"
FOLDER = "GLIDECAPE_PEERS"  # environment variable: the folder that `make peers` made
START_S = 120.0  # to load a model
ANSWER_S = 3600.0


def find_program(name: str = PROGRAM) -> Path:
    """The program built by `make peers`: in $GLIDECAPE_PEERS, in .venv-peers of the checkout or here, or on the PATH.

    Raises:
        InputError: it is nowhere.
    """
    folders = [os.environ.get(FOLDER), Path(__file__).resolve().parents[3] / ".venv-peers", ".venv-peers"]
    for folder in filter(None, folders):
        program = Path(folder) / "bin" / name
        if program.is_file():
            return program
    found = shutil.which(name)
    if found is None:
        raise InputError(f"{name} is not there: run `make peers`, or set {FOLDER} to the folder that holds bin/{name}")
    return Path(found)


class _Socket(http.client.HTTPConnection):
    """HTTP over a Unix socket: no port to choose, nobody else can ask."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


class LlamaCpp:
    """llama.cpp on a GGUF file; with `draft`, its speculative decoding (type draft-simple).

    Args:
        model, draft: GGUF files of the target and of an independent draft LM.
        threads: CPU threads.
        context: tokens of the longest prompt and its output together.
        draft_length: tokens drafted a round; not used without a draft.
        name: in tables.

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
        name: str = "",
        program: Path | None = None,
    ) -> None:
        self.name = name or ("llama.cpp" if draft is None else "llama.cpp with a draft LM")
        self.folder = Path(tempfile.mkdtemp(prefix="glidecape-"))
        self.socket = self.folder / "llama.sock"
        words = [str(program or find_program()), "--model", str(model), "--host", str(self.socket)]
        words += ["--ctx-size", str(context), "--threads", str(threads), "--threads-batch", str(threads)]
        words += ["--parallel", "1", "--cache-ram", "0", "--no-webui", "--log-disable"]
        if draft is not None:
            words += ["--spec-type", "draft-simple", "--spec-draft-model", str(draft)]
            words += ["--spec-draft-n-max", str(draft_length), "--spec-draft-threads", str(threads)]
        self.log = self.folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
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
                raise InputError(f"{self.name} ended with code {self.process.returncode} before it was ready: {last}")
            try:
                if self._ask("GET", "/health", None, 5.0)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise InputError(f"{self.name} was not ready after {START_S:.0f} seconds")

    def _ask(self, verb: str, path: str, body: dict[str, Any] | None, timeout: float) -> tuple[int, dict[str, Any]]:
        connection = _Socket(self.socket, timeout)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(verb, path, sent, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def complete(self, prompt: list[int], temperature: float, max_new_tokens: int, seed: int = 0) -> dict[str, Any]:
        """The server's whole answer on token ids; see its documentation of /completion.

        Raises:
            InputError: it refused the prompt.
        """
        body = {
            "prompt": prompt,
            "n_predict": max_new_tokens,
            "ignore_eos": True,
            "return_tokens": True,
            "cache_prompt": False,
            "temperature": temperature,
            "samplers": ["temperature"],  # its other samplers are on by default
            "seed": seed,
        }
        status, answer = self._ask("POST", "/completion", body, ANSWER_S)
        if status != 200:
            raise InputError(f"{self.name} refused a prompt of {len(prompt)} tokens: {answer.get('error', answer)}")
        return answer

    def run(self, prompt: list[int], settings: Any) -> tuple[list[int], float]:
        """Tokens, and the seconds that all but the first of them took: the first one comes from the prompt's forward."""
        answer = self.complete(prompt, settings.temperature, settings.max_new_tokens)
        return list(answer["tokens"]), answer["timings"]["predicted_ms"] / 1000

    def close(self) -> None:
        """End the server and remove its socket."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
