"""Data at size: tokenized as a stream into files, by any number of processes, killed or not; tables and data sets."""

from __future__ import annotations

import json
import os
import signal
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from glidecape.commands.data import _chat_source
from glidecape.commands.shared import read_prompts
from glidecape.errors import DataError, InputError
from glidecape.sources import read_rows
from glidecape.target.target import Target
from glidecape.train import tokenized
from glidecape.train.chat import ChatSource
from glidecape.train.data import load_streams
from glidecape.train.ranks import process_group
from glidecape.train.stream import Stream
from processes import Child
from test_command_line import run
from test_ranks import curve, free_port, join, train

ROWS = [{"prompt": f"def load_{i}(", "completion": f"table, size={i % 7}):"} for i in range(300)]
FILES = (tokenized.TOKENS, tokenized.LEARNED, tokenized.DOCUMENTS)


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """The same rows in one file, and in five."""
    folder = tmp_path_factory.mktemp("data")
    for part in range(5):
        write(folder / "files" / f"part{part}.jsonl", ROWS[60 * part : 60 * part + 60])
    return {"file": write(folder / "rows.jsonl", ROWS), "files": folder / "files"}


@pytest.fixture(scope="module")
def target(world):
    return Target.from_pretrained(world["target"], pack=False)


def load(target, path: Path, keep: Path | None = None) -> dict[str, Stream]:
    return load_streams(path, target.tokenizer, target.vocab_size, "completion", keep)


def contents(folder: Path) -> list[bytes]:
    assert not [one.name for one in folder.iterdir() if one.name.startswith(".")]
    return [(folder / name).read_bytes() for name in FILES]


def tokenize(rank: int, count: int, port: int, target: Path, path: Path, keep: Path, dies_after: int = 0) -> None:
    """In a process of its own, which counts its rows, and kills itself after so many."""
    join(rank, count, port)
    tokenized.BLOCK = 16
    made, document_of = [], tokenized.document_of

    def counted(row: object, place: str, *rest: object) -> object:
        made.append(place)
        if len(made) == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return document_of(row, place, *rest)

    tokenized.document_of = counted
    with process_group():
        load(Target.from_pretrained(target, pack=False), path, keep)
    (keep.parent / f"{keep.name}.{rank}").write_text(str(len(made)))


def by_processes(count: int, world, path: Path, keep: Path) -> list[int]:
    """Rows that each of so many processes tokenized."""
    port = free_port()
    children = [Child(tokenize, rank, count, port, world["target"], path, keep) for rank in range(count)]
    for child in children:
        assert child.wait() == 0, child.stderr.read()
        child.stderr.close()
    return [int((keep.parent / f"{keep.name}.{rank}").read_text()) for rank in range(count)]


def test_processes_share_the_rows_and_make_the_same_files(world, target, data, tmp_path):
    load(target, data["file"], tmp_path / "one")
    load(target, data["files"], tmp_path / "five")
    whole = contents(tmp_path / "one")
    assert contents(tmp_path / "five") == whole
    # 19 blocks of 16 rows, the last of 12, in turn; of five files three and two.
    assert by_processes(3, world, data["file"], tmp_path / "three") == [7 * 16 - 4, 6 * 16, 6 * 16]
    assert by_processes(2, world, data["files"], tmp_path / "two") == [180, 120]
    assert contents(tmp_path / "three") == contents(tmp_path / "two") == whole


def test_a_stream_is_what_its_rows_say(target, data, tmp_path):
    streams = load(target, data["file"], tmp_path / "kept")
    text = target.tokenizer.decode(streams["train"].tokens)
    assert text.startswith("<|endoftext|>def load_0(table, size=0):<|endoftext|>def load_1(table, size=1):")
    train_, valid = streams["train"], streams["valid"]
    assert len(valid.tokens) == 512
    assert valid.begin == len(train_.tokens)
    assert train_.known == train_.digest == Stream(train_.tokens, train_.learned).digest
    learned = np.concatenate([train_.learned, valid.learned])
    whole = np.concatenate([train_.tokens, valid.tokens])
    start = target.tokenizer.eos_token_id
    assert train_.documents.tolist() == np.flatnonzero(whole == start).tolist()
    assert learned[train_.documents].tolist() == [False] + [True] * (
        len(ROWS) - 1
    )  # the end of a completion is learned
    assert "table" in target.tokenizer.decode(whole[learned])
    assert "def" not in target.tokenizer.decode(whole[learned])


def test_what_is_there_is_not_made_again_unless_the_data_changed(target, tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", ROWS)
    first = load(target, path, tmp_path / "kept")["train"].digest

    def refuse(*_: object) -> None:
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patched:
        patched.setattr(tokenized, "document_of", refuse)
        assert load(target, path, tmp_path / "kept")["train"].digest == first
        (tmp_path / "kept" / tokenized.CARD).write_text("{")
        with pytest.raises(AssertionError, match="again"):
            load(target, path, tmp_path / "kept")
    write(path, ROWS[::-1])
    assert load(target, path, tmp_path / "kept")["train"].digest != first


def test_a_killed_run_makes_the_files_of_one_never_killed(world, target, data, tmp_path):
    keep, port = tmp_path / "kept", free_port()
    child = Child(tokenize, 0, 1, port, world["target"], data["file"], keep, 99)
    assert child.wait() == -signal.SIGKILL
    child.stderr.close()
    assert [one.name for one in keep.iterdir()] == [".tokens.0.0"]
    load(target, data["file"], keep)
    load(target, data["file"], tmp_path / "whole")
    assert contents(keep) == contents(tmp_path / "whole")


def test_data_is_never_in_memory_as_a_whole(target, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenized, "BLOCK", 64)
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"tokens": list(range(5, 255))}) + "\n"
    path.write_text(row * 2_500)  # 2.5 MB of token ids
    tracemalloc.start()
    streams = load_streams(path, target.tokenizer, target.vocab_size, "all", tmp_path / "kept")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert streams["train"].tokens.nbytes > 2e6
    assert most < 5e5


