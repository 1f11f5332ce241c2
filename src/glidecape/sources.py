"""Rows of data, one after the other, from wherever a user keeps them; nothing is held in memory but the row.

    a .jsonl or .jsonl.gz file, a .json file with a list, a text file (one row), a .parquet file, or a folder of these
    a folder that the `datasets` library saved
    hub:OWNER/NAME[/CONFIG][:SPLIT]     a data set of the Hugging Face Hub, streamed; without a split "train"

The last three need the `datasets` library.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DataError, InputError, first_line
from .progress import bar

Row = tuple[str, Any]  # its place in words, and what it holds
TEXT_SUFFIXES = {".txt", ".md", ".py", ".rst"}
TABLES = {".csv", ".tsv", ".xlsx", ".arrow"}
HUB = re.compile(r"hub:(?P<name>[\w.-]+(/[\w.-]+)?)(/(?P<config>[^:/]+))?(:(?P<split>[^:/]+))?")


def on_hub(path: Path) -> bool:
    """Is it a data set of the Hub by name?"""
    return str(path).startswith("hub:")


def check_exists(path: Path) -> None:
    """
    Raises:
        DataError: there is no such file or folder, or it is no name of a data set.
        InputError: it needs the `datasets` library, which is not installed.
    """
    if on_hub(path):
        if HUB.fullmatch(str(path)) is None:
            raise DataError(
                f"{path} names no data set: write hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or hub:OWNER/NAME/CONFIG"
            )
    elif not path.exists():
        raise DataError(
            f"no data at {path}: name a .jsonl, .parquet or text file, a folder of them, a corpus folder, or hub:OWNER/NAME"
        )
    if on_hub(path) or _saved(path) or path.suffix == ".parquet":
        _datasets(path)


def parts_of(path: Path) -> list[Callable[[], Iterator[Row]]]:
    """What the rows of `path` are read from, in order: files of a folder or of a data set, or one part that is all of it.

    Raises:
        DataError, InputError: see `check_exists`; or the folder holds no file that is read; or the Hub cannot be reached.
    """
    check_exists(path)
    if on_hub(path):
        return _parts_on_hub(path)
    if path.is_dir() and not _saved(path):
        suffixes = TEXT_SUFFIXES | {".parquet"}
        files = [p for p in sorted(path.rglob("*")) if p.suffix in suffixes or ".jsonl" in p.suffixes]
        if not files:
            raise DataError(f"no .jsonl, .parquet, .txt, .md or .py file below {path}")
        return [lambda file=file: _rows_of_file(file) for file in files]  # type: ignore[misc]
    return [lambda: _rows_of_saved(path) if path.is_dir() else _rows_of_file(path)]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, folder or data set, each with its place in words; a text file is one row with a `text` column.

    Raises:
        DataError, InputError: see `parts_of`; not UTF-8, not a table, or a row that is not JSON.
    """
    for part in parts_of(path):
        yield from part()


def _rows_of_file(path: Path) -> Iterator[Row]:
    if tables := TABLES & set(path.suffixes):
        raise DataError(f"{path} is a table ({tables.pop()}), which is not read: write its rows as .jsonl or .parquet")
    if path.suffix == ".parquet":
        yield from _rows_of_parquet(path)
        return
    number = 0
    try:
        with _open(path) as lines:
            if ".json" in path.suffixes:
                yield from _rows_of_array(json.load(lines), path)
                return
            if ".jsonl" not in path.suffixes:
                yield str(path), {"text": lines.read()}
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path} row {number}", json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} row {number} is not readable as UTF-8 text or JSON lines ({error})") from None


def _open(path: Path) -> Any:
    # Some editors begin a file with a byte-order mark, which "utf-8-sig" leaves out.
    return gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig")


def _rows_of_array(rows: Any, path: Path) -> Iterator[Row]:
    if not isinstance(rows, list):
        raise DataError(f"{path} holds no JSON list of rows, but {type(rows).__name__}: write one, or .jsonl")
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


def _datasets(path: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{path} is read by the datasets library, which is not installed: pip install 'glidecape[datasets]'"
        ) from None
    return datasets


def _saved(path: Path) -> bool:
    """Is it a folder that the `datasets` library saved?"""
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("state.json", "dataset_info.json")
    )


def _rows_of_parquet(path: Path) -> Iterator[Row]:
    library = _datasets(path)

    def opened() -> Any:
        # Brackets in a path are no pattern.
        return library.load_dataset("parquet", data_files=glob.escape(str(path)), split="train", streaming=True)

    return _rows_of_table(opened, str(path), "is it a whole .parquet file?")


def _rows_of_saved(path: Path) -> Iterator[Row]:
    library = _datasets(path)

    def opened() -> Any:
        found = library.load_from_disk(str(path))  # mapped into memory, not read
        if not isinstance(found, dict):
            return found
        if "train" not in found:
            raise DataError(f"{path} holds no split 'train': name one of its folders {', '.join(sorted(found))}")
        return found["train"]

    return _rows_of_table(opened, str(path), "is it whole?")


def _parts_on_hub(path: Path) -> list[Callable[[], Iterator[Row]]]:
    library, named = _datasets(path), HUB.fullmatch(str(path))
    assert named is not None
    advice = "check its name, its configuration and split, and the network"
    try:
        whole = library.load_dataset(named["name"], named["config"], split=named["split"] or "train", streaming=True)
        count = whole.num_shards
    except Exception as error:  # the library's errors have no common base
        raise DataError(f"cannot read {path} ({first_line(error)}): {advice}") from None

    def part(number: int) -> Callable[[], Iterator[Row]]:
        place = f"{path} file {number + 1}" if count > 1 else str(path)
        return lambda: _rows_of_table(lambda: whole.shard(num_shards=count, index=number), place, advice)

    return [part(number) for number in range(count)]


def _rows_of_table(opened: Callable[[], Any], place: str, advice: str) -> Iterator[Row]:
    """The rows of a data set. A column without a value in a row counts as missing there: a table has all columns in each.

    Raises:
        DataError: it cannot be read.
    """
    number = 0
    try:
        for number, row in enumerate(opened(), 1):
            yield f"{place} row {number}", {name: value for name, value in row.items() if value is not None}
    except DataError:
        raise
    except Exception as error:  # the library's errors have no common base
        raise DataError(f"cannot read {place} after row {number} ({first_line(error)}): {advice}") from None


@contextmanager
def reading(path: Path) -> Iterator[Callable[[Any], None]]:
    """A bar while the rows of a file, folder or data set are read; gives a function that is told each row that was."""
    inside = () if on_hub(path) else path.rglob("*") if path.is_dir() else (path,)
    files = [one for one in inside if one.is_file()]
    unknown = not files or any(one.suffix in (".gz", ".parquet", ".arrow") for one in files)
    with bar(f"reading {path}", None if unknown else sum(one.stat().st_size for one in files)) as shown:
        yield lambda row: shown.advance(len(str(row)))  # about as long as its line
