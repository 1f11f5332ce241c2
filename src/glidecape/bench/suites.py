"""Suites: named lists of prompts, each with the sha256 of what it was read from.

A suite is named `NAME` or `NAME/CATEGORY`, and `:N` or `:A-B` after it takes the first N, or those from A to B, of each
category; a path to a .jsonl or text file may stand for the name. Names are looked up in a folder of .jsonl files, one a suite.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DataError, InputError
from ..sources import read_rows
from .prompts import stdlib_prompts

FOLDER = "GLIDECAPE_SUITES"  # environment variable that names the folder of suites
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


@dataclass(frozen=True)
class Prompt:
    """One entry of a suite.

    Attributes:
        id: the entry's own name or number.
        category: what its figures are reported under: the suite's name, or suite/category.
        turns: the text to be continued (one), or the user's turns of a conversation.
        conversation: turns of a conversation; a chat template is applied to them, never to text to be continued.
    """

    id: str
    category: str
    turns: tuple[str, ...]
    conversation: bool


@dataclass(frozen=True)
class Suite:
    """A list of prompts and where it came from. `source` is a file's name, a data set's, or "made at run time"."""

    name: str
    prompts: tuple[Prompt, ...]
    source: str
    sha256: str


@dataclass(frozen=True)
class Known:
    """A suite with a name: the files that may hold it, first found first, and how it is read.

    Attributes:
        split: report categories apart; Spec-Bench's eight of MT-Bench count as one.
        turns: turns that are used; 0: all.
    """

    files: tuple[str, ...]
    split: bool = False
    turns: int = 0


TEXTS = (".jsonl", ".json", ".txt", ".md")  # a name that ends so is meant as a file
KNOWN = {
    "spec_bench": Known(("spec_bench.jsonl", "question.jsonl"), split=True),
    "mt_bench": Known(("mt_bench.jsonl", "eagle_mt_bench.jsonl", "glide_mt_bench.jsonl")),
    "gsm8k": Known(("gsm8k.jsonl", "gsm8k_test.jsonl")),
    "humaneval": Known(("humaneval.jsonl",)),
    "glide_gsm8k": Known(("glide_gsm8k.jsonl",)),
    "glide_finance_alpaca": Known(("glide_finance_alpaca.jsonl",)),
    "glide_spider": Known(("glide_spider.jsonl",)),
    "glide_code_search_net": Known(("glide_code_search_net.jsonl",)),
    "glide_mt_bench": Known(
        ("glide_mt_bench.jsonl", "mt_bench.jsonl"), turns=1
    ),  # the paper's code asks first turns only
}
GROUPS = {"glide": tuple(name for name in KNOWN if name.startswith("glide_"))}  # the GliDe paper's five sets


def read_suites(names: list[str], folder: Path | None = None, fetch: bool = False) -> list[Suite]:
    """The suites of these names; `folder` defaults to the one that GLIDECAPE_SUITES names.

    Args:
        fetch: download what the folder lacks, see `hub.fetch_suite`.

    Raises:
        InputError: an unknown name, or a suite that is not at hand; what to do is in the sentence.
        DataError: a file that cannot be read, with the line.
    """
    if folder is None and os.environ.get(FOLDER):
        folder = Path(os.environ[FOLDER])
    if folder is not None and not folder.is_dir() and not fetch:
        raise InputError(f"no folder of suites at {folder}: name one with --suites or {FOLDER}")
    suites: list[Suite] = []
    for name in (one for spec in names for one in _grouped(spec.strip())):
        suite = _read(name, folder, fetch)
        if not suite.prompts:
            raise InputError(f"suite '{name}' holds no prompt: check the category or the number after ':'")
        if any(suite.name == other.name for other in suites):
            raise InputError(f"two suites named '{suite.name}': name each once")
        suites.append(suite)
    if not suites:
        raise InputError("no prompts: name suites with --suite or files with --prompts")
    return suites


def _grouped(spec: str) -> list[str]:
    name, colon, count = spec.partition(":")
    return [one + colon + count for one in GROUPS.get(name, (name,))]


def _read(spec: str, folder: Path | None, fetch: bool) -> Suite:
    name, each = _span(spec)
    if name == "stdlib":
        texts = stdlib_prompts(each.stop if each else 128)[each or slice(None)]
        prompts = tuple(Prompt(str(i), "stdlib", (text,), False) for i, text in enumerate(texts))
        return Suite("stdlib", prompts, "made at run time from Python's own library", _digest_of(texts))
    if Path(name).is_file():
        return _of_file(Path(name).stem, Path(name), Known(()), None, each)
    if name == "own":
        return _of_file("own", _own_prompts(), Known(()), None, each)
    suite, _, category = name.partition("/")
    known = KNOWN.get(suite, Known((f"{suite}.jsonl",)))
    path = next((folder / f for f in known.files if (folder / f).is_file()), None) if folder else None
    if path is None and fetch and suite in KNOWN:
        from .hub import fetch_suite

        path = fetch_suite(suite, folder)
    if path is None:
        if Path(name).suffix in TEXTS:
            raise InputError(f"no file of prompts at {name}")
        if suite not in KNOWN:
            names = ", ".join(("own", "stdlib:N", *KNOWN, *GROUPS))
            raise InputError(f"no suite or file named '{name}': choose from {names}, or name a .jsonl or text file")
        raise InputError(
            f"suite '{suite}' is not at hand: put {known.files[0]} into a folder and name it with --suites or {FOLDER}, "
            "or download it with --fetch"
        )
    return _of_file(suite, path, known, category or None, each)


def _span(spec: str) -> tuple[str, slice | None]:
    """The name, and which prompts of each category: None for all."""
    name, colon, count = spec.rpartition(":")
    if not colon or Path(spec).is_file():
        return spec, None
    first, dash, last = count.rpartition("-")
    if not last.isdigit() or (dash and not first.isdigit()) or not 0 < int(first or 1) <= int(last):
        raise InputError(f"'{spec}': a number of prompts follows the colon, such as {name}:20 or {name}:21-40")
    return name, slice(int(first or 1) - 1, int(last))


def _own_prompts() -> Path:
    for root in (Path(__file__).resolve().parents[3], Path.cwd()):
        path = root / "evaluation" / "prompts" / "python.jsonl"
        if path.is_file():
            return path
    raise InputError("our own prompts are in evaluation/prompts of a checkout, and this is none: name a file instead")


def _of_file(name: str, path: Path, known: Known, category: str | None, each: slice | None) -> Suite:
    prompts, counts = [], Counter[str]()
    for prompt in read_prompt_file(path):
        own = "mt_bench" if prompt.category in MT_BENCH else prompt.category
        if category is not None and category not in (own, prompt.category):
            continue
        label = f"{name}/{own}" if known.split and own else name
        if each is None or each.start <= counts[label] < each.stop:
            prompts.append(replace(prompt, category=label, turns=prompt.turns[: known.turns or None]))
        counts[label] += 1
    return Suite(name, tuple(prompts), path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def read_prompt_file(path: Path) -> Iterator[Prompt]:
    """The prompts of a file of rows, with their own category or ""; a text file is one text to be continued.

    A row has `turns` or `messages` (a conversation), `question` or `instruction` (one turn), or `prompt` or `text` (text to
    be continued; a list of prompts: turns).

    Raises:
        DataError: a row without any of them, with its number; or see `sources.read_rows`.
    """
    for number, (place, row) in enumerate(read_rows(path), 1):
        if place == str(path):
            if row["text"].strip():
                yield Prompt("0", "", (row["text"],), False)
            return
        turns, conversation = _turns_of(row)
        if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise DataError(f"{place}: no text in 'turns', 'messages', 'question' or 'prompt'")
        own = row.get("id", row.get("question_id", row.get("task_id", number)))
        yield Prompt(str(own).removeprefix(f"{path.stem}/"), str(row.get("category", "")), tuple(turns), conversation)


def _turns_of(row: Any) -> tuple[list[Any], bool]:
    if not isinstance(row, dict):
        return [], False
    if isinstance(row.get("messages"), list):
        said = [m for m in row["messages"] if isinstance(m, dict) and m.get("role") == "user"]
        return [m.get("content") for m in said], True
    for key in ("turns", "question", "instruction"):
        if key in row:
            return (row[key] if isinstance(row[key], list) else [row[key]]), True
    for key in ("prompt", "text"):
        if isinstance(row.get(key), list):
            return row[key], True
        if key in row:
            return [row[key]], False
    return [], False


def _digest_of(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