def test_two_processes_learn_from_a_file_what_one_does(world, data, tmp_path):
    from glidecape.train.recipe import DraftRecipe

    recipe = DraftRecipe(length=32, rows=4, rate=1e-2, accumulate=2, loss_on="completion", documents="apart")
    for count in (1, 2):
        port, runs = free_port(), [(tmp_path / str(count), recipe)]
        children = [Child(train, rank, count, port, world["target"], data["file"], runs, 4) for rank in range(count)]
        for child in children:
            assert child.wait() == 0, child.stderr.read()
            child.stderr.close()
    assert curve(tmp_path / "2") == pytest.approx(curve(tmp_path / "1"), rel=2e-4)
    assert contents(tmp_path / "2") == contents(tmp_path / "1")


def test_a_refused_row_leaves_nothing_behind(target, tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ROWS[:3], {"body": "x"}])
    with pytest.raises(DataError, match="row 4 has no text, prompt, messages or tokens column"):
        load(target, path, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("hub:", "names no data set"), ("hub:a/b/c/d", "names no data set"), ("hub:a b", "write hub:OWNER/NAME")],
)
def test_names_of_the_hub_are_checked(name, message):
    with pytest.raises(DataError, match=message):
        list(read_rows(Path(name)))


def test_a_source_of_the_hub_has_no_bytes_after_it():
    assert _chat_source("hub:owner/name:train", 9).path == Path("hub:owner/name:train")
    assert _chat_source("rows.jsonl:2e6", 9) == ChatSource(Path("rows.jsonl"), 2_000_000)


def test_without_the_library_a_sentence_says_what_to_install(world, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "rows.parquet").touch()
    for path in (tmp_path / "rows.parquet", tmp_path, Path("hub:owner/name")):
        with pytest.raises(
            InputError, match=r"is read by the datasets library, .*: pip install 'glidecape\[datasets\]'"
        ):
            list(read_rows(path))
    words = ["train", world["target"], "--data", "hub:owner/name:test", "--output", tmp_path / "out", "--tokens", 1e4]
    code, _, err = run(capfd, monkeypatch, *words)
    assert (code, err.count("hub:owner/name:test is read by the datasets library")) == (2, 1)


TABLE = [
    {"prompt": "def a(", "completion": "b):", "messages": None, "tokens": None},
    {"prompt": "def c(", "completion": None, "messages": None, "tokens": None},
    {"prompt": None, "completion": None, "messages": [{"role": "user", "content": "d"}], "tokens": None},
    {"prompt": None, "completion": None, "messages": None, "tokens": [5, 6]},
]
SAID = [{name: value for name, value in row.items() if value is not None} for row in TABLE]


@pytest.fixture
def library():
    found = pytest.importorskip("datasets")
    found.disable_progress_bars()
    return found


def test_tables_and_saved_folders_hold_the_rows_of_lines(library, target, tmp_path):
    table = library.Dataset.from_list(TABLE)
    odd = tmp_path / "a [1] folder"  # brackets and stars are no patterns
    table.to_parquet(odd / "b*.parquet")
    table.to_parquet(odd / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    library.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "splits")
    for path in (odd / "b*.parquet", tmp_path / "saved", tmp_path / "splits", tmp_path / "splits" / "test"):
        assert [row for _, row in read_rows(path)] == SAID, path
    assert [place for place, _ in read_rows(odd)][3:5] == [f"{odd / 'a.parquet'} row 4", f"{odd / 'b*.parquet'} row 1"]
    write(tmp_path / "rows.jsonl", SAID * 50)
    library.Dataset.from_list(TABLE * 50).to_parquet(tmp_path / "rows.parquet")
    streams = [load_streams(tmp_path / name, target.tokenizer)["train"] for name in ("rows.jsonl", "rows.parquet")]
    assert streams[0].digest == streams[1].digest
    library.DatasetDict(other=table).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match="holds no split 'train': name one of its folders other"):
        list(read_rows(tmp_path / "other"))
    library.Dataset.from_list(TABLE[:2]).to_parquet(tmp_path / "prompts.parquet")
    assert [prompt.text for prompt in read_prompts(None, tmp_path / "prompts.parquet")] == ["def a(", "def c("]


def test_a_damaged_table_is_refused(library, tmp_path):
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"cannot read .*torn\.parquet after row 0 .*: is it a whole \.parquet file\?"):
        list(read_rows(tmp_path / "torn.parquet"))


def test_a_data_set_of_the_hub_is_streamed_file_by_file(library, target, tmp_path, monkeypatch):
    asked = []

    def load_dataset(*words: object, **options: object) -> object:
        asked.append((*words, options))
        return library.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(library, "load_dataset", load_dataset)
    rows = list(read_rows(Path("hub:owner/name/config:test")))
    assert asked == [("owner/name", "config", {"split": "test", "streaming": True})]
    assert [row for _, row in rows] == ROWS
    assert rows[100][0] == "hub:owner/name/config:test file 2 row 1"
    streams = load(target, Path("hub:owner/name"), tmp_path / "kept")
    assert asked[-1] == ("owner/name", None, {"split": "train", "streaming": True})
    assert streams["train"].digest == load(target, write(tmp_path / "rows.jsonl", ROWS))["train"].digest


def test_a_hub_out_of_reach_is_one_sentence(library, monkeypatch):
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr(library, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"cannot read hub:owner/name \(Couldn't reach it\): check its name"):
        list(read_rows(Path("hub:owner/name")))
