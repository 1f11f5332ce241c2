"""Accumulation, clipping, compiling, and what is measured after training."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import torch

from glidecape.drafts.checkpoint import load_draft, load_network, read_card
from glidecape.errors import InputError
from glidecape.target.target import Target
from glidecape.train import draft as drafts
from glidecape.train import figures
from glidecape.train.data import load_streams
from glidecape.train.draft import train_draft
from glidecape.train.kinds.glide import draft_logits
from glidecape.train.loop import Budget
from glidecape.train.recipe import DraftRecipe
from glidecape.train.teacher import Teacher
from states import clock_in, weights_in


@pytest.fixture
def target(world):
    return Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)


def weights(world, target, out, recipe, steps=4, **options):
    tokens = steps * recipe.rows * recipe.accumulate * recipe.length
    train_draft(target, world["corpus"], out, recipe, Budget(tokens=tokens), prompts=0, **options)
    return weights_in(out)


def test_two_batches_accumulated_are_one_of_twice_the_rows(world, target, tmp_path):
    common = {"length": 32, "rate": 1e-3, "lags": "block"}
    whole = weights(world, target, tmp_path / "whole", DraftRecipe(rows=4, **common))
    halves = weights(world, target, tmp_path / "halves", DraftRecipe(rows=2, accumulate=2, **common))
    single = weights(world, target, tmp_path / "single", DraftRecipe(rows=2, **common))
    # bfloat16 products, and AdamW's first steps of size `rate` whatever the gradient: close, where single batches aren't.
    far = sum((whole[n] - single[n]).abs().sum() for n in whole)
    near = sum((whole[n] - halves[n]).abs().sum() for n in whole)
    assert near < far / 10
    clocks = [clock_in(tmp_path / name) for name in ("whole", "halves")]
    assert [(c["step"], c["tokens"]) for c in clocks] == [(4, 512), (4, 512)]
    np.testing.assert_allclose(clocks[0]["losses"], clocks[1]["losses"], rtol=1e-2)


def test_clip_bounds_the_gradient_and_zero_does_not(world, target, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def recording(self, *arguments, **keywords):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return step(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    weights(world, target, tmp_path / "a", DraftRecipe(rows=2, length=32, clip=0.0), 1)
    weights(world, target, tmp_path / "b", DraftRecipe(rows=2, length=32, clip=0.01), 1)
    assert norms[0] > 0.02
    assert norms[1] == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(InputError, match="accumulate 0 must be at least 1"):
        DraftRecipe(accumulate=0)


@pytest.mark.parametrize("kind", ["glide", "lm"])
def test_a_compiled_draft_learns_the_same(kind, world, target, tmp_path, monkeypatch):
    """Traced and differentiated ahead of time, as by torch.compile's default, but without its code generator."""
    compiled = []

    def trace(function):
        compiled.append(function)
        return compile_(function, backend="aot_eager")

    compile_ = torch.compile
    monkeypatch.setattr(drafts.torch, "compile", trace)
    recipe = DraftRecipe(kind=kind, rows=2, length=32, lags="shift")
    plain = weights(world, target, tmp_path / "plain", recipe)
    assert compiled == []
    traced = weights(world, target, tmp_path / "traced", recipe, compile_model=True)
    assert len(compiled) == 1
    assert plain.keys() == traced.keys()
    for name in plain:
        torch.testing.assert_close(traced[name], plain[name], atol=1e-4, rtol=1e-3)


def test_figures_by_lag_are_the_obvious_ones(world, target):
    module = load_network(world["glide"], target).module
    tokens = load_streams(world["corpus"], target.tokenizer)["valid"].tokens
    found = figures.figures_by_lag(target, module, tokens, 24, max_windows=1)
    assert found["lags"] == list(range(1, 9))
    assert found["positions"] == 16
    batch = torch.from_numpy(tokens[:24].astype(np.int64))[None]
    teacher = Teacher(target, 1, 24, hidden=True)
    p = teacher(batch)[0].softmax(-1)
    for lag in (1, 8):
        overlap, same = [], []
        for j in range(8, 24):  # one query at a time
            with torch.no_grad():
                visible = teacher.positions.clone()
                visible[0, j + 1 - lag : j + 1] = j + 1 - lag  # one round, which ends with the query
                q = draft_logits(module, batch, teacher.positions, teacher.cache, visible, lag)[0, j].softmax(-1)
            overlap.append(torch.minimum(p[j], q).sum().item())
            same.append(float(p[j].argmax() == q.argmax()))
        assert found["overlap_by_lag"][lag - 1] == pytest.approx(np.mean(overlap), abs=1e-4)
        assert found["greedy_acceptance_by_lag"][lag - 1] == pytest.approx(np.mean(same), abs=1e-4)
    assert figures.figures_by_lag(target, module, tokens[:20], 24) == {}


def test_card_and_curve_carry_the_figures(world, target, capfd, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    recipe = DraftRecipe(rows=2, length=32)
    train_draft(target, world["corpus"], tmp_path, recipe, Budget(tokens=3 * 64), prompts=1)
    card, curve = read_card(tmp_path).figures, json.loads((tmp_path / figures.CURVE).read_text())
    assert len(curve["loss"]) == 3
    assert curve["tokens_a_step"] == 64
    for name in ("lags", "overlap_by_lag", "greedy_acceptance_by_lag"):
        assert curve[name] == card[name]
        assert len(card[name]) == 8
    assert all(0 <= value <= 1 for value in card["overlap_by_lag"])
    assert "pip install matplotlib" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / figures.PICTURE).exists()
    assert load_draft(tmp_path, target).max_lag == 8


def test_the_curve_is_drawn_where_matplotlib_is(tmp_path, monkeypatch):
    drawn = {"plots": 0}
    if importlib.util.find_spec("matplotlib") is None:

        class Axes:
            def plot(self, x, y, **_):
                assert len(x) == len(y)
                drawn["plots"] += 1

            def set(self, **_): ...

            def legend(self): ...

        class Figure:
            def __init__(self, **_): ...

            def subplots(self, *_):
                return Axes(), Axes()

            def savefig(self, path, format, dpi):
                path.write_bytes(b"\x89PNG")
                assert drawn["plots"] == 4  # steps and their mean, two figures by lag

        module = types.ModuleType("matplotlib.figure")
        module.Figure = Figure
        monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
        monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    by_lag = {"lags": [1, 2], "overlap_by_lag": [0.9, 0.8], "greedy_acceptance_by_lag": [0.9, 0.7]}
    figures.write_curve(tmp_path, [float(i) for i in range(200)], 12_800, by_lag)
    assert (tmp_path / figures.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / figures.CURVE).read_text())["tokens_a_step"] == 64
