"""`glidecape regenerate --endpoint`: our own server's texts, and a server that fails, is full, and dies in between."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from glidecape.asking import Server
from glidecape.drafting.drafter import NoDraft
from glidecape.errors import CheckpointError, InputError
from glidecape.target.target import Target
from glidecape.train import endpoint as endpoints
from glidecape.train.endpoint import DescribedTarget, Endpoint, in_order
from glidecape.train.regenerate import Regeneration, regenerate, regenerate_by
from serving import Running
from test_command_line import run

PLAN = Regeneration(prompt_tokens=12, new_tokens=16, seed=3)


@pytest.fixture(scope="module")
def target(world):
    return Target.from_pretrained(world["target"], dtype=torch.float32)


@pytest.fixture(scope="module")
def made(world, target, tmp_path_factory) -> Path:
    """What the model itself says here."""
    out = tmp_path_factory.mktemp("made") / "own.jsonl"
    regenerate(target, world["corpus"], out, PLAN)
    return out


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


class Fake(ThreadingHTTPServer):
    """Says what the model said, prompt by prompt, after what `trouble` does to the request of that number.

    Attributes:
        asked: bodies of completions, in the order in which they came.
        most: requests that were answered at one time.
    """

    daemon_threads = True

    def __init__(self, said: list[dict[str, Any]]) -> None:
        self.said = {tuple(row["tokens"][: row["loss_mask"].index(1)]): row for row in said}
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.trouble: dict[int, tuple[int, dict[str, str]]] = {}
        self.running = self.most = 0
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        row = self.said[tuple(body["prompt"][1:])]
        ids = row["tokens"][len(body["prompt"]) - 1 :]
        if row["finish"] == "stop":
            ids = [*ids, 0]
        choice = {"text": "?", "finish_reason": row["finish"], "token_ids": ids}
        return {"choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: Any, headers: dict[str, str]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.keys.add(self.headers.get("Authorization"))
        self.reply(200, {"data": [{"id": "fake"}]}, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append(body)
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        time.sleep(0.02 if number % 3 else 0.06)  # answers come in another order
        with self.server.lock:
            self.server.running -= 1
        status, headers = self.server.trouble.get(number, (200, {}))
        if status == 0:
            self.connection.close()  # it dies
        elif status == 200:
            self.reply(200, self.server.answer(body), {})
        else:
            self.reply(status, {"error": {"message": f"trouble {status}"}}, headers)


@pytest.fixture
def fake(made) -> Iterator[Fake]:
    server = Fake(rows_of(made))
    yield server
    server.shutdown()
    server.server_close()


def by(fake: Fake, world, out: Path, **options: Any) -> dict[str, Any]:
    known = DescribedTarget.of(str(world["target"]))
    there = Endpoint(Server(fake.url, "secret", "--endpoint"), None, known.tokenizer, 0.01)
    return regenerate_by(there, known, world["corpus"], out, PLAN, **({"side_by_side": 4} | options))


def test_our_own_server_says_what_the_model_says_here(world, target, made, tmp_path, capfd, monkeypatch):
    server = Running(target, NoDraft(), max_context=192, api_key=("secret",))
    words = ["regenerate", world["target"], "--data", world["corpus"], "--prompt-tokens", 12, "--max-new-tokens", 16]
    words += ["--seed", 3, "--endpoint", server.url, "--concurrency", 5, "--output", tmp_path / "own.jsonl"]
    monkeypatch.setenv("GLIDECAPE_API_KEY", "secret")
    code, _, err = run(capfd, monkeypatch, *words)
    monkeypatch.setenv("GLIDECAPE_API_KEY", "another")
    refused, _, told = run(capfd, monkeypatch, *words[:-1], tmp_path / "none.jsonl")
    server.close()
    assert (code, "pysource at http" in err) == (0, True)
    assert (refused, told.count("refuses a request")) == (2, 1)
    assert (tmp_path / "own.jsonl").read_bytes() == made.read_bytes()  # it tells token ids
    for row in rows_of(tmp_path / "own.jsonl"):  # learned is what the model said, and the end where it said that
        assert row["loss_mask"][:11] == [0] * 11
        assert set(row["loss_mask"][11:-1]) <= {1}
        assert row["loss_mask"][-1] == (row["finish"] == "stop")


def test_a_server_that_tells_token_ids_makes_the_same_file(fake, world, made, tmp_path):
    figures = by(fake, world, tmp_path / "own.jsonl")
    assert (tmp_path / "own.jsonl").read_bytes() == made.read_bytes()
    assert figures["rows"] == len(fake.asked) == 20
    assert fake.keys == {"Bearer secret"}
    assert 1 < fake.most <= 4
    asked = sorted(fake.asked, key=lambda body: body["seed"])
    assert [body["seed"] for body in asked] == list(range(3, 23))
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in asked} == {("fake", 1.0, 16)}
    assert json.loads((tmp_path / "own.card.json").read_text())["settings"]["target"] == "fake of a server"


def test_the_text_of_a_server_that_tells_no_token_ids_is_tokenized_again(fake, world, target, made, tmp_path):
    tell = fake.answer

    def text_alone(body: dict[str, Any]) -> dict[str, Any]:
        choice = tell(body)["choices"][0]
        text = target.tokenizer.decode(choice.pop("token_ids"), skip_special_tokens=True)
        return {"choices": [choice | {"text": text}]}

    fake.answer = text_alone
    by(fake, world, tmp_path / "own.jsonl")
    here, there = rows_of(made), rows_of(tmp_path / "own.jsonl")
    texts = [[target.tokenizer.decode(row["tokens"]) for row in rows] for rows in (here, there)]
    assert texts[0] == texts[1]
    assert [row["finish"] for row in here] == [row["finish"] for row in there]
    for row in there:  # learned is what the model said, and the end where it said that
        assert row["loss_mask"][:11] == [0] * 11
        assert set(row["loss_mask"][11:-1]) <= {1}
        assert row["loss_mask"][-1] == (row["finish"] == "stop")


def test_failures_and_a_full_server_lose_and_double_no_row(fake, world, made, tmp_path):
    fake.trouble = {1: (500, {}), 2: (0, {}), 3: (429, {"Retry-After": "0.3"}), 7: (503, {}), 9: (429, {})}
    began = time.monotonic()
    by(fake, world, tmp_path / "own.jsonl")
    assert time.monotonic() - began >= 0.3
    assert len(fake.asked) == 25
    assert (tmp_path / "own.jsonl").read_bytes() == made.read_bytes()


def test_a_server_that_dies_ends_it_with_one_sentence_and_the_next_call_goes_on(fake, world, made, tmp_path):
    out = tmp_path / "own.jsonl"
    fake.trouble = {number: (0, {}) for number in range(8, 999)}
    with pytest.raises(InputError, match=r"failed 5 times \(.+\); give the same command again to go on"):
        by(fake, world, out)
    before = len(rows_of(out))
    assert 1 <= before <= 8
    assert made.read_bytes().startswith(out.read_bytes())
    fake.trouble, fake.asked = {}, []
    with out.open("a") as file:
        file.write('{"tokens": [1, 2')  # of a run killed while it wrote
    by(fake, world, out)
    assert out.read_bytes() == made.read_bytes()
    assert {body["seed"] - 3 for body in fake.asked} == set(range(before, 20))


def test_what_cannot_help_is_not_tried_again(fake, world, tmp_path, monkeypatch):
    fake.trouble = dict.fromkeys(range(99), (401, {}))
    with pytest.raises(InputError, match=r"/v1 refuses a request \(trouble 401\)$"):
        by(fake, world, tmp_path / "a.jsonl", side_by_side=1)
    assert len(fake.asked) <= 4
    fake.trouble, fake.asked = dict.fromkeys(range(99), (429, {"Retry-After": "0.05"})), []
    monkeypatch.setattr(endpoints, "BUSY_S", 0.2)
    with pytest.raises(
        InputError, match=r"had no room for a request in 0 seconds \(trouble 429\): lower --concurrency"
    ):
        by(fake, world, tmp_path / "b.jsonl", side_by_side=1)
    fake.trouble, fake.answer = {}, lambda body: {"choices": []}
    with pytest.raises(InputError, match=r"gives no completion that can be read \(IndexError"):
        by(fake, world, tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl").read_text()


def test_a_file_of_the_model_itself_is_not_continued_by_a_server(fake, world, made):
    with pytest.raises(CheckpointError, match=r"was started with target \w+, not fake of a server"):
        by(fake, world, made)


def test_results_come_in_order_and_few_are_begun_ahead():
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        time.sleep(0.05 if number == 0 else 0)
        if number == 30:
            raise InputError("thirty")
        return number

    results = in_order(work, range(99), 2)
    assert next(results) == 0
    assert max(begun) < endpoints.AHEAD * 2
    assert [next(results) for _ in range(29)] == list(range(1, 30))
    with pytest.raises(InputError, match="thirty"):
        next(results)
    assert list(in_order(work, [], 3)) == []
    assert list(in_order(work, [5], 3)) == [5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--endpoint", "localhost:8000"], "--endpoint is an address such as"),
        (
            ["--endpoint", "http://127.0.0.1:9/v1", "--batch", 4],
            "--batch is for a local model: leave it out with --endpoint",
        ),
        (["--endpoint", "http://127.0.0.1:9/v1", "--device", "cuda"], "--device is for a local model"),
        (["--concurrency", 4], "--concurrency is for a server: name it with --endpoint, or leave it out"),
    ],
)
def test_options_of_the_other_way_are_refused(words, message, world, tmp_path, capfd, monkeypatch):
    given = ["regenerate", world["target"], "--data", world["corpus"], "--output", tmp_path / "own.jsonl", *words]
    code, _, err = run(capfd, monkeypatch, *given)
    assert code == 2
    assert message in " ".join(err.split())
