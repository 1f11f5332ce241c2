"""Targets that are split over devices, or whose weights are kept elsewhere and brought when they are needed.

accelerate puts a hook on each module of such a model (`device_map`). Before the module runs, the hook brings its inputs, and
offloaded weights, to the device that the module runs on. Otherwise an offloaded weight has no values (PyTorch's meta device).
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import DynamicCache, cache_argument, hooks_of
from ..errors import InputError, UnsupportedError, first_line
from .attention import LAYOUT, Layout


def check_map(device_map: str | dict[str, Any] | None, device: str, quantize: str | None) -> None:
    """
    Raises:
        InputError: a device map beside what it cannot stand beside, or without accelerate.
    """
    if device_map is None:
        return
    if device != "cpu":
        raise InputError(f"a device map says where the model is, and so does device {device}: give one of them")
    if quantize is not None:
        raise InputError("a model with a device map is not quantized here: leave out the map, or the quantization")
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("a device map needs accelerate, which is not installed: pip install accelerate")


def runs_on(module: Any) -> torch.device:
    """The device that a module with weights of its own runs on."""
    found: torch.device = module.weight.device
    if found.type != "meta":
        return found
    for hook in hooks_of(module):
        where = getattr(hook, "execution_device", None)
        if where is not None:
            return torch.device("cuda", where) if isinstance(where, int) else torch.device(where)
    raise UnsupportedError(
        f"the weights of {type(module).__name__} are on the meta device, and nothing brings them: load the model's weights"
    )


def is_offloaded(model: nn.Module) -> bool:
    """Are some weights brought only when they are needed?"""
    return any(one.device.type == "meta" for one in model.parameters())


def stored_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's `state_dict`, offloaded weights read where they are kept.

    Raises:
        UnsupportedError: some are kept where we do not know.
    """
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        for own, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            key = f"{name}.{own}" if name else own
            if key in state and state[key].device.type == "meta":
                state[key] = _kept(module, own, key)
    return state


def layers_of(model: Any, config: Any, device: torch.device) -> tuple[list[tuple[int, int]], list[torch.device]]:
    """`(kv_heads, head_dim)` and the device of each layer, read off a one-token forward (no config field is reliable for
    all)."""
    seen: dict[int, tuple[tuple[int, int], torch.device]] = {}

    class Recorder(DynamicCache):
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            if key_states.ndim != 4 or key_states.shape != value_states.shape:
                raise UnsupportedError(f"{config.model_type} caches keys and values of different shapes")
            seen[layer_idx] = (key_states.shape[1], key_states.shape[3]), key_states.device
            return key_states, value_states

    one = torch.zeros(1, 1, dtype=torch.long, device=device)
    token = LAYOUT.set(Layout(one[0], one, one, None))
    try:
        with torch.no_grad():
            model(input_ids=one, position_ids=one, use_cache=True, **{cache_argument(model): Recorder()})
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"{config.model_type} does not run on our cache ({type(error).__name__}: {first_line(error)})"
        ) from None
    finally:
        LAYOUT.reset(token)
    # The last layers of some models have no keys of their own: they read those of an earlier layer.
    own = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    if sorted(seen) != list(range(own)):
        raise UnsupportedError(f"{config.model_type} wrote keys and values for layers {sorted(seen)} of {own}")
    found = [seen[i] for i in sorted(seen)]
    return [shape for shape, _ in found], [where for _, where in found]


def _kept(module: nn.Module, own: str, key: str) -> Tensor:
    for hook in hooks_of(module):
        if (kept := getattr(hook, "weights_map", None)) is not None:
            try:
                found: Tensor = kept[own]
            except KeyError:
                continue
            return found
    raise UnsupportedError(
        f"the weights of this model are offloaded, and {key} is not found: load the model without offloading"
    )
