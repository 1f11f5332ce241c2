"""Replicas under Ray Serve: two real ones on the shipped pair. `make test-ray` runs those tests; the others need no Ray."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from glidecape.commands.replicas import application, read
from glidecape.drafting.options import MethodOptions
from glidecape.errors import InputError
from glidecape.serve.replicas.exchange import exchange
from glidecape.serve.replicas.gathered import gathered
from glidecape.serve.replicas.key import routing_key
from glidecape.serve.replicas.settings import ReplicaSettings, check_gpus, threads_each
from glidecape.serve.settings import ServeSettings
from serving import MODELS, PROMPTS, SAY, Asking, wait_for

ROOT = Path(__file__).parents[1]

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(
    not HAS_RAY, reason="Ray is not installed here: `make test-ray` has an environment for it"
)
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
ROWS = 4  # of each replica
# Ray asks whoever connects for a token. Without this it would make one in the home of whoever runs the tests.
TOKEN = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}


# --- without Ray


def key(fields: Any, **headers: str) -> str:
    return routing_key(headers, json.dumps(fields).encode())


def test_turns_of_a_chat_have_one_key() -> None:
    first = [{"role": "system", "content": "Be brief."}, *SAY]
    later = [*first, {"role": "assistant", "content": "return a + b"}, {"role": "user", "content": "and why?"}]
    assert key({"messages": first}) == key({"messages": later, "temperature": 0}) != ""
    other = [first[0], {"role": "user", "content": "something else"}]
    assert key({"messages": other}) != key({"messages": first})


def test_a_text_that_grows_keeps_its_key() -> None:
    text = "x" * 64
    assert key({"prompt": text}) == key({"prompt": text + " and on"}) == key({"prompt": [text + "?"]}) != ""
    assert key({"prompt": "y" + text}) != key({"prompt": text})
    ids = list(range(20))
    assert key({"prompt": ids}) == key({"prompt": [[*ids, 5]]}) != key({"prompt": [9, *ids]})


def test_who_shares_no_prefix_shares_no_key() -> None:
    fields = {"messages": SAY}
    keys = {key(fields), key(fields, authorization="Bearer a"), key(fields, authorization="Bearer b")}
    keys |= {key(fields | {"cache_salt": "s"}), key(fields | {"prompt_cache_key": "k"})}
    assert len(keys) == 5
    assert key({"prompt": "a", "prompt_cache_key": "k"}) == key({"prompt": "b", "prompt_cache_key": "k"})


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"[1]", b"3", b"{}", b"[" * 100_000, b'{"messages": 3, "prompt": {}}', b'{"prompt": []}'],
)
def test_a_body_that_says_nothing_has_no_key(body) -> None:
    assert routing_key({}, body) == ""


def test_options_without_ray_and_too_few_replicas_are_refused() -> None:
    with pytest.raises(InputError, match=r"--replicas must be at least 1, not 0"):
        ReplicaSettings(ray=True, replicas=0)
    with pytest.raises(InputError, match=r"--replicas has no effect without --ray: add --ray, or leave --replicas out"):
        ReplicaSettings(replicas=2)
    with pytest.raises(InputError, match=r"--ray-address has no effect without --ray"):
        ReplicaSettings(ray_address="auto")


def test_the_command_refuses_ray_where_it_is_not_installed(monkeypatch, capsys) -> None:
    from glidecape import cli

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else there(name, *rest))
    monkeypatch.setattr(sys, "argv", ["glidecape", "serve", "--ray", "--replicas", "2"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --ray needs Ray Serve: pip install 'glidecape[ray]'\n"


def test_cores_are_shared_among_replicas() -> None:
    assert threads_each([4, 16], 5) == 4
    assert threads_each([2], 2, asked=1) == 1
    with pytest.raises(InputError, match="3 replicas of 2 threads do not fit on machines of 4, 1 cores"):
        threads_each([4, 1], 3, asked=2)
    with pytest.raises(InputError, match="2 replicas need a GPU each, and Ray sees 1: lower --replicas"):
        check_gpus(1.0, 2)


def test_the_metrics_of_replicas_become_one_page(running) -> None:
    page = running.ask("/metrics")[1]
    lines = gathered({"b": page, "a": page}).decode().splitlines()
    told = [line for line in page.splitlines() if line.startswith("#")]
    assert len(lines) == len(set(lines)) == 2 * len(page.splitlines()) - len(told)
    assert re.search(r'^glidecape:num_requests_running\{model_name="pysource",replica="a"\} \d', "\n".join(lines), re.M)


def test_the_options_of_a_file_are_those_of_the_command(monkeypatch) -> None:
    monkeypatch.setenv("GLIDECAPE_API_KEY", "one two")
    recipe, replicas = read({"replicas": 3, "max_batch": 5, "threads": 2, "draft_length": 4, "method": "glide"})
    assert replicas == 3
    assert (recipe.settings.max_batch, recipe.settings.api_key, recipe.threads) == (5, ("one", "two"), 2)
    assert recipe.load.args[2:4] == ("glide", MethodOptions(length=4))
    with pytest.raises(InputError, match="'max_bach' is no option of the server: did you mean max_batch"):
        read({"max_bach": 5})


def test_the_example_for_kubernetes_is_of_this_version() -> None:
    """Its schemas were checked by hand (docs/scaling.md); this is what changes with this package."""
    service = yaml.safe_load((ROOT / "deploy" / "rayservice.yaml").read_text())["spec"]
    config, cluster = yaml.safe_load(service["serveConfigV2"]), service["rayClusterConfig"]
    (app,) = config["applications"]
    module, name = app["import_path"].split(":")
    assert getattr(importlib.import_module(module), name) is application
    recipe, replicas = read(app["args"] | {"target": MODELS / "target", "draft": MODELS / "glide"})
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == replicas == 2
    (head,), (worker,) = (one["template"]["spec"]["containers"] for one in (cluster["headGroupSpec"], workers))
    assert int(worker["resources"]["limits"]["cpu"]) == recipe.threads
    ports = [one["containerPort"] for one in head["ports"] if one["name"] == "serve"]
    assert ports == [config["http_options"]["port"]] == [ServeSettings().port]
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["ray"]
    assert any(f">={cluster['rayVersion'].rpartition('.')[0]}," in one for one in extra)
    assert head["image"] == worker["image"]


def test_the_dockerfile_installs_what_there_is_and_runs_as_a_user() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"^ARG EXTRAS=(.*)$", text, re.M)[0].split(",")) <= set(extras)
    assert (
        re.findall(r"^EXPOSE (\d+)$", text, re.M)
        == re.findall(r"127\.0\.0\.1:(\d+)/health", text)
        == [str(ServeSettings().port)]
    )
    assert re.findall(r"^USER (\d+)$", text, re.M) == ["1000"]
    copied = [name for line in re.findall(r"^COPY (.*)$", text, re.M) for name in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {
        line[1:] for line in (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    } == {*copied}


async def talk(app: FastAPI, path: str, batches: int = 1000) -> bytes:
    """The body of an answer, or as much of it as comes in so many batches of messages."""
    messages, body = (
        exchange(app, {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}, b""),
        b"",
    )
    async for batch in messages:
        body += b"".join(one.get("body", b"") for one in batch)
        batches -= 1
        if not batches:
            break
    await messages.aclose()
    await asyncio.sleep(0.05)
    return body


def test_an_answer_that_nobody_reads_on_is_cancelled_and_one_that_fails_fails() -> None:
    app, ended = FastAPI(), []

    @app.get("/endless")
    async def endless() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x"
                    await asyncio.sleep(0.01)
            finally:
                ended.append(True)

        return StreamingResponse(pieces())

    @app.get("/torn")
    async def torn() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"x"
            raise ValueError("no more")

        return StreamingResponse(pieces())

    @app.get("/wrong")
    async def wrong() -> None:
        raise ValueError("at once")

    assert asyncio.run(talk(app, "/endless", 3)).startswith(b"x")
    assert ended == [True]
    assert asyncio.run(talk(app, "/wrong")) == b"Internal Server Error"
    with pytest.raises(ValueError, match="no more"):
        asyncio.run(talk(app, "/torn"))


# --- with two replicas; those of the first tests are killed and ended by the last of these tests


class Cluster(Asking):
    """`glidecape serve --ray` on the shipped pair."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.said = folder / "said.txt"
        given = ["--ray", "--replicas", "2", "--port", "0", "--dtype", "float32", "--threads", "1", "--compile", "off"]
        given += ["--max-batch", str(ROWS), "--max-context", "512", "--cache-mib", "200", "--model-name", "pysource"]
        command = [sys.executable, "-m", "glidecape", "serve", *given, *words]
        with self.said.open("w") as said:
            self.process = subprocess.Popen(command, stderr=said, stdin=subprocess.DEVNULL, env=TOKEN)
        try:
            wait_for(lambda: "serving" in self._events() or self.process.poll() is not None, 200)
            assert self.process.poll() is None, self.said.read_text()
        except BaseException:
            self.end()
            raise
        self.port = int(self._events()["serving"]["url"].split(":")[2].split("/")[0])

    def _events(self) -> dict[str, Any]:
        lines = [
            json.loads(line)
            for line in self.said.read_text().splitlines()
            if line.startswith("{") and line.endswith("}")
        ]
        return {line["event"]: line for line in lines}

    def family(self) -> dict[int, str]:
        """All processes of its session, with their names, itself among them."""
        out = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout
        rows = [line.split(None, 2) for line in out.splitlines()]
        found = {self.process.pid: ""}
        while new := {int(pid): args for pid, parent, args in rows if int(parent) in found and int(pid) not in found}:
            found |= new
        return found

    @property
    def replicas(self) -> list[int]:
        return [pid for pid, args in self.family().items() if args.startswith("ray::ServeReplica:glidecape:Replica")]

    def metric(self, name: str) -> dict[str, float]:
        """A metric's value by replica."""
        found = re.findall(rf'^glidecape:{name}{{.*replica="(\w+)".*}} (\S+)$', self.ask("/metrics")[1], re.M)
        return {replica: float(value) for replica, value in found}

    def complete(self, prompt: str, tokens: int) -> str:
        status, body, _ = self.ask("/v1/completions", {"prompt": prompt, "max_tokens": tokens} | GREEDY)
        assert status == 200, body
        return body["choices"][0]["text"]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=120)

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.end()


