"""Requests that are meant to do harm: each is answered soon, by an error that names what is wrong, and the server goes on."""

from __future__ import annotations

import random
import socket
import time

import pytest

import glidecape.serve.gate as gate
from glidecape.batch.text import held_back
from serving import PROMPTS, alone, wait_for

MANY = 100_000
HALF = "\\ud800"  # half of a character, which JSON can write and UTF-8 cannot
SCHEMA = '{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": %s}}}'
HALVES = [
    f'{{"prompt": "x", "{HALF}": 1}}',
    f'{{"prompt": "x", "model": "{HALF}"}}',
    f'{{"prompt": "{HALF}"}}',
    f'{{"prompt": "x", "logit_bias": {{"{HALF}": 1}}}}',
    f'{{"prompt": "x", "structured_outputs": {{"regex": "a{HALF}"}}}}',
    f'{{"prompt": "x", "response_format": {{"type": "{HALF}"}}}}',
    SCHEMA % f'{{"type": "{HALF}"}}',
]
LONG = {
    "fields": {f"f{i}": 1 for i in range(MANY)},
    "values of a bias": {"logit_bias": {str(i): "x" for i in range(MANY)}},
    "keys of a bias": {"logit_bias": {f"x{i}": 1 for i in range(MANY)}},
    "metadata": {"metadata": {str(i): "x" for i in range(MANY)}},
    "prompts of no kind": {"prompt": [{}] * MANY},
    "prompts": {"prompt": ["a"] * MANY},
    "empty prompts": {"prompt": [[]] * MANY},
    "a field's name": {"x" * 10 * MANY: 1},
    "stop strings": {"stop": [1] * MANY},
    "one stop string": {"stop": "a" * 300},
    "stop tokens": {"stop_token_ids": ["a"] * MANY},
    "log-probabilities": {"n": 64, "max_tokens": 480, "logprobs": 20},
    "seed": {"seed": 10**4000},
    "answers": {"prompt": ["a"] * 20, "n": 5},
}


@pytest.mark.parametrize("body", HALVES)
def test_half_characters_are_refused(running, body: str) -> None:
    status, answer, _ = running.ask("/v1/completions", body.encode())
    assert status in (400, 404), answer
    # The process that reads constraints does not die of it.
    assert "cannot be read in" not in answer["error"]["message"]


@pytest.mark.parametrize("name", LONG)
def test_what_is_too_long_is_a_short_400_at_once(running, name: str) -> None:
    began = time.monotonic()
    status, answer, _ = running.ask("/v1/completions", {"prompt": "x", "max_tokens": 2} | LONG[name])
    assert status == 400, answer
    assert len(answer["error"]["message"]) < 700
    assert len(answer["error"]["param"] or "") < 700
    assert time.monotonic() - began < 10


def test_turns_of_no_kind_are_a_400_about_the_first(running) -> None:
    for content in ([{}] * MANY, [{"role": "user", "content": [{}] * MANY}], [{f"f{i}": 1 for i in range(MANY)}]):
        status, answer, _ = running.ask("/v1/chat/completions", {"messages": content})
        assert status == 400
        assert answer["error"]["param"].startswith("messages.0")


def send(port: int, body: bytes, length: int) -> socket.socket:
    """An upload of which only a part comes."""
    made = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    made.sendall(head.encode() + body)
    return made


def test_an_upload_that_does_not_come_ends_and_one_that_is_broken_off_is_forgotten(
    running, target, monkeypatch
) -> None:
    monkeypatch.setattr(gate, "UPLOAD", 0.5)
    slow = send(running.port, b'{"prompt": ', 100)
    said = slow.recv(4000).decode()
    assert said.startswith("HTTP/1.1 408")
    assert "the body did not come within 0.5 seconds" in said + slow.recv(4000).decode()
    slow.close()
    before = running.metric("requests_rejected_total", status="500")
    send(running.port, b'{"prompt": ', 100).close()
    whole = send(running.port, b'{"prompt": "x", ', 34)
    time.sleep(0.1)
    whole.sendall(b'"max_tokens": 100}')
    assert whole.recv(4000).startswith(b"HTTP/1.1 200")  # an answer may take longer than its upload
    whole.close()
    assert running.complete(PROMPTS[0], max_tokens=8) == alone(target, PROMPTS[0], max_new_tokens=8)
    wait_for(lambda: not running.service.worker.jobs)
    assert running.metric("requests_rejected_total", status="500") == before


def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string() -> None:
    chance = random.Random(4)
    for _ in range(2000):
        strings = ["".join(chance.choices("ab", k=chance.randrange(1, 7))) for _ in range(chance.randrange(4))]
        text = "".join(chance.choices("ab", k=chance.randrange(12)))
        known = [n for n in range(len(text) + 1) if any(n < len(s) and text.endswith(s[:n]) for s in strings)]
        assert held_back(text, strings) == max(known, default=0)
