"""The scripts in examples/ run, on a tiny model; and the examples of CONTRIBUTING.md keep the target's law."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import test_docs
from glidecape.drafting.drafter import ModelDrafter
from glidecape.drafting.expansions.chain import Chain
from test_exact_law import DRAFT, PARAMS, distance
from toys import ToyDraft

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not in this checkout", allow_module_level=True)


def output_of(name: str, world: Any, monkeypatch: Any, capfd: Any, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", [name, str(world["target"]), str(world["glide"]), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert end.value.code == 0
    return capfd.readouterr().out


def test_writing_with_and_without_a_draft(world, monkeypatch, capfd) -> None:
    out = output_of("generate.py", world, monkeypatch, capfd, "12")
    assert out.count("tokens/s") == 4
    assert out.count("def read_lines(path):") == 2


def test_a_stop_policy_beside_the_built_in_ones(world, monkeypatch, capfd) -> None:
    out = output_of("stop_policy.py", world, monkeypatch, capfd, "24")
    assert out.count("equal") == 4
    assert "DIFFERENT" not in out
    drafted = {line[:22].strip(): float(line[22:].split()[1]) for line in out.splitlines()[1:]}
    assert drafted["stop after a newline"] < drafted["fixed length 8"]


def test_a_server_and_its_client(world, monkeypatch, capfd) -> None:
    out = output_of("serve_openai.py", world, monkeypatch, capfd)
    whole, streamed, _ = (line.split(": ", 1)[1] for line in out.splitlines())
    assert whole == streamed


@pytest.mark.parametrize("name", ["generate.py", "stop_policy.py", "serve_openai.py"])
def test_each_says_what_it_takes(name, monkeypatch, capfd) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert end.value.code == 0
    assert "Usage:" in capfd.readouterr().out


def test_there_are_three_and_each_is_tested() -> None:
    text = Path(__file__).read_text()
    assert all(path.name in text for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("params", ["temperature 1", "greedy", "penalties"])
def test_what_contributing_md_adds_keeps_the_targets_law(params) -> None:
    """Its classes under the exact enumeration; its lines with a model are run by tests/test_docs.py."""
    code = "".join(block.code for block in test_docs.blocks(ROOT / "CONTRIBUTING.md") if block.language == "python")
    wanted = (ast.ClassDef, ast.Import, ast.ImportFrom)
    body = [statement for statement in ast.parse(code).body if isinstance(statement, wanted)]
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(ast.Module(body, []), "CONTRIBUTING.md", "exec"), names)
    for expansion, stop in (
        (Chain(), names["Confident"](0.6, cap=2)),
        (names["RunnerUp"](), names["Confident"](0.4, cap=2)),
    ):
        assert distance(ModelDrafter(ToyDraft(DRAFT), expansion, stop), PARAMS[params]) <= 1e-12
