"""Prefix reuse in the server on the shipped pair: what a client sees of it, who shares with whom, and that no token changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest

from glidecape.serve.prompts import plain_chat
from serving import PROMPTS, Running, alone, wait_for

TEXT = "def read_lines(path, limit):\n    with open(path) as file:\n        return [line.strip() for line in file]\n\n\ndef "


@pytest.fixture
def server(target, drafter):
    made = []

    def make(**settings):
        made.append(Running(target, drafter, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


def cached(one: Running, prompt: str = TEXT, headers: dict[str, str] | None = None, **fields) -> int:
    """Tokens that a request found in the cache."""
    status, body, _ = one.ask(
        "/v1/completions", {"prompt": prompt, "max_tokens": 4, "temperature": 0} | fields, headers
    )
    assert status == 200, body
    return body["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("temperature", [0, 1])
def test_turns_of_a_chat_read_only_what_is_new(server, target, temperature) -> None:
    one = server(shadow=1.0)
    client = openai.OpenAI(base_url=one.url, api_key="none", max_retries=0)
    turns, known = [], 0
    for k in range(3):
        turns.append({"role": "user", "content": PROMPTS[k]})
        options = {"temperature": float(temperature), "seed": 40 + k}
        answer = client.chat.completions.create(model="pysource", messages=turns, max_tokens=24, **options)
        said = answer.choices[0].message.content
        assert said == alone(target, plain_chat(turns), max_new_tokens=24, **options)
        turns.append({"role": "assistant", "content": said})
        found, usage = answer.usage.prompt_tokens_details.cached_tokens, answer.usage
        assert found >= known
        assert bool(found) == (k > 0)
        known = usage.prompt_tokens - 4  # the text may be cut into other tokens where an answer begins
    assert one.metric("prefix_cache_hits_total") > known / 2
    assert one.metric("prefix_cache_queries_total") == one.metric("prompt_tokens_total")
    wait_for(lambda: one.metric("shadow_requests_total", result="equal") == 3)


def test_many_requests_that_begin_alike_get_their_own_answers(server, target) -> None:
    one = server(max_batch=4)
    cached(one)
    prompts = [TEXT + name for name in ("main(", "test_", "_parse(", "write(", "close(", "__init__(")]
    options = [{"temperature": float(i % 2), "seed": i} for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(lambda i: one.complete(prompts[i], max_tokens=30, **options[i]), range(6)))
    assert texts == [alone(target, prompts[i], max_new_tokens=30, **options[i]) for i in range(6)]
    assert one.metric("prefix_cache_hits_total") > 100


def test_who_shares_with_whom(server) -> None:
    one = server(api_key=("first", "second"))

    def found(key: str, **fields) -> int:
        return cached(one, headers={"Authorization": f"Bearer {key}"}, **fields)

    assert found("first") == 0
    assert found("second") == 0
    assert found("first") > 16
    assert found("first", cache_salt="my own") == 0
    assert found("second", cache_salt="my own") == 0
    assert found("first", cache_salt="my own") > 16


def test_it_can_be_switched_off(server) -> None:
    one = server(prefix_reuse=False)
    assert [cached(one), cached(one)] == [0, 0]
    assert one.metric("prefix_cache_queries_total") == 0


def test_a_failed_engine_forgets_all_prefixes(server, monkeypatch) -> None:
    one = server()
    cached(one)
    monkeypatch.setattr(one.engine, "_fill_slots", lambda: 1 / 0)
    assert one.ask("/v1/completions", {"prompt": TEXT})[0] == 500
    monkeypatch.undo()
    assert cached(one) == 0
    assert cached(one) > 16


def test_time_won_against_plain_rounds_is_counted_by_their_measured_cost(server) -> None:
    one = server()
    plain = one.service.worker.plain
    assert plain.rows == (1, 4, 16)
    assert 0 < plain.of(1) <= plain.of(16)
    for seconds, name in ((1.0, "won"), (0.0, "lost")):
        one.service.worker.plain = replace(plain, seconds=(seconds,) * 3)
        before = one.metric(f"draft_time_{name}_seconds_total")
        one.complete(PROMPTS[0], max_tokens=20, ignore_eos=True)
        assert one.metric(f"draft_time_{name}_seconds_total") > before
    assert 5 < one.metric("draft_time_won_seconds_total") < 20  # a second a token, less what the rounds took
