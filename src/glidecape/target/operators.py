"""Operators of compiled programs that are written in C++ (`kernels/`), each beside the obvious way to compute it.

oneDNN, MKL and flash attention are made for many rows: with one to a dozen they read weights at less than half the speed of
memory (dev/LOG.md). And their sums run in an order that depends on how many rows there are. The kernels read what they need
once, and their sums have one order: a node's logits have the same bits in any tree, in any batch, and alone. That is why
compiled decoding is lossless to the bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import pages
from ..core.masks import path_slots, paths_mask, slot_positions

KERNELS = Path(__file__).parent / "kernels"
PANEL = 64  # outputs that lie side by side: BLOCK in kernels/tile.h
EXACT = (torch.Tag.needs_exact_strides,)

# The functions in kernels/, as programs declare them, by operator.
FUNCTIONS = {
    "glidecape::streamed_linear": "AOTITorchError aoti_torch_cpu_streamed_linear(AtenTensorHandle x, AtenTensorHandle weights, "
    "AtenTensorHandle scales, AtenTensorHandle bias, int64_t outputs, AtenTensorHandle* y)",
    "glidecape::tree_attention": "AOTITorchError aoti_torch_cpu_tree_attention(AtenTensorHandle q, AtenTensorHandle k, "
    "AtenTensorHandle v, AtenTensorHandle lengths, AtenTensorHandle positions, AtenTensorHandle ancestors, "
    "AtenTensorHandle seen, double scale, double cap, AtenTensorHandle* y)",
}


def panels_of(weight: Tensor) -> Tensor:
    """A weight `(outputs, inputs)` as `streamed_linear` reads it: `(panels, inputs, 64)`, the last panel filled up with zeros.

    A float32 weight that bfloat16 holds exactly, as those of most published models, is kept in bfloat16: half of the bytes,
    and the same products.
    """
    if weight.dtype == torch.float32 and torch.equal(weight.bfloat16().float(), weight):
        weight = weight.bfloat16()
    panels = -(-weight.shape[0] // PANEL)
    filled = torch.nn.functional.pad(weight, (0, 0, 0, panels * PANEL - weight.shape[0]))
    found = pages.zeros(panels, weight.shape[1], PANEL, dtype=weight.dtype, device=weight.device)
    return found.copy_(filled.view(panels, PANEL, -1).transpose(1, 2))


def is_panels(tensor: Tensor) -> bool:
    """Is it laid out as `panels_of` does? Other weights are read where their module keeps them."""
    return tensor.ndim == 3 and tensor.shape[2] == PANEL and tensor.device.type == "cpu" and tensor.is_contiguous()


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight `(outputs, inputs)` in int8, and what each output is to be multiplied by, `(outputs,)`.

    >>> weight, scales = rounded(torch.tensor([[1.27, -0.5], [0.0, 0.0]]))
    >>> weight.tolist(), scales.tolist()
    ([[127, -50], [0, 0]], [0.009999999776482582, 1.0])
    """
    scales = weight.float().abs().amax(1) / 127
    scales = torch.where(scales > 0, scales, 1.0)
    return (weight.float() / scales[:, None]).round().to(torch.int8), scales


@torch.library.custom_op("glidecape::streamed_linear", mutates_args=(), tags=EXACT)
def streamed_linear(x: Tensor, panels: Tensor, scales: Tensor, bias: Tensor, outputs: int) -> Tensor:
    """x W^T + b for few rows, in the time that reading the weights takes.

    Args:
        x: `(…, inputs)`, dense; float32, or bfloat16 unless `panels` are float32.
        panels: from `panels_of`.
        scales: `(outputs,)` in float32, which the products of int8 weights are multiplied by, or `(0,)`: none.
        bias: `(outputs,)` in float32, or `(0,)`: none.

    Returns:
        `(…, outputs)` in x's dtype.
    """
    weight = panels.transpose(1, 2).reshape(-1, panels.shape[1])[:outputs]
    found = x.float() @ weight.float().T
    if len(scales):
        found = found * scales
    return (found + bias if len(bias) else found).to(x.dtype)


@streamed_linear.register_fake
def _(x: Tensor, panels: Tensor, scales: Tensor, bias: Tensor, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@torch.library.custom_op("glidecape::tree_attention", mutates_args=(), tags=EXACT)
def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    positions: Tensor,
    ancestors: Tensor,
    seen: Tensor,
    scale: float,
    cap: float,
) -> Tensor:
    """Attention of each node to its own path, summed in the order of positions.

    Args:
        q: `(rows, heads, nodes, head_dim)`; k, v: `(rows, kv_heads, slots, head_dim)`; the last dimension is dense.
        lengths: `(rows,)` committed slots, which hold the positions of their numbers.
        positions: `(rows, scratch)` of the slots after them.
        ancestors: `(rows, nodes, scratch)`, which of these are on a node's path, its own included.
        seen: `(rows, 1, nodes, slots)`, may a node read a position? Or empty: it may read its whole path.
        scale: of scores.
        cap: scores are cap x tanh(score / cap); 0: as they are.

    Returns:
        `(rows, nodes, heads, head_dim)`.
    """
    rows = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    heads = (torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1]))[:, None, None]
    order = path_slots(lengths, positions, ancestors, k.shape[2])
    keys, values = k[rows, heads, order[:, None]].float(), v[rows, heads, order[:, None]].float()
    scores = (q.float()[:, :, :, None] * keys).sum(-1) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    end = lengths[:, None] + ancestors.sum(-1)
    own = torch.arange(k.shape[2], device=q.device) < end[..., None]
    on_path = own[:, None] & seen if seen.numel() else own[:, None]
    weights = scores.masked_fill(~on_path, float("-inf")).softmax(-1)
    return (weights[..., None] * values).sum(-2).to(q.dtype).transpose(1, 2).contiguous()


def path_attention(q: Tensor, *others: Any) -> Tensor:
    """Attention of each node to its own path in a compiled program: `tree_attention` on a CPU, by masked slots elsewhere."""
    return tree_attention(q, *others) if q.device.type == "cpu" else slot_attention(q, *others)


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    positions: Tensor,
    ancestors: Tensor,
    seen: Tensor,
    scale: float,
    cap: float,
) -> Tensor:
    """What `tree_attention` computes, by matrix products over all slots and a mask, in the order of slots."""
    (rows, heads, nodes, size), (kv_heads, keys) = q.shape, k.shape[1:3]
    mask = paths_mask(lengths, ancestors, keys)
    if seen.ndim and seen.shape[0]:
        at = slot_positions(lengths, positions, keys).clamp(max=seen.shape[3] - 1)
        mask = mask & seen.gather(3, at[:, None, None].expand(-1, -1, nodes, -1))
    # The queries of a key-value head side by side: keys and values are read as they lie.
    of_group = q.reshape(rows, kv_heads, -1, size)
    scores = (of_group @ k.transpose(2, 3)).view(rows, kv_heads, -1, nodes, keys).float() * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    weights = scores.masked_fill(~mask[:, :, None], float("-inf")).softmax(-1).to(v.dtype)
    found = weights.view(rows, kv_heads, -1, keys) @ v
    return found.view(rows, heads, nodes, size).transpose(1, 2).contiguous()


def no_mask() -> Tensor:
    """`tree_attention`'s `seen` where a node may read its whole path."""
    return torch.zeros(0, 0, 0, 0, dtype=torch.bool)


@tree_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    positions: Tensor,
    ancestors: Tensor,
    seen: Tensor,
    scale: float,
    cap: float,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
