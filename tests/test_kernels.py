"""The C++ kernels of compiled programs against the obvious way; and a row has the same bits, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from glidecape.target import packages
from glidecape.target.operators import panels_of, rounded, streamed_linear, tree_attention
from glidecape.target.packages import FOLDER, Program, compiled

pytestmark = pytest.mark.skipif(not packages.have_compiler(), reason="no C++ compiler on this machine")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# An operator, example inputs, and which of their sizes are dynamic.
Case = tuple[nn.Module, list[Tensor], list[dict[int, Any]]]


class Linear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor, in_8_bits: bool = False) -> None:
        super().__init__()
        self.outputs, scales = weight.shape[0], torch.zeros(0)
        if in_8_bits:
            weight, scales = rounded(weight)
        self.panels, self.scales, self.bias = nn.Buffer(panels_of(weight)), nn.Buffer(scales), nn.Buffer(bias)

    def forward(self, x: Tensor) -> Tensor:
        return streamed_linear(x, self.panels, self.scales, self.bias, self.outputs)


class Attention(nn.Module):
    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = cap

    def forward(self, q, k, v, lengths, positions, ancestors, seen) -> Tensor:
        return tree_attention(q, k, v, lengths, positions, ancestors, seen, 0.2, self.cap)


class All(nn.Module):
    """All operators in one program: a program takes seconds to compile, however little it does."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, inputs: list[list[Tensor]]) -> list[Tensor]:
        return [part(*own) for part, own in zip(self.parts, inputs, strict=True)]


def linear_case(name: str, x_dtype: str, weights: torch.dtype, bias: bool) -> Case:
    torch.manual_seed(0)
    weight = torch.randn(150, 70)
    weight = weight.bfloat16().float() if weights == torch.bfloat16 else weight
    module = Linear(weight.to(DTYPES[x_dtype]), torch.randn(150 if bias else 0), weights == torch.int8)
    module.weight = weight
    return module, [torch.randn(100, 70).to(DTYPES[x_dtype])], [{0: Dim(f"{name}_rows", min=1, max=4096)}]


