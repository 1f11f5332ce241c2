"""A GliDe draft in the format of the speculators library: the files, and speculators itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from glidecape.drafts.card import WEIGHTS
from glidecape.drafts.checkpoint import read_card
from glidecape.drafts.speculators import write_speculators
from glidecape.errors import InputError, UnsupportedError
from glidecape.integrations.speculators import register

SHIPPED = Path(__file__).parents[1] / "models" / "pysource" / "glide"


def exported(tmp_path: Path) -> dict[str, Any]:
    write_speculators(SHIPPED, tmp_path / "made")
    return json.loads((tmp_path / "made" / "config.json").read_text())


def test_the_files_say_what_the_draft_is(tmp_path: Path) -> None:
    config = exported(tmp_path)
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"config.json", "model.safetensors"}
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == "glide"
    (proposal,) = config["speculators_config"]["proposal_methods"]
    assert (proposal["proposal_type"], proposal["verifier_accept_k"], proposal["accept_tolerance"]) == (
        "greedy",
        1,
        0.0,
    )
    assert config["speculators_config"]["default_proposal_method"] == "greedy"
    assert config["speculators_config"]["verifier"] == {"name_or_path": None, "architectures": ["LlamaForCausalLM"]}
    assert config["draft"] == read_card(SHIPPED).config
    assert config["glidecape"]["fingerprint"] == read_card(SHIPPED).fingerprint.model_dump()
    made, own = load_file(tmp_path / "made" / "model.safetensors"), load_file(SHIPPED / WEIGHTS)
    assert made.keys() == {f"network.{name}" for name in own}
    assert all(torch.equal(made[f"network.{name}"], one) for name, one in own.items())


def test_the_command_names_the_target_and_refuses_other_drafts(world, tmp_path: Path, capfd, monkeypatch) -> None:
    from test_command_line import run

    words = ["export", world["glide"], tmp_path / "made", "--base-model", "owner/model@abc"]
    assert run(capfd, monkeypatch, *words)[0] == 0
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "owner/model"
    for draft in ("eagle", "lm"):
        with pytest.raises(UnsupportedError, match="only those are exported"):
            write_speculators(world[draft], tmp_path / "other")
    code, _, err = run(capfd, monkeypatch, *words, "--format", "gguf")
    assert (code, err) == (2, "error: --format takes speculators, not 'gguf'\n")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_speculators_reads_it_and_writes_it_again(tmp_path: Path) -> None:
    if importlib.util.find_spec("speculators") is None:
        with pytest.raises(InputError, match="pip install speculators, in an environment of its own"):
            register()
        pytest.skip("speculators is not installed: it pins an older transformers, so it has an environment of its own")
    from speculators import SpeculatorModel, SpeculatorModelConfig

    made = register()
    assert register() is made
    written = exported(tmp_path)
    config = SpeculatorModelConfig.from_pretrained(tmp_path / "made")
    assert type(config) is made.config_class
    assert config.draft == written["draft"]
    assert config.speculators_config.proposal_methods[0].proposal_type == "greedy"
    model = SpeculatorModel.from_pretrained(tmp_path / "made")
    assert type(model) is made
    own = load_file(SHIPPED / WEIGHTS)
    found = model.network.state_dict()
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], one) for name, one in own.items())
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[f"network.{name}"], one) for name, one in own.items())
    with pytest.raises(UnsupportedError, match="use `glidecape train`"):
        made.from_training_args(None)
