"""Packed linear layers: the same products as dense ones, whatever the number of rows."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from glidecape.errors import UnsupportedError
from glidecape.target.packed import PackedLinear, draft_products, pack, packs, unpack
from glidecape.target.target import Target
from tinyworld import make_world

needs_packing = pytest.mark.skipif(not packs(torch.float32), reason="this build of PyTorch has no oneDNN")


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 5, 24), (7, 24), (24,)])
def test_products_are_those_of_the_dense_layer(shape, bias):
    torch.manual_seed(0)
    dense = nn.Linear(24, 40, bias)
    packed, x = PackedLinear(dense.weight, dense.bias), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), dense(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(packed.weight, dense.weight)


@needs_packing
def test_products_in_bfloat16_keep_the_dtype_of_their_input():
    if not packs(torch.bfloat16):
        pytest.skip("this CPU has no bfloat16 instructions")
    weight, x = torch.randn(40, 24), torch.randn(3, 24)
    found = PackedLinear(weight, dtype=torch.bfloat16)(x)
    assert found.dtype == torch.float32
    assert draft_products(torch.float32) == torch.bfloat16
    torch.testing.assert_close(found, x @ weight.T, rtol=0.05, atol=0.1)


@needs_packing
def test_there_and_back_again_is_the_same_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4, bias=False), nn.LayerNorm(4)))
    x = torch.randn(3, 8)
    before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    assert pack(model)
    assert not pack(model)
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 2
    with torch.no_grad():
        torch.testing.assert_close(model(x), before)
    unpack(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert len(state) == 5


@needs_packing
def test_a_tied_weight_is_tied_again():
    model = nn.ModuleDict({"embed": nn.Embedding(12, 8), "head": nn.Linear(8, 12, bias=False)})
    model["head"].weight = model["embed"].weight
    pack(model)
    assert model["head"].weight is model["embed"].weight
    unpack(model)
    assert model["head"].weight is model["embed"].weight
    assert sum(p.numel() for p in model.parameters()) == 96


@needs_packing
def test_a_gradient_through_packed_weights_is_refused():
    with pytest.raises(UnsupportedError, match="unpack"):
        PackedLinear(torch.randn(4, 4))(torch.randn(2, 4, requires_grad=True))


@needs_packing
def test_a_packed_target_is_the_same_target(tmp_path):
    folder = make_world(tmp_path)["target"]
    packed, dense = (Target.from_pretrained(folder, torch.float32, pack=p) for p in (True, False))
    assert packed.packed
    assert not dense.packed
    assert packed.weights_digest == dense.weights_digest
    tokens = torch.arange(20)[None]
    logits = []
    for target in (packed, dense):
        cache = target.new_cache(1, 32)
        with torch.no_grad():
            logits.append(target.forward(tokens, torch.arange(20)[None], cache).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    packed.unpack()
    assert not packed.packed
    assert packed.weights_digest == dense.weights_digest


@needs_packing
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_prompts_of_many_lengths_leave_no_kernels_behind():
    """A kernel for each number of rows is kept: 1,024 of them would take a gigabyte. In a process that made no product yet."""
    code = """if True:
        import torch
        from glidecape.target.packed import PackedLinear

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096 / 2**20

        torch.set_num_threads(1)
        with torch.no_grad():
            layers = [PackedLinear(torch.randn(n, 256)) for n in (128, 256, 512)]
            x = torch.randn(400, 256)
            sizes = []
            for count in range(17, 257):
                for layer in layers:
                    layer(x[:count])
                sizes.append(resident())
        print(sizes[40], sizes[-1])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    early, late = map(float, done.stdout.split())
    assert late - early < 60, (early, late)
