"""Suites of prompts: by name, from files of several shapes, and what is said when one is not there."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from glidecape.bench.hub import fetch_suite, keep_rows
from glidecape.bench.suites import FOLDER, read_prompt_file, read_suites
from glidecape.errors import DataError, InputError

EVAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval"


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bench_rows() -> list[dict]:
    kinds = ["writing", "math", "qa", "qa", "rag"]
    return [{"id": f"spec_bench/{i}", "category": kind, "turns": [f"q{i}", "more"]} for i, kind in enumerate(kinds)]


def test_spec_bench_has_its_own_categories_and_counts_mt_bench_as_one(tmp_path: Path) -> None:
    path = write(tmp_path / "spec_bench.jsonl", *bench_rows())
    (suite,) = read_suites(["spec_bench"], tmp_path)
    assert Counter(p.category for p in suite.prompts) == {
        "spec_bench/mt_bench": 2,
        "spec_bench/qa": 2,
        "spec_bench/rag": 1,
    }
    assert (suite.prompts[0].id, suite.prompts[0].turns, suite.prompts[0].conversation) == ("0", ("q0", "more"), True)
    assert suite.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.id for p in read_suites(["spec_bench/qa"], tmp_path)[0].prompts] == ["2", "3"]
    assert [p.id for p in read_suites(["spec_bench:1"], tmp_path)[0].prompts] == ["0", "2", "4"]
    assert [p.id for p in read_suites(["spec_bench/mt_bench:1"], tmp_path)[0].prompts] == ["0"]
    assert [p.id for p in read_suites(["spec_bench:2-9"], tmp_path)[0].prompts] == ["1", "3"]
    first, last = read_suites(["stdlib:4"])[0].prompts, read_suites(["stdlib:3-4"])[0].prompts
    assert [p.turns for p in last] == [p.turns for p in first[2:]]


def test_the_papers_sets_ask_first_turns_and_mt_bench_both(tmp_path: Path) -> None:
    for name in ("gsm8k", "finance_alpaca", "spider", "code_search_net", "mt_bench"):
        write(tmp_path / f"glide_{name}.jsonl", {"id": 1, "turns": ["one", "two"]}, {"id": 2, "turns": ["three"]})
    suites = read_suites(["glide:1", "mt_bench"], tmp_path)
    assert [s.name for s in suites] == [
        "glide_gsm8k",
        "glide_finance_alpaca",
        "glide_spider",
        "glide_code_search_net",
        "glide_mt_bench",
        "mt_bench",
    ]
    assert {len(s.prompts) for s in suites[:5]} == {1}
    assert suites[4].prompts[0].turns == ("one",)
    assert suites[5].prompts[0].turns == ("one", "two")


def test_the_folder_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "gsm8k_test.jsonl", {"question": "1 + 1?", "answer": "2"})
    monkeypatch.setenv(FOLDER, str(tmp_path))
    (suite,) = read_suites(["gsm8k"])
    assert (suite.name, suite.source, suite.prompts[0].turns) == ("gsm8k", "gsm8k_test.jsonl", ("1 + 1?",))


def test_rows_of_every_shape(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mixed.jsonl",
        {"prompt": "def f("},
        {"text": "once"},
        {"instruction": "say"},
        {"prompt": ["a", "b"]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant"}]},
    )
    shapes = [(p.turns, p.conversation) for p in read_prompt_file(path)]
    assert shapes == [(("def f(",), False), (("once",), False), (("say",), True), (("a", "b"), True), (("u",), True)]
    (tmp_path / "one.txt").write_text("line\n    more")
    assert [p.turns for p in read_prompt_file(tmp_path / "one.txt")] == [("line\n    more",)]
    names = [s.name for s in read_suites([str(path), str(tmp_path / "one.txt"), "stdlib:3", "own:2"])]
    assert names == ["mixed", "one", "stdlib", "own"]


def test_a_file_of_prompts_is_read_as_every_other_command_reads_it(tmp_path: Path) -> None:
    """A byte-order mark and a line separator inside a text are no damage; a list in .json is rows, and a table is refused."""
    row = json.dumps({"prompt": "one\u2028line"}, ensure_ascii=False)
    (tmp_path / "marked.jsonl").write_text("\ufeff" + row + "\n", encoding="utf-8")
    (tmp_path / "list.json").write_text(f"[{row}]", encoding="utf-8")
    for name in ("marked.jsonl", "list.json"):
        assert [prompt.turns for prompt in read_prompt_file(tmp_path / name)] == [("one\u2028line",)]
    (tmp_path / "table.csv").write_text("prompt\none\n")
    with pytest.raises(DataError, match="is a table"):
        read_suites([str(tmp_path / "table.csv")])


def test_what_is_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    for names, message in (
        (["nothing"], "no suite or file named 'nothing': choose from own, stdlib:N, spec_bench"),
        (["poems.jsonl"], "no file of prompts at poems.jsonl"),
        (["gsm8k"], r"not at hand: put gsm8k.jsonl .* --suites or GLIDECAPE_SUITES"),
        (["gsm8k:many"], "a number of prompts follows the colon"),
        (["own:0"], "a number of prompts follows the colon"),
        (["own:5-4"], "such as own:20 or own:21-40"),
        (["own:-4"], "a number of prompts follows the colon"),
        (["own/poems"], "no suite or file"),
        ([], "no prompts: name suites"),
        (["stdlib:2", "stdlib:3"], "two suites named 'stdlib'"),
    ):
        with pytest.raises(InputError, match=message):
            read_suites(names, tmp_path)
    with pytest.raises(InputError, match="no folder of suites"):
        read_suites(["gsm8k"], tmp_path / "nowhere")
    write(tmp_path / "spec_bench.jsonl", *bench_rows())
    with pytest.raises(InputError, match="holds no prompt"):
        read_suites(["spec_bench/poetry"], tmp_path)
    for line, message in (
        ('{"x": 1}', "row 2: no text"),
        ('{"prompt": ', "row 2 is not readable as UTF-8 text or JSON lines"),
        ("[1]", "row 2: no text"),
    ):
        (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
        with pytest.raises(DataError, match=message):
            read_suites([str(tmp_path / "bad.jsonl")])


def test_downloads_become_files_of_the_same_shape(tmp_path: Path) -> None:
    """The network cannot be tried here; the rows that the library would give are."""
    keep_rows("gsm8k", [{"question": "2 + 2?", "answer": "4"}], tmp_path)
    keep_rows("mt_bench", [{"prompt": ["one", "two"], "category": "math"}], tmp_path)
    keep_rows("glide_spider", [{"question": f"q{i}"} for i in range(300)], tmp_path)
    gsm, mt, spider = read_suites(["gsm8k", "mt_bench", "glide_spider"], tmp_path)
    assert (gsm.prompts[0].turns, mt.prompts[0].turns) == (("2 + 2?",), ("one", "two"))
    assert len(spider.prompts) == 200
    assert spider.prompts[7].turns[0].endswith("in the answer. q7")
    with pytest.raises(DataError, match="has no column 'question'"):
        keep_rows("gsm8k", [{"problem": "?"}], tmp_path)
    with pytest.raises(InputError, match="is not on the Hub"):
        fetch_suite("spec_bench", tmp_path)
    with pytest.raises(InputError, match="needs a folder"):
        fetch_suite("gsm8k", None)


def test_the_shared_evaluation_sets_are_read_whole() -> None:
    if not EVAL.is_dir():
        pytest.skip("no evaluation sets beside this checkout: ../shared/data/eval")
    suites = {s.name: s for s in read_suites(["spec_bench", "glide", "humaneval", "mt_bench", "gsm8k"], EVAL)}
    assert {name: len(s.prompts) for name, s in suites.items()} == {
        "spec_bench": 480,
        "glide_gsm8k": 200,
        "glide_finance_alpaca": 200,
        "glide_spider": 200,
        "glide_code_search_net": 200,
        "glide_mt_bench": 80,
        "humaneval": 164,
        "mt_bench": 80,
        "gsm8k": 1319,
    }
    assert set(Counter(p.category for p in suites["spec_bench"].prompts).values()) == {80}
    assert all(len(p.turns) == 2 for p in suites["mt_bench"].prompts)
