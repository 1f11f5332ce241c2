"""Older draft files, read as today's: what they called their tensors, and how they kept them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

_NAMES_BEFORE_3 = {
    "bring.weight": "embedding_projection.weight",
    "give.weight": "head_projection.weight",
    "look.weight": "glimpse_projection.weight",
    "recall.weight": "own_glimpse_projection.weight",
}


def config_of(fields: dict[str, Any], number: int, hidden_size: int) -> dict[str, Any]:
    """The configuration in a card of format `number`: format 1 knew one draft layer that read one target layer."""
    if number > 1:
        return fields
    fields = dict(fields)
    fields["reads"] = [[fields.pop("target_layer", None)]]
    return fields | {"embed_width": fields.get("width"), "hidden_size": hidden_size}


def tensors_of(path: Path, number: int, config: Any) -> dict[str, Tensor]:
    """The tensors of a draft file of format `number`, as networks name them now; `config`: the network's."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if number == 1:
        tensors = _from_format_1(tensors, config.heads * config.head_dim)
    if number < 3:
        tensors = {_NAMES_BEFORE_3.get(name, name): weight for name, weight in tensors.items()}
    return tensors


def _from_format_1(tensors: dict[str, Tensor], inner: int) -> dict[str, Tensor]:
    """Format 1 kept queries, keys and values in one matrix."""
    made: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        own = name.replace("layer.", "layers.0.").replace("cross_", "cross.")
        if own.endswith("qkv.weight"):
            made[own.replace("qkv", "q")], made[own.replace("qkv", "kv")] = weight[:inner], weight[inner:]
        else:
            made[own] = weight
    return made
