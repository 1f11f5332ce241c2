"""The README.md of a published draft, its model card: what the Hub reads of it, and what people want to know."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..tables import millions
from ..target.loading import may_be_on_hub, pinned

NAMES = {"glide": "GliDe", "eagle": "EAGLE", "medusa": "Medusa", "lm": "language model"}
# What a reader judges a draft by. Training writes them unless it was told to try no prompts.
FIGURES = {
    "alpha_greedy": "alpha, greedy",
    "acceptance_length_greedy": "acceptance length, greedy",
    "alpha_t1": "alpha, T=1",
    "acceptance_length_t1": "acceptance length, T=1",
}

TEXT = """---
{metadata}
---

# {repo_id}

A {kind} draft model for speculative decoding with GlideCape. It proposes tokens, and its target checks them: what is written
is the target's own output, in less time.

| | |
|---|---|
{facts}

| measured after training, on held-out text | |
|---|---|
{figures}

alpha is the share of tested tokens that the target accepts; the acceptance length is the number of tokens that a round emits.
All figures are in `card.json`.

## Use

```python
import glidecape

lm = glidecape.load("{target}", draft="{repo_id}")
print(lm("Once upon a time").text)
```

`{repo_id}@COMMIT` pins a commit of the draft. On the command line:

```bash
glidecape generate {target} --draft {repo_id} --prompt "Once upon a time"
```

## Training

```bash
{command}
```
"""


@dataclass(frozen=True)
class Details:
    """What the Hub shows of a draft and its card does not hold.

    Attributes:
        license: as the Hub abbreviates it, such as "apache-2.0"; None: not known.
        datasets: Hub names of the data that it was trained on.
    """

    license: str | None = None
    datasets: list[str] = field(default_factory=list)


def readme(repo_id: str, card: dict[str, Any], details: Details) -> str:
    """The README.md of a draft, from its `card.json`.

    Raises:
        CheckpointError: see `check_card`.
    """
    check_card(card, repo_id)
    return TEXT.format(
        metadata=_metadata(card, details),
        repo_id=repo_id,
        kind=NAMES[card["kind"]],
        facts="\n".join(f"| {name} | {value} |" for name, value in _facts(card, details)),
        figures="\n".join(
            f"| {name} | {card['figures'][key]} |" for key, name in FIGURES.items() if key in card["figures"]
        ),
        target=card["target"],
        command=card["command"],
    )


def check_card(card: dict[str, Any], what: str) -> None:
    """Refuse to publish what nobody could use or judge.

    Raises:
        CheckpointError: the card does not say how the draft was trained, has no acceptance figures, or names no target that
            others can load.
    """
    if card.get("kind") not in NAMES:
        raise CheckpointError(f"the card of {what} describes no draft: name the folder that `glidecape train` wrote")
    if not card.get("command"):
        raise CheckpointError(
            f"the card of {what} does not name the command that trained it: train it with `glidecape train`"
        )
    if not set(FIGURES) & set(card.get("figures") or {}):
        raise CheckpointError(
            f"the card of {what} has no acceptance figures: give its `glidecape train` command again without --eval-prompts 0, "
            "which measures them"
        )
    name = card.get("target")
    if not isinstance(name, str):
        raise CheckpointError(
            f"the card of {what} does not name its target: give the Hub name of its model as the target"
        )
    if not may_be_on_hub(pinned(name)[0]):
        raise CheckpointError(
            f"the card of {what} names the folder {name} as its target, where nobody else has it: give the Hub name of its "
            "model as the target"
        )


def _metadata(card: dict[str, Any], details: Details) -> str:
    """The YAML that the Hub reads."""
    from huggingface_hub import ModelCardData

    own: dict[str, Any] = {"base_model": pinned(card["target"])[0]}
    if card["kind"] != "lm":
        # Of the Hub's relations the one for weights that are of use only beside the base model's, which stay as they are.
        own["base_model_relation"] = "adapter"
    if details.license:
        own["license"] = details.license
    if details.datasets:
        own["datasets"] = details.datasets
    tags = ["speculative-decoding", "draft-model", card["kind"]]
    made = ModelCardData(library_name="glidecape", pipeline_tag="text-generation", tags=tags, **own)
    return str(made.to_yaml())


def _facts(card: dict[str, Any], details: Details) -> list[tuple[str, str]]:
    name, revision = pinned(card["target"])
    figures, config = card["figures"], card.get("config", {})
    found = [("target", f"`{name}`" + (f", revision `{revision}`" if revision else ""))]
    for part, digest in card.get("fingerprint", {}).items():
        found.append((f"sha256 of the target's {part}", f"`{digest}`"))
    if "parameters" in figures:
        found.append(("parameters of the draft", millions(figures["parameters"])))
    if "reads" in config:
        found.append(("target layers that it reads", ", ".join(str(n) for reads in config["reads"] for n in reads)))
    if "max_lag" in config:
        found.append(("most tokens that it was trained to draft", str(config["max_lag"])))
    data = ", ".join(f"`{one}`" for one in details.datasets) or "the `--data` of the command below"
    learned = (
        f", {figures['tokens']:,} tokens in {figures['steps']:,} steps" if {"tokens", "steps"} <= set(figures) else ""
    )
    return [*found, ("data", data + learned)]


def card_in(folder: Path) -> dict[str, Any]:
    """The `card.json` of a draft's folder; empty where there is none that can be read."""
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}
