"""`glidecape chat`: piped, on a terminal, and against a server; what is shown is plain decoding's answer."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glidecape.chat.interrupt import until_interrupted
from glidecape.chat.local import LocalModel
from glidecape.core.params import SamplingParams
from glidecape.drafting.methods import make_drafter
from glidecape.drafts.checkpoint import load_draft
from glidecape.interface.language_model import LanguageModel
from glidecape.serve.prompts import chat_ids
from glidecape.target.target import Target
from serving import Running, alone
from test_command_line import only_sentence, pair, run

FIRST, SECOND = "def load_table(", "for item in"


@pytest.fixture(scope="module")
def target(world):
    return Target.from_pretrained(world["target"], dtype=torch.float32)


@pytest.fixture(scope="module")
def server(world, target):
    drafter = make_drafter("glide", load_draft(world["glide"], target), length=4)
    made = Running(target, drafter, api_key=("right",))
    yield made
    made.close()


def answers(target, *messages: str, system: str = "", **options) -> list[str]:
    """What plain decoding answers to each message, the conversation before it in mind."""
    turns = [{"role": "system", "content": system}] if system else []
    for message in messages:
        turns.append({"role": "user", "content": message})
        text = alone(target, chat_ids(target, turns), **({"max_new_tokens": 16} | options))
        turns.append({"role": "assistant", "content": text})
    return [turn["content"] for turn in turns if turn["role"] == "assistant"]


def test_a_piped_conversation_keeps_its_history_and_is_plain_text(world, target, capfd, monkeypatch) -> None:
    words = ["chat", *pair(world), "--method", "glide+cape", "--system", "x = 1"]
    code, out, err = run(capfd, monkeypatch, *words, stdin=f"{FIRST}\n\n{SECOND}")
    assert code == 0
    assert out == "".join(f"{text}\n" for text in answers(target, FIRST, SECOND, system="x = 1"))
    assert "\x1b" not in out + err
    assert "tokens/s" not in err
    options = {"temperature": 1.0, "seed": 9, "stop": ("e",)}
    typed = ["--temperature", 1, "--seed", 9, "--stop", "e"]
    code, out, _ = run(capfd, monkeypatch, "chat", *pair(world), *typed, stdin=f"{FIRST}\\\n{SECOND}\n/quit\nnever\n")
    expected = answers(target, FIRST + "\n" + SECOND, **options)[0]
    assert (code, out) == (0, f"{expected}\n")


@pytest.mark.parametrize("method", ["glide+cape", "glide+auto", "lookup", "plain"])
def test_a_local_model_reads_only_what_is_new_of_a_conversation(world, target, monkeypatch, method) -> None:
    """Also after an answer that was stopped half-way, and when the conversation outgrows the room taken first."""
    draft = load_draft(world["glide"], target) if "glide" in method else None
    lm = LanguageModel(target, make_drafter(method, draft), method, draft)
    model = LocalModel(lm, SamplingParams(max_new_tokens=16))
    whole, read, turns = target.forward, [], []

    def forward(tokens, *rest, **named):
        read[-1] += tokens.shape[1] if "logits_to_keep" in named else 0
        return whole(tokens, *rest, **named)

    monkeypatch.setattr(target, "forward", forward)
    monkeypatch.setattr("glidecape.chat.local.ROOM", 100)
    for k, message in enumerate([FIRST, "def load_table(table):\n    for item in table:\n", SECOND, FIRST, SECOND]):
        turns.append({"role": "user", "content": message})
        ids, rooms = chat_ids(target, turns), getattr(model._engine, "tokens", 0)
        read.append(0)
        pieces = model.answer(turns)
        said = next(pieces).text if k == 2 else "".join(piece.text for piece in pieces)
        pieces.close()
        turns.append({"role": "assistant", "content": said})
        if k and model._engine.tokens == rooms:
            assert read[-1] < 0.75 * len(ids)
        else:
            assert read[-1] == len(ids) - 1
        if k != 2:
            read.append(0)
            assert said == alone(target, ids, max_new_tokens=16)
            read.pop()
    assert sum(read) < 0.7 * sum(len(chat_ids(target, turns[: 2 * k + 1])) for k in range(5))


def test_reset_forgets_and_commands_are_told(world, target, capfd, monkeypatch) -> None:
    lines = [FIRST, "/reset", SECOND, "/help", "/what", "/usr/bin is"]
    code, out, err = run(capfd, monkeypatch, "chat", *pair(world), stdin="\n".join(lines))
    assert code == 0
    expected = answers(target, FIRST) + answers(target, SECOND, "/usr/bin is")
    assert out == "".join(f"{text}\n" for text in expected)
    assert "no command /what: /help lists them" in err
    assert "/reset  begin a new conversation" in err


@pytest.mark.parametrize(("method", "names"), [("glide+cape", "chain|sibling"), ("lookup", "copied"), ("plain", "")])
def test_stats_are_figures_of_each_answer_and_of_all(world, method, names, capfd, monkeypatch) -> None:
    lines = "\n".join([FIRST, "/stats", FIRST, "/stats", SECOND])
    code, out, err = run(capfd, monkeypatch, "chat", *pair(world), "--method", method, "--ignore-eos", stdin=lines)
    assert code == 0
    assert len(out.splitlines()) >= 3
    found = re.findall(r"\[(all answers: )?16 tokens, [\d.]+ tokens/s, acceptance length ([\d.]+)(.*)\]", err)
    assert [bool(one[0]) for one in found] == [True, False]
    for _, length, shares in found:
        parts = dict(re.findall(r"(\w+) (\d+) %", shares))
        assert set(parts) <= {*names.split("|"), "bonus"}
        assert abs(sum(map(int, parts.values())) - 100) <= 2
        assert float(length) == pytest.approx(100 / int(parts["bonus"]), rel=0.2)
    assert method == "plain" or re.search(names, err)


def test_a_prompt_that_is_too_long_is_said_and_the_chat_goes_on(world, target, capfd, monkeypatch) -> None:
    long = "def load( " * 200
    code, out, err = run(capfd, monkeypatch, "chat", *pair(world), stdin=f"{long}\n{FIRST}\n{SECOND}")
    assert code == 0
    assert re.search(
        r"error: the conversation has \d+ tokens, and the model's context is 192: type /reset to start", err
    )
    assert out == "".join(f"{text}\n" for text in answers(target, FIRST, SECOND))


def test_an_answer_takes_no_more_tokens_than_the_context_has_room_for(world, target, capfd, monkeypatch) -> None:
    words = [*pair(world)[:-1], "4000", "--ignore-eos"]
    code, out, _ = run(capfd, monkeypatch, "chat", *words, stdin=FIRST)
    room = target.context - len(chat_ids(target, [{"role": "user", "content": FIRST}]))
    assert code == 0
    assert out == f"{answers(target, FIRST, max_new_tokens=room, ignore_eos=True)[0]}\n"


def test_a_server_gives_the_same_conversation(server, target, capfd, monkeypatch) -> None:
    words = ["chat", "--url", server.url, "--api-key", "right", "--max-tokens", 16]
    long = "def load( " * 300
    code, out, err = run(capfd, monkeypatch, *words, stdin=f"{FIRST}\n{long}\n/stats\n{SECOND}")
    assert code == 0
    assert out == "".join(f"{text}\n" for text in answers(target, FIRST, SECOND))
    assert "note: pysource at http://127.0.0.1:" in err
    assert re.search(r"error: the prompt has at least \d+ tokens, and this server takes 192", err)
    assert re.search(r"\[16 tokens, [\d.]+ tokens/s, drafted \d+ %, bonus \d+ %\]", err)
    typed = ["--temperature", 1, "--seed", 4, "--top-k", 9, "--stop", "e", "--logit-bias", "7=1"]
    options = {"temperature": 1.0, "seed": 4, "top_k": 9, "stop": ("e",), "logit_bias": {7: 1.0}}
    code, out, _ = run(capfd, monkeypatch, *words, *typed, stdin=FIRST)
    assert (code, out) == (0, f"{answers(target, FIRST, **options)[0]}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--url", "{url}", "--api-key", "wrong"], "no valid API key"),
        (["--url", "{url}/nothing", "--api-key", "right"], "Not Found: is it http://.*/nothing/v1"),
        (["--url", "http://127.0.0.1:1/v1"], "no answer from http://127.0.0.1:1/v1: .*refused"),
        (["--url", "127.0.0.1:8000"], "--url is an address such as http://"),
        (["--url", "{url}", "--draft", "x"], "--draft is for a local model"),
        (["--url", "{url}", "--draft-length", "3"], "--draft-length is for a local model"),
        (["--url", "{url}", "--threads", "1"], "--threads is for a local model"),
        (["--url", "{url}", "--sampling", "residual"], "--sampling is the server's own"),
        (["--api-key", "x"], "--api-key is for a server"),
        (["--method", "plain", "--svip-threshold", "0.2"], "has no effect with method plain"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(server, words, message, capfd, monkeypatch) -> None:
    words = [word.format(url=server.url) for word in words]
    only_sentence(*run(capfd, monkeypatch, "chat", *words, stdin="x")[::2], message)


def test_a_server_that_goes_away_or_has_no_such_model_is_said(server, capfd, monkeypatch) -> None:
    words = ["chat", "gpt", "--url", server.url, "--api-key", "right"]
    code, out, err = run(capfd, monkeypatch, *words, stdin=f"{FIRST}\n{SECOND}")
    assert (code, out) == (0, "")
    assert err.count("error: the model 'gpt' is not served here: ask for 'pysource'") == 2


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self.inner, outer = pty.openpty()
        command = [sys.executable, "-m", "glidecape", *words]
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            command, stdin=outer, stdout=outer, stderr=outer, env=environment, start_new_session=True
        )
        os.close(outer)

    def type(self, text: str) -> None:
        os.write(self.inner, text.encode())

    def interrupt_until(self, pattern: str) -> None:
        """Ctrl-C, more than once if need be: CPython's readline hears one that comes just before it waits with the next key."""
        self.read_until(pattern, again=lambda: self.process.send_signal(signal.SIGINT))

    def read_until(self, pattern: str, seconds: float = 90, again: Callable[[], None] = lambda: None) -> str:
        """What is shown from now on, up to the pattern; `again` is called until it comes."""
        shown, end = "", time.monotonic() + seconds
        while not re.search(pattern, shown):
            assert time.monotonic() < end, shown
            again()
            if select.select([self.inner], [], [], 0.2)[0]:
                shown += os.read(self.inner, 4096).decode(errors="replace")
        return shown


