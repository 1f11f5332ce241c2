"""A damaged model folder is refused with a sentence; nothing is made up, and no Hub is asked for a path."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glidecape.errors import CheckpointError
from glidecape.models.target import Target

SHARED = Path(__file__).parents[2] / "shared" / "models"


@pytest.fixture
def folder(world, tmp_path: Path) -> Path:
    """A model folder of its own, to be damaged."""
    return Path(shutil.copytree(world["target"], tmp_path / "target"))


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def refused(folder: Path | str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Target.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_refused_with_their_number_and_names(folder: Path) -> None:
    def drop(tensors: dict) -> None:
        for name in [name for name in sorted(tensors) if "mlp" in name][:4]:
            del tensors[name]

    change_weights(folder, drop)
    refused(folder, r"lacks 4 tensor\(s\): model\.layers\.0\.mlp.*, …; copy the weights")


def test_weights_that_the_model_does_not_have_are_refused(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.zeros(2)}))
    refused(folder, r"1 tensor\(s\): model\.layers\.0\.extra\.weight; config\.json is of another model")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    refused(folder, "model.norm.weight|shape")


@pytest.mark.parametrize("more", [1, -1])
def test_another_number_of_layers_is_refused(folder: Path, more: int) -> None:
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    change_config(folder, num_hidden_layers=layers + more, layer_types=None)
    refused(folder, r"tensor\(s\): model\.layers")


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size"])
def test_a_configuration_without_a_size_is_refused(folder: Path, name: str) -> None:
    change_config(folder, **{name: None})
    refused(folder, f"gives no {name}")


@pytest.mark.parametrize(
    "text", ["[1, 2]", "{", "", '"llama"', "[" * 100_000], ids=["list", "torn", "empty", "text", "deep"]
)
def test_a_configuration_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


@pytest.mark.parametrize("content", [None, "", "{}"], ids=["missing", "empty", "no tokenizer"])
def test_a_missing_or_empty_tokenizer_is_refused(folder: Path, content: str | None) -> None:
    for path in folder.glob("token*"):
        path.unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    refused(folder, "tokenizer")


def test_torn_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "torn|cannot load")


def test_a_pickle_is_refused_in_our_own_words(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="convert them to safetensors") as caught:
        Target.from_pretrained(folder)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", ["./no/such/model", "no/such/deep/model", "/no/model", "~/no-such-model"])
def test_a_mistyped_path_is_answered_at_once_without_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    started = time.monotonic()
    refused(name, "no model folder at")
    assert time.monotonic() - started < 1


def test_a_mistyped_name_beside_a_folder_that_exists_is_a_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    refused(f"{folder.parent.name}/tagret", "no model folder at")


def test_tied_heads_and_every_model_at_hand_load(folder: Path) -> None:
    Target.from_pretrained(folder)
    tied = [path.parent for path in SHARED.glob("*/config.json")] if SHARED.is_dir() else []
    for path in tied:
        if json.loads((path / "config.json").read_text()).get("architectures"):
            Target.from_pretrained(path, probe=False, pack=False)
