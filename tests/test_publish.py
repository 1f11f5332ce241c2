"""A draft on the Hub: what is uploaded, what is refused, and loading it pinned, from a Hub on this machine and offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from glidecape import AutoDraft
from glidecape.drafts.card import CARD, STATE, WEIGHTS
from glidecape.drafts.checkpoint import load_draft, read_card
from glidecape.errors import CheckpointError
from glidecape.target.loading import pinned
from glidecape.target.target import Target
from hub import Hub
from test_command_line import run

PROMPT = "def load_table("


@pytest.fixture
def folder(world, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world["glide"], tmp_path / "draft"))


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    yield made
    made.close()


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def write_card(folder: Path, **changes: Any) -> None:
    card = read_card(folder).model_dump(mode="json") | changes
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"glidecape": json.dumps(card)})
    (folder / CARD).write_text(json.dumps(card))


def test_what_is_published_is_the_draft_and_a_card_that_says_what_it_is(world, folder, tmp_path, capfd, monkeypatch):
    assert (folder / STATE).is_dir()  # of its training, which stays here
    (folder / "notes.txt").write_text("of mine")
    words = ["publish", folder, "me/model-glide", "--base-model", "owner/model@abc", "--license", "mit"]
    words += ["--dataset", "owner/texts", "--output", tmp_path / "made"]
    code, out, err = run(capfd, monkeypatch, *words)
    assert (code, out.strip()) == (0, str(tmp_path / "made")), err
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert {WEIGHTS, CARD, "README.md"} <= names
    assert not {STATE, "notes.txt"} & names
    text = (tmp_path / "made" / "README.md").read_text()
    assert front_matter(text) == {
        "base_model": "owner/model",
        "base_model_relation": "adapter",
        "datasets": ["owner/texts"],
        "library_name": "glidecape",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "draft-model", "glide"],
    }
    card = read_card(folder)
    assert "| target | `owner/model`, revision `abc` |" in text
    assert all(f"`{digest}`" in text for digest in card.fingerprint.model_dump().values())
    assert f"| acceptance length, greedy | {card.figures['acceptance_length_greedy']} |" in text
    assert f"```bash\n{card.command}\n```" in text
    assert f"| `owner/texts`, {card.figures['tokens']:,} tokens in" in text.replace("data | ", "")
    target = Target.from_pretrained(world["target"], dtype=torch.float32)
    made = AutoDraft.from_pretrained(tmp_path / "made", target)
    assert read_card(tmp_path / "made").target == "owner/model@abc"
    assert all(
        torch.equal(one, load_file(folder / WEIGHTS)[name])
        for name, one in load_file(tmp_path / "made" / WEIGHTS).items()
    )
    assert made.max_lag == load_draft(folder, target).max_lag


def test_a_draft_lm_is_published_with_its_tokenizer(world, tmp_path, capfd, monkeypatch):
    words = ["publish", world["lm"], "me/model-lm", "--base-model", "owner/model", "--output", tmp_path / "made"]
    assert run(capfd, monkeypatch, *words)[0] == 0
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", CARD, "README.md"} <= names
    found = front_matter((tmp_path / "made" / "README.md").read_text())
    assert (found["tags"][-1], "base_model_relation" in found, "license" in found) == ("lm", False, False)
    assert json.loads((tmp_path / "made" / CARD).read_text())["target"] == "owner/model"
    shutil.copytree(world["lm"], tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    code, _, err = run(capfd, monkeypatch, "publish", tmp_path / "pickled", *words[2:])
    assert (code, "holds pytorch_model.bin, a pickle" in err) == (2, True)


def test_a_draft_that_nobody_could_use_or_judge_is_refused(world, folder, tmp_path, capfd, monkeypatch):
    def refused(message: str, *words: Any, draft: Path = folder) -> None:
        code, out, err = run(capfd, monkeypatch, "publish", draft, "me/x", *words, "--output", tmp_path / "made")
        assert (code, out, message in err, err.count("\n")) == (2, "", True, 1), err
        assert not (tmp_path / "made" / "README.md").exists()

    named = ("--base-model", "owner/model")
    refused("names the folder ../target as its target, where nobody else has it")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-8])
    refused("is torn or not a GlideCape draft", *named)
    (folder / WEIGHTS).write_bytes(whole)
    write_card(folder, target=None)
    refused("does not name its target: give the Hub name of its model")
    write_card(folder, figures={"tokens": 5})
    refused("has no acceptance figures", *named)
    write_card(folder, figures={"alpha_greedy": 0.5}, command="")
    refused("does not name the command that trained it", *named)
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {"command": "another"}))
    refused("is not the description in draft.safetensors", *named)
    (folder / CARD).unlink()
    write_card(folder, config=card["config"] | {"heads": 1})
    refused("does not fit its description: it has another shape for", *named)
    write_card(folder, format=1)
    refused("has the format of version 0.1", *named)
    refused("no draft in", *named, draft=tmp_path)
    refused("describes no draft", *named, draft=world["target"])


@pytest.mark.parametrize(
    ("name", "revision", "found"),
    [
        ("owner/model", None, ("owner/model", None)),
        ("owner/model@v1", None, ("owner/model", "v1")),
        ("owner/model@v1", "v2", ("owner/model", "v2")),
        ("owner/model@", None, ("owner/model", None)),
    ],
)
def test_a_name_holds_its_revision(name, revision, found):
    assert pinned(name, revision) == found


def test_a_folder_with_an_at_sign_is_a_folder(world, tmp_path):
    shutil.copytree(world["glide"], tmp_path / "glide@home")
    assert pinned(tmp_path / "glide@home") == (str(tmp_path / "glide@home"), None)
    target = Target.from_pretrained(world["target"], probe=False)
    assert AutoDraft.from_pretrained(tmp_path / "glide@home", target).folder == tmp_path / "glide@home"


PUBLISH = """
import json, sys
import glidecape
from glidecape import AutoDraft, Target, cli

