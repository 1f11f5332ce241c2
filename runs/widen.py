"""A Llama and its drafts made larger without changing what they compute: to measure costs where arithmetic decides.

.venv/bin/python runs/widen.py FOLDER                      the shipped pair as 290 M parameters, 1,536 x 10
.venv/bin/python runs/widen.py FOLDER --shape 7b           the same in the shape of Llama-7B, 13 GB
.venv/bin/python runs/widen.py FOLDER --target MODEL --draft glide=DRAFT --width 512 --layers 12 …

Writes FOLDER/target and FOLDER/NAME for each draft (GliDe, EAGLE, or a draft LM, which keeps its number of layers). Their cost
is that of the larger shape, their acceptance that of the small pair: say so beside each figure.

How: the residual stream gets zeros beside it, which nothing writes to; norms divide by the wider stream, so their weights
and eps shrink; new heads and new inner units are computed, and read by nothing; new layers add nothing. With heads of a larger
size the rotary pair j becomes pair m j, which turns as fast, and queries grow by sqrt(m). A width of 4, 16, … times the old one
scales norms by a power of two, exactly. Weights that reach no output are random where they can be, since zeros draw less power
than real weights; the others are zero. Dense kernels multiply zeros like any other number, so the cost is the same.
"""

import argparse
import json
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from glidecape import Target
from glidecape.drafts.checkpoint import WEIGHTS, read_card, read_network, save_network
from glidecape.errors import GlideCapeError, InputError

SHIPPED = Path(__file__).resolve().parents[1] / "models" / "pysource"
SPREAD = 0.02  # of random weights
NOTE = "its cost is that of its shape, its text and acceptance are the small pair's"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int


SHAPES = {"300m": Shape(1536, 10, 24, 24, 64, 4096), "7b": Shape(4096, 32, 32, 32, 128, 11008)}


@dataclass(frozen=True)
class Axis:
    """Where the old entries of a dimension are in the new one, and its new size."""

    at: torch.Tensor
    size: int

    def __add__(self, other: "Axis") -> "Axis":
        return Axis(torch.cat([self.at, self.size + other.at]), self.size + other.size)

    def __mul__(self, count: int) -> "Axis":
        return self if count == 1 else self + self * (count - 1)


def whole(size: int) -> Axis:
    return Axis(torch.arange(size), size)


