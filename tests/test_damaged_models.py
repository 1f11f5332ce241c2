"""A damaged model folder is refused with a sentence; nothing is made up, and no Hub is asked for a path."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, GPTNeoConfig, GPTNeoForCausalLM

import glidecape
from glidecape.errors import CheckpointError
from glidecape.target.loading import _check_sizes, load_model
from glidecape.target.target import Target, digest_of

SHARED = Path(__file__).parents[2] / "shared" / "models"
SHIPPED = Path(__file__).parents[1] / "models" / "pysource"


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
    refused(folder, r"lack 4 tensors \(model\.layers\.0\.mlp.*, …\): copy the weights")


def test_a_head_that_is_tied_to_a_missing_embedding_is_not_counted(folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    change_weights(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    refused(folder, r"lack 1 tensor \(model\.embed_tokens\.weight\)")


def test_weights_that_the_model_does_not_have_are_refused(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.zeros(2)}))
    refused(folder, r"hold 1 tensor \(model\.layers\.0\.extra\.weight\) beyond .* belong to different models")


def test_tensors_that_old_versions_saved_and_new_ones_compute_are_no_damage(folder: Path, tmp_path: Path) -> None:
    """The rotary frequencies of LLaMA; the causal masks of GPT-Neo, whose list of ignored names is empty."""
    change_weights(
        folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    Target.from_pretrained(folder)

    config = GPTNeoConfig(
        vocab_size=40, max_position_embeddings=16, hidden_size=8, num_layers=2, num_heads=2,
        attention_types=[[["global", "local"], 1]], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    (old / "model.safetensors").unlink()
    model = GPTNeoForCausalLM(config)
    config.save_pretrained(old)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    for layer in ("h.0.attn.attention", "h.1.attn.attention"):
        tensors |= {f"{layer}.bias": torch.ones(1, 1, 16, 16), f"{layer}.masked_bias": torch.tensor(-1e9)}
    torch.save(tensors, old / "pytorch_model.bin")
    loaded, _ = load_model(old, "auto", {})
    assert digest_of(loaded.state_dict()) == digest_of(model.state_dict())
    torch.save(tensors | {"h.0.attn.attention.other": torch.ones(1)}, old / "pytorch_model.bin")
    refused(old, r"hold 1 tensor \(h\.0\.attn\.attention\.other\)")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    refused(folder, r"in 1 tensor \(model\.norm\.weight is \(3,\) instead of \(\d+,\)\); config\.json and the weights")


@pytest.mark.parametrize("fields", [{"vocab_size": 77}, {"intermediate_size": 8}])
def test_a_configuration_of_another_size_is_refused(folder: Path, fields: dict) -> None:
    change_config(folder, **fields)
    refused(folder, "do not have the shapes that its config.json asks for in .* belong to different models")


@pytest.mark.parametrize("more", [1, -1])
def test_another_number_of_layers_is_refused(folder: Path, more: int) -> None:
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    change_config(folder, num_hidden_layers=layers + more, layer_types=None)
    refused(folder, rf"{'lack' if more > 0 else 'hold'} \d+ tensors \(model\.layers\.{layers - (more < 0)}\.")


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size"])
def test_a_configuration_without_a_size_is_refused(folder: Path, name: str) -> None:
    change_config(folder, **{name: None})
    refused(folder, f"config.json gives no {name}: copy it there again")
    change_config(folder, **{name: "many"})
    refused(folder, f'config.json gives "many" as {name}')


def test_no_default_configuration_of_a_model_type_is_refused(tmp_path: Path) -> None:
    """Sizes go by other names in some, and composite models may leave them out of their parts."""
    checked = 0
    for kind in CONFIG_MAPPING:
        try:
            config = json.loads(CONFIG_MAPPING[kind]().to_json_string())
        except Exception:  # some need more than their defaults, or a library that is not here
            continue
        if CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING:
            _check_sizes(tmp_path / "config.json", config)
            checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": "2"}, "'num_hidden_layers' expected int, got str"),
        ({"hidden_act": "siluu"}, r"siluu.*check the values in its config\.json"),
        ({"num_attention_heads": 0}, r"check the values in its config\.json"),
    ],
)
def test_a_wrong_value_in_a_configuration_is_not_blamed_on_the_weights(
    folder: Path, fields: dict, message: str
) -> None:
    change_config(folder, **fields)
    refused(folder, f"as a causal LM: .*{message}")


def test_a_damaged_generation_configuration_is_refused(folder: Path) -> None:
    """transformers would go on without it, and so without its end-of-text tokens."""
    (folder / "generation_config.json").write_text('{"eos_token_id": [1,')
    refused(folder, r"generation_config\.json is not readable JSON .*: copy it there again")


@pytest.mark.parametrize(("text", "message"), [("{", "is not readable JSON"), ("{}", "has no weight_map")])
def test_a_damaged_index_of_shards_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, rf"model\.safetensors\.index\.json {message}")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "holds no weights: copy model.safetensors there")


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
    refused(folder, "the tokenizer of .*: copy its tokenizer files there again")


def test_torn_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for kept in (len(whole) - 100, 100, 0):
        path.write_bytes(whole[:kept])
        refused(folder, r"are torn \(.*\): copy model\.safetensors there again")


class Payload:
    """Unpickled by a careless loader, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_in_our_own_words(folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(folder / "model.safetensors") | {"x": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"are a pickle \(pytorch_model\.bin\) .* convert them to safetensors"
    ) as caught:
        Target.from_pretrained(folder)
    assert not any(word in str(caught.value) for word in ("weights_only", "\n", "torch.load"))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_tensors_alone_is_loaded_and_a_torn_one_refused(folder: Path) -> None:
    expected = Target.from_pretrained(folder).weights_digest
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert Target.from_pretrained(folder).weights_digest == expected
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:1000])
    refused(folder, r"are torn \(.*\): copy pytorch_model\.bin there again")


@pytest.mark.parametrize(
    "name",
    ["./no/such/model", "no/such/deep/model", "/no/model", "~/no-such-model", "model/", "a/b/", "a\\b", "a b/c"],
)
def test_a_mistyped_path_is_answered_at_once_without_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    started = time.monotonic()
    refused(name, "no model folder at")
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("name", ["glidecape-tests/no-such-model", "no-such-model"])
def test_a_name_that_is_not_cached_is_answered_at_once_without_a_network(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_network(*args: object, **options: object) -> None:
        asked.append(args)
        raise socket.gaierror(-2, "Name or service not known")

    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    refused(name, f"no model folder at {name}, and the Hugging Face Hub cannot be reached .*: check the spelling")
    attempts = len(asked)  # two the first time in a process
    assert attempts in (1, 2)
    with pytest.raises(CheckpointError, match="and the Hugging Face Hub cannot be reached"):
        glidecape.load(name)  # which asks for a draft of that name, too
    attempts = len(asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(name, f"no model folder at {name}, and no model of that name in the cache .*: check the spelling")
    assert len(asked) == attempts
    assert time.monotonic() - started < 3


def test_an_empty_name_is_not_the_present_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    refused("", "empty name")


def test_a_mistyped_name_beside_a_folder_that_exists_is_a_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    refused(f"{folder.parent.name}/tagret", "no model folder at")


def test_tied_heads_and_every_model_at_hand_load(folder: Path) -> None:
    Target.from_pretrained(folder)
    shipped = [path.parent for root in (SHIPPED, SHARED) for path in root.glob("*/config.json")]
    for path in shipped:
        if json.loads((path / "config.json").read_text()).get("architectures"):
            Target.from_pretrained(path, probe=False, pack=False)
