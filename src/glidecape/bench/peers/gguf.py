"""A model folder as one GGUF file in the precision asked for, so that llama.cpp can run the same weights.

Llama and Qwen3 models with a byte-level BPE. Everything else is refused: a wrong conversion would decode quietly on. The
`gguf` package, llama.cpp's own, knows the format and the names; which numbers belong under them is written here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # GGUF's names


def write_gguf(folder: str | Path, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model in `folder` (config.json, safetensors, tokenizer.json) to `path`.

    Matrices have `dtype`; vectors (norms) are float32, as llama.cpp expects.

    Raises:
        InputError: an architecture, rotary scaling, activation, bias or tokenizer that is not converted here, a dtype that
            is not float32, float16 or bfloat16, or no `gguf` package.
    """
    try:
        import gguf
    except ImportError:
        raise InputError(
            "llama.cpp needs its weights written by the gguf package: pip install 'glidecape[peers]'"
        ) from None
    folder = Path(folder)
    if dtype not in DTYPES:
        raise InputError(f"GGUF is written in float32, float16 or bfloat16, not {dtype}")
    config = _json(folder / "config.json")
    _check(config, folder)
    writer = gguf.GGUFWriter(path, config["model_type"])
    writer.add_name(folder.name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == torch.float32 else f"MOSTLY_{DTYPES[dtype]}"])
    _add_sizes(writer, config)
    _add_tokenizer(writer, config, folder)
    for name, tensor in _tensors(folder, config):
        weight = tensor.to(dtype if tensor.ndim > 1 else torch.float32).contiguous()
        # As bytes, because NumPy has no bfloat16.
        raw = gguf.GGMLQuantizationType[DTYPES[weight.dtype]]
        writer.add_tensor(name, weight.view(torch.uint8).numpy(), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} is missing: GGUF is made from a model folder with {path.name}")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _check(config: dict[str, Any], folder: Path) -> None:
    """Refuse what would be converted wrongly."""
    architecture = config.get("model_type")
    rope = config.get("rope_parameters") or {}
    refused = {
        f"architecture {architecture}": architecture not in ("llama", "qwen3"),
        f"rotary scaling {rope.get('rope_type')}": rope.get("rope_type", "default") != "default"
        or bool(config.get("rope_scaling")),
        f"activation {config.get('hidden_act')}": config.get("hidden_act") != "silu",
        "biases": bool(config.get("attention_bias") or config.get("mlp_bias")),
    }
    if found := [what for what, there in refused.items() if there]:
        raise InputError(
            f"{folder} cannot be converted to GGUF here: {', '.join(found)}; use llama.cpp's own converter"
        )


def _heads(config: dict[str, Any]) -> tuple[int, int]:
    """Query heads and key-value heads."""
    heads = int(config["num_attention_heads"])
    return heads, int(config.get("num_key_value_heads") or heads)


def _add_sizes(writer: Any, config: dict[str, Any]) -> None:
    heads, kv_heads = _heads(config)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    context = config["max_position_embeddings"]
    if "sliding_attention" in config.get("layer_types", ()) or config.get("use_sliding_window"):
        # llama.cpp's qwen3 has no windows: exact up to the first's end.
        context = min(context, config["sliding_window"])
    writer.add_context_length(context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: Any, config: dict[str, Any], folder: Path) -> None:
    """The vocabulary and merges. How text is split before BPE is not told: token ids are fed, not text."""
    from gguf import TokenType

    written = _json(folder / "tokenizer.json")
    model = written["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise InputError(f"{folder / 'tokenizer.json'} is not a byte-level BPE: use llama.cpp's own converter")
    size = config["vocab_size"]
    tokens = [f"<unused {i}>" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, TokenType.NORMAL
    for added in written.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added.get("special") else TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    writer.add_add_bos_token(False)
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        given = config.get(f"{name}_token_id")
        if given is not None:
            add(given[0] if isinstance(given, list) else given)


def _tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The weights under GGUF's names."""
    from gguf import MODEL_ARCH, get_tensor_name_map
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no safetensors: GGUF is made from them")
    architecture, (heads, kv_heads) = config["model_type"], _heads(config)
    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    for file in files:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (safe_open is not a dict)
                new = names.get_name(name, (".weight",)) if name.endswith(".weight") else None
                if new is None:
                    raise InputError(
                        f"tensor '{name}' has no place in a GGUF file made here: use llama.cpp's own converter"
                    )
                tensor = weights.get_tensor(name)
                if architecture == "llama" and new.endswith(("attn_q.weight", "attn_k.weight")):
                    tensor = interleaved(tensor, heads if new.endswith("attn_q.weight") else kv_heads)
                yield new, tensor


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection `(heads * size, width)` in the order of llama.cpp's rotary for Llama.

    transformers rotates dimension i of a head with i + size / 2; llama.cpp rotates 2 i with 2 i + 1.
    """
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)