class Widening:
    """From one shape to another; matrices are made in `dtype`.

    Raises:
        InputError: a size that is smaller than before, or heads that cannot be mapped.
    """

    def __init__(self, old: Shape, new: Shape, dtype: torch.dtype) -> None:
        if smaller := [name for name, size in asdict(old).items() if getattr(new, name) < size]:
            raise InputError(f"{', '.join(smaller)} would become smaller: name sizes of at least {old}")
        if new.head_dim % old.head_dim or new.heads // new.kv_heads < old.heads // old.kv_heads:
            raise InputError("the head size must be a multiple of the old one, and queries for each key no fewer")
        self.old, self.new = old, new
        self.stream, self.ffn = Axis(torch.arange(old.width), new.width), Axis(torch.arange(old.ffn), new.ffn)
        self.norm = math.sqrt(old.width / new.width)
        self.query_scale = math.sqrt(new.head_dim / old.head_dim)
        self.queries, self.keys = self._queries(old.kv_heads, new.kv_heads), self._keys(old.kv_heads, new.kv_heads)
        # Of a GliDe layer's own attention, which has as many keys as queries.
        self.own_queries, self.own_keys = self._queries(old.heads, new.heads), self._keys(old.heads, new.heads)
        self.dtype = dtype
        self.pool = (SPREAD * torch.randn(2**20, generator=torch.Generator().manual_seed(0))).to(dtype)

    def _keys(self, old: int, new: int) -> Axis:
        """Rows of keys or values of so many heads; the halves of a head are rotated together, so each is spread."""
        times, half = self.new.head_dim // self.old.head_dim, self.old.head_dim // 2
        dims = torch.cat([times * torch.arange(half), self.new.head_dim // 2 + times * torch.arange(half)])
        return Axis((self.new.head_dim * torch.arange(old)[:, None] + dims).flatten(), new * self.new.head_dim)

    def _queries(self, old: int, new: int) -> Axis:
        """Rows of queries: those of a key head stay with it."""
        groups = self.old.heads // old, self.new.heads // new
        one = self._keys(groups[0], groups[1])
        at = torch.cat([one.at + head * one.size for head in range(old)])
        return Axis(at, self.new.heads * self.new.head_dim)

    def layer(self, number: int) -> int:
        """The new number of a layer: the last stays last, and those that add nothing are spread."""
        return (number + 1) * self.new.layers // self.old.layers - 1

    def matrix(self, weight: torch.Tensor, rows: Axis, columns: Axis, random: bool = False) -> torch.Tensor:
        made = self.random(rows, columns) if random else torch.zeros(rows.size, columns.size, dtype=self.dtype)
        made[rows.at[:, None], columns.at] = weight.to(self.dtype)
        return made

    def random(self, rows: Axis, columns: Axis) -> torch.Tensor:
        count = rows.size * columns.size
        return self.pool.repeat(-(-count // len(self.pool)))[:count].view(rows.size, columns.size)

    def turned(self, weight: torch.Tensor, rows: Axis) -> torch.Tensor:
        """Queries: what a head has beside its old dimensions must be zero, since keys are random there."""
        made = self.matrix(weight.float() * self.query_scale, rows, self.stream, random=True)
        heads = made.view(-1, self.new.head_dim, made.shape[1])
        used = torch.zeros(rows.size, dtype=torch.bool).index_fill(0, rows.at, True).view(len(heads), -1)
        heads[used.any(1)[:, None] & ~used] = 0
        return made

    def vector(self, weight: torch.Tensor, scale: float) -> torch.Tensor:
        made = torch.zeros(self.stream.size)
        made[self.stream.at] = weight.float() * scale
        return made


def widened_llama(w: Widening, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The new weights by their names in transformers' Llama."""
    made: dict[str, torch.Tensor] = {}
    for name, weight in state.items():
        part = name.split(".")[-2]
        if name.startswith("model.layers."):
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            name = f"model.layers.{w.layer(int(number))}.{rest}"
        made[name] = _llama_part(w, part, weight)
    first = {name: t for name, t in made.items() if name.startswith(f"model.layers.{w.layer(0)}.")}
    for number in set(range(w.new.layers)) - {w.layer(number) for number in range(w.old.layers)}:
        for name, like in first.items():
            new = w.random(*map(whole, like.shape)) if like.ndim == 2 else torch.full_like(like, w.norm)
            silent = name.endswith(("o_proj.weight", "down_proj.weight"))
            made[name.replace(f".{w.layer(0)}.", f".{number}.", 1)] = torch.zeros_like(like) if silent else new
    return made


def _llama_part(w: Widening, part: str, weight: torch.Tensor) -> torch.Tensor:
    if weight.ndim == 1:
        return w.vector(weight, w.norm)
    if part == "q_proj":
        return w.turned(weight, w.queries)
    if part in ("k_proj", "v_proj"):
        return w.matrix(weight, w.keys, w.stream, random=True)
    if part == "o_proj":
        return w.matrix(weight, w.stream, w.queries)
    if part in ("gate_proj", "up_proj"):
        return w.matrix(weight, w.ffn, w.stream, random=True)
    if part == "down_proj":
        return w.matrix(weight, w.stream, w.ffn)
    return w.matrix(weight, whole(weight.shape[0]), w.stream)  # embedding and head


def shape_of(config: dict) -> Shape:
    """Raises InputError for what is no plain Llama."""
    rope = (config.get("rope_parameters") or {}).get("rope_type", "default")
    biased = config.get("attention_bias") or config.get("mlp_bias")
    if config.get("model_type") != "llama" or biased or rope != "default":
        raise InputError("only Llama models without biases and without scaled rotary embeddings are made larger here")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or width // heads
    return Shape(width, config["num_hidden_layers"], heads, kv_heads, head_dim, config["intermediate_size"])


def widen_llama(folder: Path, out: Path, new: Shape, dtype: torch.dtype, deeper: bool = True) -> Widening:
    """Write the larger model of `folder` to `out`; `deeper`: with the layers of the new shape, else with its own."""
    config = json.loads((folder / "config.json").read_text())
    old = shape_of(config)
    w = Widening(old, new if deeper else replace(new, layers=old.layers), dtype)
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    made = {name: weight.to(dtype) for name, weight in widened_llama(w, state).items()}
    out.mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("config.json", "card.json") and path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)
    names = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    names |= {"kv_heads": "num_key_value_heads", "head_dim": "head_dim", "ffn": "intermediate_size"}
    config |= {names[name]: size for name, size in asdict(w.new).items()}
    config |= {"rms_norm_eps": config["rms_norm_eps"] * w.norm**2, "dtype": str(dtype).removeprefix("torch.")}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(made, out / "model.safetensors", {"format": "pt"})
    what = {"made_from": str(folder), "from": asdict(old), "to": asdict(w.new), "note": NOTE}
    (out / "widened.json").write_text(json.dumps(what, indent=1) + "\n")
    return w


def widen_network(folder: Path, small: Target, out: Path, large: Target, w: Widening, dtype: torch.dtype) -> None:
    """Write a GliDe or EAGLE draft of `small` as one of `large`.

    Raises:
        InputError: it is of another kind, or has not its target's sizes.
    """
    network = read_network(folder, small)
    if network.kind not in ("glide", "eagle"):
        raise InputError(f"{folder}: drafts of kind {network.kind} are not made larger here, only GliDe, EAGLE and LMs")
    config = network.config
    sizes = {"width", "hidden_size", "embed_width"}, {"heads", "target_heads"}, {"head_dim", "target_head_dim"}, {"ffn"}
    new = {}
    for names, size in zip(sizes, ("width", "heads", "head_dim", "ffn"), strict=True):
        for name in names & asdict(config).keys():
            if getattr(config, name) != getattr(w.old, size):
                raise InputError(f"{folder}: its {name} is not its target's, so it cannot be made larger here")
            new[name] = getattr(w.new, size)
    new |= {name: w.new.kv_heads for name in ("kv_heads", "target_kv_heads") if hasattr(config, name)}
    new["eps"] = config.eps * w.norm**2
    if network.kind == "glide":
        new["reads"] = tuple(tuple(w.layer(layer) for layer in reads) for reads in config.reads)
    else:
        new["layer"] = w.layer(config.layer)
    made = type(network)(replace(config, **new))
    made.load_state_dict({name: _network_part(w, name, t, network.kind) for name, t in network.state_dict().items()})
    card = read_card(folder)
    command = f"runs/widen.py, from the draft of: {card.command}"
    save_network(out, made, large, command, {"of the small pair": card.figures}, dtype)


def _network_part(w: Widening, name: str, weight: torch.Tensor, kind: str) -> torch.Tensor:
    parts = name.removesuffix(".weight").split(".")
    part, own = parts[-1], kind == "glide" and "cross" not in parts
    queries, keys = (w.own_queries, w.own_keys) if own else (w.queries, w.keys)
    rows, columns = weight.shape if weight.ndim == 2 else (0, 0)
    if part in ("kept", "mix"):
        return weight
    if name == "join.bias":
        return w.vector(weight, 1.0)
    if weight.ndim == 1:
        return w.vector(weight, w.norm)
    if part == "q":
        return w.turned(weight, queries * (rows // len(queries.at)))
    if part == "kv":
        return w.matrix(weight, keys + keys, w.stream, random=True)
    if part in ("out", "self_out"):
        return w.matrix(weight, w.stream, queries * (columns // len(queries.at)))
    if part == "gate_up":
        return w.matrix(weight, w.ffn + w.ffn, w.stream, random=True)
    if part == "down":
        return w.matrix(weight, w.stream, w.ffn)
    if part == "join":
        return w.matrix(weight, w.stream, w.stream + w.stream)
    if part in ("embed", "head"):
        return w.matrix(weight, whole(rows), w.stream)
    return w.matrix(weight, w.stream, w.stream)  # a glimpse's projections


def widen(target: Path, drafts: dict[str, Path], out: Path, new: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write `out`/target and a folder for each of `drafts` by its name.

    Raises:
        GlideCapeError: a model or a draft that is not made larger here.
    """
    if out.exists():
        raise InputError(f"{out} exists: name a folder that is to be made")
    w = widen_llama(target, out / "target", new, dtype)
    networks = {name: folder for name, folder in drafts.items() if (folder / WEIGHTS).is_file()}
    for name in drafts.keys() - networks.keys():
        widen_llama(drafts[name], out / name, new, dtype, deeper=False)
    if networks:
        small = Target.from_pretrained(target, dtype=torch.float32)
        large = Target.from_pretrained(out / "target", pack=False, probe=False)
        for name, folder in networks.items():
            widen_network(folder, small, out / name, large, w, dtype)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("out", type=Path, help="folder to make")
    made.add_argument("--target", type=Path, default=SHIPPED / "target")
    made.add_argument("--draft", action="append", metavar="NAME=FOLDER", help="default: the shipped glide, eagle, lm")
    made.add_argument("--shape", choices=SHAPES, default="300m")
    for name in asdict(SHAPES["300m"]):
        made.add_argument(f"--{name.replace('_', '-')}", type=int, help="instead of the shape's")
    made.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    return made


def main() -> None:
    given = parser().parse_args()
    changed = {name: getattr(given, name) for name in asdict(SHAPES["300m"]) if getattr(given, name)}
    names = given.draft or [f"{name}={SHIPPED / name}" for name in ("glide", "eagle", "lm")]
    drafts = {name: Path(folder) for name, _, folder in (one.partition("=") for one in names)}
    try:
        widen(given.target, drafts, given.out, replace(SHAPES[given.shape], **changed), getattr(torch, given.dtype))
    except GlideCapeError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{given.out}: {NOTE}")


if __name__ == "__main__":
    main()
