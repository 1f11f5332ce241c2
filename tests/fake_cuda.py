"""Fake CUDA tensors on a build of PyTorch without CUDA.

`FakeTensorMode` runs every operator on shapes and devices alone. Indexing by brackets and a few methods ask the CUDA runtime
for its current device before they reach an operator, so they are spelt out in operators here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors made inside are fake; `device="cuda"` is allowed, device mixes and reads on the host are errors."""
    with FakeTensorMode(), _Brackets():
        yield


def move_to_cuda(module: torch.nn.Module, device: str = "cuda") -> None:
    """Give the module fake weights on a CUDA device; to be called inside `fake_cuda`."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype, device=device)
                part._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


class _Brackets(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.__getitem__:
            view, tensors = _view(*args)
            return view if tensors is None else torch.ops.aten.index(view, tensors)
        if function is Tensor.__setitem__:
            view, tensors = _view(*args[:2])
            return _assign(view if tensors is None else torch.ops.aten.index(view, tensors), args[2])
        if function is Tensor.copy_:
            return _assign(*args[:2])
        if function in (Tensor.log_softmax, Tensor.softmax, Tensor.contiguous):
            return torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device)
        if function is scaled_dot_product_attention:  # PyTorch would take it apart, into fifty operators
            return _like(args[0], [*args[:3], kwargs.get("attn_mask")], args[2].shape[-1])
        if function is linear:
            return _like(args[0], args, args[1].shape[0])
        if function is Tensor.__invert__:
            return torch.logical_not(args[0])
        if function is Tensor.to:
            return _to(*args, **kwargs)
        return function(*args, **kwargs)


def _like(x: Tensor, operands: Sequence[Tensor | None], width: int) -> Tensor:
    """What a product gives: all operands must be on one device."""
    assert len({one.device for one in operands if one is not None}) == 1, [one and one.device for one in operands]
    return torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)


def _assign(goal: Tensor, value: Any) -> Tensor:
    """There is nothing to copy, but shape and device must be right."""
    if isinstance(value, Tensor):
        assert value.device == goal.device, f"{value.device} is written to {goal.device}"
        torch.broadcast_to(value, goal.shape)
    return goal


def _to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A move to the device must not wait for it; a change of dtype is no move."""
    where = [kwargs["device"]] if "device" in kwargs else [a for a in args if isinstance(a, (str, torch.device))]
    goal = torch.device(where[0]) if where else x.device
    if goal.type != x.device.type or (goal.index is not None and goal != x.device):
        assert goal.type == "cuda", f"{x.device} goes to {goal}: bring it by `transfer.to_host`"
        assert kwargs.get("non_blocking"), "a copy to the device waits for it: use `transfer.to_device`"
        return torch.empty(x.shape, dtype=kwargs.get("dtype", x.dtype), device=goal)
    like = [a for a in args if isinstance(a, Tensor)]
    dtypes = [a for a in (*args, kwargs.get("dtype")) if isinstance(a, torch.dtype)] + [a.dtype for a in like]
    return x if not dtypes or dtypes[0] == x.dtype else torch.ops.aten._to_copy(x, dtype=dtypes[0])


def _view(x: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None] | None]:
    """What numbers, slices, None and ... of an index leave; and for each dimension the tensor that indexes it, if any does."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        given = sum(part is not None and part is not Ellipsis for part in parts)
        parts[at : at + 1] = [slice(None)] * (x.ndim - given)
    tensors: list[Tensor | None] = []
    for part in parts:
        dim = len(tensors)
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, int):
            x = torch.ops.aten.select(x, dim, part)
            continue
        elif isinstance(part, slice):
            if part != slice(None):  # what changes nothing is not worth a fake operator, 0.3 ms
                x = torch.ops.aten.slice(x, dim, part.start, part.stop, part.step or 1)
        else:
            tensors.append(part if isinstance(part, Tensor) else torch.tensor(part, device=x.device))
            continue
        tensors.append(None)
    return x, tensors if any(t is not None for t in tensors) else None
