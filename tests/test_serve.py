"""The server on the shipped pair: errors, limits, load, faults, and that an answer does not depend on any of them."""

from __future__ import annotations

import http.client
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import torch

from glidecape import cli
from glidecape.batch.row import TokenLogprobs
from glidecape.options import option_of
from glidecape.serve.choice import Choice
from glidecape.serve.replicas.settings import ReplicaSettings
from glidecape.serve.schema import ChatRequest, CompletionRequest
from glidecape.serve.settings import ServeSettings
from serving import PROMPTS, SAY, Process, Running, alone, wait_for

MODELS = Path(__file__).parents[1] / "models" / "pysource"


# --- what is shown of it


def test_health_version_and_metrics(running) -> None:
    assert running.ask("/health")[:2] == (200, "")
    from importlib.metadata import version

    assert running.ask("/version")[1] == {"version": version("glidecape")}
    running.complete(PROMPTS[0], max_tokens=8)
    text = running.ask("/metrics")[1]
    for name in (
        "spec_decode_num_drafts_total",
        "spec_decode_num_draft_tokens_total",
        "spec_decode_num_accepted_tokens_total",
        "spec_decode_num_accepted_tokens_per_pos_total",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "num_requests_running",
        "num_requests_waiting",
    ):
        assert f"glidecape:{name}{{" in text
    assert running.metric("spec_decode_num_accepted_tokens_total") == sum(
        running.metric("spec_decode_num_accepted_tokens_per_pos_total", position=str(k)) for k in range(8)
    )


def test_the_dashboard_and_the_documentation_name_every_metric_and_no_other(running) -> None:
    docs = Path(__file__).parents[1] / "docs"
    kinds = re.findall(r"^# TYPE glidecape:(\S+) (\w+)$", running.ask("/metrics")[1], re.M)
    there = {name for name, kind in kinds if not (kind == "gauge" and name.endswith("_created"))}
    board = set(re.findall(r"glidecape:([a-z0-9_]+)", json.dumps(json.loads((docs / "grafana.json").read_text()))))
    assert {name.removesuffix("_bucket") for name in board} == there
    page = (docs / "serving.md").read_text().partition("## Watch")[2]
    table = "".join(line for line in page.splitlines() if line.startswith("| `"))
    assert {name.partition("{")[0] for name in re.findall(r"`([a-z0-9_]+(?:\{[a-z_]+\})?)`", table)} == there


def test_the_examples_of_the_documentation_run(running, capfd) -> None:
    text = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    marked = re.findall(r"<!-- run by tests/test_serve.py -->\n```(\w+)\n(.*?)```", text, re.S)
    said_by = ["data: [DONE]", "accepted_prediction_tokens=", "kind="]
    assert [kind for kind, _ in marked] == ["bash", "python", "python"]
    for (kind, code), words in zip(marked, said_by, strict=True):
        code = code.replace("127.0.0.1:8000", f"127.0.0.1:{running.port}")
        command = ["bash", "-e", "-c", code] if kind == "bash" else [sys.executable, "-c", code]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert said.returncode == 0, said.stderr
        assert words in said.stdout


def test_every_option_and_field_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    options = [one for form in (ServeSettings, ReplicaSettings) for one in fields(form)]
    options = [option_of(one).parameter(one.name).replace("_", "-") for one in options]
    assert all(f"`--{name}`" in text for name in options)
    assert all(f"`{name}" in text for name in {*ChatRequest.model_fields, *CompletionRequest.model_fields})


# --- what is refused


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": []}, "tools", "does not support the field 'tools'"),
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "warm"}, "temperature", "number"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, None, ""),
        ({"max_tokens": 5, "max_completion_tokens": 6}, None, "differ"),
        ({"top_logprobs": 2}, None, "logprobs to true"),
        ({"stream_options": {"include_usage": True}}, None, "stream to true"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"5000": 1}}, None, "outside the vocabulary of 4096"),
        ({"max_tokens": 600}, "max_tokens", "ask for 496 at most"),
        ({"messages": [{"role": "user", "content": "x = 1\n" * 400}]}, "messages", "this server takes 512"),
    ],
)
def test_what_is_not_supported_is_a_400_that_names_the_field(running, fields, param, words) -> None:
    status, body, _ = running.ask("/v1/chat/completions", {"messages": SAY} | fields)
    assert status == 400, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    if param is not None:
        assert error["param"] == param


def test_fields_without_effect_are_accepted(running) -> None:
    fields = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    assert running.ask("/v1/chat/completions", {"messages": SAY, "max_tokens": 1} | fields)[0] == 200


