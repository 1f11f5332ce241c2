"""What a run leaves in its folder, written as it goes: a killed run goes on where it was.

- `run.json`: format, identity (all that records depend on), provenance of every session, suites, fitted thresholds, costs.
- `prompts.jsonl`: a line a prompt and turn, with its token ids, category, and whether plain decoding's continuation loops.
- `outputs.jsonl`: a line a prompt: the tokens of plain decoding, which every method must emit.
- `records.jsonl`: a line a (job, repeat, method); with `--batch 1` a job is one prompt. Counts and times of each round.
- `watched.jsonl`: a line a (prompt, draft): the draft's law at each position, see `watch`.
- `summary.json`: the figures made of all that, see `metrics`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from ..drafting.auto.reliability import BINS
from ..errors import DataError, InputError
from ..files import write_atomic
from .schema import EXACT, HEADER, checked, unreadable

FORMAT = 2


@dataclass(frozen=True)
class Item:
    """One prompt, or one turn of a conversation, as token ids.

    Attributes:
        number: its place in the run.
        id: suite and name of the prompt, and "#2" for its second turn.
        category: what it is reported under.
        kind: "steady", or "looping": plain decoding's greedy continuation loops.
        chat: a chat template was applied.
        job: the items that are decoded side by side share a job.
        ids: the prompt.
    """

    number: int
    id: str
    category: str
    kind: str
    chat: bool
    job: int
    ids: tuple[int, ...]


@dataclass
class Counts:
    """One prompt's rounds, a list entry each; see `RoundStats`. Of a peer only `emitted` is known."""

    drafted: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    tested: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len({len(one) for one in (self.drafted, self.depth, self.accepted, self.tested)}) > 1:
            raise ValueError("lists of different lengths")


@dataclass(frozen=True)
class Difference:
    """Where an output parts from plain decoding's: the item, the number of the new token, and the two tokens there (-1: an
    output that ended before)."""

    item: int
    at: int
    expected: int
    got: int


@dataclass
class Record:
    """One method on one job, once.

    Attributes:
        rows: counts, one a prompt of the job, in the order of its items.
        draft_us, verify_us, round_us: microseconds of each round: drafting, the target's forward, all of it.
        prefill_us: reading the prompt, the draft's part included.
        peak_bytes: most memory in use while it ran: the device's, or the process's; None where that is not known.
        differs: outputs that are not plain decoding's; None: they were not compared, as the draws are not the same.
        calibration: of a method with auto, the nodes that it offered, by tenths of their predicted probability; each as in
            `reliability.Bin`. Of other methods empty.
        peer: another library: one entry of `emitted` and `round_us` a prompt, for the tokens after the first.
    """

    job: int
    repeat: int
    method: str
    rows: list[Counts]
    draft_us: list[int] = field(default_factory=list)
    verify_us: list[int] = field(default_factory=list)
    round_us: list[int] = field(default_factory=list)
    prefill_us: int = 0
    peak_bytes: int | None = None
    differs: list[Difference] | None = None
    calibration: list[tuple[int, int, float, int]] = field(default_factory=list)
    peer: bool = False

    @property
    def emitted(self) -> int:
        return sum(sum(row.emitted) for row in self.rows)

    @property
    def seconds(self) -> float:
        return sum(self.round_us) / 1e6


@dataclass(frozen=True)
class WatchedLine:
    """What `watch` saw of an item with a draft; see `watch.Watched`."""

    item: int
    draft: str
    matches: list[int]
    entropy: list[Annotated[list[float], Field(min_length=1)]]
    confidence: list[list[float]]
    overlap: list[float]
    overlap_1: list[float]

    def __post_init__(self) -> None:
        lists = (self.matches, self.entropy, self.confidence, self.overlap, self.overlap_1)
        if len({len(one) for one in lists}) > 1:
            raise ValueError("lists of different lengths")


@dataclass(frozen=True)
class Output:
    """Plain decoding's tokens of an item."""

    item: int
    tokens: list[int]


ITEMS = TypeAdapter(list[Item], config=EXACT)
OUTPUTS = TypeAdapter(list[Output], config=EXACT)
RECORDS = TypeAdapter(list[Record], config=EXACT)
WATCHED = TypeAdapter(list[WatchedLine], config=EXACT)


