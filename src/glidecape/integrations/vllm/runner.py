"""What the proposer needs of vLLM's inside: versions that were tried, settings that fit, and the model runner itself.

vLLM passes a proposer of `custom_class` the tokens, but not the block tables, without which no cache can be read. So
`GPUModelRunner.initialize_kv_cache`, which CPUs run, too, is wrapped: when it has made the cache, the runner introduces itself
to our proposer. Nothing else of vLLM is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...errors import UnsupportedError
from .paged import gather

TRIED = (
    "0.32.0",
)  # vLLM calls this interface experimental; compat.py knows nothing of vLLM, which is not installed there


def refuse_untried() -> None:
    """Raises UnsupportedError for a version of vLLM that was not tried."""
    import vllm

    version = vllm.__version__.split("+")[0]
    if version not in TRIED:
        raise UnsupportedError(
            f"GliDe was tried inside vLLM {', '.join(TRIED)}, and this is {version}: it uses vLLM's inner interfaces, which "
            "change; install that version"
        )


def refuse_settings(vllm_config: Any) -> None:
    """Raises UnsupportedError for settings of vLLM under which GliDe cannot read the target's cache, or was not tried."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) != 1:
            raise UnsupportedError(f"GliDe inside vLLM reads the cache of one device: {name} must be 1, not {size}")
    if model.is_multimodal_model:
        raise UnsupportedError(
            "GliDe inside vLLM drafts for language models, not for models that read pictures or sound"
        )
    dtype = vllm_config.cache_config.cache_dtype
    if dtype not in ("auto", str(model.dtype).removeprefix("torch.")):
        raise UnsupportedError(
            f"GliDe reads keys and values as the model made them: kv_cache_dtype must be auto, not {dtype}"
        )
    if vllm_config.speculative_config.num_speculative_tokens_per_batch_size:
        raise UnsupportedError(
            "GliDe's stop policy decides how long a draft is: leave num_speculative_tokens_per_batch_size out"
        )


def refuse_layer(number: int, layer: Any) -> None:
    """Raises UnsupportedError for an `Attention` of vLLM whose cache does not hold all of a row's keys."""
    if layer.sliding_window or getattr(layer, "kv_sharing_target_layer_name", None):
        raise UnsupportedError(
            f"the draft reads layer {number}, which keeps a window of the context alone, or reads another layer's cache: train "
            "a draft that reads a full-attention layer (--read)"
        )


def introduce(kind: type[Any]) -> None:
    """From now on a model runner whose drafter is of this kind calls the drafter's `attach(runner)` when it has a cache."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original: Callable[..., Any] = GPUModelRunner.initialize_kv_cache
    if getattr(original, "introduces", None) is kind:
        return

    @functools.wraps(original)
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(self, *args, **kwargs)
        drafter: Any = getattr(self, "drafter", None)
        if isinstance(drafter, kind):
            drafter.attach(self)
        return made

    initialize_kv_cache.introduces = kind  # type: ignore[attr-defined]
    GPUModelRunner.initialize_kv_cache = initialize_kv_cache


def check_reading(layer: Any) -> None:
    """Let vLLM's backend write keys and values into a block, and read them back: the same numbers, or this cache is refused.

    The block is number 0, vLLM's null block, which no request is given.

    Args:
        layer: an `Attention` of vLLM with its cache.

    Raises:
        UnsupportedError: they come back otherwise.
    """
    cache, backend = layer.kv_cache, layer.attn_backend.get_name()
    size, shape = cache.shape[2], (layer.num_kv_heads, layer.head_size)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(size, *shape, generator=generator).to(cache) for _ in range(2))
    kept = cache[0].clone()
    layer.impl.do_kv_cache_update(layer, keys, values, cache, torch.arange(size, device=cache.device))
    read = gather(backend, cache, torch.zeros(1, 1, dtype=torch.long, device=cache.device), size)
    cache[0] = kept
    for found, wanted in zip(read, (keys, values), strict=True):
        if not torch.equal(found[0], wanted.transpose(0, 1)):
            raise UnsupportedError(
                f"on this machine vLLM's backend {backend} lays {cache.dtype} keys and values out otherwise than we read them"
            )
