"""Loading a target's model folder: all of its weights and nothing else, or a sentence that says why not."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..compat import without_weight_bars
from ..errors import CheckpointError, first_line
from ..progress import note

SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
COPY = "copy it there again"


def local_folder(name: str | Path, revision: str | None = None) -> Path | None:
    """The folder that `name` stands for, or None where it is a model of the Hub ("owner/model", or one word).

    Raises:
        CheckpointError: a path where no model folder is, or a model that is not in the cache while the Hub is out of reach.
    """
    if not str(name):
        raise CheckpointError("the model has an empty name: name a folder with config.json, or a Hub model")
    folder = Path(name).expanduser()
    if not isinstance(name, Path) and not folder.exists() and may_be_on_hub(name):
        _check_reachable(name, revision)
        return None
    if folder.is_file():
        raise CheckpointError(f"{name} is a file: name the model's folder, the one that holds config.json")
    if not folder.is_dir():
        raise CheckpointError(f"no model folder at {name}: name a folder with config.json, or a Hub model")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{name} has no config.json, so it is no Hugging Face model folder; a draft's folder belongs to --draft"
        )
    return folder


def pinned(name: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """A name and the revision that it is pinned to: "owner/model@revision" is one of the Hub's; folders have none.

    Args:
        revision: branch, tag or commit that was asked for, which goes before that of the name.

    >>> pinned("owner/model@1a2b3c")
    ('owner/model', '1a2b3c')
    """
    name = str(name)
    if "@" in name and not Path(name).expanduser().exists():
        name, _, own = name.partition("@")
        revision = revision or own or None
    return name, revision


def commit_of(name: str, revision: str | None) -> str | None:
    """The commit of a Hub model that was loaded, by its folder in the cache; None: not known, or a folder of one's own."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).expanduser().exists():
        return None
    kept = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(kept).parent.name if isinstance(kept, str) else None


def load_model(
    name: str | Path, dtype: str | torch.dtype, options: dict[str, Any], device_map: str | dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """The causal LM and the tokenizer of a folder or a Hub name.

    Args:
        options: for the model and the tokenizer; `device_map` is the model's alone.

    Raises:
        CheckpointError: nothing there; a configuration, tokenizer or weights that are missing, damaged, do not belong
            together, or are stored as a pickle that cannot be loaded safely.
    """
    from transformers import AutoModelForCausalLM

    if not isinstance(name, Path):
        name, revision = pinned(name, options.get("revision"))
        options = options | {"revision": revision}
    folder = local_folder(name, options.get("revision"))
    if folder is not None:
        _check_files(folder)
        if options.get("revision") is not None:
            note(f"{name} is a folder, so revision {options['revision']} has no effect")
    try:
        # transformers answers weights of another shape with advice for its own callers, so `_check_report` answers them.
        with without_weight_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                str(folder or name),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                device_map=device_map,
                **options,
            )
    except Exception as error:  # a model's own code may raise anything
        raise _loading_error(name, folder, error) from None
    _check_report(name, model, report)
    return model, _load_tokenizer(name, folder, options)


def _load_tokenizer(name: str | Path, folder: Path | None, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder or name), **options)
    except Exception as error:  # tokenizers raises plain exceptions
        reason = first_line(error).rstrip(".")
        raise CheckpointError(
            f"cannot load the tokenizer of {name} ({reason}): copy its tokenizer files there again"
        ) from None
    if not len(tokenizer):
        raise CheckpointError(f"the tokenizer of {name} has no tokens: copy its tokenizer files there again")
    return tokenizer


def may_be_on_hub(name: str) -> bool:
    """Whether `name` can be a Hub model's, and does not look like a mistyped path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    # A path whose first part is a folder here is a mistyped path: asking the Hub for it would take long.
    parent = Path(name).parent
    return not name.startswith((".", "~")) and (parent == Path() or not parent.is_dir())


def _check_reachable(name: str, revision: str | None) -> None:
    """One request without retries: transformers repeats its own for 23 seconds when there is no network."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    advice = "check the spelling of the path, or download the model first"
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            f"no model folder at {name}, and no model of that name in the cache (HF_HUB_OFFLINE is set): {advice}"
        )
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision))
    except Exception as error:
        # Versions of huggingface_hub use different HTTP libraries. All other errors are left to transformers.
        if {"ConnectError", "ConnectionError"} & {kind.__name__ for kind in type(error).__mro__}:
            raise CheckpointError(
                f"no model folder at {name}, and the Hugging Face Hub cannot be reached ({first_line(error)}): {advice}"
            ) from None


