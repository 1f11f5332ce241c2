"""Everything that depends on a library's version: names that transformers and PyTorch changed, and their inner interfaces.

No other module may look at a version, or at a name that a release renamed. `make test-oldest` and `make test-newest` run
the suite on both ends of the range in pyproject.toml.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.pytorch_utils import Conv1D

__all__ = [
    "CACHE_ARGUMENTS",
    "Cache",
    "Conv1D",
    "DynamicCache",
    "GenerateDecoderOnlyOutput",
    "attend_without_plans",
    "attention_of",
    "build_library",
    "cache_argument",
    "cache_of",
    "causal_mask_function",
    "chunked_causal_mask_function",
    "compile_anywhere",
    "compile_for_gpu",
    "compile_to",
    "cpu_has_bfloat16",
    "export_program",
    "free_threads",
    "graphs_compiled",
    "hooks_of",
    "int8_parts",
    "is_the_callers",
    "load_for_gpu",
    "load_package",
    "pack_weight",
    "packed_linear",
    "register_attention",
    "set_attention",
    "sliding_window_causal_mask_function",
    "token_ids",
    "without_weight_bars",
    "writes_of",
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


@contextmanager
def without_weight_bars() -> Iterator[None]:
    """While it lasts, transformers draws no bar for the weights that it reads or writes. Downloads keep theirs, which
    transformers would switch off as well."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging

    drawn, downloads = logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()
        if not downloads:
            hub.disable_progress_bars()


def register_attention(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make an attention function and its mask function known to transformers under a name of ours."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def attention_of(config: Any) -> str:
    """The name of the attention that a model with this configuration uses."""
    return config._attn_implementation


def set_attention(config: Any, name: str) -> None:
    """Let a model with this configuration use that attention; unlike `set_attn_implementation`, unchecked."""
    config._attn_implementation = name


def token_ids(generation_config: Any, kind: str) -> Tensor | None:
    """The token ids that `generate` made ready of a configuration; `kind` is "eos" or "pad"."""
    return getattr(generation_config, f"_{kind}_token_tensor")


def is_the_callers(cache: Any) -> bool:
    """Is this a cache that the caller of `generate` passed? It prepares an empty one of its own where there is none."""
    return cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0)


def hooks_of(module: Any) -> Iterator[Any]:
    """accelerate's hooks of a module."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def compile_anywhere() -> CompileConfig:
    """How `generate` compiles; without it, it does so on a GPU only."""
    config = CompileConfig()
    config._compile_all_devices = True
    return config


def graphs_compiled() -> int:
    """Graphs that torch.compile made so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def writes_of(tensor: Tensor) -> int | None:
    """How often it was written; None where PyTorch does not count: in inference mode, and on a CPU, where numpy writes, too."""
    return tensor._version if tensor.is_cuda and not tensor.is_inference() else None


def pack_weight(weight: Tensor) -> Tensor:
    """A weight `(outputs, inputs)` in oneDNN's blocks.

    Products are made by kernels for one number of rows each, about a megabyte a kernel. oneDNN and PyTorch's layer above it
    keep the last 1,024 of them, which prompts of many lengths fill: over a gigabyte. So they keep 64 here, unless the user
    chose otherwise or a product was made before: both read these variables when they are first used.

    Raises:
        RuntimeError, AttributeError: this build of PyTorch lacks the operator, which is private.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, "64")
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b with a weight from `pack_weight`; raises as it does."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def int8_parts(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Of a weight `(outputs, inputs)` that torchao keeps in int8, the int8 values and a scale an output, `(outputs,)`; None of
    any other, of one with scales of parts of an output, and of one whose inputs are to be rounded, too."""
    values, scales, zeros = (getattr(weight, name, None) for name in ("qdata", "scale", "zero_point"))
    if not isinstance(values, Tensor) or values.dtype != torch.int8 or not isinstance(scales, Tensor):
        return None
    rounds_inputs = getattr(weight, "act_quant_kwargs", None) is not None
    if rounds_inputs or scales.numel() != weight.shape[0] or (zeros is not None and bool(zeros.any())):
        return None
    return values, scales.flatten().float()