@needs_ray
def test_answers_are_those_of_a_single_server(cluster, running) -> None:
    def ask(prompt: str) -> str:
        given: dict[str, Any] = {"model": "pysource", "prompt": prompt, "max_tokens": 32, "temperature": 0.7, "seed": 5}
        whole = cluster.client.completions.create(**given)
        pieces = list(cluster.client.completions.create(stream=True, **given))
        assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
        assert len(pieces) > 3, "it does not stream"
        return whole.choices[0].text

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        texts = list(pool.map(ask, PROMPTS))
    assert texts == [running.complete(prompt, max_tokens=32, temperature=0.7, seed=5) for prompt in PROMPTS]
    made = cluster.metric("generation_tokens_total")
    assert len(made) == 2
    assert min(made.values()) > 0, "one replica did nothing"


@needs_ray
def test_every_route_and_error_is_that_of_a_single_server(cluster, running) -> None:
    for path in ("/health", "/version", "/openapi.json", "/", "/playground/script.js", "/nope", "/v1/models/other"):
        status, body, headers = cluster.ask(path)
        assert (status, body) == running.ask(path)[:2]
        assert headers["x-request-id"]
    for body in (
        b"{",
        {"prompt": 3},
        {"prompt": "a", "tools": []},
        {"prompt": "a" * 9999},
        {"prompt": "a", "n": 99999},
    ):
        got, there = (one.ask("/v1/completions", body)[:2] for one in (cluster, running))
        assert got == there
        assert got[0] == 400
    large = b'{"prompt": "' + b"a" * 2**22 + b'"}'
    assert cluster.ask("/v1/completions", large)[:2] == running.ask("/v1/completions", large)[:2]
    assert cluster.ask("/v1/models")[1]["data"][0]["id"] == "pysource"
    events = cluster.ask("/playground/stream", {"prompt": "def f(", "max_tokens": 8})[1].split("\n\n")
    assert json.loads(events[0][6:])["type"] == "start"
    assert events[-2] == "data: [DONE]"