def _check_files(folder: Path) -> None:
    """Refuse what transformers reports badly or not at all: it ignores a damaged generation_config.json."""
    _check_sizes(folder / "config.json", _read_object(folder / "config.json"))
    for name in ("generation_config.json", SAFE[1], PICKLES[1]):
        if (folder / name).exists():
            content = _read_object(folder / name)
            if name.endswith("index.json") and not isinstance(content.get("weight_map"), dict):
                raise CheckpointError(f"{folder / name} has no weight_map: {COPY}")
    if not any(path.suffix in {".safetensors", ".bin"} for path in folder.iterdir()):
        raise CheckpointError(f"{folder} holds no weights: copy model.safetensors there")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({first_line(error)}): {COPY}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object: {COPY}")
    return content


def _check_sizes(path: Path, config: dict[str, Any]) -> None:
    """transformers fills missing sizes with a default, and then complains about the weights instead."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{path} does not name its model_type: is it a Hugging Face model folder?")
    if kind not in CONFIG_MAPPING or (known := CONFIG_MAPPING[kind]).sub_configs:
        return  # A model with code of its own may use other names; a composite model may leave out its parts' defaults.
    for name in ("vocab_size", "hidden_size"):
        alias = known.attribute_map.get(name, name)
        size = config.get(name, config.get(alias))
        if not isinstance(size, int) or size < 1:
            found = "no" if size is None else f"{json.dumps(size)} as"
            raise CheckpointError(f"{path} gives {found} {alias}: {COPY}, as it was saved with the weights")


def _loading_error(name: str | Path, folder: Path | None, error: Exception) -> CheckpointError:
    stored = "" if folder is None else next((file for file in (*SAFE, *PICKLES) if (folder / file).exists()), "")
    if isinstance(error, pickle.UnpicklingError):
        return CheckpointError(
            f"cannot load {name}: its weights are a pickle{stored and f' ({stored})'} that could run any code when it is "
            "loaded; use a copy whose weights are model.safetensors, or convert them to safetensors with `save_pretrained` on "
            "a machine that may run it"
        )
    if type(error).__name__ == "SafetensorError" or "PytorchStreamReader" in str(error):
        reason = first_line(error).split(". ")[0]
        return CheckpointError(f"the weights of {name} are torn ({reason}): copy {stored or 'them'} there again")
    reason = first_line(error)
    if reason.endswith(":"):  # some errors name the field first, and the trouble on the next line
        reason = " ".join(str(error).split())[:300]
    if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
        reason += f" ({type(error).__name__}); check the values in its config.json"
    return CheckpointError(f"cannot load {name} as a causal LM: {reason}")


def _check_report(name: str | Path, model: Any, report: dict[str, Any]) -> None:
    """Refuse weights that are not exactly those of the model: transformers makes missing ones up at random."""
    wrong = "config.json and the weights belong to different models: copy both from one place again"
    missing, tied = set(report["missing_keys"]), getattr(model, "all_tied_weights_keys", None) or {}
    # Without an embedding, the head that is tied to it is not missing as well.
    if names := {key for key in missing if tied.get(key) not in missing}:
        raise CheckpointError(
            f"the weights of {name} lack {_listed(names)}: copy the weights there again, and check that config.json "
            "was saved with them"
        )
    if shapes := sorted(report["mismatched_keys"]):
        differences = [f"{key} is {tuple(found)} instead of {tuple(expected)}" for key, found, expected in shapes]
        raise CheckpointError(
            f"the weights of {name} do not have the shapes that its config.json asks for in {_listed(differences)}; {wrong}"
        )
    if names := set(report["unexpected_keys"]) - set(_recomputed(model, report["unexpected_keys"])):
        raise CheckpointError(f"the weights of {name} hold {_listed(names)} beyond those of its config.json; {wrong}")


def _recomputed(model: Any, keys: Iterable[str]) -> Iterator[str]:
    """Those of the unexpected tensors that old versions saved and new ones compute, such as GPT-Neo's causal masks."""
    buffers = {buffer for buffer, _ in model.named_buffers()}
    for key in keys:
        own = key.removesuffix("masked_bias") + "bias" if key.endswith(".masked_bias") else key
        if own in buffers or f"{model.base_model_prefix}.{own}" in buffers:
            yield key


def _listed(keys: Iterable[str]) -> str:
    """The number of tensors, and the first three names."""
    names = sorted(keys)
    some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} ({some})"
