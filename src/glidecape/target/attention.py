"""Attention and masks of a target's forward: what transformers calls in the place of its own functions.

During a forward a context variable holds the layout of the scratch slots. The mask function evaluates the model's own rule
(causal, window, chunk) at the positions of tree nodes and joins it with the ancestor test.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat import causal_mask_function
from ..core.masks import slot_positions
from ..errors import UnsupportedError
from .operators import no_mask, path_attention


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool = False) -> Tensor:
    """Scaled dot-product attention, `(batch, queries, heads x head_dim)`; grouped-query heads without copies.

    Args:
        q: `(batch, heads, queries, head_dim)`; k, v: `(batch, kv_heads, keys, head_dim)`.
        mask: bool `(batch, 1, queries, keys)` or None: all, or with `causal` the queries' own causal mask.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.shape[2] == 1:
        # One query: the heads of a group become queries of their key-value head.
        q = q.reshape(q.shape[0], k.shape[1], groups, q.shape[3])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return out.reshape(q.shape[0], 1, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1)
    return out.transpose(1, 2).flatten(2)


ATTENTION = "glidecape"


@dataclass(frozen=True)
class Layout:
    """Where the queries of the forward in progress stand.

    `lengths (batch,)` of the rows, `positions (batch, queries)` of the queries, `scratch (batch, slots)` positions of all
    scratch slots, and the tree's mask as made by `masks.tree_mask`, None where every query sees every slot before it.
    In a compiled program `ancestors (batch, queries, slots)` stand in the mask's place: `path_attention` reads them.
    """

    lengths: Tensor
    positions: Tensor
    scratch: Tensor
    mask: Tensor | None
    ancestors: Tensor | None = None


LAYOUT: ContextVar[Layout | None] = ContextVar("glidecape_layout", default=None)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer."""
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise UnsupportedError(f"{type(module).__name__} adds attention sinks or position biases, not supported yet")
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    layout, cap = LAYOUT.get(), kwargs.get("softcap")
    if layout is not None and layout.ancestors is not None:
        seen = no_mask() if attention_mask is None else attention_mask
        where = (layout.lengths, layout.scratch, layout.ancestors, seen)
        return path_attention(query, key, value, *where, scale, cap or 0.0), None
    if cap is not None:
        return _capped(query, key, value, attention_mask, scale, cap), None
    causal = attention_mask is None and query.shape[2] > 1
    out = attend(query, key, value, attention_mask, scale, causal)
    return out.unflatten(-1, (query.shape[1], -1)), None


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """Attention with soft-capped scores (gemma2), the obvious way; `(batch, queries, heads, head_dim)`."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = cap * torch.tanh(q @ k.transpose(2, 3) * scale / cap)
    if mask is None:
        queries, keys = scores.shape[-2:]
        before = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        scores = scores.masked_fill(~before, float("-inf"))
    else:
        scores = scores + mask
    return (scores.float().softmax(-1).to(q.dtype) @ v).transpose(1, 2)


def layer_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that transformers calls once a forward for each kind of layer."""
    layout = LAYOUT.get()
    if layout is None:
        raise UnsupportedError("this model now belongs to GlideCape: decode it through Target, not by calling it")
    if layout.ancestors is not None:
        return _by_position(mask_function, layout.positions, kv_length)
    if mask_function is None or mask_function is causal_mask_function:
        # Committed slots and ancestors all come before the query: the tree's mask is causal already. A prompt from its
        # beginning has none; `attention` then uses the causal kernel.
        return _additive(layout.mask, dtype)
    rule = positional_rule(mask_function, layout.lengths, layout.positions, layout.scratch, kv_length)
    return _additive(rule if layout.mask is None else layout.mask & rule, dtype)


def _by_position(rule: Callable[..., Any] | None, positions: Tensor, keys: int) -> Tensor | None:
    """Positions 0 .. keys-1 that a query may see by a model's own rule, `(batch, 1, queries, keys)`; None: its whole path."""
    if rule is None or rule is causal_mask_function:
        return None
    row = torch.arange(positions.shape[0], device=positions.device)[:, None, None]
    at = torch.arange(keys, device=positions.device)
    return ((at <= positions[..., None]) & rule(row, 0, positions[:, :, None], at[None, None]))[:, None]


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """0 where a query sees, -inf elsewhere: attention kernels add it as it is, where a bool mask is turned in each layer."""
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def positional_rule(rule: Callable[..., Any], lengths: Tensor, positions: Tensor, scratch: Tensor, keys: int) -> Tensor:
    """A model's own mask rule at the positions of slots (see `masks.slot_positions`), `(batch, 1, queries, keys)`."""
    batch, queries = positions.shape
    at = slot_positions(lengths, scratch, keys)
    row = torch.arange(batch, device=positions.device)[:, None, None]
    everything = torch.ones(batch, queries, keys, dtype=torch.bool, device=positions.device)
    return (everything & rule(row, 0, positions[:, :, None], at[:, None, :]))[:, None]
