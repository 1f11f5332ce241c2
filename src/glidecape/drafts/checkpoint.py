"""Draft checkpoints: one safetensors file that carries its own description, so that a write is all or nothing.

`draft.safetensors` holds the weights, and in its metadata the JSON that `card.json` repeats for human readers: format
number, kind, configuration with max lag, the target's fingerprint and name, the command and the figures.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import CheckpointError, MismatchError, first_line
from ..files import write_atomic
from ..target.loading import may_be_on_hub, pinned
from ..target.packed import draft_products
from ..target.target import Target
from .card import CARD, FORMAT, STATE, WEIGHTS, Card, checked, read_card_text
from .causal_lm import StandaloneDraft
from .eagle.adapter import EagleDraft
from .eagle.config import EagleConfig
from .eagle.network import EagleModel
from .formats import config_of, tensors_of
from .glide.adapter import GlideDraft
from .glide.config import GlideConfig
from .glide.network import GlideModel
from .medusa.adapter import MedusaDraft
from .medusa.config import MedusaConfig
from .medusa.network import MedusaModel
from .readme import card_in
from .sharing import name_from

Network = GlideModel | EagleModel | MedusaModel
NetworkDraft = GlideDraft | EagleDraft | MedusaDraft

# By the kind that a checkpoint names: the configuration, the network, and what joins it to the decode loop.
KINDS: dict[str, tuple[Any, Any, Any]] = {
    GlideModel.kind: (GlideConfig, GlideModel, GlideDraft),
    EagleModel.kind: (EagleConfig, EagleModel, EagleDraft),
    MedusaModel.kind: (MedusaConfig, MedusaModel, MedusaDraft),
}
_SHAPE_FIELDS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "rope_parameters", "layer_types", "sliding_window"),
)


class TargetFacts(Protocol):
    """What a draft's description is compared with: facts of a `Target`, or of a model that another engine has loaded.

    Attributes:
        tokenizer: None where there is none.
        shapes: `(kv_heads, head_dim)` of each layer.
    """

    text_config: Any
    tokenizer: Any
    shapes: list[tuple[int, int]]

    @property
    def weights_digest(self) -> str | None:
        """Of the weights as they were stored; None where they are not known so."""

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""

    @property
    def embed_width(self) -> int:
        """Width of the embeddings, which in some models is not that of the hidden states."""


def fingerprint(target: TargetFacts) -> dict[str, str | None]:
    """What tells targets apart: sha256 of the shape, of the tokenizer, and of about 1 MB of fixed weight slices."""
    config = target.text_config
    shape = {name: getattr(config, name, None) for name in _SHAPE_FIELDS}
    vocab = target.tokenizer.get_vocab() if target.tokenizer is not None else {}
    return {
        "shape": _sha(json.dumps(shape, sort_keys=True, default=str)),
        "tokenizer": _sha(json.dumps(sorted(vocab.items()))),
        "weights": target.weights_digest,
    }


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_fingerprint(saved: dict[str, str], target: TargetFacts, where: str) -> None:
    """Refuse a draft of another target; a note for the same shape with other weights.

    Raises:
        MismatchError: another shape or tokenizer.
    """
    own = fingerprint(target)
    for part, what in (("shape", "a target of another shape"), ("tokenizer", "a target with another tokenizer")):
        if part == "tokenizer" and target.tokenizer is None:
            continue  # token ids only: there is nothing to compare, and the shape holds the vocabulary's size
        if saved.get(part) != own[part]:
            raise MismatchError(f"the draft in {where} was trained for {what}: train one for this target")
    if own["weights"] is not None and saved.get("weights") != own["weights"]:
        warnings.warn(
            f"the draft in {where} was trained for other weights of this architecture; the output stays the target's, "
            "but fewer tokens may be accepted",
            stacklevel=5,
        )


def save_network(
    folder: Path, module: Network, target: Target, command: str, figures: dict[str, Any], dtype: torch.dtype
) -> None:
    """Write the checkpoint of a draft network; weights in `dtype`.

    Raises:
        CheckpointError: the disk is full or the folder not writable; an earlier checkpoint there stays whole.
    """
    card = {
        "format": FORMAT,
        "kind": module.kind,
        "config": asdict(module.config),
        "fingerprint": fingerprint(target),
        "command": command,
        "figures": figures,
        "target": name_from(folder, target.pinned_name),
    }
    tensors = {
        name: t.detach().to(dtype if t.is_floating_point() else t.dtype).contiguous().cpu()
        for name, t in module.state_dict().items()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder} ({error.strerror or error})") from None
    content = save(tensors, metadata={"glidecape": json.dumps(card)})
    write_atomic(folder / WEIGHTS, lambda path: path.write_bytes(content))
    write_atomic(folder / CARD, lambda path: path.write_text(json.dumps(card, indent=1) + "\n"))


def read_card(folder: Path) -> Card:
    """The description of a draft network's checkpoint.

    Raises:
        CheckpointError: missing, torn, of a newer format, of a kind that this version does not know, or with a field that
            is missing, unknown or wrong.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise _no_draft(folder, f"it has no {WEIGHTS} (make one with `glidecape train`)")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})["glidecape"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is torn or not a GlideCape draft ({type(error).__name__}: {error})") from None
    try:
        return read_card_text(text, tuple(KINDS))
    except ValueError as error:
        raise CheckpointError(f"{path} is not a draft that can be read: {first_line(error)}") from None


def _check_config(config: Any, target: TargetFacts, path: Path) -> None:
    """Raises ValueError where a configuration does not fit its target, which its fingerprint belongs to, or its file."""
    with safe_open(path, framework="pt") as file:
        largest = max((n for name in file.keys() for n in file.get_slice(name).get_shape()), default=0)  # noqa: SIM118
    # Before a network of that size is made: it could be larger than the memory.
    for name in ("width", "ffn", "heads", "head_dim", "draft_vocab"):
        if getattr(config, name, 0) > largest:
            raise ValueError(f"its {name} is {getattr(config, name)}, and no tensor in it is larger than {largest}")
    layers = len(target.shapes)
    read = [n for reads in getattr(config, "reads", ()) for n in reads] + [getattr(config, "layer", 0)]
    if wrong := [n for n in read if n >= layers]:
        raise ValueError(f"it reads target layer {wrong[0]}, and the target's are 0 to {layers - 1}")
    sizes = {"vocab_size": target.vocab_size, "hidden_size": target.hidden_size}
    sizes["embed_width"] = target.embed_width
    if hasattr(config, "reads"):
        sizes["target_kv_heads"], sizes["target_head_dim"] = target.shapes[read[0]]
        if config.target_heads % config.target_kv_heads or config.draft_vocab > config.vocab_size:
            raise ValueError("its numbers of heads or tokens do not fit together")
    elif hasattr(config, "kv_heads") and config.heads % config.kv_heads:
        raise ValueError("its numbers of heads do not fit together")
    for name, size in sizes.items():
        if getattr(config, name, size) != size:
            raise ValueError(f"its {name} is {getattr(config, name)}, and the target's is {size}")


def _read_tensors(path: Path, card: Card, config: Any, module: Network) -> dict[str, Tensor]:
    """The weights of a draft file, if they are exactly those of its network.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape, or hold values that are not finite numbers.
    """
    tensors = tensors_of(path, card.format, config)
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    for what, names in (
        ("lacks", wanted.keys() - shapes.keys()),
        ("holds, beside those of its network,", shapes.keys() - wanted.keys()),
        ("has another shape for", {name for name in wanted.keys() & shapes.keys() if wanted[name] != shapes[name]}),
        ("holds values that are not finite in", {n for n, t in tensors.items() if not bool(t.isfinite().all())}),
    ):
        if names:
            raise ValueError(f"it {what} {len(names)} tensor(s): {', '.join(sorted(names)[:3])}")
    return tensors


def read_unbound(folder: Path, target: TargetFacts) -> Network:
    """The weights of a draft network in float32, checked against the target that it is for, and not bound to it.

    Raises:
        CheckpointError: see `read_card`; also weights that don't fit the description.
        MismatchError: trained for another target.
    """
    card, path = read_card(folder), folder / WEIGHTS
    form, network, _ = KINDS[card.kind]
    try:
        config = checked(form, config_of(card.config, card.format, target.hidden_size))
        check_fingerprint(card.fingerprint.model_dump(), target, str(folder))
        _check_config(config, target, path)
        module: Network = network(config)
        module.load_state_dict(_read_tensors(path, card, config, module))
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit its description: {first_line(error)}") from None
    return module


def check_file(folder: Path) -> None:
    """Compare a draft's file with its description, without a target: see `read_unbound` for what needs one.

    Raises:
        CheckpointError: see `read_card`; also weights that don't fit the description, and a draft of format 1, whose
            description does not say what its target is like.
    """
    card, path = read_card(folder), folder / WEIGHTS
    if card.format == 1:
        raise CheckpointError(
            f"{path} has the format of version 0.1: load it with its model and `save_pretrained` it first"
        )
    form, network, _ = KINDS[card.kind]
    try:
        config = checked(form, card.config)
        with torch.device("meta"):  # shapes are compared: nothing is made
            module: Network = network(config)
        _read_tensors(path, card, config, module)
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit its description: {first_line(error)}") from None


def check_published(folder: Path, target: str | None = None) -> str | None:
    """Compare the files of a draft, a network's or an LM's, with their descriptions; the target that the card names.

    Args:
        target: what to name instead.

    Raises:
        CheckpointError: see `check_file`; also a card.json that is not the file's, and a folder without a draft's card.
    """
    if (folder / WEIGHTS).is_file():
        check_file(folder)
        card = read_card(folder).model_dump(mode="json")
        if (beside := card_in(folder)) and beside != card:
            raise CheckpointError(
                f"{folder / CARD} is not the description in {WEIGHTS}: delete it, it is written again"
            )
        return target or card["target"]
    if not (card := card_in(folder)):
        raise _no_draft(folder, f"it has no {WEIGHTS} and no {CARD} (make a draft with `glidecape train`)")
    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is torn ({first_line(error)}): train or copy the draft again") from None
    return target or card.get("target")


def read_network(folder: Path, target: Target) -> Network:
    """The same, bound to its target; not made ready for decoding.

    Raises:
        CheckpointError, MismatchError: see `read_unbound`.
    """
    return read_unbound(folder, target).bind(target)


def load_network(folder: Path, target: Target, dtype: torch.dtype | None = None) -> NetworkDraft:
    """A draft network for its target, in the target's dtype unless told otherwise.

    Raises:
        CheckpointError, MismatchError: see `read_network`.
    """
    module, card = read_network(folder, target), read_card(folder)
    module.to(dtype or target.dtype).serve()
    loaded: NetworkDraft = KINDS[card.kind][2](module, card.figures)
    loaded.folder, loaded.target_name = folder, target.pinned_name
    return loaded


def resolve(name: str | Path, revision: str | None = None, **download: Any) -> Path:
    """A local folder, or the snapshot of a Hub repository, "owner/name" or "owner/name@revision".

    Args:
        revision: branch, tag or commit, which goes before that of the name.
        download: `token`, `cache_dir` and `local_files_only`, as in `huggingface_hub.snapshot_download`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{name} is a file: name the folder that holds it, {folder.parent}")
    repo_id, revision = pinned(name, revision)
    if repo_id.count("/") != 1 or not may_be_on_hub(repo_id):
        raise CheckpointError(
            f"no draft folder at {name}: check the path, train a draft with `glidecape train`, or leave it out and use "
            "--method lookup"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, **download))
    except RevisionNotFoundError:
        raise CheckpointError(
            f"{repo_id} has no branch, tag or commit {revision} on the Hub: check its spelling"
        ) from None
    except Exception as error:
        raise CheckpointError(
            f"{name} is neither a folder here nor a repository of the Hub ({first_line(error)})"
        ) from None


def _no_draft(folder: Path, lacks: str) -> CheckpointError:
    if (folder / STATE).is_dir():
        return CheckpointError(
            f"the training in {folder} has not ended: give its `glidecape train` command again, which resumes it"
        )
    return CheckpointError(f"no draft in {folder}: {lacks}")


def load_draft(
    name: str | Path, target: Target, revision: str | None = None, **download: Any
) -> NetworkDraft | StandaloneDraft:
    """A draft by folder or Hub name: a checkpoint of ours, or any causal LM with the target's vocabulary.

    Args:
        revision: branch, tag or commit of a draft on the Hub.
        **download: see `resolve`.

    Raises:
        CheckpointError, MismatchError, UnsupportedError: missing, torn, of another target, or not decodable.

    >>> from glidecape import Target, load_draft
    >>> load_draft("path/to/draft", Target.from_pretrained("path/to/model")).kind
    'glide'
    """
    folder = resolve(name, revision, **download)
    if (folder / WEIGHTS).is_file():
        return load_network(folder, target)
    if not (folder / "config.json").is_file():
        raise _no_draft(folder, f"it holds neither {WEIGHTS} nor a causal LM (config.json)")
    products = draft_products(target.dtype)
    model = Target.from_pretrained(folder, dtype=target.dtype, device=str(target.device), pack=products)
    if model.vocab_size != target.vocab_size:
        raise MismatchError(
            f"the draft LM in {folder} has {model.vocab_size} tokens, the target {target.vocab_size}: vanilla speculative "
            "decoding needs one vocabulary"
        )
    if model.context < target.context:
        warnings.warn(
            f"the draft LM in {folder} has a context of {model.context} tokens, the target {target.context}: past it the "
            "output stays the target's, but few tokens will be accepted",
            stacklevel=2,
        )
    if target.tokenizer is not None and model.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise MismatchError(f"the draft LM in {folder} has another tokenizer than the target")
    loaded = StandaloneDraft(model)
    loaded.folder, loaded.target_name = folder, target.pinned_name
    return loaded
