"""Anchor-offset positions: where the tokens of a window stand, and what the target and its drafts make of it."""

import copy
import json

import numpy as np
import pytest
import torch

import zoo
from glidecape.drafts.checkpoint import load_network
from glidecape.drafts.glide.config import GlideConfig
from glidecape.drafts.glide.network import GlideModel
from glidecape.errors import InputError, UnsupportedError
from glidecape.target.target import UNLIMITED, Target
from glidecape.train.draft import DraftLoss, make_draft, train_draft
from glidecape.train.kinds.glide import draft_logits, hidden_by_lag
from glidecape.train.loop import Budget
from glidecape.train.positions import anchored, check_offsets, window_positions
from glidecape.train.recipe import DraftRecipe
from glidecape.train.study_rows import study_rows
from glidecape.train.teacher import Teacher
from states import clock_in
from test_command_line import run

TOKENS = torch.tensor([[(7 * i * i + 3 * r) % 97 for i in range(24)] for r in range(2)])


def literally(seed, number, rows, length, context):
    """One token at a time."""
    offsets = np.random.default_rng([seed, number, 4]).integers(0, context - length + 1, rows)
    return [[place if place < 4 else place + int(offset) for place in range(length)] for offset in offsets]


def test_the_first_four_stay_and_the_rest_moves_by_one_offset_a_row():
    seen = set()
    for seed, number, rows, length, context in (
        *((0, number, 3, 9, 12) for number in range(40)),
        *((7, 5, 4, 64, 8192), (7, 6, 1, 3, 100), (7, 6, 2, 4, 100), (1, 0, 2, 5, 6)),
    ):
        found = window_positions(seed, number, rows, length, context)
        assert found.tolist() == literally(seed, number, rows, length, context)
        assert int(found.max()) < context
        if context == 12:
            seen |= set((found[:, -1] - 8).tolist())
    assert seen == {0, 1, 2, 3}  # from nothing to the end of the context
    several = window_positions(0, 1, 8, 32, 8192)
    assert len(set(several[:, -1].tolist())) > 4  # each row its own
    assert not torch.equal(several, window_positions(0, 2, 8, 32, 8192))
    assert not torch.equal(several, window_positions(1, 1, 8, 32, 8192))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt"])
def test_the_target_runs_at_the_positions_that_it_is_given(kind):
    model = zoo.build(kind, max_position_embeddings=128)
    reference, target = copy.deepcopy(model), Target(model)
    positions = anchored(torch.tensor([0, 104]), 24)  # to the last position there is
    logits = Teacher(target, 2, 24)(TOKENS, positions=positions)
    with torch.no_grad():
        expected = reference(input_ids=TOKENS, position_ids=positions, attention_mask=torch.ones_like(TOKENS)).logits
        plain = reference(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(logits[0], plain[0], atol=2e-4, rtol=1e-3)
    assert (logits[1] - plain[1]).abs().max() > 0.01
    check_offsets(target, 24)


def test_a_windowed_layer_far_away_no_longer_sees_the_first_four():
    """As it would in a long text: its window goes by positions."""
    target = Target(zoo.build("mistral", max_position_embeddings=512, num_hidden_layers=1))
    teacher = Teacher(target, 1, 24)
    far = teacher(TOKENS[:1], positions=anchored(torch.tensor([400]), 24))[0, 4:]
    alone = Teacher(target, 1, 20)(TOKENS[:1, 4:])[0]
    torch.testing.assert_close(far, alone, atol=2e-4, rtol=1e-3)
    assert (far[:4] - teacher(TOKENS[:1])[0, 4:8]).abs().max() > 0.01


RECIPES = [
    DraftRecipe(length=32, rows=2),
    DraftRecipe(length=32, rows=2, glimpse="on", window=8),
    DraftRecipe(kind="eagle", length=32, rows=2),
    DraftRecipe(kind="medusa", max_lag=2, length=32, rows=2),
    DraftRecipe(kind="lm", length=32, rows=2),
]


@pytest.fixture(scope="module")
def target(world):
    return Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.kind + recipe.glimpse)
def test_an_offset_of_zero_changes_nothing_and_another_one_does(recipe, target, monkeypatch):
    batch = torch.arange(64).view(2, 32) * 5 % 300
    moved = DraftRecipe(**(vars(recipe) | {"positions": "anchor-offset"}))
    losses = []
    for one, offset in ((recipe, None), (moved, 0), (moved, 100)):
        monkeypatch.setattr(
            "glidecape.train.draft.window_positions",
            lambda _seed, _number, rows, length, _context, offset=offset: anchored(
                torch.tensor([offset] * rows), length
            ),
        )
        losses.append(float(DraftLoss(target, make_draft(target, one), one, 32)(batch, 3).detach()))
    assert losses[1] == losses[0]
    assert losses[2] != losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=0.5)


