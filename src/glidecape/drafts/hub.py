"""`AutoDraft`: a draft by the Hub's conventions, whatever its kind."""

from __future__ import annotations

from pathlib import Path

from ..target.target import Target
from .card import WEIGHTS
from .causal_lm import StandaloneDraft
from .checkpoint import NetworkDraft, load_draft, read_card, resolve
from .sharing import target_named_by, target_of_lm


class AutoDraft:
    """Loads drafts as transformers' `Auto` classes load models: the files say which kind it is.

    >>> from glidecape import AutoDraft
    >>> AutoDraft.from_pretrained("path/to/draft").kind
    'glide'
    """

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        target: Target | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> NetworkDraft | StandaloneDraft:
        """A draft by folder or Hub name.

        Args:
            target: that it drafts for, whose embedding and head it uses; None: the one that its card names is loaded.
            revision: branch, tag or commit of the draft.
            token: as in `huggingface_hub`, for the draft; so are the next two.
            cache_dir: where downloads are kept.
            local_files_only: download nothing.

        Raises:
            CheckpointError, MismatchError, UnsupportedError: see `load_draft` and `Target.from_pretrained`; also a card that
                names no target.
        """
        folder = resolve(name, revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        if target is None:
            is_network = (folder / WEIGHTS).is_file()
            named = read_card(folder).target if is_network else target_of_lm(folder)
            target = Target.from_pretrained(target_named_by(folder, named))
        return load_draft(folder, target)
