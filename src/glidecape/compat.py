"""Everything that depends on a library's version: names that transformers and PyTorch changed, and their inner interfaces.

No other module may look at a version, or at a name that a release renamed. `make test-oldest` and `make test-newest` run
the suite on both ends of the range in pyproject.toml.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

__all__ = [
    "CACHE_ARGUMENTS",
    "Cache",
    "DynamicCache",
    "GenerateDecoderOnlyOutput",
    "cache_argument",
    "cache_of",
    "causal_mask_function",
    "chunked_causal_mask_function",
    "compile_to",
    "cpu_has_bfloat16",
    "export_program",
    "load_package",
    "pack_weight",
    "packed_linear",
    "register_attention",
    "sliding_window_causal_mask_function",
]

# A causal LM's argument for its keys and values. transformers 5.24 renamed it, and warns about the old name.
CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(model: Any) -> str:
    """The name under which a model's `forward` takes its cache: "cache" or, before transformers 5.24, "past_key_values".

    A model with code of its own may use either name with any version, so its signature is asked.
    """
    return _cache_argument(type(model).forward)


@cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), CACHE_ARGUMENTS[-1])


def cache_of(output: Any) -> Any:
    """The cache in a model's output."""
    return next(output[name] for name in CACHE_ARGUMENTS if name in output)


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make an attention function and its mask function known to transformers under a name of ours."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def pack_weight(weight: Tensor) -> Tensor:
    """A weight `(outputs, inputs)` in oneDNN's blocks.

    Raises:
        RuntimeError, AttributeError: this build of PyTorch lacks the operator, which is private.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b with a weight from `pack_weight`; raises as it does."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def export_program(program: nn.Module, inputs: tuple[Any, ...], dynamic: tuple[Any, ...]) -> Any:
    """`torch.export`, with sizes 0 and 1 taken for what they are: one program serves one row and many."""
    with _inductor():
        import torch.fx.experimental._config as export_config

        patch: Any = export_config
        with patch.patch(backed_size_oblivious=True):
            return torch.export.export(
                program, inputs, dynamic_shapes=dynamic, strict=False, prefer_deferred_runtime_asserts_over_guards=True
            )


def compile_to(path: str, exported: Any) -> None:
    """Compile an exported program with its weights, packed where that is faster, to a package at `path`."""
    options = {"freezing": True, "cpp.dynamic_threads": True}  # as many threads as PyTorch has when it runs
    with _inductor() as inductor:
        inductor.aoti_compile_and_package(exported, package_path=path, inductor_configs=options)


def load_package(path: str) -> Callable[[list[Tensor]], list[Tensor]]:
    """The program of a package: flat inputs to flat outputs."""
    with _inductor() as inductor:
        # The loader itself: the public wrapper flattens its arguments in Python at each call.
        return inductor.aoti_load_package(path).loader.run


@contextmanager
def _inductor() -> Iterator[Any]:
    """PyTorch's compiler, slow to import, without what it says about its own deprecated parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch._inductor

        yield torch._inductor


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions; without them, such products are emulated and slow."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # PyTorch has no public question for this
    return known is not None and bool(known())
