"""A whole round on a CUDA device that is not there: nothing is made on the wrong device, and the host waits as seldom as
docs/design.md says.

`fake_cuda` refuses operands on two devices, and every read of a number on the host. So each wait must go through
`transfer.to_host`, which is counted here and answers with made-up numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.overrides import TorchFunctionMode

import glidecape.core.transfer as transfer_module
import glidecape.core.tree as tree_module
import glidecape.drafting.drafter as drafter_module
import glidecape.drafting.expansions.cape as expansion_module
import glidecape.engine.round as round_module
from fake_cuda import fake_cuda, move_to_cuda
from glidecape.batch.row import new_row
from glidecape.core import noise
from glidecape.core.params import SamplingParams
from glidecape.drafting.auto.drafter import AutoDrafter
from glidecape.drafting.auto.fixed import FixedRounds, Shape
from glidecape.drafting.methods import DRAFTLESS, METHODS, make_drafter
from glidecape.drafts.causal_lm import StandaloneDraft
from glidecape.drafts.eagle.adapter import EagleDraft
from glidecape.drafts.eagle.config import EagleConfig
from glidecape.drafts.eagle.network import EagleModel
from glidecape.drafts.glide.adapter import GlideDraft
from glidecape.drafts.glide.config import GlideConfig
from glidecape.drafts.glide.network import GlideModel
from glidecape.drafts.medusa.adapter import MedusaDraft
from glidecape.drafts.medusa.config import MedusaConfig
from glidecape.drafts.medusa.network import MedusaModel
from glidecape.engine.engine import Engine
from glidecape.target import graphs
from glidecape.target.target import Target
from test_against_transformers import build

LENGTH = 3
RAGGED = [[5, 6, 7], [8] * 9, [9, 10, 11, 12, 13], [7]]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of each tensor that was brought to the host; numbers are made up so that a draft goes on."""
    seen: list[tuple[int, ...]] = []

    def answer(tensor: torch.Tensor):
        seen.append(tuple(tensor.shape))
        if tensor.ndim == 0:  # does any row draft on; nodes of the row with the most
            return True if tensor.dtype == torch.bool else 2 * LENGTH
        if tensor.shape[1] == 2:  # no proposal: the bonus token, and is its score no number?
            return [[3, 0]] * tensor.shape[0]
        length = 2  # of each accepted path: the root and node 1
        return [[length, 3, LENGTH, LENGTH, 0, 0, *range(tensor.shape[1] - 6)] for _ in range(tensor.shape[0])]

    for module in (drafter_module, expansion_module, round_module, transfer_module):
        monkeypatch.setattr(module, "to_host", answer)
    return seen


@cache
def small() -> Target:
    """One layer waits as seldom as four."""
    return build("llama", num_hidden_layers=1)[0]


def pair(method: str) -> tuple[Target, Any]:
    """A target of its own and a draft for a method, on the CPU."""
    target = copy.deepcopy(small())
    base = method.split("+")[0]
    if base in DRAFTLESS:
        return target, None
    if base == "vanilla":
        return target, StandaloneDraft(target)
    if base == "glide":
        return target, GlideDraft(GlideModel.new(GlideConfig.for_target(target), target))
    if base == "eagle":
        return target, EagleDraft(EagleModel.new(EagleConfig.for_target(target), target))
    return target, MedusaDraft(MedusaModel.new(MedusaConfig.for_target(target), target))


def forget() -> None:
    """Drop the tensors that are kept for later calls: those are on another device, or another fake one."""
    for kept in (noise._columns, tree_module._comb):
        kept.cache_clear()