def export_program(program: nn.Module, inputs: tuple[Any, ...], dynamic: tuple[Any, ...]) -> Any:
    """`torch.export`, with sizes 0 and 1 taken for what they are: one program serves one row and many."""
    with _inductor():
        import torch.fx.experimental._config as export_config

        patch: Any = export_config
        with patch.patch(backed_size_oblivious=True), _OuterProducts():
            return torch.export.export(
                program, inputs, dynamic_shapes=dynamic, strict=False, prefer_deferred_runtime_asserts_over_guards=True
            )


class _OuterProducts(TorchFunctionMode):
    """A column times a row is a product that broadcasts, not a matrix product.

    transformers 5.17 computes rotary angles as such a matrix product; a program exported with it asserts that there is more
    than one row.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
            column, row = args
            inner = column.shape[-1]
            if isinstance(inner, int) and inner == 1 and row.ndim > 1:
                return (row.mT * column.mT).mT
        return function(*args, **(kwargs or {}))


def compile_to(path: str, exported: Any, functions: dict[str, str], joined: dict[str, list[str]], folder: Path) -> None:
    """Compile an exported program to a package at `path`, without its weights: `load_package` is given them.

    Args:
        functions: by operator of ours, the declaration of the C function that the program calls for it.
        joined: by buffer of the program's own, the weights that it is made of, one after another.
        folder: for what the compiler makes on the way, and headers that it reads once.
    """
    numbers = {
        one.target: _as_json(exported.constants[one.target])  # that its code names
        for one in exported.graph_signature.input_specs
        if one.kind.name == "CONSTANT_TENSOR"
    }
    options: dict[str, Any] = {
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.metadata": {"joined": json.dumps(joined), "numbers": json.dumps(numbers)},
        "cpp.dynamic_threads": True,  # as many threads as PyTorch has when it runs
    }
    options["aot_inductor.custom_ops_to_c_shims"] = {
        getattr(getattr(torch.ops, space), name).default: [declaration]
        for (space, name), declaration in ((one.split("::"), text) for one, text in functions.items())
    }
    with _inductor(folder) as inductor:
        inductor.aoti_compile_and_package(exported, package_path=path, inductor_configs=options)


def build_library(sources: Path, path: Path, folder: Path) -> None:
    """Compile the C++ files in `sources`, which use PyTorch's C interface, to a shared library at `path`, for this CPU.

    Args:
        folder: as for `compile_to`.

    Raises:
        RuntimeError and others of the builder: it cannot be compiled.
    """
    with _inductor(folder):
        from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        # Multiplying and adding are one instruction.
        flags = ["-ffp-contract=fast"]
        options = CppTorchOptions(pick_vec_isa(), include_pytorch=True, warning_all=False, extra_flags=flags)
        files = [str(one) for one in sorted(sources.glob("*.cpp"))]
        builder = CppBuilder(path.stem, files, options, output_dir=str(path.parent))
        builder.build()
        os.replace(builder.get_target_file_path(), path)


def load_package(
    path: str, weights: dict[str, Tensor], join: Callable[[dict[str, list[str]]], dict[str, Tensor]]
) -> Callable[[list[Tensor]], list[Tensor]]:
    """The program of a package: flat inputs to flat outputs.

    Args:
        weights: which it reads where they are.
        join: makes weights, by name, of others one after another.

    Raises:
        RuntimeError: it cannot be loaded, or reads weights that are not there.
    """
    with _inductor() as inductor:
        # The loader itself: the public wrapper flattens its arguments in Python at each call.
        loader = inductor.aoti_load_package(path).loader
    written = loader.get_metadata()
    joined = join(json.loads(written["joined"]))
    numbers = {name: _from_json(one) for name, one in json.loads(written["numbers"]).items()}
    known, wanted = {**weights, **joined, **numbers}, loader.get_constant_fqns()
    if missing := set(wanted) - known.keys():
        raise RuntimeError(f"it needs {', '.join(sorted(missing))}, which no module holds")
    run: Any = partial(loader.run)
    run.weights = {name: known[name] for name in wanted}  # theirs is the memory that the program reads
    loader.load_constants(run.weights, use_inactive=False, check_full_update=True, user_managed=True)
    return run


def _as_json(number: Tensor) -> list[Any]:
    return [number.tolist(), str(number.dtype).removeprefix("torch."), str(number.device)]


def _from_json(written: list[Any]) -> Tensor:
    value, dtype, device = written
    return torch.tensor(value, dtype=getattr(torch, dtype), device=device)


def compile_for_gpu(path: Path, exported: Any, folder: Path) -> None:
    """Compile an exported program by Inductor to a file that `load_for_gpu` reads; weights stay where they are.

    Args:
        folder: for what the compiler keeps.

    """
    fakes = [node.meta["val"] for node in exported.graph_module.graph.nodes if node.op == "placeholder"]
    with _inductor(folder) as inductor:
        made = inductor.standalone_compile(exported.graph_module, fakes, dynamic_shapes="from_graph")
        made.save(path=str(path), format="binary")
    held: list[Any] = []  # what it takes before its inputs: names of weights, and numbers that its code names
    for one in exported.graph_signature.input_specs:
        if one.kind.name in ("PARAMETER", "BUFFER"):
            held.append(one.target)
        elif one.kind.name == "CONSTANT_TENSOR":
            held.append(_as_json(exported.constants[one.target]))
    with path.open("ab") as file:  # after the artifact, whose length the last 8 bytes tell
        file.write(json.dumps(held).encode() + path.stat().st_size.to_bytes(8, "little"))


def load_for_gpu(path: Path, module: nn.Module, folder: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    """The program of a file from `compile_for_gpu`: flat inputs to flat outputs.

    Args:
        module: whose weights it reads.

    Raises:
        RuntimeError: it cannot be loaded, or reads weights that the module has not.
    """
    content = path.read_bytes()
    size = int.from_bytes(content[-8:], "little")
    named = dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))
    held = json.loads(content[size:-8])
    if missing := {one for one in held if isinstance(one, str)} - named.keys():
        raise RuntimeError(f"it needs {', '.join(sorted(missing))}, which no module holds")
    first = [named[one].detach() if isinstance(one, str) else _from_json(one) for one in held]
    with _inductor(folder) as inductor, TemporaryDirectory(dir=folder) as own:
        artifact = Path(own) / "artifact"
        artifact.write_bytes(content[:size])
        run = inductor.CompiledArtifact.load(path=str(artifact), format="binary")
    return lambda inputs: list(run(*first, *inputs))


def attend_without_plans(device: torch.device) -> None:
    """Keep PyTorch from cuDNN's attention on a GPU: it makes a plan for each new number of keys, and each token brings one.

    On an H200 bfloat16 decoded at an eighth of float32's pace, 65 ms a token (dev/LOG.md).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def free_threads() -> None:
    """End the OpenMP threads of the calling thread; they come back when it computes again. To be called before another thread
    decodes.

    GNU's OpenMP lets its threads wait awake only while there are no more of them than CPUs, idle ones of other threads counted.
    Asleep, they are woken for each operator, which made decoding five to ten times slower (dev/LOG.md).
    """
    pause = _pause_openmp()
    if pause is not None:
        pause(1)  # omp_pause_soft: settings such as the number of threads stay


@cache
def _pause_openmp() -> Callable[[int], int] | None:
    """OpenMP 5.0's `omp_pause_resource_all` of the library that PyTorch has loaded, GNU's on Linux."""
    return getattr(ctypes.CDLL(None), "omp_pause_resource_all", None) if sys.platform == "linux" else None


@contextmanager
def _inductor(folder: Path | None = None) -> Iterator[Any]:
    """PyTorch's compiler, slow to import, without what it says about its own deprecated parts.

    Args:
        folder: it keeps what it makes in a folder in there; None: where it does without us, or nowhere.
    """
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        import torch._inductor

        if folder is not None:
            from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

            stack.enter_context(temporary_cache_dir(str(folder / "inductor")))
        yield torch._inductor


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions; without them, such products are emulated and slow."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # PyTorch has no public question for this
    return known is not None and bool(known())
