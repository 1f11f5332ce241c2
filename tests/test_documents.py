"""Documents that share a training window and are kept apart: none of them can tell what stands beside it."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch

import zoo
from glidecape.core.masks import documents_mask, visible_mask
from glidecape.errors import DataError, InputError
from glidecape.target.target import Target
from glidecape.train.data import load_streams
from glidecape.train.draft import DraftLoss, make_draft, train_draft
from glidecape.train.kinds import BY_RECIPE
from glidecape.train.loop import Budget
from glidecape.train.recipe import DraftRecipe
from glidecape.train.stream import Stream, Windows
from glidecape.train.teacher import Teacher
from states import clock_in

FIRST, SECOND = 13, 19  # tokens of two documents
RECIPES = {
    "glide": DraftRecipe(),
    "glide, two layers and a glimpse": DraftRecipe(layers=2, glimpse="on"),
    "glide, a short window": DraftRecipe(window=4),
    "glide-no-cross": DraftRecipe(kind="glide-no-cross"),
    "eagle": DraftRecipe(kind="eagle", noise=0.0),
    "medusa": DraftRecipe(kind="medusa"),
    "lm": DraftRecipe(kind="lm"),
}


@pytest.fixture(scope="module")
def target(world):
    return Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)


def test_the_masks_are_blocks():
    begins = torch.tensor([[0, 0, 2, 2, 2]])
    assert documents_mask(begins)[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert visible_mask(torch.tensor([[0, 1, 0, 1, 2]]), 5, begins)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
    ]


def test_windows_say_where_their_documents_begin():
    text = Stream(np.arange(40), None, np.array([0, 3, 12, 13, 31]))
    held_out = Windows(replace(text[10:], begin=10), 0, apart=True)
    found = zip(held_out.batch(0, 3, 10).tolist(), held_out.batch_begins(0, 3, 10).tolist(), strict=True)
    assert {tokens[0]: begins for tokens, begins in found} == {
        10: [0, 0, 2, 3, 3, 3, 3, 3, 3, 3],
        20: [0] * 10,
        30: [0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    }
    assert Windows(text, 0).batch_begins(0, 3, 10) is None
    with pytest.raises(DataError, match="no end-of-text token to stand between documents: leave --documents joined"):
        Windows(Stream(np.arange(40)), 0, apart=True)
    with pytest.raises(InputError, match="--documents takes joined or apart, not 'mixed'"):
        DraftRecipe(documents="mixed")


def window(target, seed: int) -> torch.Tensor:
    torch.manual_seed(7)
    second = torch.randint(5, target.vocab_size, (SECOND,))
    torch.manual_seed(seed)
    return torch.cat([torch.randint(5, target.vocab_size, (FIRST,)), second])[None]


def places() -> torch.Tensor:
    return torch.tensor([[0] * FIRST + [FIRST] * SECOND])


def losses(target, recipe: DraftRecipe, tokens: torch.Tensor, begins: torch.Tensor | None, first: int) -> float:
    """The loss of what is learned from the document that begins in slot `first`, but for its first tokens: an LM leaves some of
    them out, by chance."""
    recipe = replace(recipe, rows=1, length=tokens.shape[1], lags="shift", max_lag=1)
    learned = torch.zeros_like(tokens, dtype=torch.bool)
    learned[:, first + 9 :] = True
    made = make_draft(target, recipe)
    with torch.no_grad():
        for parameter in made.parameters():  # what begins as zero is to count, too
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return DraftLoss(target, made, recipe, tokens.shape[1])(tokens, 0, learned, begins).item()


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_documents_loss_does_not_depend_on_its_neighbours(name, target, monkeypatch):
    assert {recipe.kind for recipe in RECIPES.values()} == BY_RECIPE.keys()
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # in whole float32
    recipe = RECIPES[name]
    one, other = (losses(target, recipe, window(target, seed), places(), FIRST) for seed in (1, 2))
    assert one == other
    alone = losses(target, recipe, window(target, 1)[:, FIRST:], None, 0)
    assert one == pytest.approx(alone, rel=1e-5)
    seen = [losses(target, recipe, window(target, seed), None, FIRST) for seed in (1, 2)]
    assert abs(seen[0] - seen[1]) > 1e-4 * one  # joined, it does


@pytest.mark.parametrize("family", ["llama", "gemma4_text", "gpt2", "phi3"])
def test_the_targets_logits_are_those_of_the_document_alone(family):
    target = Target(zoo.build(family), probe=False)  # of positions, learned or rotated, and of windows of 12 tokens
    logits = Teacher(target, 1, FIRST + SECOND)(window(target, 1), places())
    alone = Teacher(target, 1, SECOND)(window(target, 1)[:, FIRST:])
    torch.testing.assert_close(logits[:, FIRST:], alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits[:, FIRST:], Teacher(target, 1, FIRST + SECOND)(window(target, 2), places())[:, FIRST:])


def test_a_training_with_documents_apart_learns_and_is_another_run(world, target, tmp_path):
    recipe = DraftRecipe(rows=4, length=64, rate=1e-2, documents="apart")
    text = load_streams(world["corpus"], target.tokenizer, target.vocab_size)["train"]
    begins = Windows(text, 0, apart=True).batch_begins(0, 4, 64)
    assert len(begins.unique()) > 1
    figures = train_draft(target, world["corpus"], tmp_path / "draft", recipe, Budget(tokens=30 * 256), prompts=0)
    curve = clock_in(tmp_path / "draft")["losses"]
    assert figures["steps"] == 30
    assert np.mean(curve[-5:]) < 0.8 * np.mean(curve[:5])
    with pytest.raises(Exception, match="documents apart, not joined"):
        train_draft(
            target,
            world["corpus"],
            tmp_path / "draft",
            replace(recipe, documents="joined"),
            Budget(tokens=256),
            prompts=0,
        )
