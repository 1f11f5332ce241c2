"""Draft files are somebody else's: whatever they hold, loading one gives a draft or one sentence of ours."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glidecape.drafts.card import FORMAT
from glidecape.drafts.checkpoint import CARD, WEIGHTS, load_draft, read_card, save_network
from glidecape.drafts.glide.config import GlideConfig
from glidecape.drafts.glide.network import GlideModel
from glidecape.errors import CheckpointError, GlideCapeError, MismatchError
from glidecape.target.target import Target

MISSING = object()


@pytest.fixture(scope="module")
def target(world) -> Target:
    return Target.from_pretrained(world["target"], probe=False, pack=False)


@pytest.fixture
def folder(world, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world["glide"], tmp_path / "draft"))


def card_of(folder: Path) -> dict[str, Any]:
    return read_card(folder).model_dump(mode="json")


def write(folder: Path, card: Any, tensors: dict[str, torch.Tensor] | None = None) -> None:
    text = card if isinstance(card, str) else json.dumps(card)
    save_file(load_file(folder / WEIGHTS) if tensors is None else tensors, folder / WEIGHTS, {"glidecape": text})


def changed(card: dict[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    card = json.loads(json.dumps(card))
    inside = card
    for name in path[:-1]:
        inside = inside[name]
    if value is MISSING:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return card


def refused(folder: Path, target: Target, message: str, error: type = CheckpointError) -> None:
    with pytest.raises(error, match=message) as caught:
        load_draft(folder, target)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


WRONG = {
    "no fingerprint": (("fingerprint",), MISSING, "fingerprint"),
    "a text for a fingerprint": (("fingerprint",), "abc", "fingerprint"),
    "half a fingerprint": (("fingerprint", "weights"), MISSING, "fingerprint.weights"),
    "no figures": (("figures",), MISSING, "figures"),
    "no command": (("command",), MISSING, "command"),
    "a text for a number": (("config", "max_lag"), "16", "max_lag"),
    "a lag of 0": (("config", "max_lag"), 0, "max_lag"),
    "a lag of a million": (("config", "max_lag"), 10**6, "max_lag"),
    "a layer that is not there": (("config", "reads"), [[99]], "reads target layer 99"),
    "no layer": (("config", "reads"), [], "reads"),
    "a negative window": (("config", "window"), -7, "window"),
    "a window that is not whole": (("config", "window"), 1.5, "window"),
    "true for a number": (("config", "heads"), True, "heads"),
    "an eps that is no number": (("config", "eps"), math.nan, "eps"),
    "an unknown field": (("config", "colour"), 1, "colour"),
    "an unknown part": (("notes",), "x", "notes"),
    "a missing size": (("config", "width"), MISSING, "width"),
    "another width": (("config", "ffn"), 3, "another shape|ffn"),
    "another vocabulary": (("config", "vocab_size"), 11, "vocab_size"),
    "a huge size": (("config", "ffn"), 2**19, "ffn"),
    "a list for a kind": (("kind",), ["glide"], "unknown here"),
    "a kind of the future": (("kind",), "hydra", "unknown here: update"),
    "a format of the future": (("format",), 99, r"format 99, this version reads \d: update"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_named(case: str, folder: Path, target: Target) -> None:
    path, value, message = WRONG[case]
    write(folder, changed(card_of(folder), path, value))
    refused(folder, target, message)


@pytest.mark.parametrize("text", ["[1]", '"x"', "3", "{", "null", "[" * 100_000], ids=repr)
def test_a_description_that_is_no_object_is_refused(text: str, folder: Path, target: Target) -> None:
    write(folder, text)
    refused(folder, target, "description|not a draft")


def test_weights_that_are_not_those_of_the_network_are_refused(folder: Path, target: Target) -> None:
    card, right = card_of(folder), load_file(folder / WEIGHTS)
    name = "norm.weight"
    for message, change in {
        r"lacks 1 tensor\(s\): norm.weight": lambda t: t.pop(name),
        r"holds, beside those of its network, 1 tensor\(s\): more": lambda t: t.update(more=torch.zeros(2)),
        r"another shape for 1 tensor\(s\): norm.weight": lambda t: t.update({name: torch.zeros(3)}),
        r"not finite in 1 tensor\(s\): norm.weight": lambda t: t[name].fill_(math.nan),
    }.items():
        tensors = {n: t.clone() for n, t in right.items()}
        change(tensors)
        write(folder, card, tensors)
        refused(folder, target, message)


def test_a_torn_file_is_refused(folder: Path, target: Target) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-50])
    refused(folder, target, "torn")


def test_a_draft_of_another_target_is_still_a_mismatch(folder: Path, target: Target) -> None:
    write(folder, changed(card_of(folder), ("fingerprint", "shape"), "0" * 64))
    refused(folder, target, "another shape", MismatchError)


def test_the_description_for_readers_is_the_one_that_is_loaded(folder: Path) -> None:
    assert json.loads((folder / CARD).read_text()) == card_of(folder)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-3, 99), max_size=2),
    st.lists(st.lists(st.integers(-3, 99), max_size=2), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.filterwarnings("ignore:the draft in")
def test_any_change_of_a_description_loads_or_is_refused_in_our_words(folder: Path, target: Target, data: Any) -> None:
    card = json.loads((folder / CARD).read_text())
    places = [(name,) for name in card] + [("config", name) for name in card["config"]]
    places += [("fingerprint", name) for name in card["fingerprint"]] + [("config", "new"), ("new",)]
    path = data.draw(st.sampled_from(places))
    value = data.draw(st.one_of(ODD, st.just(MISSING)))
    if value is MISSING and path[-1] == "new":
        return
    write(folder, changed(card, path, value))
    try:
        load_draft(folder, target)
    except GlideCapeError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_a_draft_of_format_2_is_read_with_the_names_of_its_time(target: Target, tmp_path: Path) -> None:
    config = GlideConfig.for_target(target, glimpse=True, width=24)
    module = GlideModel.new(config, target)
    torch.nn.init.normal_(module.glimpse_projection.weight)
    torch.nn.init.normal_(module.own_glimpse_projection.weight)
    save_network(tmp_path, module, target, "test", {}, torch.float32)
    old = {
        "bring": "embedding_projection",
        "give": "head_projection",
        "look": "glimpse_projection",
        "recall": "own_glimpse_projection",
    }
    tensors = load_file(tmp_path / WEIGHTS)
    for before, now in old.items():
        tensors[f"{before}.weight"] = tensors.pop(f"{now}.weight")
    write(tmp_path, card_of(tmp_path) | {"format": 2}, tensors)
    read = load_draft(tmp_path, target).module
    for now in old.values():
        assert torch.equal(getattr(read, now).weight, getattr(module, now).weight.to(read.dtype))
    write(tmp_path, card_of(tmp_path) | {"format": 3}, tensors)
    refused(tmp_path, target, "lacks 4 tensor")


def test_a_draft_of_format_1_is_read_and_saved_as_one_of_today(folder: Path, target: Target, tmp_path: Path) -> None:
    card, tensors = card_of(folder), load_file(folder / WEIGHTS)
    old = {name.replace("layers.0.", "layer.").replace("cross.", "cross_"): one for name, one in tensors.items()}
    old["layer.qkv.weight"] = torch.cat([old.pop("layer.q.weight"), old.pop("layer.kv.weight")])
    for name in ("reads", "embed_width", "hidden_size", "window"):
        del card["config"][name]
    del card["target"]
    card["config"]["target_layer"] = 1
    write(folder, card | {"format": 1}, old)
    draft = load_draft(folder, target)
    assert (draft.module.config.reads, draft.module.config.window) == (((1,),), 0)
    draft.save_pretrained(tmp_path / "now", target="owner/model")
    saved = load_file(tmp_path / "now" / WEIGHTS)
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], one) for name, one in tensors.items())
    card = card_of(tmp_path / "now")
    assert (card["format"], card["target"]) == (FORMAT, "owner/model")
    assert load_draft(tmp_path / "now", target).module.config == draft.module.config