def test_on_a_terminal_tokens_have_colours_and_ctrl_c_stops_an_answer() -> None:
    """The shipped pair writes 6000 tokens in half a minute: time to stop it."""
    models = Path(__file__).parents[1] / "models" / "pysource"
    words = [str(models / "target"), "--draft", str(models / "glide"), "--threads", "1", "--dtype", "float32"]
    one = Terminal("chat", *words, "--max-new-tokens", "6000", "--ignore-eos")
    try:
        one.read_until("> ")
        one.type("/stats\n")
        assert "\x1b[32mchain\x1b[0m" in one.read_until("Figures are on.*\n.*> ")
        one.type(f"{FIRST}\n")
        one.read_until("\x1b\\[3[25]m")  # a token
        one.process.send_signal(signal.SIGINT)
        (stopped,) = re.findall(r"\[(\d+) tokens", one.read_until(r"\[\d+ tokens, .*\](.|\n)*> "))
        assert 0 < int(stopped) < 6000
        one.interrupt_until("/quit or Ctrl-D ends the program")
        one.type(f"{SECOND}\n")
        one.read_until("\x1b\\[32m")
        one.process.send_signal(signal.SIGINT)
        one.read_until(r"\[\d+ tokens, .*\](.|\n)*> ")
        one.type("\x04")
        assert one.process.wait(20) == 0
    finally:
        one.process.kill()
        one.process.wait(20)
        os.close(one.inner)


def test_ctrl_c_is_heeded_between_two_pieces_and_in_a_wait_and_the_source_is_closed() -> None:
    closed, seen = [], []

    def source(signal_in_wait: bool):
        try:
            for number in range(100):
                if signal_in_wait and number == 3:
                    signal.raise_signal(signal.SIGINT)
                yield number
        finally:
            signal.raise_signal(signal.SIGINT)  # a second one, while the first is being heeded
            closed.append(True)

    for waits in (False, True):
        seen.clear()
        for piece in until_interrupted(source(waits)):
            seen.append(piece)
            if piece == 2 and not waits:
                signal.raise_signal(signal.SIGINT)
        assert seen == [0, 1, 2]
    assert len(closed) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_importing_the_client_s_half_is_light() -> None:
    script = (
        "import sys, glidecape.chat.remote, glidecape.chat.session; assert not {'torch', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])
