"""Linear layers of compiled programs: `StreamedLinear` in the place of packed ones and plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..compat import int8_parts
from .operators import PANEL, panels_of, rounded, streamed_linear
from .packed import PackedLinear


class StreamedLinear(nn.Module):
    """x W^T + b by `streamed_linear`, in x's dtype.

    Args:
        weight: `(outputs, inputs)`, float32, bfloat16, or int8 by torchao.
        bias: `(outputs,)` or None.
        in_8_bits: round the weights to 8 bits: half of the bytes to read.
    """

    panels: Tensor
    scales: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None, in_8_bits: bool = False) -> None:
        super().__init__()
        self.outputs, scales = weight.shape[0], torch.zeros(0)
        weight = weight.detach()
        if (parts := int8_parts(weight)) is not None:
            weight, scales = parts
        elif in_8_bits:
            weight, scales = rounded(weight)
        self.register_buffer("panels", panels_of(weight))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.zeros(0) if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        # A product in bfloat16 has a weight in bfloat16.
        values = x.float() if self.panels.dtype == torch.float32 else x
        return streamed_linear(values.contiguous(), self.panels, self.scales, self.bias, self.outputs).to(x.dtype)


def streamable(layer: object) -> bool:
    """Layers that have a `StreamedLinear` of the same outcome: packed ones, and plain ones in float32, bfloat16 or int8."""
    if type(layer) is nn.Linear and layer.weight.device.type == "cpu":
        weight = layer.weight
        plain = type(weight) is nn.Parameter and weight.dtype in (torch.float32, torch.bfloat16)
        return plain or int8_parts(weight) is not None
    return isinstance(layer, PackedLinear)


@contextmanager
def streamed_layers(*models: nn.Module, holders: tuple[Any, ...] = (), in_8_bits: bool = False) -> Iterator[None]:
    """While it lasts, linear layers are streamed ones, in modules and in the attributes of `holders`."""
    places = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], part)
        for model in models
        for name, part in model.named_modules(remove_duplicate=False)
    ]
    places += [(holder, name, part) for holder in holders for name, part in vars(holder).items()]
    swapped = [place for place in places if streamable(place[2])]
    streamed = {id(part): StreamedLinear(part.weight, part.bias, in_8_bits) for _, _, part in swapped}
    try:
        for module, own, part in swapped:
            setattr(module, own, streamed[id(part)])
        yield
    finally:
        for module, own, part in swapped:
            setattr(module, own, part)


def share_inputs(graph: fx.Graph) -> None:
    """Make one product of those that multiply the same input, such as queries, keys and values: fewer, longer reads."""
    operator = torch.ops.glidecape.streamed_linear.default
    by_input: dict[Any, list[Any]] = {}
    for node in graph.nodes:
        if node.target is operator and node.args[4] % PANEL == 0:
            x, panels, _, bias, _ = node.args
            by_input.setdefault((x, panels.meta["val"].dtype, bias.meta["val"].numel() > 0), []).append(node)
    cat, narrow = torch.ops.aten.cat.default, torch.ops.aten.slice.Tensor
    for (x, _, _), nodes in by_input.items():
        if len(nodes) == 1:
            continue
        ends = list(accumulate(node.args[4] for node in nodes))
        with graph.inserting_before(nodes[0]):
            parts = [graph.call_function(cat, ([node.args[i] for node in nodes],)) for i in (1, 2, 3)]
            whole = graph.call_function(operator, (x, *parts, ends[-1]))
            for node, first, end in zip(nodes, [0, *ends], ends, strict=False):
                node.replace_all_uses_with(graph.call_function(narrow, (whole, -1, first, end)))
        for node in nodes:
            graph.erase_node(node)
