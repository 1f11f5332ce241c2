"""Linear layers for decoding on CPUs, their weights packed once for oneDNN.

A decoding step multiplies one to a few dozen rows with every weight of the model, so it takes as long as reading the
weights does. `torch.nn.functional.linear` reads them in the order in which they lie; oneDNN packs them into blocks once
and then reads two to four times as fast (dev/LOG.md). Its products for one row and for many are equal bit for bit, too,
which makes a tree's logits those of plain decoding. `torch.compile` uses the same operators, after a C++ compiler has
been found and every shape compiled; here they are called directly.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import cpu_has_bfloat16, pack_weight, packed_linear
from ..errors import UnsupportedError


class PackedLinear(nn.Module):
    """x W^T + b for decoding. The dense weight is not kept: `weight` unpacks a copy.

    Args:
        weight: `(outputs, inputs)`, on the CPU.
        bias: `(outputs,)` or None.
        dtype: float32 or bfloat16, to take products in; inputs and outputs of `forward` keep theirs. None: the weight's.

    Raises:
        UnsupportedError: a gradient is asked for (in `forward`).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype or weight.dtype
        self.out_features, self.in_features = weight.shape
        # A weight that something else holds, as a tied embedding does, is tied again when unpacked.
        self._dense = weakref.ref(weight)
        # Not buffers: an opaque tensor can be neither saved nor moved.
        self._packed = pack_weight(weight.detach().to(self.dtype).contiguous())
        self.bias = None if bias is None else bias.detach().to(self.dtype)

    @property
    def weight(self) -> Tensor:
        dense = self._dense()
        return self._packed.to_dense() if dense is None else dense

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise UnsupportedError("packed weights have no gradients: call `unpack` on the target to train with it")
        found = packed_linear(x.to(self.dtype), self._packed, self.bias)
        return found.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has the operators, for this dtype, and they multiply correctly."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    if dtype == torch.bfloat16 and not cpu_has_bfloat16():
        return False
    x, weight = (torch.arange(n * 16.0).sin().view(n, 16).to(dtype) for n in (3, 32))
    try:
        found = PackedLinear(weight)(x)
    except (RuntimeError, AttributeError):  # private operators: they may go away
        return False
    return torch.allclose(found.float(), (x @ weight.T).float(), atol=0.1 if dtype == torch.bfloat16 else 1e-4)


def draft_products(dtype: torch.dtype) -> torch.dtype:
    """The dtype for products of a draft in `dtype`: bfloat16 for float32 where the CPU has it.

    Half the bytes is nearly half the time, and rounding costs a draft at most a token's acceptance: what is emitted is
    the target's choice.
    """
    return torch.bfloat16 if dtype == torch.float32 and packs(torch.bfloat16) else dtype


def packable(module: Any) -> bool:
    """Plain linear layers on the CPU: neither quantized nor otherwise special."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
        and packs(module.weight.dtype)
    )


def pack(model: nn.Module, dtype: torch.dtype | None = None) -> bool:
    """Replace the plain linear layers of `model` by packed ones with products in `dtype`; False if there were none.

    Dense weights are freed, except where something else holds them, as a tied embedding does.
    """
    found = [(name, part) for name, part in model.named_modules() if packable(part)]
    for name, part in found:
        above, _, own = name.rpartition(".")
        setattr(model.get_submodule(above), own, PackedLinear(part.weight, part.bias, dtype))
    return bool(found)


def unpack(model: nn.Module) -> None:
    """Turn packed layers back into dense ones, for training."""
    for name, part in list(model.named_modules()):
        if isinstance(part, PackedLinear):
            dense = nn.Linear(part.in_features, part.out_features, part.bias is not None, device="meta")
            weight = part.weight
            dense.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
            if part.bias is not None:
                dense.bias = nn.Parameter(part.bias)
            above, _, own = name.rpartition(".")
            setattr(model.get_submodule(above), own, dense)
