"""The page's files and its route: rounds add up to the answer of /v1/completions, and nobody pays for what nobody watches."""

from __future__ import annotations

import http.client
import json
import re
from pathlib import Path

import pytest
import torch

from glidecape.core.tree import TokenTree
from glidecape.drafting.lookup import LookupDrafter
from glidecape.drafting.methods import make_drafter
from glidecape.drafts.checkpoint import load_draft
from glidecape.serve import playground
from glidecape.target.target import Target
from serving import PROMPTS, Running, alone, wait_for

MODELS = Path(__file__).parents[1] / "models" / "pysource"
PAGE = Path(playground.__file__).parent
STREAM = "/playground/stream"


@pytest.fixture(scope="module")
def target():
    return Target.from_pretrained(MODELS / "target", dtype=torch.float32)


@pytest.fixture(scope="module")
def running(target):
    drafter = make_drafter("glide+cape", load_draft(MODELS / "glide", target), length=4, bins=(2, 1))
    made = Running(target, drafter)
    yield made
    made.close()


def events_of(one: Running, prompt: str, **fields) -> list:
    status, text, _ = one.ask(STREAM, {"prompt": prompt, "temperature": 0, "max_tokens": 40} | fields)
    assert status == 200, text
    *events, done = text.strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def text_of(rounds: list) -> str:
    return "".join(token["text"] for one in rounds for token in one["tokens"])


@pytest.mark.parametrize("drafts", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 5}, {"stop": ["self", "\n\n"], "max_tokens": 200}]
)
def test_rounds_add_up_to_the_answer_of_the_completions(running, drafts, options) -> None:
    start, *rounds, end = events_of(running, PROMPTS[1], drafts=drafts, **options)
    assert start["method"] == ("test" if drafts else "plain")
    assert start["prompt_tokens"] == end["usage"]["prompt_tokens"] > 0
    assert text_of(rounds) == running.complete(PROMPTS[1], **{"max_tokens": 40} | options)
    emitted = [token for one in rounds for token in one["tokens"]]
    assert len(emitted) == end["usage"]["completion_tokens"]
    assert {token["origin"] for token in emitted} <= ({"chain", "sibling", "bonus"} if drafts else {"bonus"})
    assert [one["at"] for one in rounds] == sorted(one["at"] for one in rounds)
    assert (max(len(one["tokens"]) for one in rounds) > 1) == drafts
    details = end["usage"]["completion_tokens_details"]
    drafted = sum(len(one["tree"]["texts"]) - 1 for one in rounds)
    assert drafted == details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"]


def test_a_round_s_tree_is_what_was_proposed_and_its_path_what_was_emitted(running, target) -> None:
    _, *rounds, _ = events_of(running, PROMPTS[0])
    for one in rounds:
        tree, tokens = one["tree"], one["tokens"]
        nodes = len(tree["texts"])
        assert [len(tree[name]) for name in ("origins", "parents", "probabilities")] == [nodes] * 3
        assert tree["parents"][0] == -1
        assert all(0 <= parent < node for node, parent in enumerate(tree["parents"][1:], 1))
        assert tree["probabilities"][0] == 1
        assert all(0 < given <= 1 for given in tree["probabilities"])
        path = tree["path"]
        assert path[0] == 0
        assert [tree["parents"][node] for node in path[1:]] == path[:-1]
        accepted = [(tree["texts"][node], tree["origins"][node]) for node in path[1:]][: len(tokens)]
        assert accepted == [(token["text"], token["origin"]) for token in tokens][: len(accepted)]
        assert len(tokens) <= len(path)
    assert any("sibling" in one["tree"]["origins"] for one in rounds)
    # The first round's root is the prompt's last token.
    assert rounds[0]["tree"]["texts"][0] == target.tokenizer.decode(target.encode(PROMPTS[0])[-1:])


def test_nothing_is_brought_to_the_host_for_rows_that_nobody_watches(running, monkeypatch) -> None:
    rows, listed = [], TokenTree.listed

    def counted(tree, row):
        rows.append(tree.batch)
        return listed(tree, row)

    monkeypatch.setattr(TokenTree, "listed", counted)
    assert running.complete(PROMPTS[2], max_tokens=12)
    assert rows == []
    _, *rounds, _ = events_of(running, PROMPTS[2], max_tokens=12)
    assert len(rows) == len(rounds)


