"""Sharing a draft: its files in another folder, or on the Hugging Face Hub, with the target's name in its card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError, InputError, first_line
from ..files import write_folder
from ..tables import millions
from .card import CARD, FORMAT, WEIGHTS
from .formats import tensors_of
from .readme import Details, card_in, readme

README, MESSAGE = "README.md", "Upload a draft"

# A pickle runs code when it is read. Nothing that is published may hold one.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def name_from(folder: Path, name: str | None) -> str | None:
    """A target's name for the card of a draft in `folder`: of a local model the path from there, so that the two folders can
    be moved together; a Hub name as it is.

    >>> name_from(Path("drafts/glide"), "owner/model")
    'owner/model'
    """
    if name is None or not Path(name).expanduser().is_dir():
        return name
    return os.path.relpath(Path(name).expanduser().resolve(), folder.resolve())


def target_of_lm(folder: Path) -> str | None:
    """The target in the card of an LM that was trained as a draft; None: it is no such LM, or its card names none."""
    named = _lm_card(folder).get("target")
    return named if isinstance(named, str) else None


def _lm_card(folder: Path) -> dict[str, Any]:
    """The card of an LM that was trained as a draft; empty where it is no such LM."""
    card = card_in(folder)
    return card if card.get("kind") == "lm" else {}


def target_named_by(folder: Path, name: str | None) -> str:
    """The folder or Hub name of the target that a draft's card names.

    Raises:
        CheckpointError: the card names none, or a folder that is not there.
    """
    if name is None:
        raise CheckpointError(f"{folder} holds a draft, and its card does not name its target: name the model, too")
    local = folder / name
    if local.is_dir():
        return str(local.resolve())
    if name.startswith(".") or Path(name).is_absolute():
        raise CheckpointError(f"the draft in {folder} is for the model in {local}, which is not there: name the model")
    return name


class SharedDraft:
    """A draft that knows which files it came from.

    Attributes:
        folder: of its files; None: it was made in this process.
        target_name: folder or Hub name of the target that it was loaded for; None: unknown.
    """

    module: Any
    max_lag: int
    folder: Path | None = None
    target_name: str | None = None

    def __repr__(self) -> str:
        served = getattr(self.module, "num_parameters", None)  # else it is being trained
        size = sum(one.numel() for one in self.module.parameters()) if served is None else served
        place = "" if self.folder is None else f", {self.folder}"
        return f"{type(self).__name__}({millions(size)} parameters, up to {self.max_lag} tokens a round{place})"

    def save_pretrained(self, folder: str | Path, target: str | None = None) -> None:
        """Write its files into another folder, from which `load_draft` and `glidecape.load` read them.

        Args:
            target: folder or Hub name of its model, for the card; None: the model that it was loaded for.

        Raises:
            InputError: it came from no files, or the folder is the one that it came from.
            CheckpointError: the disk is full or the folder is not writable; an earlier draft there stays whole.
        """
        source, goal = self._source(), Path(folder).expanduser()
        if goal.resolve() == source.resolve():
            raise InputError(f"the draft was loaded from {goal}: name another folder")
        name = name_from(goal, target or self.target_name)
        write_folder(goal, lambda temporary: copy_draft(source, temporary, name, self._config()), WEIGHTS)

    def push_to_hub(
        self,
        repo_id: str,
        target: str | None = None,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        license: str | None = None,
        datasets: Sequence[str] = (),
    ) -> str:
        """Upload it to the Hub as `repo_id`, such as "me/model-glide", in one commit; the address of the commit.

        Args:
            target: Hub name of its model, for the card; None: the name that it was loaded for.
            private, token, commit_message: as in `huggingface_hub`.
            revision: branch to upload to, which is made where it is not there; None: the main one.
            license, datasets: see `Details`; for the model card.

        Raises:
            InputError: it came from no files.
            CheckpointError: see `publish`.
        """
        place = Place(repo_id, private, revision, token, commit_message or MESSAGE)
        name = target or self.target_name
        return publish(self._source(), place, name, Details(license, list(datasets)), self._config())

    def _source(self) -> Path:
        if self.folder is None:
            raise InputError("this draft was not loaded from files: `glidecape train` has written them already")
        if not self.folder.is_dir():
            raise InputError(f"the files of this draft were in {self.folder}, which is not there any more")
        return self.folder

    def _config(self) -> Any:
        return getattr(getattr(self, "module", None), "config", None)


def copy_draft(source: Path, goal: Path, target: str | None, config: Any = None) -> None:
    """Copy a draft's files; its card gets the target's name. A network's file gets the newest format.

    Args:
        config: of a network that was loaded; None: the description in its file, of format 2 or newer.
    """
    is_network = (source / WEIGHTS).is_file()
    for path in source.iterdir():
        # Beside a network, descriptions alone. The state of a training is a folder: it stays where it is.
        wanted = path.suffix == ".json" or not is_network
        if path.is_file() and wanted and not path.name.startswith("."):
            shutil.copyfile(path, goal / path.name)
    card = _lm_card(source)
    if is_network:
        with safe_open(source / WEIGHTS, framework="pt") as file:
            card = json.loads(file.metadata()["glidecape"])
        tensors = tensors_of(source / WEIGHTS, card["format"], config)
        card |= {"format": FORMAT, "target": target}
        if config is not None:
            card["config"] = asdict(config)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, goal / WEIGHTS, {"glidecape": json.dumps(card)})
    elif card:
        card["target"] = target
    else:
        return  # another program's LM, whose files say nothing of drafts
    (goal / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Place:
    """Where a draft is published: see `SharedDraft.push_to_hub`."""

    repo_id: str
    private: bool = False
    revision: str | None = None
    token: str | None = None
    commit_message: str = MESSAGE


def write_published(
    source: Path, goal: Path, repo_id: str, target: str | None, details: Details, config: Any = None
) -> None:
    """Write what is published of a draft into the folder `goal`: its files, and a README.md made of its card.

    Raises:
        CheckpointError: a file is a pickle, or `readme.check_card`.
    """
    copy_draft(source, goal, target, config)
    if pickles := sorted(path.name for path in goal.iterdir() if path.suffix in PICKLES):
        raise CheckpointError(
            f"{source} holds {pickles[0]}, a pickle that runs code when it is read: save it as safetensors"
        )
    (goal / README).write_text(readme(repo_id, card_in(goal), details), encoding="utf-8")


def publish(source: Path, place: Place, target: str | None, details: Details, config: Any = None) -> str:
    """Upload the draft in `source` in one commit; the commit's address.

    huggingface_hub's `ModelHubMixin` does not fit: it saves into the folder itself, where a reader may meet half of the files,
    and loads configuration and weights by requests of their own, which may be of two commits. So the names are its names, and
    the functions under them are called here.

    Raises:
        CheckpointError: see `write_published`; the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        write_published(source, Path(temporary), place.repo_id, target, details, config)
        api = HfApi(token=place.token)
        try:
            api.create_repo(place.repo_id, private=place.private, exist_ok=True)
            if place.revision is not None:
                api.create_branch(place.repo_id, branch=place.revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=place.repo_id,
                folder_path=temporary,
                revision=place.revision,
                commit_message=place.commit_message,
                delete_patterns=[
                    "*.safetensors",
                    "*.json",
                ],  # an earlier draft's, of which none may be read as this one's
            )
        except Exception as error:  # of the HTTP library, or the Hub's own
            raise CheckpointError(f"cannot upload the draft to {place.repo_id}: {first_line(error)}") from None
    return str(commit.commit_url)
