"""Bars with the time left on a terminal, plain lines elsewhere, nothing with --quiet: the helper, and each command."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import glidecape
from glidecape import cli, progress
from glidecape.commands import waiting
from glidecape.compat import without_weight_bars

SCRIPT = """
import sys, time
from glidecape import progress

progress.FIRST_LINE_S = 0.1
progress.be_quiet("--quiet" in sys.argv)
with progress.bar("counting", 4) as outer, progress.bar("guessing", seconds=60):
    for _ in range(4):
        time.sleep(0.15)
        outer.advance()
        progress.note("one more")
print("counted")
"""


class Terminal:
    """A pseudo-terminal that is read as long as it is there; `file` is its other end."""

    def __init__(self) -> None:
        self.reader, writer = pty.openpty()
        self.file, self.parts = os.fdopen(writer, "w"), list[bytes]()
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        try:
            while part := os.read(self.reader, 4096):
                self.parts.append(part)
        except OSError:  # the other end was closed
            pass

    def text(self) -> str:
        """All that was written, once the other end is closed; without colours."""
        self.file.close()
        self.thread.join()
        os.close(self.reader)
        return re.sub(r"\x1b\[[0-9;]*m", "", b"".join(self.parts).decode())


def counted(*words: str, terminal: Terminal | None = None) -> str:
    """Standard error of the script, on a terminal or in a pipe."""
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm", "COLUMNS": "100"}
    stderr = subprocess.PIPE if terminal is None else terminal.file
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == "counted\n"
    return found.stderr if terminal is None else terminal.text()


def test_a_bar_is_drawn_on_a_terminal_with_the_time_left_and_goes_away() -> None:
    drawn = counted(terminal=Terminal())
    assert re.search(r"counting ━.* \d+ %, 0:0\d so far, 0:0\d left", drawn)
    assert re.search(r"guessing ━.* \d %, 0:0\d so far, (1:00|0:5\d) left", drawn)
    assert drawn.count("note: one more") == 4
    assert drawn.startswith("\x1b[?25l")
    # The lines are emptied, and the cursor is there again; before its release 15 rich leaves an empty line.
    assert re.search(r"\x1b\[2K(\r\n)?\x1b\[\?25h\s*$", drawn)


def test_lines_are_plain_where_there_is_no_terminal() -> None:
    lines = counted().splitlines()
    assert lines.count("note: one more") == 4
    assert re.fullmatch(r"counting: 25 %, 0:00 so far, 0:0[01] left", lines[0])
    assert lines[-1] == "counting: done in 0:01"
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_quiet_says_nothing() -> None:
    assert counted("--quiet") == ""
    assert counted("--quiet", terminal=Terminal()) == ""


def test_lines_come_less_often_the_longer_it_takes(capsys, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.bar("training", 7200) as shown:
        for second in range(1, 7201):
            now[0] = float(second)
            shown.at(second)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 0 %, 0:10 so far, 1:59:50 left"
    assert lines[-1] == "training: done in 2:00:00"
    assert 60 < len(lines) < 120


def test_the_end_is_left_to_a_caller_that_says_more_of_it(capsys, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.bar("compiling", seconds=60, ends=False):
        now[0] = 61.0
    assert capsys.readouterr().err == ""


def test_in_python_nothing_is_drawn_and_downloads_keep_their_bars(world, capfd) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.enable_progress_bar()
    glidecape.load(world["target"], draft=world["glide"])
    assert "\r" not in capfd.readouterr().err
    assert (logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == (True, False)
    with without_weight_bars():
        assert (logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == (False, False)
    if not before[0]:
        logging.disable_progress_bar()


def test_the_figures_of_what_was_written_are_the_last_line_of_a_log(world, capfd, monkeypatch) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)  # as if all of it took long
    words = ["generate", world["target"], "--draft", world["glide"], "-p", "def", "--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["glidecape", *map(str, words)])
    with pytest.raises(SystemExit):
        cli.main()
    said = capfd.readouterr().err.splitlines()
    assert said[-1].startswith("[glide: 4 tokens, ")
    assert not [line for line in said if line.startswith("preparing compiled programs: done")]


@pytest.fixture
def on_terminal(monkeypatch, tmp_path):
    """Runs a command with its standard error on a terminal; gives what was drawn there."""
    monkeypatch.setenv("GLIDECAPE_CACHE", str(tmp_path / "kept"))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(*words: object) -> str:
        terminal = Terminal()
        monkeypatch.setattr(sys, "argv", ["glidecape", *map(str, words)])
        monkeypatch.setattr(sys, "stderr", terminal.file)
        code: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        drawn = terminal.text()
        assert not code, drawn
        return drawn

    return run


def test_what_cannot_be_counted_takes_as_long_as_last_time(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLIDECAPE_CACHE", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(waiting, "SHORT_S", 0.1)
    (tmp_path / "seconds.json").write_text("[1]")  # nobody's
    drawn = []
    for _ in range(2):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal.file)
        with waiting.waiting("loading a model"):
            time.sleep(0.6)
        drawn.append(terminal.text())
    assert "left" not in drawn[0]
    assert re.search(r"loading a model ━.* %, 0:0[01] so far, 0:0[01] left", drawn[1])
    assert 0.6 <= json.loads((tmp_path / "seconds.json").read_text())["loading a model"] < 5


COMMANDS = {
    "generate": ("{target} --draft {glide} -p def -p class --json", ["loading", "writing"]),
    "generate --svip-fit": (
        "{target} --draft {glide} --method glide+svip -p def --svip-fit {prompts} --json",
        ["drafting at every token", "timing drafts"],
    ),
    "certify": ("{target} --draft {glide} --methods glide", ["loading drafts", "loading", "certifying"]),
    "bench": (
        "{target} --draft {glide} --prompts {prompts} --limit 1 --watch 1 --peers=",
        ["sorting prompts", "measuring", "timing single steps", "watching drafts"],
    ),
    "measure batch": ("{target} --draft {glide} --suite {prompts} --sizes 1 --limit 1", ["sorting", "measuring"]),
    "train": (
        "{target} --data {texts} --output {out} --tokens 256 --length 32 --rows 2",
        ["reading", "training", "comparing the draft with its target", "trying the draft"],
    ),
    "train-target": (
        "--data {corpus} --output {out} --tokens 256 --length 32 --rows 2 --long-share 0 --layers 1 --width 32 --ffn 32 "
        "--heads 2 --kv-heads 2 --context 64",
        ["training", "evaluating the model"],
    ),
    "regenerate": ("{target} --data {prompts} --output {out}.jsonl", ["regenerating|row"]),
    "plan": ("{target} --seconds 0 --length 32 --rows 2", ["measuring"]),
    "data chat": (
        "--source {chats} --output {out} --vocab-size 512 --valid-share 0.2",
        ["reading", "learning a vocab", "tokenizing"],
    ),
}
NEW_TOKENS = ("generate", "certify", "bench", "measure", "regenerate")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_draws_what_takes_long(command: str, world, on_terminal, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def load_table("}\n{"prompt": "def save_page("}\n')
    (tmp_path / "texts.jsonl").write_text('{"text": "def load_table(table, size=3):\\n    return size\\n"}\n' * 200)
    chats = (f'{{"prompt": "What is {i}?", "completion": "A number."}}\n' for i in range(60))
    (tmp_path / "chats.jsonl").write_text("".join(chats))
    places = {
        "chats": tmp_path / "chats.jsonl",
        "prompts": tmp_path / "prompts.jsonl",
        "texts": tmp_path / "texts.jsonl",
        "out": tmp_path / "out",
    }
    words, wanted = COMMANDS[command]
    few = ["--max-new-tokens", "8"] if command.startswith(NEW_TOKENS) else []
    drawn = on_terminal(*command.split(" --")[0].split(), *words.format(**world, **places).split(), *few)
    for what in wanted:
        assert re.search(f"({what})[^\n]*━", drawn), f"{what} is not drawn: {drawn}"


@pytest.mark.parametrize("where", ["terminal", pytest.param("pipe", marks=pytest.mark.slow)])
def test_bench_without_a_model_uses_the_shipped_pair(where: str, on_terminal, monkeypatch, capfd) -> None:
    if not (Path(__file__).parents[1] / "models" / "pysource" / "target" / "config.json").is_file():
        pytest.skip("the shipped pair is not in this checkout")
    words = ["bench", "--limit", "1", "--looping", "1", "--max-new-tokens", "8", "--prompt-tokens", "64"]
    words += ["--watch", "0", "--repeats", "1", "--peers="]
    if where == "terminal":
        said = on_terminal(*words)
        assert "measuring" in said
    else:
        monkeypatch.setattr(sys, "argv", ["glidecape", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
        said = capfd.readouterr().err
        assert "\x1b" not in said
    assert "no model is named: this is the pair in" in said.replace("\r\n", " ")
