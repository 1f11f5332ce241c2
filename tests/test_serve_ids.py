"""Token ids in a server's answers, in vLLM's fields, where a request asks for them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from glidecape.core.params import SamplingParams
from glidecape.engine.decode import generate
from serving import PROMPTS, SAY

PROMPT = PROMPTS[0]
ASK = {"temperature": 0, "max_tokens": 24, "return_token_ids": True}


def emitted(target: Any, prompt: list[int], **options: Any) -> list[int]:
    return list(generate(target, prompt, None, SamplingParams(max_new_tokens=24, **options))[0].tokens)


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]


@pytest.mark.parametrize("as_ids", [False, True])
def test_a_completion_tells_its_ids_and_those_of_its_prompt(running, target, as_ids) -> None:
    ids = target.encode(PROMPT)
    _, body, _ = running.ask("/v1/completions", {"prompt": ids if as_ids else PROMPT} | ASK)
    (choice,) = body["choices"]
    assert choice["prompt_token_ids"] == ids
    assert choice["token_ids"] == emitted(target, ids)
    assert len(choice["token_ids"]) == body["usage"]["completion_tokens"]
    assert "prompt_token_ids" not in body


def test_each_prompt_of_a_request_and_each_of_its_answers_has_its_own(running, target) -> None:
    _, body, _ = running.ask("/v1/completions", {"prompt": PROMPTS[:2], "n": 2} | ASK)
    known = [target.encode(prompt) for prompt in PROMPTS[:2]]
    assert [one["prompt_token_ids"] for one in body["choices"]] == [known[0], known[0], known[1], known[1]]
    assert [one["token_ids"] for one in body["choices"]] == [emitted(target, known[i]) for i in (0, 0, 1, 1)]


def test_a_chat_tells_ids(running, target) -> None:
    _, body, _ = running.ask("/v1/chat/completions", {"messages": SAY} | ASK)
    assert body["choices"][0]["token_ids"] == emitted(target, body["prompt_token_ids"])
    assert "prompt_token_ids" not in body["choices"][0]


def test_events_of_a_stream_tell_what_is_new(running, target) -> None:
    ids = target.encode(PROMPT)
    told = events(running.ask("/v1/completions", {"prompt": PROMPT, "stream": True} | ASK)[1])
    assert len(told) > 1
    assert [one["choices"][0].get("prompt_token_ids") for one in told] == [ids] + [None] * (len(told) - 1)
    assert [i for one in told for i in one["choices"][0]["token_ids"]] == emitted(target, ids)

    told = events(running.ask("/v1/chat/completions", {"messages": SAY, "stream": True} | ASK)[1])
    first, *rest = told
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert not [one for one in rest if "prompt_token_ids" in one]
    new = [i for one in told for i in one["choices"][0].get("token_ids", [])]
    assert new == emitted(target, first["prompt_token_ids"])


def test_the_ids_of_a_stop_string_are_told_and_its_text_is_not(running, target) -> None:
    ids = target.encode(PROMPT)
    text = target.tokenizer.decode(emitted(target, ids))
    stop = text[len(text) // 2 :][:4]
    for stream in (False, True):
        _, body, _ = running.ask("/v1/completions", {"prompt": PROMPT, "stop": stop, "stream": stream} | ASK)
        choices = [one["choices"][0] for one in (events(body) if stream else [body])]
        new = [i for one in choices for i in one["token_ids"]]
        assert new == emitted(target, ids)[: len(new)]
        assert stop in target.tokenizer.decode(new)
        assert stop not in "".join(one["text"] for one in choices)


def test_who_does_not_ask_is_told_nothing(running) -> None:
    for fields in ({}, {"return_token_ids": False}):
        for path, what in (("completions", {"prompt": PROMPT}), ("chat/completions", {"messages": SAY})):
            for stream in (False, True):
                _, body, _ = running.ask(f"/v1/{path}", what | fields | {"max_tokens": 4, "stream": stream})
                assert "token_ids" not in (body if stream else json.dumps(body))
