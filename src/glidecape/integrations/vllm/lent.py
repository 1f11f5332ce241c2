"""What a draft takes from a model that vLLM has loaded: embedding, head, rotary embedding, and facts to compare.

No second copy of the model is made: embeddings and logits are vLLM's own, and so is the table of cosines and sines.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...target.target import refuse_by_config

KV = tuple[Tensor, Tensor]


def layers_of(vllm_config: Any) -> dict[int, tuple[str, Any]]:
    """The name and vLLM's `Attention` of each of the model's layers, by number.

    Raises:
        UnsupportedError: something in it is no such layer.
    """
    found = {}
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        number = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if number is None or not hasattr(layer, "num_kv_heads"):
            raise UnsupportedError(f"GliDe reads models whose layers all keep keys and values, not {name}")
        found[int(number.group(1))] = name, layer
    return found


class Facts:
    """The facts of a model that vLLM has loaded (`TargetFacts`), from its folder's configuration and tokenizer.

    Args:
        vllm_config: vLLM's.

    Raises:
        UnsupportedError: an architecture that GlideCape doesn't read.
    """

    weights_digest = None  # vLLM stores weights in an order of its own

    def __init__(self, vllm_config: Any) -> None:
        from transformers import AutoConfig, AutoTokenizer

        model = vllm_config.model_config
        own = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        # Read again: vLLM changes the one that it holds.
        self.text_config = AutoConfig.from_pretrained(model.model, **own).get_text_config()
        refuse_by_config(self.text_config)
        self.tokenizer = None if model.skip_tokenizer_init else AutoTokenizer.from_pretrained(model.tokenizer, **own)
        layers = layers_of(vllm_config)
        self.shapes = [(layers[n][1].num_kv_heads, layers[n][1].head_size) for n in sorted(layers)]
        self.vocab_size = self.text_config.vocab_size
        self.hidden_size = self.embed_width = self.text_config.hidden_size


class TableRotary:
    """Cosines and sines as a layer of vLLM's model takes them, out of its table.

    Args:
        module: vLLM's rotary embedding of that layer; None: the layer has none.

    Raises:
        UnsupportedError: it has no table of one row a position, or turns neighbouring dimensions.
    """

    def __init__(self, module: Any) -> None:
        table = getattr(module, "cos_sin_cache", None)
        if not isinstance(table, Tensor) or table.ndim != 2 or not module.is_neox_style:
            raise UnsupportedError(
                "GliDe reads layers of vLLM whose rotary embedding has one table of cosines and sines, half and half; this is "
                f"{type(module).__name__}"
            )
        cos, sin = table.chunk(2, dim=-1)
        # As `layers.rotate` takes them: the minus of (a cos - b sin) is in the first half of the sines.
        self.cos, self.sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    def __call__(self, positions: Tensor) -> tuple[KV, KV]:
        """See `TargetRotary.forward`."""
        at = positions.clamp(max=len(self.cos) - 1)
        found = self.cos[at], self.sin[at]
        return found, found


class Parts:
    """vLLM's embedding and head as a draft takes them (`LentParts`).

    Args:
        model: vLLM's model, with `embed_input_ids` and `compute_logits`.
        rotary: of the target layer that the draft reads.
    """

    def __init__(self, model: Any, rotary: TableRotary) -> None:
        self.model, self.rotary = model, rotary

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """See `TargetParts`."""
        return self.model.embed_input_ids(tokens.flatten()).to(dtype).unflatten(0, tokens.shape)

    def logits(self, hidden: Tensor, kept: Tensor | None = None) -> Tensor:
        """See `TargetParts`."""
        made = self.model.compute_logits(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])
        return made if kept is None else made[..., kept]

    def serve(self, products: torch.dtype, kept: Tensor | None = None) -> None:
        """vLLM has packed them already."""


def lend(model: Any, vllm_config: Any, layer: int) -> Parts:
    """Parts for a draft that reads this layer of vLLM's model.

    Raises:
        UnsupportedError: the layer does not rotate as `TableRotary` wants.
    """
    inside = layers_of(vllm_config)[layer][0].rpartition(".")[0]  # "model.layers.5.self_attn" of "….attn"
    return Parts(model, TableRotary(getattr(model.get_submodule(inside), "rotary_emb", None)))
