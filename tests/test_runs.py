"""The scripts in runs/ that widen a pair, draw curves of cost, count launches, and measure on a GPU."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from glidecape import SamplingParams, Target, load_draft, make_drafter
from glidecape.core.stats import Stats
from glidecape.engine.decode import decode
from glidecape.errors import InputError
from test_docs import command_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "runs"))

import curves  # noqa: E402
import launches  # noqa: E402
import widen  # noqa: E402

PROMPTS = [[5, 9, 13, 5, 9, 13, 5, 9], [250, 1, 2, 3], list(range(40, 70))]


@pytest.fixture(scope="module")
def wide(world, tmp_path_factory) -> Path:
    """The tiny pair four times as wide and twice as deep, in float32."""
    out = tmp_path_factory.mktemp("wide") / "pair"
    shape = widen.Shape(width=128, layers=4, heads=8, kv_heads=8, head_dim=16, ffn=192)
    drafts = {name: world[name] for name in ("glide", "eagle", "lm")}
    widen.widen(world["target"], drafts, out, shape, torch.float32)
    return out


def decoded(folder: Path, target: str, draft: str, method: str, temperature: float) -> tuple[list[list[int]], Stats]:
    """The tokens, and what was drafted and accepted."""
    model = Target.from_pretrained(folder / target, torch.float32)
    drafter = make_drafter(method, load_draft(folder / draft, model))
    params, stats = SamplingParams(temperature, seed=3, max_new_tokens=24, ignore_eos=True), Stats()
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for event in decode(model, drafter, PROMPTS, [params] * len(PROMPTS), stats):
        tokens[event.row] += event.tokens
    return tokens, stats


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("draft", "method"), [("glide", "glide+cape"), ("eagle", "eagle+chain"), ("lm", "vanilla")])
def test_a_widened_pair_drafts_accepts_and_emits_as_before(world, wide, draft, method, temperature) -> None:
    before, seen = decoded(world["target"].parent, "target", draft, method, temperature)
    after, seen_wide = decoded(wide, "target", draft, method, temperature)
    assert after == before
    counts = ("rounds", "drafted", "accepted")
    assert [getattr(seen_wide, name) for name in counts] == [getattr(seen, name) for name in counts]


def logits_of(folder: Path) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([list(range(3, 40))])).logits


def test_a_widened_target_gives_the_same_logits(world, wide) -> None:
    small, large = logits_of(world["target"]), logits_of(wide / "target")
    assert torch.allclose(small, large, atol=1e-4), (small - large).abs().max()


def test_larger_heads_turn_as_before(tmp_path: Path) -> None:
    """Grouped queries, heads twice as large, a head of its own, a width that is no power of two of the old one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=24,
        head_dim=8,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    shape = widen.Shape(width=54, layers=5, heads=9, kv_heads=3, head_dim=16, ffn=48)
    widen.widen(tmp_path / "small", {}, tmp_path / "large", shape, torch.float32)
    small, large = logits_of(tmp_path / "small"), logits_of(tmp_path / "large" / "target")
    assert torch.allclose(small, large, atol=1e-4), (small - large).abs().max()
    made = LlamaForCausalLM.from_pretrained(tmp_path / "large" / "target", dtype=torch.float32).state_dict()
    assert sum(bool((one == 0).all()) for one in made.values()) == 2 * 2, (
        "only what writes in the two new layers is zero"
    )


def test_what_cannot_be_widened_is_refused(world, tmp_path: Path) -> None:
    shape = widen.Shape(width=64, layers=2, heads=4, kv_heads=4, head_dim=16, ffn=64)
    with pytest.raises(InputError, match="width would become smaller"):
        widen.widen(world["target"], {}, tmp_path / "a", widen.replace(shape, width=16))
    with pytest.raises(InputError, match="kind medusa"):
        widen.widen(world["target"], {"medusa": world["medusa"]}, tmp_path / "b", shape)
    with pytest.raises(InputError, match="exists"):
        widen.widen(world["target"], {}, tmp_path, shape)


def test_curves_of_cost(world, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(curves, "COPY_BYTES", 2**20)
    sizes = "--nodes 1,3 --batch 1,2 --context 16,400 --seconds 0.001 --threads 1 --compile off"
    where = ["--target", str(world["target"]), "--output", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.svg")]
    monkeypatch.setattr(sys, "argv", ["curves.py", *sizes.split(), *where])
    monkeypatch.setitem(curves.STILL, "context", 16)
    curves.main()
    tables = json.loads((tmp_path / "c.json").read_text())["tables"]
    assert [(t["title"], len(t["rows"])) for t in tables] == [("By nodes", 4), ("By batch", 4), ("By context", 4)]
    for row in (row for table in tables for row in table["rows"]):
        assert row["ms"] > 0
        assert row["of_copy"] == pytest.approx(row["limit_ms"] / row["ms"], rel=0.01)
    longest = tables[2]["rows"][-1]
    assert (longest["nodes"], longest["context"]) == (16, 192 - 16), "cut to the target's context"
    target = Target.from_pretrained(world["target"], torch.float32)
    read = curves.weight_bytes(target) + 2 * 2 * 2 * 16 * 176 * 4  # keys and values, layers, heads, their size, tokens
    assert longest["MB"] == pytest.approx(read / 1e6, rel=0.001)
    assert "By context" in (tmp_path / "c.md").read_text()
    assert (tmp_path / "c.svg").read_text().count("<path") == 3 * 5


def test_weights_are_counted_as_they_are_read(world) -> None:
    target = Target.from_pretrained(world["target"], torch.float32)
    config = target.config
    width, ffn, inner = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    layer = 4 * width * inner + 3 * width * ffn
    assert curves.weight_bytes(target) == 4 * (config.num_hidden_layers * layer + config.vocab_size * width)


def test_launches_are_counted(world, tmp_path: Path, monkeypatch) -> None:
    """Without a GPU there are none, which is what it says."""
    where = ["--target", str(world["target"]), "--draft", str(world["glide"]), "--output", str(tmp_path / "l.json")]
    words = ["--device", "cpu", "--dtype", "float32", "--rounds", "2", "--method", "plain", "--method", "glide"]
    monkeypatch.setattr(sys, "argv", ["launches.py", *where, *words])
    launches.main()
    found = json.loads((tmp_path / "l.json").read_text())["calls_a_round"]
    assert found == {method: dict.fromkeys(launches.KINDS, 0) for method in ("plain", "glide")}


@pytest.mark.parametrize("toy", [False, True])
def test_each_command_of_the_gpu_script_can_be_read(toy: bool) -> None:
    environment = os.environ | {"DRY_RUN": "1"} | ({"TOY": "1", "DEVICE": "cpu"} if toy else {})
    ran = subprocess.run(["bash", "runs/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    scripts = {"runs/widen.py": widen, "runs/curves.py": curves, "runs/launches.py": launches}
    names = []
    for words in map(shlex.split, ran.stdout.splitlines()):
        if words[1:3] == ["-m", "glidecape"]:
            command, name, rest = command_of(words[2:])
            command.make_context(name[-1], list(rest))
            names.append(" ".join(name))
        else:
            scripts[words[1]].parser().parse_args(words[2:])
            names.append(words[1])
    assert set(names) == {"certify", "data pysource", "train-target", "train", "bench", *scripts}
