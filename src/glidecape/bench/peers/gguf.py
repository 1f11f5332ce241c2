"""A model folder as one GGUF file in the precision asked for, so that llama.cpp can run the same weights.

Llama and Qwen3 models with a byte-level BPE. Everything else is refused: a wrong conversion would decode quietly on.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...errors import InputError

ALIGNMENT = 32  # bytes; GGUF's default
VERSION = 3
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}  # ggml's numbers
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # token types

GLOBAL_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: str | Path, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model in `folder` (config.json, safetensors, tokenizer.json) to `path`.

    Matrices have `dtype`; vectors (norms) are float32, as llama.cpp expects.

    Raises:
        InputError: an architecture, rotary scaling, activation, bias or tokenizer that is not converted here, or a dtype that
            is not float32, float16 or bfloat16.
    """
    folder = Path(folder)
    if dtype not in TYPES:
        raise InputError(f"GGUF is written in float32, float16 or bfloat16, not {dtype}")
    config = _json(folder / "config.json")
    heads = _check(config, folder)
    facts = _facts(config, folder, dtype)
    tensors = [
        (name, t.to(dtype if t.ndim > 1 else torch.float32))
        for name, t in _tensors(folder, config["model_type"], heads)
    ]
    with path.open("wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(facts)))
        for key, value in facts.items():
            out.write(_string(key) + _typed(value))
        offset = 0
        for name, tensor in tensors:
            shape = tuple(reversed(tensor.shape))
            out.write(_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
            out.write(struct.pack("<IQ", TYPES[tensor.dtype], offset))
            offset += _padded(tensor.nbytes)
        _pad(out)
        for _, tensor in tensors:
            out.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
            _pad(out)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} is missing: GGUF is made from a model folder with {path.name}")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _check(config: dict[str, Any], folder: Path) -> tuple[int, int]:
    """(query heads, key-value heads); refuses what would be converted wrongly."""
    kind = config.get("model_type")
    rope = config.get("rope_parameters") or {}
    refused = {
        f"architecture {kind}": kind not in ("llama", "qwen3"),
        f"rotary scaling {rope.get('rope_type')}": rope.get("rope_type", "default") != "default"
        or bool(config.get("rope_scaling")),
        f"activation {config.get('hidden_act')}": config.get("hidden_act") != "silu",
        "biases": bool(config.get("attention_bias") or config.get("mlp_bias")),
    }
    if found := [what for what, there in refused.items() if there]:
        raise InputError(
            f"{folder} cannot be converted to GGUF here: {', '.join(found)}; use llama.cpp's own converter"
        )
    heads = int(config["num_attention_heads"])
    return heads, int(config.get("num_key_value_heads") or heads)


def _facts(config: dict[str, Any], folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The file's keys: sizes of the model, and its tokenizer. ints are 32-bit, as llama.cpp expects."""
    kind, heads = config["model_type"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    context = config["max_position_embeddings"]
    if "sliding_attention" in config.get("layer_types", ()) or config.get("use_sliding_window"):
        context = min(
            context, config["sliding_window"]
        )  # llama.cpp's qwen3 has no windows: exact up to the first's end
    own = {
        "context_length": context,
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "vocab_size": config["vocab_size"],
    }
    facts: dict[str, Any] = {"general.architecture": kind, "general.name": folder.name}
    facts["general.file_type"] = FILE_TYPES[dtype]
    return facts | {f"{kind}.{key}": value for key, value in own.items()} | _tokenizer(config, folder)


def _tokenizer(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The vocabulary and merges. How text is split before BPE is not told: token ids are fed, not text."""
    written = _json(folder / "tokenizer.json")
    model = written["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise InputError(f"{folder / 'tokenizer.json'} is not a byte-level BPE: use llama.cpp's own converter")
    size = config["vocab_size"]
    tokens = [f"<unused {i}>" for i in range(size)]
    types = [UNUSED] * size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in written.get("added_tokens", ()):
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added.get("special") else NORMAL
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    facts: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,
    }
    for name in ("bos", "eos"):
        given = config.get(f"{name}_token_id")
        if given is not None:
            facts[f"tokenizer.ggml.{name}_token_id"] = given[0] if isinstance(given, list) else given
    return facts


def _tensors(folder: Path, kind: str, heads: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no safetensors: GGUF is made from them")
    for file in files:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (safe_open is not a dict)
                new = tensor_name(name)
                tensor = weights.get_tensor(name)
                if kind == "llama" and new.endswith(("attn_q.weight", "attn_k.weight")):
                    tensor = interleaved(tensor, heads[0] if new.endswith("attn_q.weight") else heads[1])
                yield new, tensor


def tensor_name(name: str) -> str:
    """GGUF's name of a transformers tensor.

    Raises:
        InputError: a tensor that neither architecture has.

    >>> tensor_name("model.layers.3.self_attn.q_proj.weight"), tensor_name("model.norm.weight")
    ('blk.3.attn_q.weight', 'output_norm.weight')
    """
    stem = name.removesuffix(".weight")
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.weight"
    parts = stem.split(".", 3)
    if parts[:2] == ["model", "layers"] and len(parts) == 4 and parts[3] in LAYER_NAMES and name.endswith(".weight"):
        return f"blk.{parts[2]}.{LAYER_NAMES[parts[3]]}.weight"
    raise InputError(f"tensor '{name}' has no place in a GGUF file made here: use llama.cpp's own converter")


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection `(heads * size, width)` in the order of llama.cpp's rotary for Llama.

    transformers rotates dimension i of a head with i + size / 2; llama.cpp rotates 2 i with 2 i + 1.
    """
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    """A value with the number of its type before it."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if value and isinstance(value[0], int):
        return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pad(out: BinaryIO) -> None:
    out.write(b"\0" * (_padded(out.tell()) - out.tell()))