@needs_ray
def test_the_turns_of_a_chat_find_their_prefix(cluster) -> None:
    queries = "prefix_cache_queries_total"
    for number, prompt in enumerate(PROMPTS[:6]):
        turns = [{"role": "user", "content": f"# {number}\n{prompt}"}]
        before, known = cluster.metric(queries), 0
        for turn in range(3):
            whole = cluster.client.chat.completions.create(
                model="pysource", messages=turns, max_tokens=24, **_only(GREEDY)
            )
            cached = whole.usage.prompt_tokens_details.cached_tokens
            assert cached >= known - 1, f"turn {turn}: {cached} of {known} tokens"
            known = whole.usage.prompt_tokens
            turns += [
                {"role": "assistant", "content": whole.choices[0].message.content},
                {"role": "user", "content": "go on"},
            ]
        assert sum(value > before[name] for name, value in cluster.metric(queries).items()) == 1, (
            "it went to both replicas"
        )
    assert min(cluster.metric(queries).values()) > 0, "all chats went to one replica"


def _only(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields beyond OpenAI's go into its client's `extra_body`."""
    return {"temperature": fields["temperature"], "extra_body": {"ignore_eos": fields["ignore_eos"]}}


@needs_ray
def test_a_chat_goes_elsewhere_while_its_replica_is_full(cluster) -> None:
    before = cluster.metric("generation_tokens_total")
    alone = cluster.complete(PROMPTS[0], 150)
    with ThreadPoolExecutor(2 * ROWS) as pool:
        texts = set(pool.map(lambda _: cluster.complete(PROMPTS[0], 150), range(2 * ROWS)))
    assert texts == {alone}
    assert all(value > before[name] for name, value in cluster.metric("generation_tokens_total").items())


@needs_ray
def test_a_client_that_goes_away_frees_its_row(cluster) -> None:
    stream = cluster.client.completions.create(
        model="pysource", prompt="a", max_tokens=500, stream=True, **_only(GREEDY)
    )
    next(iter(stream))
    assert sum(cluster.metric("num_requests_running").values()) == 1
    stream.response.close()
    wait_for(lambda: not any(cluster.metric("num_requests_running").values()), 5)
    assert "abort" in cluster.ask("/metrics")[1]


@needs_ray
def test_a_killed_replica_loses_nothing_that_had_not_begun(cluster) -> None:
    """Sixteen requests, two of which are no streams; eight run and eight wait when a replica is killed."""
    replicas = cluster.replicas
    assert len(replicas) == 2
    began, ended = threading.Semaphore(0), {}

    def ask(number: int) -> tuple[str, str]:
        given = {"model": "pysource", "prompt": PROMPTS[number], "max_tokens": 200, **_only(GREEDY)}
        if number < 2:
            return "whole", cluster.client.completions.create(**given).choices[0].text
        text = ""
        try:
            for piece in cluster.client.completions.create(stream=True, **given):
                if not text:
                    began.release()
                text += piece.choices[0].text
        except openai.APIError as error:
            return str(error.code), text
        return "whole", text

    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, number) for number in range(16)]
        for _ in range(ROWS + 1):  # so both replicas have begun some
            began.acquire(timeout=60)
        os.kill(replicas[0], signal.SIGKILL)
        killed = time.monotonic()
        ended = [one.result(timeout=120) for one in asked]
    assert {how for how, _ in ended} == {"whole", "replica_lost"}
    lost = [number for number, (how, _) in enumerate(ended) if how == "replica_lost"]
    assert all(number >= 2 and ended[number][1] for number in lost), "one that had sent nothing was not tried again"
    with ThreadPoolExecutor(16) as pool:
        wholes = list(pool.map(lambda one: cluster.complete(one, 200), PROMPTS))
    for (how, text), whole in zip(ended, wholes, strict=True):
        assert text == whole if how == "whole" else whole.startswith(text)
    wait_for(lambda: len(cluster.metric("num_requests_running")) == 2, 90)
    print(f"two replicas again after {time.monotonic() - killed:.0f} s")
    assert len(cluster.replicas) == 2
    assert replicas[0] not in cluster.replicas


@needs_ray
def test_sigterm_lets_answers_end_and_ends_everything(cluster) -> None:
    family = cluster.family()
    assert len(family) > 5
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(cluster.ask, "/v1/completions", {"prompt": one, "max_tokens": 100} | GREEDY)
            for one in PROMPTS[:4]
        ]
        wait_for(lambda: sum(cluster.metric("num_requests_running").values()) >= 1)
        assert cluster.end() == 0
        assert [one.result()[0] for one in asked] == [200] * 4
    assert "stopped" in cluster.said.read_text()
    wait_for(lambda: not [pid for pid in family if Path(f"/proc/{pid}").exists()], 15)


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@needs_ray
def test_a_cluster_that_runs_is_joined_and_left_as_it_was(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["start", "--head", "--block", "--port", str(port), "--num-cpus", "2", "--include-dashboard", "false"]
    ray = Path(sys.executable).with_name("ray")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    head = subprocess.Popen([ray, *words, "--disable-usage-stats"], env=TOKEN, **quiet)
    try:
        wait_for(lambda: answers(port), 60)
        cluster = Cluster(tmp_path, "--ray-address", f"127.0.0.1:{port}")
        assert len(cluster.metric("num_requests_running")) == 2
        assert cluster.replicas == [], "they are processes of the cluster"
        assert cluster.end(signal.SIGINT) == 0
        assert head.poll() is None
        wait_for(lambda: not answers(cluster.port), 20)
    finally:
        head.terminate()
        head.wait(30)


@needs_ray
def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path) -> None:
    for file in (MODELS / "target").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_text("torn")
    command = [sys.executable, "-m", "glidecape", "serve", str(tmp_path), "--ray", "--port", "0", "--compile", "off"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, env=TOKEN)
    assert said.returncode == 2
    assert re.fullmatch(
        r"error: the weights of .* are torn .*: copy model.safetensors there again", said.stderr.splitlines()[-1]
    )
