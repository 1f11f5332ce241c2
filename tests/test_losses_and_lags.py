"""Losses against the obvious formulas, in bounded memory; lag schemes as pictures and counts."""

import pytest
import torch

from glidecape.errors import InputError
from glidecape.train import losses
from glidecape.train.lags import lag_visible
from glidecape.train.losses import distillation_loss
from glidecape.train.recipe import LAGS, DraftRecipe, check_loss


def obvious(draft, target, tokens, counted, loss):
    """One position after the other, by the definitions."""
    total = 0
    for part in loss.split("+"):
        values = []
        for row, column in counted.nonzero().tolist():
            p, q = target[row, column].float().softmax(-1), draft[row, column].float().softmax(-1)
            if part == "kl":
                values.append((p * (p / q).log()).sum())
            elif part == "rkl":
                values.append((q * (q / p).log()).sum())
            elif part == "tv":
                values.append(1 - torch.minimum(p, q).sum())
            elif part == "nla":
                values.append(-torch.minimum(p, q).sum().log())
            elif part == "lk_hybrid":
                alpha = torch.minimum(p, q).sum()
                share = float(torch.exp(-3 * alpha.detach()))  # a number: no gradient passes
                values.append(share * (p * (p / q).log()).sum() + (1 - share) * (1 - alpha))
            elif column + 1 < tokens.shape[1]:
                values.append(-q[tokens[row, column + 1]].log())
        total = total + torch.stack(values).mean() / len(loss.split("+"))
    return total


