"""Sharing a draft: its files in another folder, or on the Hugging Face Hub, with the target's name in its card."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError, InputError, first_line
from ..files import write_folder
from ..tables import millions
from .card import CARD, FORMAT, WEIGHTS
from .formats import tensors_of

README = """---
library_name: glidecape
tags: [speculative-decoding, glidecape]
{base_model}---
A draft model for speculative decoding with GlideCape. Decoding with it gives the target's own output, in less time:

```python
import glidecape

lm = glidecape.load({target}, draft="{repo}")
print(lm("Once upon a time").text)
```
"""


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
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) and card.get("kind") == "lm" else {}


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
        write_folder(goal, lambda temporary: self._copy(source, temporary, name), WEIGHTS)

    def push_to_hub(self, repo: str, target: str | None = None, private: bool = False, token: str | None = None) -> str:
        """Upload it to the Hub as `repo`, such as "me/model-glide"; the address of the commit.

        Args:
            target: Hub name of its model, for the card; None: the name that it was loaded for.
            private, token: as in `huggingface_hub`.

        Raises:
            InputError: it came from no files.
            CheckpointError: the Hub refuses, or cannot be reached.
        """
        from huggingface_hub import HfApi

        source, name = self._source(), target or self.target_name
        if name is not None and Path(name).expanduser().is_dir():
            name = None  # a folder of this machine means nothing to others
        with tempfile.TemporaryDirectory() as temporary:
            self._copy(source, Path(temporary), name)
            readme = README.format(
                base_model=f"base_model: {name}\n" if name else "",
                target=json.dumps(name or "path/to/model"),
                repo=repo,
            )
            (Path(temporary) / "README.md").write_text(readme, encoding="utf-8")
            try:
                api = HfApi(token=token)
                api.create_repo(repo, private=private, exist_ok=True)
                return str(api.upload_folder(repo_id=repo, folder_path=temporary, commit_message="Upload a draft"))
            except Exception as error:  # of the HTTP library, or the Hub's own
                raise CheckpointError(f"cannot upload the draft to {repo}: {first_line(error)}") from None

    def _source(self) -> Path:
        if self.folder is None:
            raise InputError("this draft was not loaded from files: `glidecape train` has written them already")
        if not self.folder.is_dir():
            raise InputError(f"the files of this draft were in {self.folder}, which is not there any more")
        return self.folder

    def _copy(self, source: Path, goal: Path, target: str | None) -> None:
        """Copy the draft's files; its card gets the target's name. A network's file gets the newest format."""
        for path in source.iterdir():
            if path.is_file() and not path.name.startswith(".") and path.name != WEIGHTS:
                shutil.copyfile(path, goal / path.name)
        card = _lm_card(source)
        if (source / WEIGHTS).is_file():
            with safe_open(source / WEIGHTS, framework="pt") as file:
                card = json.loads(file.metadata()["glidecape"])
            tensors = tensors_of(source / WEIGHTS, card["format"], self.module.config)
            card |= {"format": FORMAT, "config": asdict(self.module.config), "target": target}
            whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(whole, goal / WEIGHTS, {"glidecape": json.dumps(card)})
        elif card:
            card["target"] = target
        else:
            return  # another program's LM, whose files say nothing of drafts
        (goal / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
