"""The server tried long (`make test-serve`): generated requests, many clients at once of which some go away, and
older releases of the official client."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from glidecape.target.target import Target
from serving import PROMPTS, Process, alone, wait_for

pytestmark = pytest.mark.serve
MODELS = Path(__file__).parents[1] / "models" / "pysource"
CASES = 2000
LOCK = Path(__file__).parents[1] / "requirements.lock"
CLIENTS = ("1.109.1", "2.8.0")  # of September and November 2025


def test_generated_requests_end_in_no_5xx_and_no_hang() -> None:
    """schemathesis makes requests of our own OpenAPI document, right ones and wrong ones, and checks every answer by it."""
    command = Path(sys.executable).parent / "schemathesis"
    if not command.exists():
        pytest.skip("schemathesis is in the dependency group 'fuzz': make test-serve")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    with Process("--max-context", "48", "--max-queue", "8", "--timeout", "20") as server:
        done = subprocess.run(
            [
                command, "run", f"http://127.0.0.1:{server.port}/openapi.json", "--checks", checks, "--mode", "all",
                "--phases", "examples,coverage,fuzzing", "--max-examples", "800", "--request-timeout", "30", "--seed", "1",
                "--no-color", "--suppress-health-check", "all",
            ],
            capture_output=True,
            text=True,
            timeout=1200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:]
        counts = [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) generated", done.stdout)]
        assert counts, done.stdout[-3000:]
        assert counts[0] >= CASES
        assert server.ask("/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200
        assert not [line for line in server.log if line["level"] == "error"]


def _stream(port: int, body: dict, leave_after: int | None, nap: float) -> str | None:
    """The text of a stream; None where the client left after so many events. `nap`: seconds before each event is read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request(
        "POST", "/v1/completions", json.dumps(body | {"stream": True}), {"Content-Type": "application/json"}
    )
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    text, events, ended = "", 0, False
    for line in answer:
        if line.startswith(b"data: {"):
            time.sleep(nap)
            choice = json.loads(line[6:])["choices"][0]
            text += choice["text"]
            ended = choice["finish_reason"] is not None
            events += 1
            if events == leave_after:
                answer.close()
                connection.close()
                return None
    assert ended, "the stream broke off"
    return text


def test_128_streams_some_aborted_some_slow_are_all_right_and_leak_nothing() -> None:
    torch.set_num_threads(1)
    target = Target.from_pretrained(MODELS / "target", dtype=torch.float32)
    kinds = [
        (
            {"prompt": prompt, "temperature": float(t), "seed": i, "max_tokens": 6 + i, "ignore_eos": True},
            alone(target, prompt, temperature=float(t), seed=i, max_new_tokens=6 + i, ignore_eos=True),
        )
        for i, prompt in enumerate(PROMPTS)
        for t in (0, 1)
    ]
    chance, outcomes = random.Random(5), Counter()

    with Process("--max-context", "256", "--max-queue", "200") as server:

        def one(number: int) -> None:
            body, expected = kinds[number % len(kinds)]
            leaves = chance.randrange(1, 4) if chance.random() < 0.2 else None
            nap = 0.5 if number % 400 < 5 else 0.0
            got = _stream(server.port, body, leaves, nap)
            if got is None:
                outcomes["left"] += 1
                return
            assert got == expected, body
            outcomes["slow" if nap else "whole"] += 1

        def many(first: int, last: int) -> int:
            with ThreadPoolExecutor(128) as pool:
                list(pool.map(one, range(first, last)))
            wait_for(lambda: 'num_requests_running{model_name="target"} 0.0' in server.ask("/metrics")[1])
            assert 'num_requests_waiting{model_name="target"} 0.0' in server.ask("/metrics")[1]
            return server.resident

        early = many(0, 500)
        late = many(500, 2000)
        metrics = server.ask("/metrics")[1]
    print(f"{dict(outcomes)}, resident {early / 2**20:.0f} MiB after 500 requests, {late / 2**20:.0f} MiB after 2,000")
    assert late < 1.05 * early
    assert outcomes["left"] > 200
    assert outcomes["slow"] >= 10
    assert outcomes["whole"] > 1000
    ended = sum(float(number) for number in re.findall(r"request_success_total\{.*\} (\S+)", metrics))
    assert ended == 2000


@pytest.mark.parametrize("version", CLIENTS)
def test_older_clients_are_served(version, tmp_path) -> None:
    """The tests of today's client, run with an older one that stands before it on the path."""
    lock = "\n".join(line for line in LOCK.read_text().splitlines() if not line.startswith("openai=="))
    (tmp_path / "lock").write_text(lock)
    python, client = sys.executable, tmp_path / "client"
    install = [python, "-m", "pip", "install", "--quiet", "--target", client, "-c", tmp_path / "lock"]
    done = subprocess.run([*install, f"openai=={version}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join(filter(None, (str(client), os.environ.get("PYTHONPATH"))))
    tests = Path(__file__).with_name("test_serve_client.py")
    code = f"import openai, pytest, sys; assert openai.__version__ == '{version}'; sys.exit(pytest.main(sys.argv[1:]))"
    command = [python, "-c", code, "-p", "no:cacheprovider", "-W", "default", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"1\d passed", done.stdout), done.stdout
