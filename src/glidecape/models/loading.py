"""Loading a target's model folder: all of its weights, from a format that cannot run code, or a sentence that says why not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, first_line

PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SAFE = ("model.safetensors", "model.safetensors.index.json")


def local_folder(name: str | Path) -> Path | None:
    """The folder that `name` stands for, or None where it is a name on the Hub ("owner/model", or one word).

    Raises:
        CheckpointError: a path where no model folder is.
    """
    folder = Path(name).expanduser()
    hub_name = str(name).count("/") <= 1 and not str(name).startswith((".", "/", "~"))
    # A path whose first part is a folder here is a path with a typing error: asking the Hub for it takes long.
    hub_name = hub_name and not (folder.parent != Path() and folder.parent.is_dir())
    if not isinstance(name, Path) and not folder.exists() and hub_name:
        return None
    if not folder.is_dir():
        raise CheckpointError(f"no model folder at {name}: name a folder with config.json, or a Hub model")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name} has no config.json: is it a Hugging Face model folder?")
    return folder


def load_model(name: str | Path, dtype: str | torch.dtype, options: dict[str, Any]) -> tuple[Any, Any]:
    """The causal LM and the tokenizer of a folder or a Hub name.

    Raises:
        CheckpointError: nothing there; a configuration, tokenizer or weights that are missing, damaged, do not belong
            together, or are stored as a pickle that cannot be loaded safely.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = local_folder(name)
    if folder is not None:
        _check_config(folder)
        _check_format(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder or name), dtype=dtype, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"cannot load {name} as a causal LM: {first_line(error)}") from None
    except Exception as error:  # safetensors has its own exception types
        raise CheckpointError(f"the weights of {name} are torn or unreadable: {first_line(error)}") from None
    _check_report(str(name), report)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder or name), **options)
    except Exception as error:
        raise CheckpointError(f"cannot load the tokenizer of {name}: {first_line(error)}") from None
    if not len(tokenizer):
        raise CheckpointError(f"the tokenizer of {name} has no tokens: copy its tokenizer files there again")
    return model, tokenizer


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({first_line(error)}): copy it there again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object: copy the model's configuration there again")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{path} does not name its model_type: is it a Hugging Face model folder?")
    # Nearly all name these; a composite model names them in a part of its own, and a few use names of their own.
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for names in (("vocab_size",), ("hidden_size", "n_embd", "d_model", "dim", "model_dim", "hidden_dim")):
        sizes = [part[name] for part in parts for name in names if name in part]
        if not any(isinstance(size, int) and size > 0 for size in sizes):
            raise CheckpointError(f"{path} gives no {names[0]}: the weights would be read into a model of another size")


def _check_format(folder: Path) -> None:
    if any((folder / name).exists() for name in SAFE):
        return
    if pickle := next((name for name in PICKLES if (folder / name).exists()), None):
        raise CheckpointError(
            f"cannot load {folder}: its weights are a pickle ({pickle}), which can run any code when it is loaded; convert "
            "them to safetensors with `save_pretrained` on a machine that may run it"
        )


def _check_report(name: str, report: dict[str, Any]) -> None:
    """Refuse weights that are not exactly those of the model: transformers makes missing ones up at random."""
    for key, what, advice in (
        ("missing_keys", "lacks", "copy the weights there again, or set config.json to the model that was saved"),
        ("unexpected_keys", "holds, beside those of its model,", "config.json is of another model than the weights"),
        ("mismatched_keys", "has another shape than its model for", "config.json is of another model than the weights"),
    ):
        if names := sorted(_names(report.get(key) or ())):
            some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            raise CheckpointError(f"{name} {what} {len(names)} tensor(s): {some}; {advice}")


def _names(keys: Iterable[Any]) -> list[str]:
    return [key if isinstance(key, str) else str(key[0]) for key in keys]
