"""Prefix reuse in the server on the shipped pair: what a client sees of it, who shares with whom, and that no token changes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from glidecape.serve.prompts import plain_chat
from serving import PROMPTS, Running, alone, wait_for

TEXT = "def read_lines(path, limit):\n    with open(path) as file:\n        return [line.strip() for line in file]\n\n\ndef "


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


@pytest.mark.parametrize("temperature", [0, 1])
def test_several_answers_to_one_prompt_read_it_once(server, target, temperature) -> None:
    one, read = server(), []
    whole = one.engine._read
    one.engine._read = lambda first, last, chunk: (read.append(last - first), whole(first, last, chunk))
    body = {"prompt": TEXT * 2, "max_tokens": 12, "temperature": temperature, "seed": 5, "n": 4}
    _, answer, _ = one.ask("/v1/completions", body)
    for i, choice in enumerate(answer["choices"]):
        options = {"temperature": float(temperature), "seed": 5 + i, "max_new_tokens": 12}
        assert choice["text"] == alone(target, TEXT * 2, **options)
    prompt = len(target.encode(TEXT * 2))
    assert one.metric("prefix_cache_hits_total") == 3 * (prompt - 2)
    assert read[0] == 1
