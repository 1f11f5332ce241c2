"""Keys and values out of SGLang's token pool, where a row's tokens lie in slots that `req_to_token` lists. Never run inside
SGLang."""

from __future__ import annotations

from torch import Tensor

from ...errors import UnsupportedError


def gather(
    buffers: tuple[Tensor, Tensor], req_to_token: Tensor, requests: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of tokens 0 .. length-1 of some rows, copied: `(rows, kv_heads, length, head_dim)` each.

    Args:
        buffers: keys and values `(slots, kv_heads, head_dim)` of one layer: `MHATokenToKVPool.get_kv_buffer(layer)`.
        req_to_token: `(requests, context)` int, `ReqToTokenPool.req_to_token`. It must hold slots of the pool, which it does
            without `--enable-unified-memory`. Past a row's own tokens its slots may be any.
        requests: `(rows,)` int, SGLang's `req_pool_indices`.
        length: committed tokens of the longest row.

    Raises:
        UnsupportedError: a pool that is laid out by pages, or quantized.

    Source: `MHATokenToKVPool._kv_buffer_shapes` of SGLang 0.5.23.

    >>> import torch
    >>> keys = torch.arange(4.0).view(4, 1, 1)  # four slots, one head of size one
    >>> gather((keys, -keys), torch.tensor([[0, 0], [3, 1]]), torch.tensor([1]), 2)[0].tolist()
    [[[[3.0], [1.0]]]]
    """
    for one in buffers:
        if one.ndim != 3 or one.dtype.itemsize == 1:
            raise UnsupportedError(
                "GliDe reads pools of SGLang with a slot a token, (slots, heads, head size), in 16 bits or more; this one is "
                f"{tuple(one.shape)}, {one.dtype}: leave SGLANG_USE_HND_KVCACHE unset and --kv-cache-dtype at auto"
            )
    slots = req_to_token.index_select(0, requests)[:, :length]
    keys, values = (one.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2) for one in buffers)
    return keys, values