class JsonLines:
    """A .jsonl file that grows a whole line at a time; a line torn by a kill is dropped when it is opened again.

    Raises:
        DataError: a line before the last is not JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.is_file():
            text = path.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            for number, line in enumerate(whole.splitlines(), 1):
                try:
                    self.lines.append(json.loads(line))
                except (ValueError, RecursionError):  # bytes that are no text, too
                    raise DataError(
                        f"{path}, line {number} is not JSON: the file was changed by hand; use another --output"
                    ) from None
            if len(whole) < len(text):
                os.truncate(path, len(whole))

    def append(self, *lines: Mapping[str, Any]) -> None:
        self.lines += map(dict, lines)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))

    def keep_only(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the other lines."""
        kept = [line for line in self.lines if wanted(line)]
        if len(kept) < len(self.lines):
            text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in kept)
            write_atomic(self.path, lambda path: path.write_text(text, encoding="utf-8"))
            self.lines = kept


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


class RunFolder:
    """The folder of one run, opened to go on or to be read.

    Args:
        path: made if it is missing.
        identity: of the run that goes on; None: only read.

    Raises:
        InputError: the folder holds a run with another identity, or none to read.
        DataError: it is torn, or of a newer format.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any] | None = None) -> None:
        self.path = path
        header = path / "run.json"
        if header.is_file():
            try:
                self.header: dict[str, Any] = json.loads(header.read_bytes())
            except (ValueError, RecursionError):
                raise DataError(f"{header} is not JSON: the folder is torn; use another --output") from None
            if not isinstance(self.header, dict) or not {"format", "identity", "sessions"} <= self.header.keys():
                raise DataError(f"{header} is no benchmark's: the folder is torn; use another --output")
            if self.header.get("format") != FORMAT:
                raise DataError(
                    f"{header} is of format {self.header.get('format')}, and this version reads {FORMAT}: run the benchmark "
                    "again with another --output"
                )
            checked(HEADER, self.header, header)
            if identity is not None:
                _refuse_other(path, self.header["identity"], json.loads(json.dumps(identity)))
        elif identity is None:
            raise InputError(f"no benchmark run in {path}: make one with glidecape bench --output {path}")
        else:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.glob("*.jsonl")):
                raise InputError(f"{path} holds .jsonl files but no run.json: use an empty folder for --output")
            self.header = {"format": FORMAT, "identity": json.loads(json.dumps(identity)), "sessions": []}
        self.prompts, self.outputs = JsonLines(path / "prompts.jsonl"), JsonLines(path / "outputs.jsonl")
        self.measured, self.watched = JsonLines(path / "records.jsonl"), JsonLines(path / "watched.jsonl")
        self._check()

    def _check(self) -> None:
        """Raises DataError for lines that no run of this version writes."""
        identity = self.header["identity"]
        checked(OUTPUTS, self.outputs.lines, self.outputs.path)
        checked(WATCHED, self.watched.lines, self.watched.path)
        jobs, names = {item.job for item in self.items}, {*identity["methods"], *identity["peers"]}
        for number, record in enumerate(self.records, 1):
            if record.job not in jobs or record.method not in names:
                raise unreadable(self.measured.path, f"line {number}: a job or a method that is not of this run")
            if not record.peer and not len(record.draft_us) == len(record.verify_us) == len(record.round_us):
                raise unreadable(self.measured.path, f"line {number}: lists of different lengths")
            if record.calibration and not _is_calibration(record.calibration):
                raise unreadable(self.measured.path, f"line {number}: a calibration that counts no nodes")
            if not record.peer and record.seconds <= 0:
                raise unreadable(self.measured.path, f"line {number}: no time was taken")

    def save(self) -> None:
        write_json(self.path / "run.json", self.header)

    def keep(self, **parts: Any) -> None:
        """Put parts into the header and save it."""
        self.header |= parts
        self.save()

    def add(self, record: Record) -> None:
        self.measured.append(asdict(record))

    @property
    def items(self) -> list[Item]:
        return checked(ITEMS, self.prompts.lines, self.prompts.path)

    @property
    def records(self) -> list[Record]:
        return checked(RECORDS, self.measured.lines, self.measured.path)

    @property
    def tokens(self) -> dict[int, list[int]]:
        """Plain decoding's output by number of the item."""
        return {line["item"]: line["tokens"] for line in self.outputs.lines}


def _is_calibration(bins: Sequence[tuple[int, int, float, int]]) -> bool:
    return len(bins) == BINS and all(
        0 <= accepted <= reached <= offered and 0 <= predicted <= reached + 1e-3
        for offered, reached, predicted, accepted in bins
    )


def _refuse_other(path: Path, there: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name in (*there, *ours):
        if there.get(name) != ours.get(name):
            was, now = there.get(name), ours.get(name)
            while isinstance(was, Mapping) and isinstance(now, Mapping):
                name = next(key for key in (*was, *now) if was.get(key) != now.get(key))
                was, now = was.get(name), now.get(name)
            raise InputError(
                f"{path} holds a run with {name} {_short(was)}, not {_short(now)}: use another --output, or delete it"
            )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "…"
