"""What OpenAI's official client sees of the server on the shipped pair; tests/test_serve_long.py runs it with older clients."""

from __future__ import annotations

import openai
import pytest
import torch

from glidecape.core.params import SamplingParams
from glidecape.engine.decode import generate
from glidecape.serve.prompts import plain_chat
from serving import PROMPTS, SAY, SCHEMA, Point, alone


@pytest.fixture
def client(running):
    return openai.OpenAI(base_url=running.url, api_key="none", max_retries=0)


def test_a_chat_is_plain_decoding_of_its_text(client, target) -> None:
    answer = client.chat.completions.create(model="pysource", messages=SAY, max_tokens=40, temperature=0)
    assert answer.choices[0].message.content == alone(target, plain_chat(SAY), max_new_tokens=40)
    assert answer.choices[0].message.role == "assistant"
    usage = answer.usage
    assert usage.prompt_tokens == len(target.encode(plain_chat(SAY)))
    assert usage.completion_tokens == 40
    assert usage.total_tokens == usage.prompt_tokens + 40
    details = usage.completion_tokens_details
    assert 0 < details.accepted_prediction_tokens < 40
    assert details.rejected_prediction_tokens > 0


def test_the_same_seed_gives_plain_decoding_s_text_at_temperature_1(client, target) -> None:
    options = {"temperature": 0.9, "top_p": 0.9, "seed": 11, "presence_penalty": 0.4, "frequency_penalty": 0.2}
    answer = client.completions.create(
        model="pysource", prompt=PROMPTS[0], max_tokens=48, n=2, logit_bias={"17": 3, "18": -100}, **options
    )
    for i, choice in enumerate(answer.choices):
        own = options | {"seed": 11 + i, "logit_bias": {17: 3.0, 18: -100.0}, "max_new_tokens": 48}
        assert (choice.index, choice.text) == (i, alone(target, PROMPTS[0], **own))
    assert answer.choices[0].text != answer.choices[1].text


def test_the_extensions_of_local_servers_have_their_effect(client, target) -> None:
    extra = {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.2, "min_tokens": 4, "ignore_eos": True}
    answer = client.completions.create(
        model="pysource", prompt=PROMPTS[1], max_tokens=32, seed=3, temperature=0.8, extra_body=extra
    )
    own = {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.2, "min_new_tokens": 4, "ignore_eos": True}
    assert answer.choices[0].text == alone(target, PROMPTS[1], max_new_tokens=32, seed=3, temperature=0.8, **own)


def test_a_stream_is_the_same_text_in_pieces_and_ends_with_usage(client, target) -> None:
    chunks = list(
        client.chat.completions.create(
            model="pysource",
            messages=SAY,
            max_tokens=40,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert sum(bool(piece) for piece in pieces) > 5
    assert "".join(pieces) == alone(target, plain_chat(SAY), max_new_tokens=40)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 40


def test_the_stream_helper_and_streams_of_the_older_interface(client, target) -> None:
    expected = alone(target, plain_chat(SAY), max_new_tokens=200, stop="\n\n")
    with client.chat.completions.stream(
        model="pysource", messages=SAY, max_tokens=200, temperature=0, stop=["\n\n"]
    ) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.content == expected
    assert {"chunk", "content.delta", "content.done"} <= kinds
    chunks = client.completions.create(
        model="pysource", prompt=[PROMPTS[2], PROMPTS[3]], max_tokens=12, temperature=0, stream=True
    )
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [alone(target, prompt, max_new_tokens=12) for prompt in PROMPTS[2:4]]


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_strings_are_left_out_of_text_and_log_probabilities(client, target, streamed) -> None:
    text = alone(target, PROMPTS[4], max_new_tokens=40)
    stop = text[9:12]
    answer = client.chat.completions.create(
        model="pysource", messages=SAY, max_tokens=60, temperature=0, stop=stop, logprobs=True, stream=streamed
    )
    expected = alone(target, plain_chat(SAY), max_new_tokens=60, stop=stop)
    choices = [chunk.choices[0] for chunk in answer] if streamed else answer.choices
    said = "".join((c.delta.content or "") if streamed else c.message.content for c in choices)
    entries = [entry for c in choices if c.logprobs for entry in c.logprobs.content]
    assert said == expected
    assert stop not in said
    assert "".join(entry.token for entry in entries).startswith(said)
    assert len("".join(entry.token for entry in entries[:-1])) <= len(said)


def test_log_probabilities_are_the_target_s(client, target) -> None:
    answer = client.chat.completions.create(
        model="pysource", messages=SAY, max_tokens=10, seed=5, temperature=0.7, logprobs=True, top_logprobs=3
    )
    prompt = target.encode(plain_chat(SAY))
    tokens = generate(target, prompt, None, SamplingParams(0.7, seed=5, max_new_tokens=10))[0].tokens
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        cache = target.new_cache(1, ids.shape[1])
        logits = target.forward(ids, torch.arange(ids.shape[1])[None], cache).logits[0, len(prompt) - 1 : -1]
    law = logits.log_softmax(-1)
    for k, entry in enumerate(answer.choices[0].logprobs.content):
        assert entry.logprob == pytest.approx(float(law[k, tokens[k]]), abs=1e-3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(law[k].topk(3).values.tolist(), abs=1e-3)
    old = client.completions.create(model="pysource", prompt=PROMPTS[0], max_tokens=4, temperature=0, logprobs=2)
    found = old.choices[0].logprobs
    assert "".join(found.tokens) == old.choices[0].text
    assert found.text_offset[:2] == [0, len(found.tokens[0])]


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_parse_helper_gives_a_pydantic_model(client, running, temperature) -> None:
    options = {"model": "pysource", "messages": SAY, "temperature": temperature, "seed": 5, "response_format": Point}
    choice = client.chat.completions.parse(max_tokens=200, **options).choices[0]
    assert isinstance(choice.message.parsed, Point)
    assert choice.finish_reason == "stop"
    with client.chat.completions.stream(max_tokens=200, **options) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == choice.message.parsed
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(max_tokens=3, **options)
    _, body, _ = running.ask(
        "/v1/chat/completions", {"messages": SAY, "max_tokens": 3, "temperature": 0, "response_format": SCHEMA}
    )
    assert body["choices"][0]["finish_reason"] == "length"


def test_models(client) -> None:
    (model,) = client.models.list()
    assert (model.id, model.max_model_len) == ("pysource", 512)
    assert client.models.retrieve("pysource").id == "pysource"


def test_errors_are_the_client_s_exception_classes(client, server) -> None:
    with pytest.raises(openai.BadRequestError, match="does not support the field 'tools'"):
        client.chat.completions.create(model="pysource", messages=SAY, tools=[])
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' is not served here: ask for 'pysource'"):
        client.chat.completions.create(model="gpt", messages=SAY)
    closed = server(api_key=("right", "other"), max_body=2000)
    for key in ("wrong", "righ", "right2"):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=closed.url, api_key=key).models.list()
    for key in ("right", "other"):
        known = openai.OpenAI(base_url=closed.url, api_key=key, max_retries=0)
        assert [model.id for model in known.models.list()] == ["pysource"]
    with pytest.raises(openai.APIStatusError, match="at most 2000 are taken") as caught:
        known.completions.create(model="pysource", prompt="x" * 3000)
    assert caught.value.status_code == 413
    assert closed.ask("/health")[0] == 200
    assert closed.ask("/metrics")[0] == 401
