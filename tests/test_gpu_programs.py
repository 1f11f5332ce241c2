"""Programs on a GPU, as far as a CPU can show it: a graph that is recorded here runs the same code again, on its own inputs
and into its own outputs, as a captured one does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from glidecape import SamplingParams, Target, generate, load_draft, make_drafter
from glidecape.target import graphs, packages
from glidecape.target.graphs import MOST, Graphs
from glidecape.target.packages import CompileError, Program, compiled

PROMPTS = [[5, 6, 7], [8] * 9, [9, 10, 11, 12, 13], [7, 3]]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One number for each capture; replays run the code again."""
    made: list[int] = []

    def capture(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        outputs = [one.clone() for one in run()]
        made.append(len(outputs))

        def replay() -> None:
            for own, new in zip(outputs, run(), strict=True):
                own.copy_(new)

        return replay, outputs

    monkeypatch.setattr(graphs, "capture_graph", capture)
    return made


class Lookup(nn.Module):
    """Writes a row into a store, and sums as many of its rows as it is told."""

    def forward(self, x: Tensor, numbers: Tensor, stores: list[Tensor]) -> Tensor:
        stores[0][0] = x
        return stores[0][: len(numbers)].sum(0) * 2


def lookup() -> Graphs:
    example = (torch.zeros(3), torch.arange(4), [torch.zeros(600, 3)])
    width = Dim("width", min=1, max=64)
    sizes = ({0: width}, {0: Dim("keys", min=1, max=600)}, [{0: Dim("slots", min=1, max=600), 1: width}])
    return Graphs(Lookup(), example, sizes, pytest.fail)


def test_a_graph_is_captured_at_the_second_run_and_reads_new_inputs(captured: list[int]) -> None:
    program, store = lookup(), torch.zeros(600, 3)
    kept = []
    for i in range(1, 6):
        x = torch.full((3,), float(i))
        kept.append(program([x, torch.arange(10 * i), store])[0])
        assert store[0].tolist() == x.tolist()
    assert [one.tolist() for one in kept] == [[2.0 * i] * 3 for i in range(1, 6)]  # no later run wrote over them
    assert captured == [1]
    # Another number of slots, another store and other sizes are other graphs.
    for inputs in (
        [torch.ones(3), torch.arange(129), store],
        [torch.ones(3), torch.arange(5), store.clone()],
        [torch.ones(2), torch.arange(5), torch.zeros(600, 2)],
    ):
        for _ in range(3):
            assert program(inputs)[0].tolist() == [2.0] * len(inputs[0])
    assert captured == [1] * 4


def test_the_oldest_graphs_are_dropped(captured: list[int]) -> None:
    program, stores = lookup(), [torch.zeros(600, 3) for _ in range(MOST + 1)]
    for store in stores:
        for _ in range(2):
            program([torch.ones(3), torch.arange(5), store])
    assert len(program.kept) == MOST and len(captured) == MOST + 1
    for store, made in ((stores[-1], 0), (stores[0], 1)):
        before = len(captured)
        for _ in range(2):
            program([torch.ones(3), torch.arange(5), store])
        assert len(captured) == before + made


def test_what_cannot_be_captured_runs_eagerly_and_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(run: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "capture_graph", fails)
    program, said = lookup(), list[str]()
    program.say = said.append
    for _ in range(4):
        assert program([torch.ones(3), torch.arange(5), torch.zeros(600, 3)])[0].tolist() == [2.0] * 3
    assert said == [
        "a program cannot be captured as a CUDA graph and runs eagerly (operation not permitted when stream is capturing)"
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "T=1"])
def test_tokens_are_eager_decoding_s(world, captured: list[int], monkeypatch, temperature: float) -> None:
    target = Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)
    drafts = {name: load_draft(world[name], target) for name in ("glide", "eagle", "medusa")}
    drafts |= {"plain": None, "lookup": None}
    methods = ["plain", "lookup", "glide", "glide+cape", "glide+cape+svip", "glide+auto", "eagle", "eagle+chain", "medusa"]
    drafters = {one: make_drafter(one, drafts[one.split("+")[0]]) for one in methods}
    params = SamplingParams(temperature, max_new_tokens=24, seed=3, ignore_eos=True)
    expected = generate(target, PROMPTS, drafters["plain"], params)
    monkeypatch.setattr(packages, "_package", lambda program, mode, say: packages.Graphs(*program.make(), pytest.fail))
    assert target.compile("on", pytest.fail)
    for name, drafter in drafters.items():
        captured.clear()
        if name not in {"plain", "lookup", "medusa"}:
            assert drafter.compile("on", pytest.fail), name
        found = generate(target, PROMPTS, drafter, params)
        alone = generate(target, PROMPTS[:1], drafter, params)
        assert [one.tokens for one in found] == [one.tokens for one in expected], name
        assert alone[0].tokens == expected[0].tokens, name
        assert captured, name


def test_a_device_without_programs_and_weights_on_two_devices_are_said() -> None:
    module = nn.Linear(2, 2)
    for device, reason in (("meta", "not for devices of type meta"), ("cuda", "several devices")):
        said: list[str] = []
        program = Program("a product", {}, (module,), lambda: (), device=torch.device(device))
        assert compiled(program, "on", said.append) is None
        assert reason in said[0]
        with pytest.raises(CompileError, match=reason):
            packages._graphs(program, pytest.fail)
