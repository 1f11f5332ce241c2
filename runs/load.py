"""The server under load: throughput and time to first token at 1, 4, 16 and 32 clients, beside plain decoding and llama.cpp.

    .venv/bin/python runs/load.py [--clients 1 4 16 32] [--repeats 3] [--method glide] [--compile on]

On the shipped pair in float32, greedily, 96 tokens an answer. All servers run at once, and are asked in turn, so that they meet
the same drift of the machine; one that is not asked is idle. Each client asks one request after the other. No server may
reuse a prefix. Prints the table of docs/serving.md: medians of the repeats. llama.cpp is left out where `make peers` was not
run.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from glidecape import Target
from glidecape.bench.peers.gguf import write_gguf
from glidecape.bench.peers.llama_cpp import find_program
from glidecape.errors import InputError

PAIR = Path("models/pysource")
ROOM = 512  # tokens of a prompt and its answer
START_S = 900.0  # compiling included


@dataclass
class Server:
    """A server that runs: its name in the table, where it listens, and what its requests have besides."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    extra: dict[str, object]

    def wait(self) -> None:
        until = time.monotonic() + START_S
        while time.monotonic() < until and self.process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise SystemExit(f"{self.name} does not start")

    def answer(self, prompt: list[int], tokens: int) -> tuple[int, float]:
        """Tokens of an answer, and seconds until its first."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
        body |= {"stream_options": {"include_usage": True}} | self.extra
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        began, first, count = time.perf_counter(), 0.0, 0
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"{self.name}: {answer.read().decode()}")
        for line in answer:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                usage = json.loads(line[6:]).get("usage")
                count = usage["completion_tokens"] if usage else count
        connection.close()
        return count, first


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start(given: argparse.Namespace, folder: Path) -> list[Server]:
    rows, quiet = max(given.clients), {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ours = [sys.executable, "-m", "glidecape.cli", "serve", str(PAIR / "target"), "--dtype", "float32"]
    ours += ["--threads", str(given.threads), "--max-context", str(ROOM), "--max-batch", str(rows)]
    ours += ["--no-prefix-reuse", "--compile", given.compile]
    draft = ["--draft", str(PAIR / given.draft), "--method", given.method]
    servers = []
    for name, words in ((given.method, draft), ("plain", ["--method", "plain"])):
        port = free_port()
        process = subprocess.Popen([*ours, *words, "--port", str(port)], **quiet)  # type: ignore[call-overload]
        servers.append(Server(name, port, process, {}))
        servers[-1].wait()
    try:
        program, model, port = find_program(), folder / "target.gguf", free_port()
    except InputError as error:
        print(f"without llama.cpp: {error}", file=sys.stderr)
        return servers
    write_gguf(PAIR / "target", model, torch.float32)
    words = [str(program), "--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--no-webui"]
    words += ["--threads", str(given.threads), "--threads-batch", str(given.threads), "--cache-ram", "0"]
    words += ["--parallel", str(rows), "--ctx-size", str(rows * ROOM)]
    process = subprocess.Popen(words, **quiet)  # type: ignore[call-overload]
    servers.append(Server("llama.cpp", port, process, {"cache_prompt": False}))
    servers[-1].wait()
    return servers


def load(server: Server, prompts: list[list[int]], clients: int, requests: int, tokens: int) -> tuple[float, float]:
    """Tokens a second of all clients together, and the median of the seconds to a first token."""

    def client(number: int) -> list[tuple[int, float]]:
        own = range(number * requests, (number + 1) * requests)
        return [server.answer(prompts[i % len(prompts)], tokens) for i in own]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [one for each in pool.map(client, range(clients)) for one in each]
    seconds = time.perf_counter() - began
    return sum(count for count, _ in answers) / seconds, statistics.median(first for _, first in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draft", default="glide")
    parser.add_argument("--method", default="glide")
    parser.add_argument("--compile", default="on", choices=("on", "off", "auto"))
    given = parser.parse_args()
    target = Target.from_pretrained(PAIR / "target", dtype=torch.float32)
    lines = Path("evaluation/prompts/python.jsonl").read_text().splitlines()
    prompts = [target.encode(json.loads(line)["prompt"])[:192] for line in lines]
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    servers: list[Server] = []
    with tempfile.TemporaryDirectory(prefix="glidecape-") as folder:
        try:
            servers = start(given, Path(folder))
            for server in servers:
                load(server, prompts, min(given.clients), 1, given.tokens)  # warm
            for repeat in range(given.repeats):
                for clients in given.clients:
                    for server in servers if repeat % 2 == 0 else servers[::-1]:
                        one = load(server, prompts, clients, given.requests, given.tokens)
                        found.setdefault((clients, server.name), []).append(one)
        finally:
            for server in servers:
                server.process.kill()
                server.process.wait()
    print_table(given.clients, [server.name for server in servers], found)


def print_table(clients: list[int], names: list[str], found: dict[tuple[int, str], list[tuple[float, float]]]) -> None:
    heads = [f"{name}, {what}" for what in ("tokens/s", "first token ms") for name in names]
    print(f"| clients | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}")
    for count in clients:
        rates = [statistics.median(rate for rate, _ in found[count, name]) for name in names]
        firsts = [statistics.median(first for _, first in found[count, name]) for name in names]
        cells = [f"{rate:.0f}" for rate in rates] + [f"{1000 * first:.0f}" for first in firsts]
        print(f"| {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
