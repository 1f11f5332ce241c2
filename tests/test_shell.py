"""What a shell sees of the program: exit codes, completion, pipes that are closed, and options from a file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from glidecape import cli

PROGRAM = Path(sysconfig.get_path("scripts")) / "glidecape"
ENVIRONMENT = os.environ | {"PATH": f"{PROGRAM.parent}{os.pathsep}{os.environ['PATH']}", "TERM": "dumb"}


def shell(script: str, program: str = "bash", **variables: str) -> str:
    found = subprocess.run(
        [program, "-c", script], capture_output=True, text=True, env=ENVIRONMENT | variables, timeout=60
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


COMPLETED = {
    "glidecape ce": ["certify"],
    "glidecape train": ["train", "train-target"],
    "glidecape measure co": ["context"],
    "glidecape generate --max": ["--max-new-tokens"],
    "glidecape measure svip --temp": ["--temperature"],
}


def commands(group: Any = None, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words of its name."""
    for name, command in (group or typer.main.get_command(cli.app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*before, name))
        else:
            yield (*before, name), command


def callbacks(app: typer.Typer = cli.app, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The function of every command, whose annotations say what it takes."""
    for one in app.registered_commands:
        assert one.callback is not None
        yield (*before, one.name or one.callback.__name__.replace("_", "-")), one.callback
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from callbacks(group.typer_instance, (*before, str(group.name)))


COMMANDS, CALLBACKS = dict(commands()), dict(callbacks())


@pytest.mark.parametrize("line", COMPLETED)
def test_bash_completes_commands_and_options(line: str) -> None:
    script = f"""
source <(glidecape --show-completion)
COMP_WORDS=({line})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_glidecape_completion glidecape
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    assert shell(script).split() == COMPLETED[line]


@pytest.mark.parametrize("line", COMPLETED)
def test_zsh_is_told_the_same(line: str) -> None:
    """By what its script runs: zsh itself is on few machines."""
    script = shell("glidecape", _GLIDECAPE_COMPLETE="source_zsh")
    assert "#compdef glidecape" in script
    told = shell("glidecape", _GLIDECAPE_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=line)
    assert all(f'"{word}":' in told or f'"{word}"' in told for word in COMPLETED[line])
    if shutil.which("zsh") is not None:
        shell(f"autoload -U compinit; compinit -u\n{script}", "zsh")


def test_exit_codes_are_those_that_help_names(monkeypatch) -> None:
    text = shell("glidecape --help")
    assert all(f"  {code}  " in text for code in (0, 1, 2, 3, 130, 141, 143))
    for code, words in (
        (0, ["--version"]),
        (2, ["report", "nowhere"]),
        (2, ["generate", "--colour", "blue"]),
        (2, ["no"]),
    ):
        monkeypatch.setattr(sys, "argv", ["glidecape", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert (stop.value.code or 0) == code, words


def test_an_interrupted_command_ends_with_130_and_no_traceback(world, tmp_path: Path) -> None:
    words = [PROGRAM, "train", world["target"], "--data", world["corpus"], "--output", tmp_path / "o", "--minutes", "9"]
    words += ["--length", "32", "--rows", "2", "--save-every", "0"]
    with subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as running:
        began = time.monotonic()
        while not (tmp_path / "o" / "training").exists() and time.monotonic() - began < 60:
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "Traceback" not in err


def test_a_fault_of_our_own_is_told_apart_from_bad_input(monkeypatch, capfd) -> None:
    def broken() -> None:  # no command is known to do this
        raise KeyError("x")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3
    assert capfd.readouterr().err.rstrip().endswith("please report it with the lines above")


def test_a_pipe_that_is_closed_ends_the_program_quietly(world, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "def save_"}\n' * 3)
    words = f"generate {world['target']} -f {tmp_path / 'p.jsonl'} --max-tokens 8 --json --quiet"
    script = f"glidecape {words} 2> {tmp_path / 'err'} | head -n 1; echo ${{PIPESTATUS[0]}}"
    line, code = shell(script).splitlines()
    assert json.loads(line)["prompt"] == "def save_"
    assert (code, (tmp_path / "err").read_text()) == ("141", "")


def sample(hint: Any) -> Any:
    """A value for an option of this type, as a file would have it."""
    kind = next(kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None))
    for one in (hint, kind):
        if typing.get_origin(one) is list:
            return [sample(typing.get_args(one)[0])] * 2
    return {bool: True, int: 600, float: 1.0}.get(kind, "some")


def as_typed(value: Any) -> Any:
    """What the command gets of a value, so that it can be compared: paths and numbers as text."""
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else str(value)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("form", ["yaml", "json"])
def test_every_option_of_every_command_can_come_from_a_file(words, form, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("GLIDECAPE_COMPILE")  # a variable comes before a file
    command, path = COMMANDS[words], tmp_path / f"options.{form}"
    hints = CALLBACKS[words].__annotations__
    params = {one.name: one for one in command.params if one.name not in ("config", "help")}
    wanted = {name: sample(typing.get_args(hints[name])[0]) for name in params}
    flags = {name: "model" if name == "target" else max(one.opts, key=len).lstrip("-") for name, one in params.items()}
    typed = {flags[name]: value for name, value in wanted.items()}
    path.write_text(json.dumps(typed) if form == "json" else yaml.safe_dump(typed))
    context = command.make_context(words[-1], ["--config", str(path)])
    for name in params:
        assert as_typed(context.params[name]) == as_typed(wanted[name]), name
        source = context.get_parameter_source(name)
        assert source is not None
        assert source.name == "DEFAULT_MAP", name


def test_what_is_typed_comes_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("max_tokens: 5\nseed: 3\nmodel: there\ndraft: null\n")
    typed = ["here", "--config", str(path), "--max-new-tokens", "9"]
    context = COMMANDS["generate",].make_context("generate", typed)
    chosen = {name: context.params[name] for name in ("target", "draft", "max_new_tokens", "seed")}
    assert chosen == {"target": "here", "draft": None, "max_new_tokens": 9, "seed": 3}


def test_a_whole_command_runs_from_a_file(world, tmp_path: Path, monkeypatch, capfd) -> None:
    path, out = tmp_path / "options.json", tmp_path / "answers.jsonl"
    options = {"model": str(world["target"]), "draft": str(world["glide"]), "prompt": ["def load(", "def save("]}
    path.write_text(json.dumps(options | {"max-tokens": 6, "json": True, "output": str(out), "ignore-eos": True}))
    monkeypatch.setattr(sys, "argv", ["glidecape", "generate", "--config", str(path), "--quiet"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None)
    assert [len(json.loads(line)["tokens"]) for line in out.read_text().splitlines()] == [6, 6]
    assert capfd.readouterr() == ("", "")