def waits_of_a_round(
    method: str,
    prompts: list[list[int]],
    temperature: float,
    waits: list,
    rounds: int = 2,
    compile: bool = False,
    place: Callable[[Any, Any], None] = lambda target, draft: move_to_cuda(target.model),
) -> int:
    """Waits of the last round: the first one makes what is kept for later rounds.

    Args:
        place: gives the target fake weights.
    """
    target, draft = pair(method)
    forget()
    with fake_cuda():
        place(target, draft)
        if getattr(draft, "module", None) is not None:
            move_to_cuda(draft.module)
        drafter = make_drafter(method, draft, length=LENGTH, cap=LENGTH, bins=(2, 1), top=3, total=8)
        if isinstance(drafter, AutoDrafter):
            drafter = FixedRounds(drafter)
            drafter.shape = (
                Shape(LENGTH, 4) if drafter.runner is not None else Shape(0, 4)
            )  # what it would choose depends on numbers, which are made up
        if compile:
            assert target.compile("kept", pytest.fail)
            assert drafter.compile("kept", pytest.fail) or method.split("+")[0] in ("plain", "lookup", "medusa")
        engine = Engine(target, drafter, len(prompts), tokens=64, new_tokens=32)
        for i, prompt in enumerate(prompts):
            # The last of several rows may soon emit no more, so it drafts less than its neighbours.
            most = 5 if i and i == len(prompts) - 1 and rounds == 2 else 32
            options = {"top_p": 0.9, "min_p": 0.01, "top_k": 40, "seed": i, "ignore_eos": True}
            params = SamplingParams(temperature, max_new_tokens=most, **options)
            engine.submit(new_row(i, prompt, params, target))
        engine.step()  # takes the rows in, and reads their prompts
        while engine.read_prompts():
            pass
        for _ in range(rounds):
            waits.clear()
            assert len(engine.step()) == len(prompts)
    forget()
    return len(waits)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "T=1"])
@pytest.mark.parametrize("method", METHODS)
def test_a_round_stays_on_its_device_and_waits_as_often_alone_as_in_a_ragged_batch(
    method: str, temperature: float, waits: list[tuple[int, ...]]
) -> None:
    alone = waits_of_a_round(method, RAGGED[:1], temperature, waits)
    assert waits_of_a_round(method, RAGGED, temperature, waits) == alone
    asks_each_depth = "svip" in method or method in ("eagle", "glide+tree")
    looks_at_each_depth = "auto" in method and not method.startswith("lookup")
    packs = "cape" in method
    assert alone <= 1 + packs + (LENGTH - 1) * asks_each_depth + LENGTH * looks_at_each_depth, waits
    if not asks_each_depth and not looks_at_each_depth:
        assert alone <= 2


class NoCopies(TorchFunctionMode):
    """Numbers of the host that go to the device: a graph would read them where they were at its capture."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        from_host = function is torch.Tensor.to and args[0].device.type == "cpu"
        if (function in (torch.tensor, torch.as_tensor) or from_host) and found.device.type != "cpu":
            raise AssertionError(f"{function} copies from the host")
        return found


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "T=1"])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_graph_captures_neither_waits_nor_copies_from_the_host(
    method: str, temperature: float, waits: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def capture(run: Any) -> Any:
        before = len(waits)
        with NoCopies():
            outputs = run()
        assert len(waits) == before
        made.append(len(outputs))
        return (lambda: None), outputs

    monkeypatch.setattr(graphs, "capture_graph", capture)
    monkeypatch.setattr(
        Target, "_tried", lambda self, program, say: program
    )  # it compares numbers, which are made up here
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="none", major=0, minor=0))
    alone = waits_of_a_round(method, RAGGED[:1], temperature, waits, 4, compile=True)
    assert made
    assert waits_of_a_round(method, RAGGED, temperature, waits, 4, compile=True) == alone


def test_a_wait_that_is_not_counted_is_an_error() -> None:
    """The mode refuses what this file relies on it to refuse."""
    with fake_cuda():
        x = torch.randn(2, 3, device="cuda")
        for refused in (
            lambda: x + torch.ones(3),
            lambda: x.argmax().item(),
            lambda: x.tolist(),
            lambda: bool(x.any()),
        ):
            with pytest.raises((RuntimeError, DataDependentOutputException)):
                refused()
