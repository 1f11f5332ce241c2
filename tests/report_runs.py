"""Folders of benchmark runs with made-up rounds, for tests of the report."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glidecape.bench.records import Counts, Item, Record, RunFolder
from glidecape.bench.settings import Settings

# Method: accepted tokens of four, and milliseconds of a round over plain decoding's.
METHODS = {
    "plain": (0.0, 1.0),
    "lookup": (1.2, 1.3),
    "vanilla": (0.9, 2.0),
    "nocross:glide": (0.8, 1.5),
    "last:glide": (1.9, 1.5),
    "glide": (2.2, 1.5),
    "glide+cape": (2.6, 1.9),
    "glide+svip@threshold=0.3": (1.4, 1.3),
    "glide+cape+svip": (2.5, 1.6),
    "eagle+chain": (2.2, 1.45),
    "eagle@top=4@total=12": (2.7, 1.9),
    "medusa@top=4@total=12": (0.6, 1.8),
}
PEERS = {"transformers": 1.3, "transformers+lookup": 0.7}
WATCHED = ("glide", "nocross", "last", "vanilla", "eagle")
WHERE = {"commit": "0123abc", "torch": "2.13.0", "transformers": "5.24.0", "python": "3.11.7", "processor": "a CPU"}


def identity(temperature: float) -> dict[str, Any]:
    return {
        "settings": asdict(Settings(temperature=temperature, repeats=1)),
        "methods": list(METHODS),
        "peers": dict.fromkeys(PEERS, "5.24.0"),
        "suites": {"own": "ab" * 32},
        "prompts": {"own": 9},
        "calibration": None,
        "target": "cd" * 32,
        "drafts": dict.fromkeys(WATCHED, "ef" * 32),
        "compiled": False,
        "circumstances": WHERE | {"device": "cpu", "dtype": "float32", "threads": 2},
    }


def made(path: Path, temperature: float) -> Path:
    """A finished run of nine prompts in three categories."""
    chance = random.Random(int(temperature))
    folder = RunFolder(path, identity(temperature))
    nodes = (0, 1, 2, 4, 8, 16)
    costs: dict[str, Any] = {
        "context": 128,
        "draft_step_s": dict.fromkeys(WATCHED, 0.0004),
        "c": dict.fromkeys(WATCHED, 0.13),
    }
    costs |= {"verify_s": {str(n): 0.003 + 0.0002 * n for n in nodes}, "v": {str(n): 1 + 0.07 * n for n in nodes}}
    session = {"command": "glidecape bench model --suite own --output run", "started": "2026-11-27T05:00:00+00:00"}
    suites = [{"name": "own", "source": "python.jsonl", "sha256": "ab" * 32, "prompts": 9}]
    drawn = {name: {"steady": 3, "looping": 0} for name in ("code", "prose", "mathematics")}
    folder.keep(sessions=[session], suites=suites, drawn=drawn, costs=costs, fits={})
    items = [Item(i, f"own/{i}", list(drawn)[i // 3], "steady", False, i, (i, i + 1)) for i in range(9)]
    folder.prompts.append(*map(asdict, items))
    for item in items:
        folder.outputs.append({"item": item.number, "tokens": list(range(60))})
        for method, (accepted, pace) in METHODS.items():
            folder.add(_record(item, method, accepted / (1 + temperature), pace, chance))
        for peer, pace in PEERS.items():
            took = [int(59 * 3000 * pace * chance.uniform(0.9, 1.1))]
            folder.add(Record(item.job, 0, peer, [Counts(emitted=[59])], round_us=took, peer=True))
    for draft in WATCHED:
        folder.watched.append({"item": 0, "draft": draft, **_watched(chance)})
    return path


def _record(item: Item, method: str, accepted: float, pace: float, chance: random.Random) -> Record:
    rounds = int(60 / (1 + accepted))
    row, drafted = Counts(), 0 if method == "plain" else 4
    for _ in range(rounds):
        took = min(drafted, max(0, round(chance.gauss(accepted, 1)))) if drafted else 0
        tested = min(drafted, took + 1)
        for name, value in zip(
            ("drafted", "depth", "accepted", "tested", "emitted"),
            (drafted, drafted, took, tested, took + 1),
            strict=True,
        ):
            getattr(row, name).append(value)
    whole = [int(3000 * pace * chance.uniform(0.95, 1.05)) for _ in range(rounds)]
    draft = [int(0.1 * drafted * us) for us in whole]
    forward = [us - own - 50 for us, own in zip(whole, draft, strict=True)]
    return Record(item.job, 0, method, [row], draft, forward, whole, 9000, 2**28)


def _watched(chance: random.Random) -> dict[str, Any]:
    entropy = [[chance.uniform(0, 3) for _ in range(4)] for _ in range(60)]
    confidence = [[1 / (1 + h) for h in each] for each in entropy]
    matches = [next((d for d, c in enumerate(each) if chance.random() > c), 4) for each in confidence]
    overlap = [each[0] for each in confidence]
    return {"matches": matches, "entropy": entropy, "confidence": confidence, "overlap": overlap, "overlap_1": overlap}