@pytest.mark.parametrize("loss", ["kl", "rkl", "tv", "nla", "lk_hybrid", "ce", "kl+ce", "kl+rkl+tv+nla+lk_hybrid+ce"])
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_losses_and_gradients_are_the_obvious_ones(loss, at_once, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", at_once * 11)  # 7 positions count
    torch.manual_seed(0)
    target, tokens = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    counted = torch.tensor([[0, 1, 1, 1, 1], [1, 0, 1, 0, 1]], dtype=torch.bool)
    ours, theirs = (torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in "ab")
    value = distillation_loss(ours, target, tokens, counted, loss)
    wanted = obvious(theirs, target, tokens, counted, loss)
    torch.testing.assert_close(value, wanted)
    (3 * value).backward()
    (3 * wanted).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad[~counted].abs().max() == 0
    with torch.no_grad():
        torch.testing.assert_close(distillation_loss(ours, target, tokens, counted, loss), value.detach())


def test_nla_has_a_gradient_where_the_laws_hardly_overlap():
    """An overlap of 2e-17, where 1 - tv is 0 in float32, and the gradient of tv with it."""
    draft = torch.tensor([[[40.0, 0.0]]], requires_grad=True)
    target, tokens, counted = torch.tensor([[[0.0, 40.0]]]), torch.zeros(1, 1).long(), torch.ones(1, 1).bool()
    value = distillation_loss(draft, target, tokens, counted, "nla")
    value.backward()
    assert value.item() == pytest.approx(40 - 0.6931, abs=1e-3)
    assert draft.grad.tolist() == [[[pytest.approx(0.5, abs=1e-3), pytest.approx(-0.5, abs=1e-3)]]]
    draft.grad = None
    distillation_loss(draft, target, tokens, counted, "tv").backward()
    assert draft.grad.abs().max() < 1e-8


@pytest.mark.parametrize("loss", ["kl", "nla", "lk_hybrid"])
def test_a_vocabulary_of_152k_needs_no_float32_copy_of_the_logits(loss):
    """bfloat16 logits, 240 positions: no tensor of theirs is ever widened whole, and value and gradient are right."""
    torch.manual_seed(0)
    vocab, length = 152_064, 240
    draft = torch.randn(1, length, vocab, dtype=torch.bfloat16).requires_grad_()
    target, tokens = torch.randn(1, length, vocab, dtype=torch.bfloat16), torch.randint(vocab, (1, length))
    counted = torch.ones(1, length, dtype=torch.bool)
    widest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            out = function(*arguments, **(keywords or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                widest.append(out.numel())
            return out

    with Watch():
        value = distillation_loss(draft, target, tokens, counted, loss)
        value.backward()
    assert max(widest) <= losses.CHUNK < length * vocab / 4
    total = 0.0
    for i in range(length):
        q = draft.detach()[0, i].float().requires_grad_(i % 64 == 0)
        a, b = q.log_softmax(-1), target[0, i].float().log_softmax(-1)
        alpha, divergence = torch.minimum(a.exp(), b.exp()).sum(), (b.exp() * (b - a)).sum()
        share = {"kl": 1.0, "nla": 0.0, "lk_hybrid": float(torch.exp(-3 * alpha.detach()))}[loss]
        overlap = -alpha.log() if loss == "nla" else 1 - alpha
        one = (share * divergence + (1 - share) * overlap) / length
        total += float(one.detach())
        if i % 64 == 0:
            one.backward()
            torch.testing.assert_close(draft.grad[0, i], q.grad.bfloat16(), rtol=2e-2, atol=1e-10)
    assert value.item() == pytest.approx(total, rel=1e-5)


def test_nothing_counted_is_no_loss_and_no_nan():
    draft = torch.randn(1, 3, 5, requires_grad=True)
    value = distillation_loss(draft, torch.randn(1, 3, 5), torch.ones(1, 3).long(), torch.zeros(1, 3).bool(), "kl+ce")
    value.backward()
    assert value.item() == 0
    assert draft.grad.abs().max() == 0


@pytest.mark.parametrize("loss", ["jsd", "kl+kl", "", "kl+"])
def test_unknown_losses_are_refused(loss):
    with pytest.raises(InputError, match="choose from kl"):
        check_loss(loss)


def test_unknown_lags_are_refused():
    with pytest.raises(InputError, match="block-random, block, balanced, shift"):
        DraftRecipe(lags="uniform")


def lags_of(visible):
    """Lags of the positions that count."""
    return (torch.arange(visible.shape[1]) + 1 - visible)[visible > 0]


def test_block_is_the_papers_picture():
    assert lag_visible("block", 0, 3, 1, 12, 4).tolist() == [[0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8]]


def test_balanced_gives_each_lag_equally_often_at_every_position():
    visible = lag_visible("balanced", 0, 5, 8, 20, 4)
    assert lags_of(visible).unique(return_counts=True)[1].tolist() == [32] * 4  # 16 positions of 8 rows
    for j in range(4, 20):
        assert sorted((j + 1 - visible[:, j]).tolist()) == [1, 1, 2, 2, 3, 3, 4, 4]
    # Two rows a batch: balanced over every two batches.
    pair = torch.cat([lag_visible("balanced", 0, n, 2, 20, 4) for n in (6, 7)])
    assert lags_of(pair).unique(return_counts=True)[1].tolist() == [16] * 4


def test_shift_draws_a_lag_for_each_position():
    visible = lag_visible("shift", 0, 0, 64, 256, 8)
    counts = (torch.arange(8, 256) + 1 - visible[:, 8:]).unique(return_counts=True)
    assert counts[0].tolist() == list(range(1, 9))
    # 15,872 draws, 1,984 expected each with a standard deviation of 42: ten of them.
    assert (counts[1] - 1984).abs().max() < 420
    together = (visible[:, 9:] == visible[:, 8:-1]).float().mean()
    assert together < 0.2  # neighbours share a root by chance only: 7/64 of the time


@pytest.mark.parametrize("scheme", LAGS)
def test_lags_depend_on_seed_and_number_alone_and_never_look_ahead(scheme):
    visible = lag_visible(scheme, 1, 2, 3, 40, 5)
    assert visible.shape == (3, 40)
    assert torch.equal(visible, lag_visible(scheme, 1, 2, 3, 40, 5))
    assert (visible <= torch.arange(40)).all()
    assert 1 <= lags_of(visible).min() <= lags_of(visible).max() <= 5
    if scheme != "block":
        assert not torch.equal(visible, lag_visible(scheme, 1, 3, 3, 40, 5))
