"""The C++ kernels of compiled programs against the obvious way; and a row has the same bits, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from glidecape.target import packages
from glidecape.target.operators import panels_of, rounded, streamed_linear, tree_attention
from glidecape.target.packages import FOLDER, Program, compiled

pytestmark = pytest.mark.skipif(not packages.have_compiler(), reason="no C++ compiler on this machine")
ROWS, SIZES = Dim("rows", min=1, max=4096), {"float32": torch.float32, "bfloat16": torch.bfloat16}


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[..., Tensor]]:
    """Compiles a module that calls one operator."""
    monkeypatch.setenv(FOLDER, str(folder))

    def make(module: nn.Module, inputs: tuple[Tensor, ...], dynamic: tuple[dict[int, Dim], ...]):
        said: list[str] = []
        facts = {"kind": str([(tuple(x.shape), str(x.dtype)) for x in inputs]), "cap": getattr(module, "cap", None)}
        found = compiled(Program("a kernel", facts, (module,), lambda: (module, inputs, dynamic)), "on", said.append)
        assert found is not None, said
        return lambda *tensors: found(list(tensors))[0]

    return make


@pytest.mark.parametrize(
    ("x_dtype", "weights", "bias"),
    [
        ("float32", torch.bfloat16, True),
        pytest.param("float32", torch.float32, False, marks=pytest.mark.slow),
        ("bfloat16", torch.bfloat16, True),
        ("float32", torch.int8, True),
        pytest.param("bfloat16", torch.int8, False, marks=pytest.mark.slow),
    ],
)
def test_a_linear_layer_is_the_obvious_product_with_equal_bits_for_any_number_of_rows(
    run, x_dtype, weights, bias
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(150, 70)
    weight = weight.bfloat16().float() if weights == torch.bfloat16 else weight
    module = Linear(weight.to(SIZES[x_dtype]), torch.randn(150 if bias else 0), weights == torch.int8)
    assert module.panels.dtype == weights
    x = torch.randn(100, 70).to(SIZES[x_dtype])
    product = run(module, (x[:3],), ({0: ROWS},))
    whole = product(x)
    reference = module(x)
    if weights == torch.int8:  # rounding to 8 bits is all that is lost
        exact = x.float() @ weight.T + module.bias if bias else x.float() @ weight.T
        assert float((reference.float() - exact).std()) < 0.01 * float(exact.std())
    torch.testing.assert_close(whole, reference, atol=2e-5 if x_dtype == "float32" else 2e-2, rtol=1e-5)
    for rows in (1, 2, 5, 7, 8, 9, 17, 33, 65):
        assert torch.equal(product(x[:rows].contiguous()), whole[:rows]), rows
        assert torch.equal(product(x[-rows:].contiguous()), whole[-rows:]), rows


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


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "dim", "windowed", "cap"),
    [
        pytest.param("float32", 6, 6, 64, False, 0.0, marks=pytest.mark.slow),
        ("float32", 4, 2, 80, True, 0.0),
        ("bfloat16", 8, 2, 128, False, 0.0),
        pytest.param("float32", 2, 1, 16, True, 3.0, marks=pytest.mark.slow),
    ],
)
def test_attention_is_the_obvious_one_with_equal_bits_in_any_company(
    run, dtype, heads, kv_heads, dim, windowed, cap
) -> None:
    torch.manual_seed(1)
    rows, nodes, scratch, slots, lengths = 3, 11, 14, 240, torch.tensor([200, 3, 130])
    kind = SIZES[dtype]
    q = torch.randn(rows, heads, nodes, dim).to(kind)
    k, v = torch.randn(2, rows, kv_heads, slots + 9, dim).to(kind).unbind(0)
    positions, ancestors = random_tree(rows, nodes, scratch, lengths)
    own = lengths[:, None] + ancestors.sum(-1) - 1
    at = torch.arange(slots)
    seen = (at <= own[..., None]) & (at > own[..., None] - 90) if windowed else torch.zeros(0, 0, 0, 0).bool()
    seen = seen[:, None] if windowed else seen
    tree = ({0: ROWS}, {0: ROWS, 1: Dim("scratch", min=1, max=512)})
    nodes_dim, slots_dim = Dim("nodes", min=1, max=4096), Dim("slots", min=1, max=4096)
    sizes = (
        {0: ROWS, 2: nodes_dim},
        {0: ROWS, 2: slots_dim},
        {0: ROWS, 2: slots_dim},
        *tree,
        {0: ROWS, 1: nodes_dim, 2: tree[1][1]},
        {0: ROWS, 2: nodes_dim, 3: slots_dim} if windowed else {},
    )
    module = Attention(cap)
    inputs = (q, k[:, :, :slots].contiguous(), v[:, :, :slots].contiguous(), lengths, positions, ancestors, seen)
    attend = run(module, inputs, sizes)
    whole, reference = attend(*inputs), module(*inputs)
    torch.testing.assert_close(whole, reference, atol=1e-5 if dtype == "float32" else 1e-2, rtol=1e-5)
    for row in range(rows):
        for node in range(nodes):
            # Alone, its path in the slots of its positions, as plain decoding has it.
            n, path = int(lengths[row]), ancestors[row, node].nonzero().flatten()
            order = path[positions[row, path].argsort()] + n
            lane = [torch.cat([x[row : row + 1, :, :n], x[row : row + 1, :, order]], 2) for x in (k, v)]
            end = n + len(path)
            alone = attend(
                q[row : row + 1, :, node : node + 1].contiguous(),
                *lane,
                torch.tensor([end - 1]),
                torch.tensor([[end - 1]]),
                torch.ones(1, 1, 1).bool(),
                seen[row : row + 1, :, node : node + 1, :end].contiguous() if windowed else seen,
            )
            assert torch.equal(alone[0, 0], whole[row, node]), (row, node)
