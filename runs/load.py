"""The server under load: throughput and time to first token at 1, 4, 16 and 32 clients, beside plain decoding and llama.cpp.

    .venv/bin/python runs/load.py [--clients 1 4 16 32] [--repeats 3] [--methods glide glide+auto] [--output table.md]

On the shipped pair in float32, greedily, 96 tokens an answer, prompts whose answers do not loop. All servers run at once, and
are asked in turn, so that they meet the same drift of the machine; one that is not asked is idle. Each client asks one request
after the other. No server may reuse a prefix. Writes the table of docs/serving.md: medians of the repeats, and of the ratios
within each. Repeats end before they would take more than --minutes. llama.cpp is left out where `make peers` was not run.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shlex
import signal
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

from glidecape import SamplingParams, Target, generate
from glidecape.bench.peers.gguf import write_gguf
from glidecape.bench.peers.llama_cpp import find_program
from glidecape.bench.provenance import commit
from glidecape.core.stats import loops
from glidecape.errors import InputError

PAIR = Path("models/pysource")
ROOM = 512  # tokens of a prompt and its answer
PROMPT = 192  # tokens of it, most
START_S = 900.0  # compiling included
Rates = dict[tuple[int, str], list[tuple[float, float]]]  # by clients and server: tokens a second, seconds to the first


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


def ours(given: argparse.Namespace, method: str) -> Server:
    """A server of this package."""
    words = [sys.executable, "-m", "glidecape.cli", "serve", str(PAIR / "target"), "--dtype", "float32"]
    words += ["--threads", str(given.threads), "--max-context", str(ROOM), "--max-batch", str(max(given.clients))]
    words += ["--no-prefix-reuse", "--compile", given.compile, "--method", method]
    words += [] if method == "plain" else ["--draft", str(PAIR / given.draft)]
    port = free_port()
    return Server(method, port, quiet([*words, "--port", str(port)]), {})


def llama_cpp(given: argparse.Namespace, folder: Path) -> Server:
    """llama.cpp's server on the same weights.

    Raises:
        InputError: it is not there.
    """
    rows, program, model, port = max(given.clients), find_program(), folder / "target.gguf", free_port()
    write_gguf(PAIR / "target", model, torch.float32)
    words = [str(program), "--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--no-webui"]
    words += ["--threads", str(given.threads), "--threads-batch", str(given.threads), "--cache-ram", "0"]
    words += ["--parallel", str(rows), "--ctx-size", str(rows * ROOM)]
    return Server("llama.cpp", port, quiet(words), {"cache_prompt": False})


def quiet(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def steady_prompts(count: int, tokens: int) -> list[list[int]]:
    """Prompts of code after which plain decoding does not loop."""
    target = Target.from_pretrained(PAIR / "target", dtype=torch.float32)
    lines = Path("evaluation/prompts/python.jsonl").read_text().splitlines()
    prompts = [target.encode(json.loads(line)["prompt"])[:PROMPT] for line in lines][: 2 * count]
    answers = generate(target, prompts, params=SamplingParams(max_new_tokens=tokens, ignore_eos=True), batch=32)
    return [prompt for prompt, one in zip(prompts, answers, strict=True) if not loops(one.tokens)][:count]


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


def measure(given: argparse.Namespace, servers: list[Server], prompts: list[list[int]], until: float) -> Rates:
    """All servers in turn, at each number of clients, as often as asked or until then."""
    found: Rates = {}
    for repeat in range(given.repeats):
        began = time.monotonic()
        for clients in given.clients:
            requests = max(given.requests, given.answers // clients)
            for server in servers if repeat % 2 == 0 else servers[::-1]:
                one = load(server, prompts, clients, requests, given.tokens)
                found.setdefault((clients, server.name), []).append(one)
                print(f"{server.name}, {clients} clients: {one[0]:.0f} tokens/s", file=sys.stderr, flush=True)
        now = time.monotonic()
        if repeat + 1 < given.repeats and now + (now - began) > until:
            print(f"another repeat would take more than --minutes: {repeat + 1} were made", file=sys.stderr)
            break
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--answers", type=int, default=24, help="of all clients together, least")
    parser.add_argument("--requests", type=int, default=2, help="of each client, least")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all; one repeat is made at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draft", default="glide")
    parser.add_argument("--methods", nargs="+", default=["glide"])
    parser.add_argument("--compile", default="on", choices=("on", "off", "auto"))
    parser.add_argument("--output", type=Path, help="write the table here, too")
    return parser.parse_args()


def main() -> None:
    given, servers = options(), list[Server]()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end, too
    until = time.monotonic() + 60 * given.minutes
    torch.set_num_threads(given.threads)
    prompts = steady_prompts(24, given.tokens)
    print(f"{len(prompts)} prompts whose answers do not loop", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="glidecape-") as folder:
        try:
            for method in (*given.methods, "plain"):
                servers.append(ours(given, method))
                servers[-1].wait()
            try:
                servers.append(llama_cpp(given, Path(folder)))
                servers[-1].wait()
            except InputError as error:
                print(f"without llama.cpp: {error}", file=sys.stderr)
            for server in servers:
                load(server, prompts, min(given.clients), 1, given.tokens)  # warm
            found = measure(given, servers, prompts, until)
        finally:
            for server in servers:
                server.process.kill()
                server.process.wait()
    made = table(given.clients, [server.name for server in servers], found)
    repeats, code = min(map(len, found.values())), commit()
    command = shlex.join(["runs/load.py", *sys.argv[1:]])
    made += f"\n\n`{command}`, commit {code}, {given.threads} threads, repeats: {repeats}, prompts: {len(prompts)}"
    print(made)
    if given.output is not None:
        given.output.write_text(made + "\n")


def table(clients: list[int], names: list[str], found: Rates) -> str:
    """In Markdown."""
    others = [name for name in names if name != "plain"]
    heads = [f"{name}, tokens/s" for name in names] + [f"{name} over plain" for name in others]
    heads += [f"{name}, first token ms" for name in names]
    lines = [f"| clients | {' | '.join(heads)} |", f"|{'---:|' * (1 + len(heads))}"]
    for count in clients:
        of = {name: found[count, name] for name in names}
        cells = [f"{statistics.median(rate for rate, _ in of[name]):.0f}" for name in names]
        for name in others:
            pairs = zip(of[name], of["plain"], strict=True)
            cells.append(f"{statistics.median(one / plain for (one, _), (plain, _) in pairs):.2f}")
        cells += [f"{1000 * statistics.median(first for _, first in of[name]):.0f}" for name in names]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
