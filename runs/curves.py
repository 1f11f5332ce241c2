"""What a forward of the target costs as work grows: by nodes, by batch and by context, beside the bytes that it must read.

.venv/bin/python runs/curves.py --threads 2 --output runs/out/curves.json --plot docs/images/curves.svg

Each cell is one forward of the compiled program on a cache full of random keys and values; the nodes are a chain. What must
be read are the weights once, and the keys and values of every row once. The limit is that many bytes at the speed of a copy
that is measured here, reads and writes counted; a model that fits the processor's cache can be faster than the limit. Takes two
minutes on the shipped target, and half a minute more the first time, to compile.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from drawings import Picture

from glidecape import Target
from glidecape.bench.provenance import circumstances
from glidecape.core import pages
from glidecape.core.cache import cache_bytes
from glidecape.errors import GlideCapeError
from glidecape.interface.load import compile_models, load_target
from glidecape.measure.table import Study, Table
from glidecape.target.streamed import dense_of

# What grows; beside it, in two curves of its own, what stands still: (nodes, batch, context).
CURVES = {
    "nodes": [("batch", 1), ("batch", 8)],
    "batch": [("nodes", 1), ("nodes", 16)],
    "context": [("nodes", 1), ("nodes", 16)],
}
STILL = {"nodes": 1, "batch": 1, "context": 256}
COPY_BYTES = 2**28


def copy_speed(device: torch.device, patience: float) -> float:
    """Bytes a second of a copy too large for the processor's cache, what is read and what is written together."""
    source, goal = (pages.zeros(COPY_BYTES // 4, dtype=torch.float32, device=device).fill_(1) for _ in range(2))
    return 2 * source.nbytes / timed(lambda: goal.copy_(source), device, patience)


def timed(call, device: torch.device, patience: float) -> float:
    """Median seconds of a call, after one to warm up; at least three, and more until `patience` seconds are over."""
    times: list[float] = []
    call()
    while len(times) < 3 or sum(times) < patience:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def weight_bytes(target: Target) -> int:
    """Bytes of the weights that a forward reads: of embeddings a few rows only, of the head and all layers everything."""
    total = 0
    for layer in target.model.modules():
        if dense_of(layer) is not None or isinstance(layer, torch.nn.Linear):
            weight = layer.weight.detach()
            # A compiled program keeps a float32 weight in bfloat16 where that holds it exactly.
            halved = target.compiled is not None and torch.equal(weight.bfloat16().to(weight.dtype), weight)
            total += weight.numel() * (2 if halved else weight.element_size())
    return total


@torch.no_grad()
def forward_s(target: Target, nodes: int, batch: int, context: int, patience: float) -> float:
    """Seconds of a forward of so many nodes after so many committed tokens, in each of so many rows."""
    cache = target.new_cache(batch, context + nodes)
    for store in (*cache.keys, *cache.values):
        store.normal_()  # memory that nobody wrote is read from one page
    cache.commit([context] * batch)
    tokens = torch.randint(target.vocab_size, (batch, nodes), device=target.device)
    positions = torch.arange(context, context + nodes, device=target.device).repeat(batch, 1)
    return timed(lambda: target.forward(tokens, positions, cache), target.device, patience)


def measured(target: Target, grows: dict[str, list[int]], patience: float) -> tuple[list[Table], dict]:
    """The tables of all curves, and what they share."""
    speed, weights = copy_speed(target.device, patience), weight_bytes(target)
    tables = []
    for what, curves in CURVES.items():
        table = Table(f"By {what}")
        for other, number in curves:
            for size in grows[what]:
                cell = STILL | {other: number, what: size}
                if what == "context":
                    cell["context"] = min(size, target.context - cell["nodes"])
                seconds = forward_s(target, *cell.values(), patience)
                read = weights + sum(
                    cache_bytes(1, cell["batch"], heads, cell["context"], dim, target.dtype)
                    for heads, dim in target.shapes
                )
                found = {"ms": 1e3 * seconds, "MB": read / 1e6, "limit_ms": 1e3 * read / speed}
                found["of_copy"] = read / speed / seconds
                table.rows.append(cell | {key: float(f"{one:.4g}") for key, one in found.items()})
                print(" ".join(f"{key} {value}" for key, value in table.rows[-1].items()), file=sys.stderr, flush=True)
        tables.append(table)
    after = copy_speed(target.device, patience)
    return tables, {
        "copy_gb_s": round(speed / 1e9, 2),
        "copy_gb_s_after": round(after / 1e9, 2),
        "weight_bytes": weights,
    }


LEFT, TOP, WIDE, HIGH, GAP = 64, 62, 190, 190, 62
COLOURS = ("var(--target)", "var(--draft)")


def draw(tables: list[Table]) -> Picture:
    """Three panels, milliseconds by what grows, both in powers of two; dashed: the limit."""
    picture = Picture("Milliseconds of a forward as work grows", LEFT + 3 * (WIDE + GAP), TOP + HIGH + 60)
    picture.text(LEFT, 24, "milliseconds of a forward; dashed: the bytes that it must read, at a copy's speed", "small")
    for panel, (table, (what, curves)) in enumerate(zip(tables, CURVES.items(), strict=True)):
        left = LEFT + panel * (WIDE + GAP)
        across = _scale([row[what] for row in table.rows], left, WIDE)
        up = _scale([row[key] for row in table.rows for key in ("ms", "limit_ms")], TOP + HIGH, -HIGH)
        picture.line(f"M{left} {TOP}V{TOP + HIGH}H{left + WIDE}", "edge")
        picture.text(left + WIDE / 2, TOP + HIGH + 36, what, "mid")
        for size in {row[what]: None for row in table.rows}:
            picture.text(across(size), TOP + HIGH + 18, f"{size}", "small mid")
        for tick in _ticks([row[key] for row in table.rows for key in ("ms", "limit_ms")]):
            picture.text(left - 6, up(tick) + 4, f"{tick:g}", "small end")
        for curve, (other, number) in enumerate(curves):
            rows = [row for row in table.rows if row[other] == number]
            colour = f"stroke: {COLOURS[curve]}; stroke-width: 2; fill: none"
            for key, dashes in (("ms", ""), ("limit_ms", "; stroke-dasharray: 4 4")):
                points = "L".join(f"{across(row[what]):.1f} {up(row[key]):.1f}" for row in rows)
                picture.parts.append(f'<path d="M{points}" style="{colour}{dashes}"/>')
            words = f'<text x="{left + 6 + 90 * curve}" y="{TOP - 12}" style="fill: {COLOURS[curve]}; font-size: 12px">'
            picture.parts.append(f"{words}{other} {number}</text>")
    return picture


def _scale(values: list[float], start: float, length: float):
    """From values to pixels, by their logarithms."""
    low, high = (torch.tensor(float(one)).log2().item() for one in (min(values), max(values)))
    return lambda value: start + length * (torch.tensor(float(value)).log2().item() - low) / max(high - low, 1e-9)


def _ticks(values: list[float]) -> list[float]:
    """1, 2, 5, 10, … between the values."""
    steps = [step * 10.0**power for power in range(-3, 6) for step in (1, 2, 5)]
    return [one for one in steps if min(values) <= one <= max(values)]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--target", default="models/pysource/target")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--compile", choices=["on", "off"], default="on")
    made.add_argument("--nodes", default="1,2,4,8,16,32,64", help="sizes, joined by commas")
    made.add_argument("--batch", default="1,2,4,8,16,32")
    made.add_argument("--context", default="256,512,1024,2048,4096,8192")
    made.add_argument("--seconds", type=float, default=1.0, help="of each cell")
    made.add_argument("--output", type=Path, default=Path("runs/out/curves.json"), help="JSON; a .md beside it")
    made.add_argument("--plot", type=Path, help="SVG")
    return made


def main() -> None:
    given = parser().parse_args()
    try:
        grows = {what: [int(one) for one in getattr(given, what).split(",")] for what in CURVES}
    except ValueError:
        raise SystemExit("error: --nodes, --batch and --context take numbers joined by commas") from None
    try:
        target = load_target(given.target, given.dtype, given.device, given.threads)
        compile_models(target, [], given.compile)
        tables, shared = measured(target, grows, given.seconds)
    except GlideCapeError as error:
        raise SystemExit(f"error: {error}") from None
    facts = {"command": " ".join(["runs/curves.py", *sys.argv[1:]])} | circumstances(target)
    facts |= {"model": target.summary, "compiled": target.compiled is not None} | shared
    study = Study("curves", facts, {"seconds": given.seconds, **grows}, tables)
    study.notes.append(
        f"A copy moves {shared['copy_gb_s']} GB/s here, read and written together. limit: what must be read at that speed; "
        "of copy: the limit over what was measured."
    )
    study.write(given.output)
    if given.plot:
        draw(tables).write(given.plot)
    print(study.markdown())


if __name__ == "__main__":
    main()
