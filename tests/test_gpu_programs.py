"""Programs on a GPU, as far as a CPU can show it: a graph that is recorded here runs the same code again, on its own inputs
and into its own outputs, as a captured one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import glidecape.drafts.glide.network as glide_network
import glidecape.drafts.layers as draft_layers
import glidecape.drafts.network as draft_network
import glidecape.target.attention as attention_module
from glidecape import SamplingParams, Target, generate, load_draft, make_drafter
from glidecape.compat import attend_without_plans
from glidecape.target import graphs, packages, packed
from glidecape.target.graphs import MOST, Graphs, flat_run
from glidecape.target.operators import path_attention, slot_attention
from glidecape.target.packages import FOLDER, CompileError, Program, compiled
from test_kernels import ATTENTION, attention_case

COMPILER = pytest.mark.skipif(not packages.have_compiler(), reason="no C++ compiler on this machine")
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
    return Graphs(flat_run(Lookup(), example), sizes, pytest.fail)


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


def test_an_input_that_did_not_change_is_not_copied_again(captured: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "writes_of", lambda tensor: tensor._version)
    program, store, x = lookup(), torch.zeros(600, 3), torch.ones(3)
    for _ in range(2):
        program([x, torch.arange(5), store])
    graph = next(iter(program.kept.values()))
    own = graph.copied[0][1]
    own.fill_(7.0)
    assert program([x, torch.arange(5), store])[0].tolist() == [14.0] * 3  # what the graph has, not what x has
    x.fill_(2.0)
    assert program([x, torch.arange(5), store])[0].tolist() == [4.0] * 3
    assert program([x.clone().fill_(3.0), torch.arange(5), store])[0].tolist() == [6.0] * 3


def test_the_oldest_graphs_are_dropped(captured: list[int]) -> None:
    program, stores = lookup(), [torch.zeros(600, 3) for _ in range(MOST + 1)]
    for store in stores:
        for _ in range(2):
            program([torch.ones(3), torch.arange(5), store])
    assert (len(program.kept), len(captured)) == (MOST, MOST + 1)
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
    store = torch.zeros(600, 3)  # a graph is of one store, wherever the next one may lie
    for _ in range(4):
        assert program([torch.ones(3), torch.arange(5), store])[0].tolist() == [2.0] * 3
    assert said == [
        "a program cannot be captured as a CUDA graph and runs eagerly (operation not permitted when stream is capturing)"
    ]


METHODS = ["plain", "lookup", "glide", "glide+cape", "glide+cape+svip", "glide+auto", "eagle", "eagle+chain", "medusa"]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Programs are made as for a GPU, and kept in a folder of their own."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr(packages, "_on_cpu", lambda program, mode, say: packages._in_graphs(program, {}, mode, say))
    for module in (attention_module, draft_layers, glide_network):
        monkeypatch.setattr(module, "path_attention", slot_attention)
    for module in (draft_network, packed):
        monkeypatch.setattr(module, "packable", lambda _: False)  # for oneDNN's products
    return tmp_path / "packages"


def compare(
    world: dict, captured: list[int], methods: list[str], temperature: float, mode: str, compile_drafts: bool
) -> None:
    """Tokens of programs and of eager plain decoding are equal, alone and in a ragged batch."""
    target = Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)
    drafts = {name: load_draft(world[name], target) for name in ("glide", "eagle", "medusa")}
    drafts |= {"plain": None, "lookup": None}
    drafters = {
        one: make_drafter(one, drafts[one.split("+")[0]], length=None if "auto" in one else 3) for one in methods
    }
    params = SamplingParams(temperature, max_new_tokens=24, seed=3, ignore_eos=True)
    expected = generate(target, PROMPTS, drafters["plain"], params)
    said: list[str] = []
    assert target.compile(mode, said.append)
    for name, drafter in drafters.items():
        captured.clear()
        if compile_drafts and name not in {"plain", "lookup", "medusa"}:
            assert drafter.compile(mode, said.append), name
        found = generate(target, PROMPTS, drafter, params)
        alone = generate(target, PROMPTS[:1], drafter, params)
        assert [one.tokens for one in found] == [one.tokens for one in expected], name
        assert alone[0].tokens == expected[0].tokens, name
        assert captured, name
    assert not [one for one in said if "compiling" not in one and not one.startswith("compiled")]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "T=1"])
def test_tokens_of_captured_launches_are_eager_decoding_s(
    world, captured, as_on_a_gpu: Path, temperature: float
) -> None:
    compare(world, captured, METHODS, temperature, "kept", True)
    assert not list(as_on_a_gpu.glob("*.gpu"))


@COMPILER
def test_tokens_of_a_compiled_target_are_eager_decoding_s(world, captured, as_on_a_gpu: Path) -> None:
    compare(world, captured, ["plain", "glide+cape+svip"], 0.0, "on", False)
    # The target and the verdict, which are found again.
    assert len(list(as_on_a_gpu.glob("*.gpu"))) == 2
    compare(world, captured, ["plain", "eagle"], 1.0, "kept", False)


@COMPILER
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tokens_of_compiled_drafts_are_eager_decoding_s(world, captured, as_on_a_gpu: Path) -> None:
    for temperature in (0.0, 1.0):
        compare(world, captured, METHODS, temperature, "on", True)


class Scaled(nn.Module):
    """A product with a weight, and a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 100)
        self.register_buffer("scale", torch.rand(100), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def program_of(module: nn.Module, **options: torch.device) -> Program:
    rows = {0: Dim("rows", min=1, max=64)}
    return Program(
        "a product", {"kind": "product"}, (module,), lambda: (module, (torch.ones(2, 6),), (rows,)), **options
    )


@COMPILER
def test_a_compiled_program_reads_the_weights_of_the_model_itself(as_on_a_gpu: Path, captured: list[int]) -> None:
    module, x, said = Scaled().requires_grad_(False), torch.randn(3, 6), list[str]()
    run = compiled(program_of(module), "on", said.append)
    assert run is not None, said
    torch.testing.assert_close(run([x])[0], module(x))
    module.linear.weight.mul_(3.0)
    torch.testing.assert_close(run([x])[0], module(x))
    # Another model of these shapes is served by the same package, with its own weights.
    other = Scaled().requires_grad_(False)
    other.forward = pytest.fail
    again = compiled(program_of(other), "kept", pytest.fail)
    torch.testing.assert_close(
        again([x])[0], nn.functional.linear(x, other.linear.weight, other.linear.bias) * other.scale
    )
    assert len(list(as_on_a_gpu.glob("*.gpu"))) == 1
    # A torn package is not read.
    package = next(as_on_a_gpu.glob("*.gpu"))
    package.write_bytes(package.read_bytes()[:-9])
    del other.forward
    torch.testing.assert_close(compiled(program_of(other), "kept", pytest.fail)([x])[0], other(x))


def test_what_cannot_be_compiled_is_captured_as_it_is(as_on_a_gpu: Path, captured: list[int], monkeypatch) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(packages, "have_compiler", lambda: True)
    monkeypatch.setattr(packages, "compile_for_gpu", fails)
    module, said, x = Scaled(), list[str](), torch.ones(2, 6)
    run = compiled(program_of(module), "on", said.append)
    for _ in range(2):
        torch.testing.assert_close(run([x])[0], module(x))
    assert said[-1] == "a product is not compiled, its launches are captured as they are: ValueError: no such thing"
    assert captured == [1]


def test_weights_of_another_library_are_not_compiled(as_on_a_gpu: Path, captured: list[int]) -> None:
    class Foreign(Tensor):
        pass

    module, said = Scaled(), list[str]()
    module.scale = torch.ones(100).as_subclass(Foreign)
    assert compiled(program_of(module), "on", said.append) is not None
    assert said[0].endswith("scale is a Foreign")


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_by_slots_is_attention_by_position(name: str) -> None:
    dtype, *_, cap = ATTENTION[name]
    _, inputs, _ = attention_case(name, *ATTENTION[name])
    by_slot, by_position = slot_attention(*inputs, 0.2, cap), path_attention(*inputs, 0.2, cap)
    torch.testing.assert_close(by_slot, by_position, atol=1e-5 if dtype == "float32" else 4e-2, rtol=1e-5)


def test_attention_by_slots_reads_committed_slots_alone_where_no_scratch_is_on_a_path() -> None:
    """As a draft reads its target's keys."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    lengths, nowhere = torch.tensor([17, 5]), torch.zeros(2, 3, 1, dtype=torch.bool)
    found = slot_attention(q, k, v, lengths, lengths[:, None], nowhere, torch.zeros(0, 0, 0, 0).bool(), 0.3, 0.0)
    for row, length in enumerate(lengths.tolist()):
        keys, values = (x[row : row + 1, :, :length] for x in (k, v))
        one = nn.functional.scaled_dot_product_attention(q[row : row + 1], keys, values, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(found[row], one[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_a_gpu_attends_without_cudnn() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for device, expected in (("cpu", True), ("cuda", False)):
            torch.backends.cuda.enable_cudnn_sdp(True)
            attend_without_plans(torch.device(device))
            assert torch.backends.cuda.cudnn_sdp_enabled() == expected
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_device_without_programs_and_weights_on_two_devices_are_said() -> None:
    module = nn.Linear(2, 2)
    for device, reason in (("meta", "not for devices of type meta"), ("cuda", "several devices")):
        said: list[str] = []
        program = Program("a product", {}, (module,), lambda: (), device=torch.device(device))
        assert compiled(program, "on", said.append) is None
        assert reason in said[0]
        with pytest.raises(CompileError, match=reason):
            packages._on_gpu(program, "on", pytest.fail)
