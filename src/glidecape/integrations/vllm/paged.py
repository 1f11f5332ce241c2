"""Reading keys and values out of a paged cache, where a row's tokens lie in blocks that its block table lists."""

from __future__ import annotations

from torch import Tensor

from ...errors import UnsupportedError

KV = tuple[Tensor, Tensor]


def views(backend: str, blocks: Tensor) -> KV:
    """Keys and values `(blocks, kv_heads, block_size, head_dim)` as views of blocks as a backend of vLLM stores them.

    Args:
        backend: vLLM's name for it.
        blocks: of one layer's cache, contiguous.

    Raises:
        UnsupportedError: a backend whose blocks were not tried.

    Source: `CPUAttentionBackendImpl.do_kv_cache_update` of vLLM 0.32.0, and its kernel's "vec" layout.
    """
    if backend != "CPU_ATTN":
        raise UnsupportedError(
            f"GliDe reads the cache of vLLM's backend CPU_ATTN, and this one is {backend}: not tried yet"
        )
    # (blocks, kv_heads, block_size, 2 x head_dim) in name; in each, first all keys, transposed, then all values.
    size, head_dim = blocks.shape[2], blocks.shape[3] // 2
    keys, values = blocks.flatten(2).unflatten(2, (2, -1)).unbind(2)
    return keys.unflatten(2, (head_dim, size)).transpose(2, 3), values.unflatten(2, (size, head_dim))


def gather(backend: str, cache: Tensor, tables: Tensor, length: int) -> KV:
    """Keys and values of tokens 0 .. length-1 of some rows, copied: `(rows, kv_heads, length, head_dim)` each.

    Args:
        backend: see `views`.
        cache: of one layer, all of its blocks.
        tables: `(rows, blocks)` int, numbers of each row's blocks in order. Past a row's own tokens they may be of any block.

    Raises:
        UnsupportedError: see `views`.

    >>> import torch
    >>> cache = torch.arange(2 * 2 * 4.0).view(2, 1, 2, 4)  # two blocks of two tokens, one head of size two
    >>> keys, values = gather("CPU_ATTN", cache, torch.tensor([[1, 0]]), 3)
    >>> keys.tolist(), values.tolist()
    ([[[[8.0, 10.0], [9.0, 11.0], [0.0, 2.0]]]], [[[[12.0, 13.0], [14.0, 15.0], [4.0, 5.0]]]])
    """
    size = cache.shape[2]
    needed = tables[:, : -(-length // size)].long()
    # Whole blocks are copied first: a block is contiguous, a token's keys in it are not.
    keys, values = (
        part.unflatten(0, needed.shape).transpose(1, 2).flatten(2, 3)[:, :, :length]
        for part in views(backend, cache.index_select(0, needed.flatten()))
    )
    return keys, values