def test_malformed_bodies_are_400_and_unknown_routes_404(running) -> None:
    for body in (b"{", b"", b"[]", b"null", b'{"messages": NaN}', b"\xff\xfe", b"[" * 100_000, b'"\xed\xa0\x80"'):
        status, answer, _ = running.ask("/v1/chat/completions", body)
        assert status == 400, (body[:20], answer)
        assert answer["error"]["type"] == "invalid_request_error"
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # the second is what curl -d says
        status, answer, _ = running.ask("/v1/completions", b'{"prompt": "x"}', {"Content-Type": kind})
        assert (status, answer["error"]["code"]) == (400, "no_content_type")
        assert "Content-Type: application/json" in answer["error"]["message"]
    lone = b'{"prompt": "\\ud800", "max_tokens": 1}'
    assert running.ask("/v1/completions", lone)[0] == 400
    assert running.ask("/v1/nothing")[0] == 404
    assert running.ask("/v1/chat/completions")[0] == 405
    assert running.complete(PROMPTS[0], max_tokens=2)


def test_a_chunked_body_cannot_pass_the_limit(server) -> None:
    small = server(max_body=1000)
    connection = http.client.HTTPConnection("127.0.0.1", small.port, timeout=20)
    connection.request("POST", "/v1/completions", iter([b"x" * 600] * 5), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 413


# --- load, aborts, time


def test_a_row_does_not_depend_on_its_neighbours(running, target) -> None:
    options = [{"temperature": float(i % 2), "seed": 50 + i, "max_tokens": 24 + i} for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda i: running.complete(PROMPTS[i], **options[i]), range(16)))
    for i, text in enumerate(together):
        own = {"temperature": float(i % 2), "seed": 50 + i, "max_new_tokens": 24 + i}
        assert text == alone(target, PROMPTS[i], **own), i


