"""A target that is trained further: it begins as the model it was, may learn from any text, and keeps its drafts."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from glidecape.cli import app
from glidecape.drafts.checkpoint import load_draft
from glidecape.errors import CheckpointError
from glidecape.target.target import Target
from glidecape.train.loop import Budget
from glidecape.train.recipe import TargetShape, Windowing
from glidecape.train.target import train_target

SHORT = Windowing(length=32, rows=2, long_length=32)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [{"text": f"total = {i} + {i + 1}\nprint(total)\n" * 8} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def further(world, text, out, rate):
    budget = Budget(tokens=20 * 2 * 32)
    return train_target(text, out, TargetShape(), budget, SHORT, rate, start_from=world["target"])


def test_without_learning_it_is_the_model_it_was(world, text, tmp_path):
    further(world, text, tmp_path / "same", 0.0)
    before, after = (load_file(folder / "model.safetensors") for folder in (world["target"], tmp_path / "same"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_learns_and_its_drafts_still_serve_with_a_note(world, text, tmp_path):
    unlearned = further(world, text, tmp_path / "same", 0.0)
    learned = further(world, text, tmp_path / "changed", 1e-2)
    assert learned["valid_loss"] < unlearned["valid_loss"] - 0.5
    with pytest.warns(UserWarning, match="other weights of this architecture"):
        load_draft(str(world["glide"]), Target.from_pretrained(tmp_path / "changed", torch.float32))


def test_from_the_command_line(world, text, tmp_path):
    words = ["train-target", "--data", text, "--out", tmp_path / "out", "--tokens", 128, "--length", 32, "--rows", 2]
    found = CliRunner().invoke(app, [*map(str, words), "--start-from", str(world["target"])])
    assert found.exit_code == 0, found.output
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["shape"] == {"start_from": str(world["target"])}


def test_no_model_to_start_from_is_said(text, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config\.json, so it is no Hugging Face model folder"):
        train_target(text, tmp_path / "out", TargetShape(), Budget(tokens=64), SHORT, start_from=tmp_path)
