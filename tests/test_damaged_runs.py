"""`glidecape report` on folders that are damaged or of another version: one sentence that says what to do."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from glidecape.bench.report import write_report
from glidecape.errors import GlideCapeError
from report_runs import made

FILES = ("run.json", "prompts.jsonl", "outputs.jsonl", "records.jsonl", "watched.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("runs") / "whole", 0.0)


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else []
    return [above, *(place for key, one in inner for place in places(one, (*above, key)))]


def damage(folder: Path, chance: random.Random) -> str:
    """Change one value or name of one file; returns what was done."""
    path = folder / chance.choice(FILES)
    lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
    number = chance.randrange(len(lines))
    held = json.loads(lines[number])
    *way, key = chance.choice(places(held)[1:])
    inside = held
    for step in way:
        inside = inside[step]
    how = chance.choice(("drop", "rename", "replace"))
    kept = inside[key]
    if how != "replace":
        del inside[key]
    if how == "rename" and isinstance(inside, dict):
        inside[f"old_{key}"] = kept
    if how == "replace":
        inside[key] = chance.choice((None, -1, 0, 2.5, "x", [], {}, True, [[]], {"x": 1}))
    lines[number] = json.dumps(held)
    path.write_text("\n".join(lines) + "\n")
    return f"{path.name} {number + 1}: {how} {[*way, key]}"


def outcome(folder: Path) -> str:
    """The sentence of the error, "" for a page."""
    try:
        write_report([folder], folder)
    except GlideCapeError as error:
        return str(error)
    return ""


def test_whatever_is_damaged_there_is_a_page_or_one_sentence(whole, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # plots take most of the time
    chance, refused = random.Random(3), 0
    for number in range(100):
        folder = shutil.copytree(whole, tmp_path / str(number))
        done = damage(folder, chance)
        try:
            told = outcome(folder)
        except Exception as error:
            raise AssertionError(done) from error
        assert "\n" not in told, done
        refused += bool(told)
        shutil.rmtree(folder)
    assert refused > 50


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("run.json", "verify_s", "forward_s"),
        ("records.jsonl", "verify_us", "forward_us"),
        ("watched.jsonl", "overlap_1", "overlap_one"),
    ],
)
def test_a_folder_of_an_older_version_says_to_run_again(whole, tmp_path, file, old, new) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / file).write_text((folder / file).read_text().replace(old, new))
    with pytest.raises(
        GlideCapeError, match=rf"{file} is damaged, or of another version .*({old}|{new}).*: run the benchmark again"
    ):
        write_report([folder], folder)
