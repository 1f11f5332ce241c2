"""A GliDe draft in the format of the speculators library: config.json, and weights under the names of a class of ours.

`integrations.speculators` registers that class. The format expresses what the draft is and which model it is for. It expresses
no tree and no stop policy: a proposal there is a greedy chain.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..errors import UnsupportedError
from ..files import write_folder
from ..target.loading import may_be_on_hub, pinned
from .card import WEIGHTS, checked
from .checkpoint import check_published, read_card
from .formats import tensors_of
from .glide.config import GlideConfig
from .glide.network import GlideModel

CONFIG, MODEL, VERSION = "config.json", "model.safetensors", "0.9.0"  # of speculators, with which it was tried
PREFIX = "network."  # of the network in the registered class


def write_speculators(folder: Path, out: Path, target: str | None = None) -> None:
    """Write the GliDe draft in `folder` to the folder `out`, as config.json and model.safetensors.

    Args:
        target: Hub name of its model; None: the name in its card, where that is one of the Hub.

    Raises:
        CheckpointError: see `check_published`; also a folder that cannot be written.
        UnsupportedError: it is a draft of another kind.
    """
    name = check_published(folder, target)
    if not (folder / WEIGHTS).is_file() or (card := read_card(folder)).kind != GlideModel.kind:
        raise UnsupportedError(f"the draft in {folder} is no GliDe draft: only those are exported to speculators")
    config = checked(GlideConfig, card.config)
    tensors = {PREFIX + key: one.contiguous() for key, one in tensors_of(folder / WEIGHTS, card.format, config).items()}
    described = _config(config, name, _architectures(folder, name))
    described["glidecape"] = {
        "fingerprint": card.fingerprint.model_dump(),
        "command": card.command,
        "figures": card.figures,
    }

    def write(temporary: Path) -> None:
        save_file(tensors, temporary / MODEL, {"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    write_folder(out, write, CONFIG)


def _config(config: GlideConfig, name: str | None, architectures: list[str]) -> dict[str, Any]:
    hub = name if name is not None and may_be_on_hub(pinned(name)[0]) else None
    greedy = {
        "proposal_type": "greedy",
        "speculative_tokens": min(5, config.max_lag),
        "verifier_accept_k": 1,  # the target's own token, or none: anything else would change the output
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["GlideSpeculator"],
        "speculators_model_type": "glide",
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": "glide",
            "proposal_methods": [greedy],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": None if hub is None else pinned(hub)[0], "architectures": architectures},
        },
        "draft": asdict(config),
    }


def _architectures(folder: Path, name: str | None) -> list[str]:
    """Those that the target's config.json names, where the card names a folder that is there."""
    try:
        found = json.loads((folder / (name or "") / CONFIG).read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError):
        return []
    return list(found or [])
