"""A real server in a thread of the test process, so that tests can reach into its engine; and plain HTTP to talk to it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import uvicorn
from pydantic import BaseModel, Field

from glidecape.core.params import SamplingParams
from glidecape.drafting.drafter import Drafter
from glidecape.engine.decode import generate
from glidecape.serve.app import create_app
from glidecape.serve.server import bind, make_service
from glidecape.serve.settings import ServeSettings
from glidecape.target.target import Target
from processes import Child, glidecape

MODELS = Path(__file__).parents[1] / "models" / "pysource"
PROMPTS = [
    "def read_lines(path):\n    ",
    "import os\n\nclass Config:\n    ",
    "for i in range(10):\n    print(",
    "try:\n    value = ",
    "def test_add():\n    assert ",
    "# Copyright\n\nimport ",
    "while True:\n    line = ",
    "with open(name) as file:\n    ",
    "class Node:\n    def __init__(self",
    "def fibonacci(n):\n    if n ",
    "x = [1, 2, 3]\ny = ",
    "from typing import ",
    "@dataclass\nclass Point:\n    x",
    "def main():\n    parser = argparse",
    "if __name__ == ",
    'return "hello ',
]

SAY = [{"role": "user", "content": "def add(a, b):"}]


class Point(BaseModel):
    kind: Literal["left", "right"]
    x: int = Field(ge=0, le=99)
    labels: list[Literal["a", "b"]] = Field(max_length=2)


SCHEMA = {"type": "json_schema", "json_schema": {"name": "point", "schema": Point.model_json_schema(), "strict": True}}


class Asking:
    """Plain HTTP to a server at `port` of this machine."""

    port: int

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body (JSON where it is some) and headers; `body`: JSON to post, or bytes; None: get."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if data is not None else {}
        connection.request("GET" if data is None else "POST", path, data, kind | (headers or {}))
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        return answer.status, json.loads(text) if is_json else text, dict(answer.headers.items())


class Process(Asking):
    """`glidecape serve` on the shipped pair, as a process of its own."""

    def __init__(self, *words: str) -> None:
        given = list(words) if "--port" in words else ["--port", "0", *words]
        self.process = Child(glidecape, "serve", "--dtype", "float32", "--threads", "1", *given)
        self.log: list[dict[str, Any]] = []
        lines = (json.loads(line) for line in self.process.stderr if line.startswith("{"))  # before that come notes
        for entry in lines:
            self.log.append(entry)
            if entry["event"] == "serving":
                break
        self.port = int(self.log[-1]["url"].split(":")[2].split("/")[0])
        # The pipe is read on, or the server would wait for a reader one day.
        threading.Thread(target=lambda: self.log.extend(lines), daemon=True).start()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(30)

    @property
    def resident(self) -> int:
        """Bytes of memory that it holds, without mapped files: their pages come and go as the kernel likes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon"))


class Running(Asking):
    """A server on a free port, in a thread."""

    def __init__(self, target: Target, drafter: Drafter, **settings: Any) -> None:
        chosen = ServeSettings(**({"port": 0, "max_context": 512} | settings))
        self.service = make_service(target, drafter, chosen, "pysource", "test")
        listening = bind(chosen)
        self.port = listening.getsockname()[1]
        config = uvicorn.Config(create_app(self.service), log_level="warning", timeout_graceful_shutdown=5)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def engine(self) -> Any:
        return self.service.worker.engine

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive(), "the server does not end"

    def complete(self, prompt: str, **fields: Any) -> str:
        """The text of a completion."""
        status, body, _ = self.ask("/v1/completions", {"prompt": prompt, "temperature": 0} | fields)
        assert status == 200, body
        return body["choices"][0]["text"]

    def metric(self, name: str, **labels: str) -> float:
        value = self.service.metrics.registry.get_sample_value(
            f"glidecape:{name}", {"model_name": "pysource", **labels}
        )
        return 0.0 if value is None else value


def wait_for(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def alone(target: Target, prompt: str | list[int], **options: Any) -> str:
    """What plain decoding says; one prompt is decoded once for all tests of a target."""
    known = _ALONE.setdefault(target, {})
    asked = repr((prompt, sorted(options.items())))
    if asked not in known:
        known[asked] = generate(target, prompt, None, SamplingParams(**options))[0].text
    return known[asked]


_ALONE: WeakKeyDictionary[Target, dict[str, str]] = WeakKeyDictionary()
