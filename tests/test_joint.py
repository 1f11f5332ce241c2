"""A draft trained beside its target: the target is the one trained alone, the draft learns from it as it is at each step,
and both are resumed together."""

import json

import pytest
import torch
from safetensors.torch import load_file

from glidecape.core.params import SamplingParams
from glidecape.drafting.methods import make_drafter
from glidecape.drafts.checkpoint import load_draft
from glidecape.engine.decode import generate
from glidecape.errors import CheckpointError
from glidecape.target.target import Target
from glidecape.train import loop
from glidecape.train.joint import JointDraft
from glidecape.train.loop import Budget
from glidecape.train.recipe import DraftRecipe, TargetShape, Windowing
from glidecape.train.target import train_target
from states import clock_in
from test_command_line import run

SHAPE = TargetShape(layers=2, width=32, ffn=64, heads=2, kv_heads=2, context=192)
WINDOWING = Windowing(length=32, rows=4, long_length=64, long_share=0.3)
STEPS = 10
DRAFT = DraftRecipe(rate=1e-2, max_lag=3)


def train(world, out, draft, **options):
    budget = Budget(tokens=STEPS * 4 * 32)
    return train_target(world["corpus"], out, SHAPE, budget, WINDOWING, 1e-2, draft=draft, prompts=1, seed=1, **options)


@pytest.fixture(scope="module")
def both(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("both")
    return out, train(world, out, DRAFT)


def test_the_target_is_the_one_trained_alone(world, both, tmp_path):
    alone = train(world, tmp_path, None)
    ours, theirs = load_file(both[0] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {n: both[1][n] for n in ("steps", "tokens", "train_loss", "valid_loss")} == {
        n: alone[n] for n in ("steps", "tokens", "train_loss", "valid_loss")
    }


def test_the_draft_fits_the_saved_target_and_says_where_it_comes_from(both, recwarn):
    target = Target.from_pretrained(both[0], dtype=torch.float32)
    draft = load_draft(both[0] / "draft", target)
    assert not [w for w in recwarn if "other weights" in str(w.message)]
    assert (draft.max_lag, draft.figures["trained_with_target"], draft.figures["steps"]) == (3, True, STEPS)
    assert len(json.loads((both[0] / "draft" / "curve.json").read_text())["loss"]) == STEPS
    params = SamplingParams(max_new_tokens=16, ignore_eos=True)
    plain = generate(target, ["def load_table("], None, params)[0].tokens
    assert generate(target, ["def load_table("], make_drafter("glide+cape", draft), params)[0].tokens == plain


def test_no_gradient_reaches_the_target_and_the_draft_sees_its_steps(world):
    model = Target.from_pretrained(world["target"], dtype=torch.float32, pack=False).model.requires_grad_(True)
    tokenizer = Target.from_pretrained(world["target"]).tokenizer
    implementation = model.config._attn_implementation
    joint = JointDraft(model, tokenizer, DRAFT, torch.arange(400).numpy())
    assert model.config._attn_implementation == implementation
    batch = torch.arange(3, 67).view(2, 32)
    first = joint.loss(batch, 0)
    first.backward()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(p.grad is not None for p in joint.module.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    own = dict(joint.target.model.named_parameters())
    assert all(torch.equal(p, own[name]) and not own[name].requires_grad for name, p in model.named_parameters())
    assert joint.loss(batch, 0) != first


class KilledError(Exception):
    pass


def test_both_are_resumed_together(world, both, tmp_path, monkeypatch):
    real, calls = loop.torch.nn.utils.clip_grad_norm_, []

    def dies(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2 * 6 + 2:  # in step 7, between the two
            raise KilledError
        return real(*arguments, **keywords)

    monkeypatch.setattr(loop.torch.nn.utils, "clip_grad_norm_", dies)
    with pytest.raises(KilledError):
        train(world, tmp_path, DRAFT, save_every_s=0)
    monkeypatch.setattr(loop.torch.nn.utils, "clip_grad_norm_", real)
    assert clock_in(tmp_path)["step"] == 6
    with pytest.raises(CheckpointError, match="started with draft"):
        train(world, tmp_path, None)
    train(world, tmp_path, DRAFT)
    for name in ("model.safetensors", "draft/draft.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(both[0] / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_the_command(world, tmp_path, capfd, monkeypatch):
    words = ["train-target", "--data", world["corpus"], "--out", tmp_path, "--layers", 1, "--width", 32, "--ffn", 32]
    words += ["--heads", 2, "--kv-heads", 2, "--context", 192, "--length", 32, "--rows", 2, "--tokens", 128]
    code, _, err = run(capfd, monkeypatch, *words, "--draft-recipe", "max_lag:4")
    assert (code, "give --with-draft too" in err) == (2, True)
    words.append("--with-draft")
    code, _, err = run(capfd, monkeypatch, *words, "--draft-recipe", "rows:4")
    assert (code, "cannot set rows" in err) == (2, True)
    code, _, err = run(capfd, monkeypatch, *words, "--draft-recipe", "max_lag:4,loss:nla")
    assert (code, (tmp_path / "draft" / "draft.safetensors").exists()) == (0, True), err