def random_tree(rows: int, nodes: int, scratch: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Positions `(rows, scratch)` and ancestors `(rows, nodes, scratch)` of trees of which the last `nodes` slots are run."""
    positions, ancestors = torch.zeros(rows, scratch).long(), torch.zeros(rows, scratch, scratch).bool()
    for row in range(rows):
        for slot in range(scratch):
            parent = int(torch.randint(-1, slot, ())) if slot else -1
            if parent >= 0:
                ancestors[row, slot] = ancestors[row, parent]
            ancestors[row, slot, slot] = True
            positions[row, slot] = lengths[row] + ancestors[row, slot].sum() - 1
    return positions, ancestors[:, scratch - nodes :].contiguous()


def attention_case(name: str, dtype: str, heads: int, kv_heads: int, dim: int, windowed: bool, cap: float) -> Case:
    torch.manual_seed(1)
    rows, nodes, scratch, slots, lengths = 3, 11, 14, 240, torch.tensor([200, 3, 130])
    q = torch.randn(rows, heads, nodes, dim).to(DTYPES[dtype])
    k, v = torch.randn(2, rows, kv_heads, slots + 9, dim).to(DTYPES[dtype])[:, :, :, :slots].unbind(0)
    positions, ancestors = random_tree(rows, nodes, scratch, lengths)
    own = lengths[:, None] + ancestors.sum(-1) - 1
    at = torch.arange(slots)
    seen = (at <= own[..., None]) & (at > own[..., None] - 90) if windowed else torch.zeros(0, 0, 0, 0).bool()
    seen = seen[:, None] if windowed else seen
    r, n, s, t = (Dim(f"{name}_{size}", min=1, max=4096) for size in ("rows", "nodes", "slots", "scratch"))
    keys = {0: r, 2: s}
    sizes = [{0: r, 2: n}, keys, keys, {0: r}, {0: r, 1: t}, {0: r, 1: n, 2: t}, {0: r, 2: n, 3: s} if windowed else {}]
    return Attention(cap), [q, k.contiguous(), v.contiguous(), lengths, positions, ancestors, seen], sizes


LINEAR = {
    "halved": ("float32", torch.bfloat16, True),
    "whole": ("float32", torch.float32, False),
    "half": ("bfloat16", torch.bfloat16, True),
    "eighth": ("float32", torch.int8, True),
    "eighth_of_half": ("bfloat16", torch.int8, False),
}
ATTENTION = {
    "plain": ("float32", 6, 6, 64, False, 0.0),
    "windowed": ("float32", 4, 2, 80, True, 0.0),
    "wide": ("bfloat16", 8, 2, 128, False, 0.0),
    "capped": ("float32", 2, 1, 16, True, 3.0),
}


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    made = {name: linear_case(name, *options) for name, options in LINEAR.items()}
    return made | {name: attention_case(name, *options) for name, options in ATTENTION.items()}


@pytest.fixture(scope="module")
def run(programs: Path, cases: dict[str, Case]) -> Callable[..., Tensor]:
    """Runs the compiled operator of a case; the others get their example inputs."""
    modules, examples, sizes = (list(part) for part in zip(*cases.values(), strict=True))
    every, said = All(modules), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(programs))
        program = Program("kernels", {"kind": "kernels"}, (every,), lambda: (every, (examples,), (sizes,)))
        found = compiled(program, "on", said.append)
    assert found is not None, said

    def one(name: str, *inputs: Tensor) -> Tensor:
        given = [list(inputs) if case == name else own for case, (_, own, _) in cases.items()]
        return found([tensor for own in given for tensor in own])[list(cases).index(name)]

    return one


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_layer_is_the_obvious_product_with_equal_bits_for_any_number_of_rows(run, cases, name) -> None:
    x_dtype, weights, bias = LINEAR[name]
    module, (x,), _ = cases[name]
    assert module.panels.dtype == weights
    whole, reference = run(name, x), module(x)
    if weights == torch.int8:  # rounding to 8 bits is all that is lost
        exact = x.float() @ module.weight.T + (module.bias if bias else 0)
        assert float((reference.float() - exact).std()) < 0.01 * float(exact.std())
    torch.testing.assert_close(whole, reference, atol=2e-5 if x_dtype == "float32" else 2e-2, rtol=1e-5)
    for rows in (1, 2, 5, 7, 8, 9, 17, 33, 65):
        assert torch.equal(run(name, x[:rows].contiguous()), whole[:rows]), rows
        assert torch.equal(run(name, x[-rows:].contiguous()), whole[-rows:]), rows


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_the_obvious_one_with_equal_bits_in_any_company(run, cases, name) -> None:
    dtype, windowed = ATTENTION[name][0], ATTENTION[name][4]
    module, inputs, _ = cases[name]
    q, k, v, lengths, positions, ancestors, seen = inputs
    whole, reference = run(name, *inputs), module(*inputs)
    torch.testing.assert_close(whole, reference, atol=1e-5 if dtype == "float32" else 1e-2, rtol=1e-5)
    for row in range(q.shape[0]):
        for node in range(q.shape[2]):
            # Alone, its path in the slots of its positions, as plain decoding has it.
            n, path = int(lengths[row]), ancestors[row, node].nonzero().flatten()
            order = path[positions[row, path].argsort()] + n
            lane = [torch.cat([x[row : row + 1, :, :n], x[row : row + 1, :, order]], 2) for x in (k, v)]
            end = n + len(path)
            alone = run(
                name,
                q[row : row + 1, :, node : node + 1].contiguous(),
                *lane,
                torch.tensor([end - 1]),
                torch.tensor([[end - 1]]),
                torch.ones(1, 1, 1).bool(),
                seen[row : row + 1, :, node : node + 1, :end].contiguous() if windowed else seen,
            )
            assert torch.equal(alone[0, 0], whole[row, node]), (row, node)