folder, commit = sys.argv[1:3]
sys.argv = ["glidecape", "publish", folder, "me/model-glide", "--base-model", f"owner/model@{commit}", "--private"]
cli.main = cli.app  # typer exits
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code, stop.code
target = Target.from_pretrained("owner/model", revision=commit, dtype="float32")
assert (target.name, target.commit) == ("owner/model", commit)
draft = AutoDraft.from_pretrained("me/model-glide", target)
draft.push_to_hub("me/copy", revision="v1", commit_message="A copy", license="mit")
for wrong, revision in (("me/model-glide", "v9"), ("me/nothing", None)):
    try:
        AutoDraft.from_pretrained(wrong, target, revision=revision)
    except glidecape.GlideCapeError as error:
        print(error)
"""
LOAD = """
import sys
import glidecape

lm = glidecape.load(sys.argv[1], dtype="float32", compile="off")
print(lm.method, lm.target.pinned_name, lm.draft.folder.name, lm.draft.target_name)
print(lm("def load_table(", max_tokens=12).tokens)
try:
    glidecape.load_draft("me/model-glide@0123456789", lm.target)
except glidecape.GlideCapeError as error:
    print(error)
"""


def test_a_draft_goes_to_the_hub_and_comes_back_pinned_and_offline(world, hub: Hub, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in world["target"].iterdir() if path.is_file()}
    model = hub.add("owner/model", files)
    hub.add("owner/model", files | {"config.json": b"{}"})  # the main branch went on, and cannot be loaded
    hub.add("me/copy", {"model.safetensors": b"old", "config.json": b"{}", "README.md": b"old", "notes.txt": b"mine"})
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test", "OMP_NUM_THREADS": "1"}

    def python(script: str, *words: str, **more: str) -> list[str]:
        known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | here | more
        made = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, env=known, timeout=200
        )
        assert made.returncode == 0, made.stderr
        return made.stdout.splitlines()

    address, *errors = python(PUBLISH, str(world["glide"]), model)
    first = hub.branches["me/model-glide"]["main"]
    assert address == f"{hub.url}/me/model-glide/commit/{first}"
    assert "has no branch, tag or commit v9" in errors[0]
    assert errors[1].startswith("me/nothing is neither a folder here nor a repository of the Hub")
    assert (hub.unknown, hub.private, hub.messages) == ([], {"me/model-glide"}, ["Upload a draft", "A copy"])
    shown = {path.name for path in world["glide"].iterdir() if path.suffix == ".json"} | {WEIGHTS, "README.md"}
    assert set(hub.commits["me/model-glide"][first]) - {".gitattributes"} == shown
    copied = hub.commits["me/copy"][hub.branches["me/copy"]["v1"]]
    assert set(copied) - {".gitattributes"} == shown | {
        "notes.txt"
    }  # nothing of the earlier draft may be read as this one's
    assert front_matter(copied["README.md"].decode())["license"] == "mit"
    assert f"revision `{model}`".encode() in copied["README.md"]
    # The branch goes on, and the commit stays what it was.
    hub.add("me/model-glide", dict.fromkeys(copied, b"torn"))
    found = python(LOAD, f"me/model-glide@{first}")
    target = Target.from_pretrained(world["target"], dtype=torch.float32)
    assert found[0].split() == ["glide", f"owner/model@{model}", first, f"owner/model@{model}"]
    expected = [int(one) for one in found[1].strip("[]").split(",")]
    from glidecape.interface.load import with_draft

    assert with_draft(target, None, "plain")(PROMPT, max_tokens=12).tokens == expected
    hub.close()
    offline = python(LOAD, f"me/model-glide@{first}", HF_HUB_OFFLINE="1")
    assert offline[:2] == found[:2]
    assert offline[2].startswith("me/model-glide@0123456789 is neither a folder here nor a repository of the Hub")


def test_a_draft_made_in_this_process_is_published_by_its_folder(world) -> None:
    target = Target.from_pretrained(world["target"], probe=False)
    draft = load_draft(world["glide"], target)
    draft.target_name = None
    with pytest.raises(CheckpointError, match="does not name its target"):
        draft.push_to_hub("me/model-glide")