@pytest.mark.parametrize("glimpse", ["off", "on"])
def test_every_query_of_a_draft_sees_the_tokens_within_its_window_by_position(world, target, glimpse):
    """One query at a time, with nothing but the tokens that it may see."""
    length, window = 24, 6
    module = make_draft(target, DraftRecipe(window=window, glimpse=glimpse, max_lag=4)).eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else None
    tokens = torch.arange(length)[None] * 7 % 300
    teacher = Teacher(target, 1, length, hidden=True)
    teacher(tokens, positions=anchored(torch.tensor([90]), length))
    cache, at = teacher.cache, teacher.positions[0].tolist()
    lagged = list(hidden_by_lag(module, tokens, teacher.positions, cache, 2))
    with torch.no_grad():
        for j in range(8, length):
            for lag in (1, 2):
                near = [i for i in range(j + 1) if at[j] - at[i] < window]
                picked = torch.tensor(near)
                glance = None
                if glimpse == "on" and lag == 1:
                    glance = module.glimpse_projection(cache.hidden_at(picked[None] - 1))
                elif glimpse == "on":
                    glance = module.own_glimpse_projection(lagged[0][:, picked - 1])
                expected = module.hidden(
                    tokens[:, picked],
                    teacher.positions[:, picked],
                    {layer: cache.committed(layer) for layer in module.config.layers_read},
                    (picked + 1 - lag)[None],
                    glimpse=glance,
                )[0, -1]
                torch.testing.assert_close(lagged[lag - 1][0, j], expected, atol=1e-4, rtol=1e-3)
        visible = torch.arange(length)[None]  # roots, all of them
        forced = draft_logits(module, tokens, teacher.positions, cache, visible, passes=2)
        torch.testing.assert_close(forced[0, 8:], module.head_logits(lagged[0])[0, 8:], atol=1e-4, rtol=1e-3)


def test_targets_that_cannot_be_moved_are_refused():
    def target(kind, **changes):
        return Target(zoo.build(kind, **({"max_position_embeddings": 64} | changes)))

    with pytest.raises(InputError, match="windows of 64 tokens fill the target's context of 64: shorten --length"):
        check_offsets(target("llama"), 64)
    check_offsets(target("llama"), 63)
    check_offsets(target("gpt2"), 63)
    endless = target("llama")
    endless.text_config.max_position_embeddings = 0
    assert endless.context == UNLIMITED
    with pytest.raises(InputError, match="does not say how long its context is"):
        check_offsets(endless, 32)
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    with pytest.raises(UnsupportedError, match="depends on the longest position of a batch"):
        check_offsets(target("phi3", rope_parameters=rope, original_max_position_embeddings=32), 32)
    counting = target("llama")
    forward = counting.model.forward
    counting.model.forward = lambda position_ids, **rest: forward(
        position_ids=torch.arange(position_ids.shape[1])[None], **rest
    )
    with pytest.raises(UnsupportedError, match="gives the same logits wherever its tokens stand"):
        check_offsets(counting, 32)


def test_recipes_say_what_can_be_given(tmp_path, world, capfd, monkeypatch):
    with pytest.raises(InputError, match="unknown positions 'random': choose zero or anchor-offset"):
        DraftRecipe(positions="random")
    with pytest.raises(InputError, match="leave --positions out"):
        DraftRecipe(positions="anchor-offset", documents="apart")
    with pytest.raises(InputError, match="positions"):
        study_rows(DraftRecipe(), [], ["moved=positions:anchor-offset"])
    words = ["train-target", "--data", world["corpus"], "--output", tmp_path / "t", "--tokens", 1e3, "--with-draft"]
    code, _, err = run(capfd, monkeypatch, *words, "--draft-recipe", "positions:anchor-offset")
    assert (code, "--draft-recipe cannot set positions" in err) == (2, True)


def test_the_command_trains_at_moved_positions(world, target, tmp_path, capfd, monkeypatch):
    words = ["train", world["target"], "--data", world["corpus"], "--output", tmp_path / "moved", "--tokens", 4 * 64]
    words += ["--length", 32, "--rows", 2, "--eval-prompts", 0, "--positions", "anchor-offset"]
    assert run(capfd, monkeypatch, *words)[0] == 0
    assert "--positions anchor-offset" in json.loads((tmp_path / "moved" / "card.json").read_text())["command"]
    train_draft(
        target, world["corpus"], tmp_path / "zero", DraftRecipe(length=32, rows=2), Budget(tokens=4 * 64), prompts=0
    )
    clocks = [clock_in(tmp_path / name) for name in ("moved", "zero")]
    assert [clock["step"] for clock in clocks] == [4, 4]
    assert clocks[0]["losses"] != clocks[1]["losses"]
    assert (
        load_network(tmp_path / "moved", target).module.config == load_network(tmp_path / "zero", target).module.config
    )


def test_a_draft_whose_window_holds_only_moved_tokens_gives_what_it_gives_at_the_beginning():
    """Rotation is relative: far away, without cross-attention, the tokens after the first four are a text of their own."""
    target = Target(zoo.build("llama", max_position_embeddings=256))
    config = GlideConfig.for_target(target, cross_attention=False, window=6)
    module = GlideModel.new(config, target).eval()
    positions = anchored(torch.tensor([200]), 24)
    with torch.no_grad():
        far = module.hidden(TOKENS[:1], positions, {}, None)[0, 4:]
        alone = module.hidden(TOKENS[:1, 4:], torch.arange(20)[None], {}, None)[0]
    torch.testing.assert_close(far, alone, atol=1e-4, rtol=1e-3)
