"""`glidecape plan`: counts that training confirms, and a refusal before memory runs out."""

import json

import pytest
import torch

from glidecape.commands import plan as planning
from glidecape.errors import InputError
from glidecape.target.target import Target
from glidecape.train.draft import train_draft
from glidecape.train.loop import Budget
from glidecape.train.recipe import DraftRecipe
from states import STATE
from test_command_line import run


def test_the_plan_names_what_training_then_takes(world, capfd, monkeypatch, tmp_path):
    words = ["plan", world["target"], "--rows", 4, "--length", 32, "--tokens", 1024, "--seconds", 0]
    code, out, _ = run(capfd, monkeypatch, *words, "--data", world["corpus"], "--json")
    assert code == 0
    plan = json.loads(out)
    target = Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)
    recipe = DraftRecipe(rows=4, length=32)
    figures = train_draft(target, world["corpus"], tmp_path, recipe, Budget(tokens=1024), prompts=0)
    assert plan["draft_parameters"] == figures["parameters"]
    assert plan["steps"] == figures["steps"] == 8
    assert plan["target_parameters"] == sum(p.numel() for p in target.model.parameters())
    assert plan["epochs"] == round(1024 / plan["data_tokens"], 2)
    # Files hold the tensors counted, and their own headers.
    assert 0 < (tmp_path / "draft.safetensors").stat().st_size - plan["checkpoint_bytes"] < 8_000
    assert 0 < sum(one.stat().st_size for one in (tmp_path / STATE).iterdir()) - plan["training_state_bytes"] < 60_000
    assert plan["memory_bytes"] > plan["target_parameters"] * 4 + plan["training_state_bytes"]
    assert plan["hours"] == pytest.approx(1024 / plan["tokens_per_s"] / 3600, abs=1e-4)


def test_a_plan_for_people_needs_no_data(world, capfd, monkeypatch):
    words = ["plan", world["target"], "--rows", 2, "--length", 32, "--tokens", "2e6", "--kind", "lm", "--seconds", 0]
    code, out, _ = run(capfd, monkeypatch, *words)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["target", "draft", "on", "in", "speed", "time"]
    assert "2,000,000 tokens in 31,250 steps" in out


def test_what_does_not_fit_is_refused_before_it_is_tried(world, monkeypatch):
    target = Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)
    monkeypatch.setattr(planning, "free_memory", lambda device: 2**20)
    monkeypatch.setattr(planning, "measure", lambda *_: pytest.fail("it was tried"))
    with pytest.raises(InputError, match=r"needs about .* 1\.0 MiB are free"):
        planning.make_plan(target, DraftRecipe(rows=16, length=64), 1000)


def test_times_and_sizes_read_well():
    assert [planning._time(h) for h in (0.001, 0.5, 1.9, 30)] == [
        "4 seconds",
        "30 minutes",
        "114 minutes",
        "30.0 hours",
    ]
    assert [planning._bytes(b) for b in (900, 1536, 2**30 * 7.25)] == ["900 bytes", "1.5 KiB", "7.2 GiB"]
