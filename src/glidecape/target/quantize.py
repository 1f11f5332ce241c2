"""Targets with int8 weights, by torchao: half of bfloat16's bytes, products in the model's own dtype."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import InputError, UnsupportedError, first_line

QUANTIZERS = ("int8",)


def quantize(model: nn.Module, name: str) -> None:
    """Replace the weights of all linear layers, in place, by int8 ones with a scale an output ("int8", weight only).

    Embeddings stay as they are. What is quantized is another target: its output is its own, not the full model's.

    Raises:
        InputError: an unknown quantizer, or torchao is not installed.
        UnsupportedError: torchao cannot quantize this model.
    """
    if name not in QUANTIZERS:
        raise InputError(f"unknown quantizer '{name}': choose {', '.join(QUANTIZERS)}")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise InputError(
            f"quantizing to {name} needs torchao, which does not load ({error}): pip install 'glidecape[int8]'"
        ) from None
    try:
        quantize_(model, Int8WeightOnlyConfig())
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(f"torchao cannot quantize this model: {first_line(error)}") from None


def refuse_quantized(model: nn.Module) -> None:
    """Refuse products whose rows depend on each other: a node's logits would depend on its neighbours in the tree.

    bitsandbytes' 8-bit products look for outliers in the inputs of all rows at once, and take those columns in 16 bits for
    every row.

    Raises:
        UnsupportedError: the model has such layers.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt" and getattr(module.state, "threshold", 0) > 0:
            raise UnsupportedError(
                "bitsandbytes' 8-bit products with a threshold for outliers depend on the other rows of a batch, so a tree's "
                "would not be plain decoding's: load it with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)"
            )


def dense(weight: Any) -> Tensor:
    """A weight as an ordinary tensor, unpacked if a quantizer keeps it as something else."""
    return weight.dequantize() if hasattr(type(weight), "__tensor_flatten__") else weight
