"""Linear layers of compiled programs: `StreamedLinear` in the place of packed ones and plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from ..compat import Conv1D, int8_parts
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
        # A product in bfloat16 has a weight in bfloat16. Copies, even of float32, would keep `share_inputs` from one input.
        values = x.float() if self.panels.dtype == torch.float32 != x.dtype else x
        return streamed_linear(values.contiguous(), self.panels, self.scales, self.bias, self.outputs).to(x.dtype)


def dense_of(layer: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight `(outputs, inputs)` and bias of a layer that has a `StreamedLinear` of the same outcome, None of any other.

    Packed layers have one, and plain ones in float32, bfloat16 or int8, GPT-2's transposed ones included.
    """
    if isinstance(layer, PackedLinear):
        return layer.weight, layer.bias
    if type(layer) not in (nn.Linear, Conv1D):
        return None
    weight, bias = layer.weight, layer.bias
    plain = type(weight) is nn.Parameter and weight.dtype in (torch.float32, torch.bfloat16)
    if weight.device.type != "cpu" or not (plain or int8_parts(weight) is not None):
        return None
    return weight.T.contiguous() if isinstance(layer, Conv1D) else weight, bias


@contextmanager
def streamed_layers(*models: nn.Module, holders: tuple[Any, ...] = (), in_8_bits: bool = False) -> Iterator[None]:
    """While it lasts, linear layers are streamed ones, in modules and in the attributes of `holders`."""
    places = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], part)
        for model in models
        for name, part in model.named_modules(remove_duplicate=False)
    ]
    places += [(holder, name, part) for holder in holders for name, part in vars(holder).items()]
    parts = {id(part): part for _, _, part in places}
    streamed = {key: StreamedLinear(*found, in_8_bits) for key, part in parts.items() if (found := dense_of(part))}
    swapped = [place for place in places if id(place[2]) in streamed]
    try:
        for module, own, part in swapped:
            setattr(module, own, streamed[id(part)])
        yield
    finally:
        for module, own, part in swapped:
            setattr(module, own, part)


def share_inputs(exported: Any) -> dict[str, list[str]]:
    """Make one product of those that multiply the same input, such as queries, keys and values: fewer, longer reads.

    Args:
        exported: a program of `torch.export`.

    Returns:
        By new buffer of the program, the weights that it is made of, one after another.
    """
    graph, operator = exported.graph, torch.ops.glidecape.streamed_linear.default
    by_input: dict[Any, list[Any]] = {}
    for node in graph.nodes:
        if node.target is operator and node.args[4] % PANEL == 0:
            x, panels, _, bias, _ = node.args
            by_input.setdefault((x, panels.meta["val"].dtype, bias.meta["val"].numel() > 0), []).append(node)
    buffers = _Joined(exported)
    for (x, _, _), nodes in by_input.items():
        if len(nodes) == 1:
            continue
        ends = list(accumulate(node.args[4] for node in nodes))
        parts = [buffers.of([node.args[i] for node in nodes]) for i in (1, 2, 3)]
        with graph.inserting_before(nodes[0]):
            whole = graph.call_function(operator, (x, *parts, ends[-1]))
            for node, first, end in zip(nodes, [0, *ends], ends, strict=False):
                part = graph.call_function(torch.ops.aten.slice.Tensor, (whole, -1, first, end))
                node.replace_all_uses_with(part)
        for node in nodes:
            graph.erase_node(node)
    exported.graph_module.recompile()
    return buffers.made


class _Joined:
    """New buffers of an exported program, each made of several that it has.

    Attributes:
        made: by name, the names of their parts.
    """

    def __init__(self, exported: Any) -> None:
        self.exported, self.specs = exported, exported.graph_signature.input_specs
        self.names = {spec.arg.name: spec.target for spec in self.specs}  # of weights by placeholder
        self.made: dict[str, list[str]] = {}
        self.placeholders: dict[tuple[str, ...], fx.Node] = {}

    def of(self, parts: list[fx.Node]) -> fx.Node:
        """The placeholder of a buffer in which these follow each other."""
        names = [self.names[part.name] for part in parts]
        if tuple(names) not in self.placeholders:
            self.placeholders[tuple(names)] = self._add(names)
        return self.placeholders[tuple(names)]

    def _add(self, names: list[str]) -> fx.Node:
        graph, state, name = self.exported.graph, self.exported.state_dict, f"joined_{len(self.made)}"
        state[name], self.made[name] = torch.cat([state[one] for one in names]), names
        first = next(node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_before(first):
            node = graph.placeholder(f"b_{name}")
        node.meta["val"] = first.meta["val"].fake_mode.from_tensor(state[name])
        self.specs.insert(0, InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True))
        return node
