"""One vocabulary in all commands, other programs' names for it, options from a file, and help that shows how."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from glidecape import cli
from glidecape.commands.parsing import ALIASES, MODEL
from test_command_line import ROOT, only_sentence, run

APP: Any = typer.main.get_command(cli.app)


def commands(group: Any = APP, path: str = "glidecape") -> Iterator[tuple[str, Any]]:
    for name, one in group.commands.items():
        if hasattr(one, "commands"):
            yield from commands(one, f"{path} {name}")
        else:
            yield f"{path} {name}", one


COMMANDS = dict(commands())


def words_of(world: dict[str, Path], *options: Any) -> list[Any]:
    return ["generate", world["target"], "--dtype", "float32", "-p", "def load(", "--json", *options]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_command_has_the_common_options_two_examples_that_parse_and_a_model_in_front(name: str) -> None:
    command = COMMANDS[name]
    flags = {flag for one in command.params for flag in one.opts}
    assert {"--config", "--quiet", "-q"} <= flags
    assert not flags & {"--out", "--target", "--model"}
    targets = [one for one in command.params if one.name == "target"]
    assert all(one.param_type_name == "argument" for one in targets)
    examples = [line.strip() for line in command.epilog.splitlines() if "glidecape" in line]
    assert len(examples) == 2
    for line in examples:
        words = line.replace("[cyan]", "").replace("[/]", "").replace('"', "")
        assert words.startswith(name)
        given = [word for word in words.split() if word.startswith("-")]
        assert {command.own_name(one) for one in given} <= flags, words


def test_every_alias_leads_to_an_option_that_some_command_has() -> None:
    flags = {flag for one in COMMANDS.values() for param in one.params for flag in param.opts}
    assert set(ALIASES) - {MODEL} <= flags
    assert not {"--target", "--out", "--max-tokens"} & flags


def test_the_documentation_lists_every_alias() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    for own, others in ALIASES.items():
        for name in others:
            (line,) = [line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]]
            assert "the first argument" in line if own == MODEL else f"`{own}`" in line


def test_names_of_other_programs_do_the_same(world, capfd, monkeypatch) -> None:
    ours = ["--draft", world["glide"], "--draft-length", 3, "--max-new-tokens", 9, "--temperature", 1, "--top-k", 20]
    theirs = ["--assistant-model", world["glide"], "--num_speculative_tokens", 3, "--max-tokens=9", "--temp", 1]
    expected = run(capfd, monkeypatch, *words_of(world, *ours))
    assert expected[0] == 0
    words = ["generate", *words_of(world)[2:], *theirs, "--top_k", 20, "--model", world["target"]]
    found = json.loads(run(capfd, monkeypatch, *words)[1])
    assert found["tokens"] == json.loads(expected[1])["tokens"]
    assert found["method"] == "glide"


def test_a_value_that_looks_like_an_option_stays_a_value() -> None:
    command = COMMANDS["glidecape generate"]
    assert command.rewritten(["--stop", "--model", "--model", "m"]) == ["m", "--stop", "--model"]
    assert command.rewritten(["m", "--", "--max-tokens"]) == ["m", "--", "--max-tokens"]


def test_options_come_from_a_file_and_what_is_typed_comes_first(world, capfd, monkeypatch, tmp_path: Path) -> None:
    options = {"model": str(world["target"]), "max_tokens": 5, "stop-token": [1, 2], "json": True, "dtype": "float32"}
    (tmp_path / "c.json").write_text(json.dumps(options))
    (tmp_path / "c.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in options.items()))
    for name in ("c.json", "c.yaml"):
        for typed, count in (([], 5), (["--max-new-tokens", "3"], 3)):
            code, out, _ = run(capfd, monkeypatch, "generate", "--config", tmp_path / name, "-p", "def load(", *typed)
            assert code == 0
            assert len(json.loads(out)["tokens"]) == count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "max-new-token: 4",
            "'max-new-token' is no option of glidecape generate: did you mean max-new-tokens?|did you mean",
        ),
        ("factor: loss", "'factor' is no option of"),
        ("- a\n- b", "holds no options: write a line such as"),
        ("a: [", "neither YAML nor JSON"),
        ("logit-bias: {1: 2}", "takes a value or a list of values"),
        ("max-tokens: 3\nmax-new-tokens: 4", "given twice"),
        ("svip-threshold: 0.5", "--svip-threshold has no effect with method lookup"),
    ],
)
def test_a_file_of_options_that_cannot_be_followed_is_refused(
    text, message, world, capfd, monkeypatch, tmp_path
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    words = words_of(world, "--config", tmp_path / "c.yaml")
    only_sentence(*run(capfd, monkeypatch, *words)[::2], message)


def test_quiet_says_nothing_and_output_is_a_file(world, capfd, monkeypatch, tmp_path: Path) -> None:
    words = ["generate", world["target"], "-p", "def load(", "--seed", 3]
    code, out, err = run(capfd, monkeypatch, *words)
    assert code == 0
    assert "tokens/s" in err
    assert "no effect at temperature 0" in err
    code, nothing, err = run(capfd, monkeypatch, *words, "--quiet", "--output", tmp_path / "new" / "text")
    assert (code, nothing, err) == (0, "", "")
    assert (tmp_path / "new" / "text").read_text() == out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["text"]


def test_a_draft_alone_brings_its_model(world, capfd, monkeypatch, tmp_path: Path) -> None:
    words = ["-p", "def load(", "--dtype", "float32", "--json"]
    pair = json.loads(run(capfd, monkeypatch, "generate", world["target"], "--draft", world["glide"], *words)[1])
    for alone in ([world["glide"]], ["--draft", world["glide"]]):
        found = json.loads(run(capfd, monkeypatch, "generate", *alone, *words)[1])
        assert (found["method"], found["tokens"]) == ("glide", pair["tokens"])


def test_without_a_model_the_shipped_pair_is_used_or_asked_for(capfd, monkeypatch, tmp_path: Path) -> None:
    if (ROOT / "models" / "pysource" / "target" / "config.json").is_file():
        code, out, err = run(capfd, monkeypatch, "generate", "-p", "def add(", "--max-tokens", 4, "--json")
        assert code == 0
        assert "no model is named: this is the pair in" in err
        assert json.loads(out)["method"] == "glide"
    monkeypatch.setattr("glidecape.shipped.__file__", str(tmp_path / "a" / "b" / "shipped.py"))
    monkeypatch.chdir(tmp_path)
    for command in ("generate", "certify", "bench"):
        only_sentence(*run(capfd, monkeypatch, command)[::2], "no model is named, and the wheel holds no weights: name")


def test_versions_help_and_completion_from_python_m(monkeypatch) -> None:
    def of(*words: str) -> str:
        script = "import sys, glidecape.cli; sys.argv[0] = 'glidecape'; glidecape.cli.main()"
        start = ["-c", script] if words[0] == "--show-completion" else ["-m", "glidecape"]
        found = subprocess.run([sys.executable, *start, *words], capture_output=True, text=True, check=True)
        return found.stdout

    assert [part.split()[0] for part in of("--version").split(", ")] == ["glidecape", "torch", "transformers"]
    assert of("generate", "-h") == of("generate", "--help")
    assert "Exit codes" in of("-h")
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert "_GLIDECAPE_COMPLETE=complete_bash" in of("--show-completion", "bash")