def stream(one: Running | Process, prompt: str, **fields):
    """An open stream: its connection and its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=60)
    body = {"prompt": prompt, "temperature": 0, "stream": True, "ignore_eos": True, **fields}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def is_empty(one: Running) -> bool:
    return not one.service.worker.jobs and not one.engine.waiting and one.metric("num_requests_running") == 0


def test_a_full_queue_is_a_429_with_retry_after_and_clients_that_go_away_make_room(server) -> None:
    one = server(max_batch=1, max_queue=1)
    first, answer = stream(one, PROMPTS[0], max_tokens=450)
    answer.readline()
    second, _ = stream(one, PROMPTS[1], max_tokens=450)  # it waits: its headers come, its tokens do not
    client = openai.OpenAI(base_url=one.url, api_key="none", max_retries=0)
    with pytest.raises(openai.RateLimitError, match="this server holds 2: try again in") as caught:
        client.completions.create(model="pysource", prompt="x")
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert one.ask("/v1/completions", {"prompt": "x", "n": 3})[0] == 400
    rounds = one.metric("generation_tokens_total")
    first.close()
    second.close()
    wait_for(lambda: is_empty(one))
    assert one.metric("generation_tokens_total") < rounds + 300
    assert one.metric("request_success_total", finished_reason="abort") == 2
    assert one.complete(PROMPTS[2], max_tokens=4)


def test_a_client_that_stops_waiting_for_a_whole_answer_frees_its_row(server) -> None:
    one = server()
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=20)
    body = {"prompt": PROMPTS[0], "max_tokens": 450, "ignore_eos": True, "n": 4}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    wait_for(lambda: len(one.engine.batch.slots) == 4)
    connection.close()
    wait_for(lambda: is_empty(one))
    assert one.metric("request_success_total", finished_reason="abort") == 4


def test_a_request_that_takes_too_long_ends_with_408(server) -> None:
    one = server(timeout=0.4)
    long = {"prompt": PROMPTS[0], "max_tokens": 480, "ignore_eos": True, "n": 8}
    status, body, _ = one.ask("/v1/completions", long)
    assert status == 408
    assert "given up after 0." in body["error"]["message"]
    _, answer = stream(one, PROMPTS[0], max_tokens=480, n=8)
    events = answer.read().decode().strip().split("\n\n")
    assert len(events) > 1
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    wait_for(lambda: is_empty(one))


def test_a_newcomer_s_long_prompt_does_not_hold_the_others_up(running, target) -> None:
    """Between two rounds of the row that is decoding at most one chunk is read, and the two give what they give alone."""
    long = "".join(PROMPTS) * 2
    _, answer = stream(running, PROMPTS[0], max_tokens=200)
    answer.readline()
    seen = []
    read, step = running.engine._read, running.engine.step

    def counted_read(first, last, chunk):
        seen.append(("read", chunk if first else 0))
        read(first, last, chunk)

    def counted_step(stats=None):
        events = step(stats)
        seen.extend([("round", 0)] * bool(events))
        return events

    running.engine._read, running.engine.step = counted_read, counted_step
    try:
        assert running.complete(long, max_tokens=8) == alone(target, long, max_new_tokens=8)
    finally:
        running.engine._read, running.engine.step = read, step
    reads = [i for i, (what, chunk) in enumerate(seen) if what == "read" and chunk]
    assert len(reads) > 1
    assert all(seen[i + 1][0] == "round" for i in reads[:-1])
    assert answer.read().decode().rstrip().endswith("data: [DONE]")


# --- faults


def texts_of(one: Running, count: int = 8, **fields) -> list:
    """Of `count` requests at once: texts, or statuses of errors."""

    def ask(i):
        body = {"prompt": PROMPTS[i], "temperature": 0, "max_tokens": 24, **fields}
        status, answer, _ = one.ask("/v1/completions", body)
        return answer["choices"][0]["text"] if status == 200 else status

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(ask, range(count)))


@pytest.fixture
def faults(monkeypatch):
    """Lets the rounds of the engine fail: `faults(when, error)`, with `when(rows, drafter)`."""
    import glidecape.engine.steady as module

    whole = module.run_round

    def install(when, error):
        def run_round(target, drafter, batch, stats=None):
            if when(batch.rows, drafter):
                raise error
            return whole(target, drafter, batch, stats)

        monkeypatch.setattr(module, "run_round", run_round)

    return install


def test_out_of_memory_sheds_load_and_every_answer_is_right(server, target, faults) -> None:
    one = server()
    faults(lambda rows, _: len(rows) > 2, torch.OutOfMemoryError("CUDA out of memory"))
    assert texts_of(one) == [alone(target, prompt, max_new_tokens=24) for prompt in PROMPTS[:8]]
    assert one.metric("out_of_memory_total") > 0
    assert 0 < one.metric("rows_per_forward_limit") < 16
    assert one.metric("draft_failures_total") == 0


def test_a_request_that_never_fits_gets_a_503_and_the_next_one_succeeds(server, target, faults) -> None:
    one = server()
    big = target.encode(PROMPTS[3])
    faults(lambda rows, _: any(row.tokens[: len(big)] == big for row in rows), torch.OutOfMemoryError("out of memory"))
    expected = [alone(target, prompt, max_new_tokens=24) for prompt in PROMPTS[:8]]
    assert texts_of(one) == [*expected[:3], 503, *expected[4:]]
    assert one.complete(PROMPTS[0], max_tokens=24) == expected[0]


def test_an_error_inside_one_request_ends_no_other(server, target, faults) -> None:
    one = server()
    bad = target.encode(PROMPTS[5])
    faults(lambda rows, _: any(row.tokens[: len(bad)] == bad for row in rows), ValueError("secret details"))
    expected = [alone(target, prompt, max_new_tokens=24) for prompt in PROMPTS[:8]]
    assert texts_of(one) == [*expected[:5], 500, *expected[6:]]
    _, answer, _ = one.ask("/v1/completions", {"prompt": PROMPTS[5]})
    assert answer["error"]["message"] == "decoding failed (ValueError)"
    wait_for(lambda: is_empty(one))


def test_a_drafting_error_falls_back_to_plain_decoding_of_that_row_and_is_counted(server, target, faults) -> None:
    one = server()
    bad, plain = target.encode(PROMPTS[2]), []

    def when(rows, drafter):
        drafts = drafter is one.engine.drafter
        plain.append((len(rows), drafts))
        return drafts and any(row.tokens[: len(bad)] == bad and row.emitted > 3 for row in rows)

    faults(when, RuntimeError("a bug of a draft"))
    assert texts_of(one) == [alone(target, prompt, max_new_tokens=24) for prompt in PROMPTS[:8]]
    assert one.metric("draft_failures_total") == 1
    assert (7, True) in plain or any(rows > 1 and drafts for rows, drafts in plain[-20:])


def test_an_error_that_is_no_row_s_ends_the_answers_and_the_server_goes_on(server, monkeypatch) -> None:
    one = server()
    monkeypatch.setattr(one.engine, "_fill_slots", lambda: 1 / 0)
    assert one.ask("/v1/completions", {"prompt": "x"})[0] == 500
    monkeypatch.undo()
    assert one.complete(PROMPTS[0], max_tokens=4)


# --- the shadow check


def test_the_shadow_check_finds_equal_answers_equal_and_a_wrong_one_different(server, monkeypatch) -> None:
    one = server(shadow=1.0)
    for i in range(4):
        one.complete(PROMPTS[i], max_tokens=16, temperature=float(i % 2), seed=i)
    wait_for(lambda: one.metric("shadow_requests_total", result="equal") == 4)
    consider = one.service.worker.shadow.consider

    def damaged(job):
        job.row.tokens[-3] = (job.row.tokens[-3] + 1) % 4096
        consider(job)

    monkeypatch.setattr(one.service.worker.shadow, "consider", damaged)
    one.complete(PROMPTS[5], max_tokens=16)
    wait_for(lambda: one.metric("shadow_requests_total", result="different") == 1)
    assert one.metric("shadow_requests_total", result="near_tie") == 0


def test_a_request_interrupts_the_shadow_check(server) -> None:
    one = server(shadow=1.0, max_batch=1)
    one.complete(PROMPTS[0], max_tokens=200, ignore_eos=True)
    wait_for(lambda: one.service.worker.shadow.row is not None)
    began = time.monotonic()
    assert one.complete(PROMPTS[1], max_tokens=2)
    assert one.metric("shadow_requests_total", result="equal") == 0 or time.monotonic() - began < 1
    wait_for(lambda: one.metric("shadow_requests_total", result="equal") == 2)


# --- at start


def test_a_cache_that_does_not_fit_is_refused_with_both_numbers(target, drafter) -> None:
    from glidecape.errors import InputError

    with pytest.raises(InputError, match=r"needs 3[\d,]* MiB for 64 row.* more than the 100 MiB allowed"):
        Running(target, drafter, max_batch=64, max_context=2048, cache_mib=100)


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch, capfd) -> None:
    import importlib.util
    import sys

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "fastapi" else find(name, *rest)
    )
    monkeypatch.setattr(sys, "argv", ["glidecape", "serve"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capfd.readouterr().err == "error: the server needs fastapi: pip install 'glidecape[serve]'\n"


def test_two_servers_cannot_have_one_port(running, target, drafter) -> None:
    from glidecape.errors import InputError

    with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1 port {running.port}"):
        Running(target, drafter, port=running.port)


def test_a_port_in_use_is_one_sentence_before_the_model_is_loaded(running, capfd, monkeypatch) -> None:
    monkeypatch.setattr("glidecape.target.target.Target.from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr(sys, "argv", ["glidecape", "serve", "--port", str(running.port)])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "port" in said
    assert said.count("in use") == 1
    assert said.endswith("choose another --host or --port")


def test_threads_are_gone_when_a_server_ends(target, drafter) -> None:
    one = Running(target, drafter)
    one.complete(PROMPTS[0], max_tokens=2)
    one.close()
    wait_for(lambda: one.service.worker not in threading.enumerate())


# --- as a process


def test_a_killed_server_starts_again_and_sigterm_drains() -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 300, "temperature": 0, "ignore_eos": True}
    quick = "--method", "glide", "--max-batch", "1", "--max-context", "512"  # whose prices are measured in some seconds
    with Process(*quick, "--shadow", "0.5") as one:
        assert stream(one, PROMPTS[0], max_tokens=300)[1].readline().startswith(b"data: ")
        one.process.kill()
        one.process.wait(30)
    began, answers = time.monotonic(), []
    with Process("--port", str(one.port), *quick) as two:
        assert time.monotonic() - began < 60
        asking = threading.Thread(target=lambda: answers.append(two.ask("/v1/completions", body)))
        asking.start()
        wait_for(lambda: 'num_requests_running{model_name="target"} 1.0' in two.ask("/metrics")[1])
        two.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(ConnectionError):
            two.ask("/health")
        asking.join(60)
        assert answers[0][0] == 200
        assert answers[0][1]["usage"]["completion_tokens"] == 300
        assert two.process.wait(30) == 0


class Toy:
    """A tokenizer that can be named."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(f"<{one}>" for one in ids)


def test_a_token_that_cannot_come_has_a_log_probability_that_json_can_write() -> None:
    row = SimpleNamespace(params=SimpleNamespace(stop=(), logprobs=2))
    tokenizer = Toy()
    choice = Choice(SimpleNamespace(row=row, prompt=[1]), tokenizer)
    entries = [(5, TokenLogprobs(-0.0, ((5, -0.0), (7, -math.inf))))]
    for told in (choice.chat_logprobs(entries), choice.completion_logprobs(entries, 0)):
        assert told is not None
        text = json.dumps(told.model_dump(), allow_nan=False)
        assert "-9999.0" in text