def test_lookup_s_tokens_are_copied(target) -> None:
    one = Running(target, LookupDrafter())
    try:
        _, *rounds, _ = events_of(one, "a = 1\nb = 2\na = 1\nb = 2\na =", max_tokens=24)
    finally:
        one.close()
    assert "copied" in {token["origin"] for each in rounds for token in each["tokens"]}
    assert all(each["tree"]["probabilities"] is None for each in rounds)


def test_a_chat_s_prompt_is_a_turn(running) -> None:
    _, *rounds, _ = events_of(running, "def add(a, b):", chat=True)
    turns = {"messages": [{"role": "user", "content": "def add(a, b):"}], "temperature": 0, "max_tokens": 40}
    assert text_of(rounds) == running.ask("/v1/chat/completions", turns)[1]["choices"][0]["message"]["content"]


def test_a_client_that_goes_away_frees_the_row(running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=20)
    body = {"prompt": PROMPTS[0], "max_tokens": 450, "ignore_eos": True, "drafts": False}
    before = running.metric("request_success_total", finished_reason="abort")
    connection.request("POST", STREAM, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    for _ in range(4):
        answer.readline()
    answer.close()
    connection.close()
    wait_for(lambda: running.metric("request_success_total", finished_reason="abort") == before + 1)
    wait_for(lambda: not running.service.worker.jobs and running.metric("num_requests_running") == 0)
    assert running.complete(PROMPTS[0], max_tokens=2)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"logprobs": 2}, "logprobs"),
        ({"stream": False}, "stream"),
        ({"colour": "red"}, "colour"),
        ({"max_tokens": 600}, "max_tokens"),
        ({"drafts": "no"}, "drafts"),
    ],
)
def test_what_the_page_does_not_ask_for_is_refused(running, fields, param) -> None:
    status, body, _ = running.ask(STREAM, {"prompt": "x"} | fields)
    assert (status, body["error"]["param"]) == (400, param), body


def test_an_error_in_a_stream_is_its_last_event(target, monkeypatch) -> None:
    one = Running(target, make_drafter("plain", None), timeout=0.2)
    try:
        text = one.ask(STREAM, {"prompt": PROMPTS[0], "max_tokens": 480, "ignore_eos": True})[1]
        assert json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    finally:
        one.close()


def test_the_page_is_open_to_browsers_and_its_route_asks_for_the_key(target) -> None:
    one = Running(target, make_drafter("plain", None), api_key=("right",), max_queue=0, max_batch=1)
    try:
        for path, (name, kind) in playground.FILES.items():
            status, text, headers = one.ask(path)
            assert (status, text) == (200, (PAGE / name).read_text())
            assert headers["content-type"].startswith(kind)
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "unsafe" not in headers["content-security-policy"]
        body = {"prompt": "x", "max_tokens": 2}
        assert one.ask(STREAM, body)[0] == 401
        assert one.ask(STREAM, body, {"Authorization": "Bearer right"})[0] == 200
        assert one.ask("/playground/../v1/models")[0] == 401
    finally:
        one.close()


def test_the_page_loads_nothing_from_elsewhere_and_has_no_inline_code() -> None:
    for name, _ in playground.FILES.values():
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", (PAGE / name).read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
    page = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! src)", page)
    labelled = set(re.findall(r'<label[^>]* for="(\w+)"', page)) | set(
        re.findall(r'<label[^>]*>[^<]*<input id="(\w+)"', page)
    )
    assert set(re.findall(r'<(?:input|textarea) id="(\w+)"', page)) <= labelled


def test_the_rounds_are_plain_decoding_s_text(running, target) -> None:
    _, *rounds, _ = events_of(running, PROMPTS[4], seed=3, temperature=1.0)
    assert text_of(rounds) == alone(target, PROMPTS[4], seed=3, temperature=1.0, max_new_tokens=40)
