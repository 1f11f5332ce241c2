"""Suites downloaded from the Hugging Face Hub, for a user with a network.

Not tried where this was written, which has no network: the names of data sets and columns are from their public pages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, InputError, first_line


@dataclass(frozen=True)
class Dataset:
    """Where a suite is on the Hub: the data set, its configuration and split, the column with the text, the wording put
    before it, and how many rows are taken (0: all)."""

    name: str
    config: str | None
    split: str
    column: str
    before: str = ""
    rows: int = 0


SQL = (
    "Could you translate the following question into SQL. Please only generate SQL, don't include explanation in the "
    "answer. "
)
CODE = "Please generate code based on the following doc:\n"
MT = Dataset("HuggingFaceH4/mt_bench_prompts", None, "train", "prompt")
DATASETS = {
    "mt_bench": MT,
    "gsm8k": Dataset("openai/gsm8k", "main", "test", "question"),
    "humaneval": Dataset("openai/openai_humaneval", None, "test", "prompt", "Complete the code I provided.\n\n"),
    "glide_gsm8k": Dataset("openai/gsm8k", "main", "test", "question", rows=200),
    "glide_finance_alpaca": Dataset("gbharti/finance-alpaca", None, "train", "instruction", rows=200),
    "glide_spider": Dataset("xlangai/spider", None, "validation", "question", SQL, 200),
    "glide_code_search_net": Dataset(
        "code-search-net/code_search_net", "python", "test", "func_documentation_string", CODE, 200
    ),
    "glide_mt_bench": MT,
}


def fetch_suite(name: str, folder: Path | None) -> Path:
    """Download a suite and keep it as `folder/NAME.jsonl`; returns that path.

    The GliDe paper's sets are 200 rows each of these data sets; which 200 is not published with them, so the first are taken.

    Raises:
        InputError: no folder to keep it in, a suite that is not on the Hub, or no `datasets` library.
        DataError: the download failed.
    """
    if folder is None:
        raise InputError("--fetch needs a folder to keep the suites in: name one with --suites")
    if name not in DATASETS:
        raise InputError(
            f"suite '{name}' is not on the Hub: copy its question.jsonl from its authors' repository to "
            f"{folder / f'{name}.jsonl'}"
        )
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("--fetch needs the datasets library: pip install 'glidecape[datasets]'") from None
    wanted = DATASETS[name]
    try:
        rows = load_dataset(wanted.name, wanted.config, split=wanted.split)
    except Exception as error:  # the library's errors have no common base
        reason = first_line(error)
        raise DataError(f"cannot download {wanted.name}: {reason}") from None
    return keep_rows(name, list(rows), folder)


def keep_rows(name: str, rows: list[dict[str, Any]], folder: Path) -> Path:
    """Write a data set's rows as a suite's file.

    Raises:
        DataError: the column is not there.
    """
    wanted = DATASETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    lines = []
    for number, row in enumerate(rows[: wanted.rows or None]):
        if wanted.column not in row:
            raise DataError(f"{wanted.name} has no column '{wanted.column}': it has {', '.join(row)}")
        said = row[wanted.column]
        turns = [wanted.before + said] if isinstance(said, str) else list(said)
        lines.append(json.dumps({"id": str(number), "turns": turns}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
