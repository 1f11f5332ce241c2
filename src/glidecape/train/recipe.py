"""What is trained, and how: the options of `glidecape train` and `glidecape train-target`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from ..options import option

LOSSES = ("kl", "rkl", "tv", "nla", "lk_hybrid", "ce")
FEATURE = "feature"  # EAGLE's own loss
LAGS = ("block-random", "block", "balanced", "shift")
POSITIONS = ("zero", "anchor-offset")
GLIDE_KINDS = ("glide", "glide-no-cross")
KINDS = (*GLIDE_KINDS, "eagle", "medusa", "lm")
OF_GLIDE = ("preset", "layers", "read", "glimpse", "width", "window", "embedding", "norm", "draft_vocab")


def check_loss(loss: str) -> None:
    """Raises InputError for a loss that is not one of `LOSSES`, or a sum of different ones."""
    parts = loss.split("+")
    if not set(parts) <= set(LOSSES) or len(set(parts)) < len(parts):
        raise InputError(f"unknown loss '{loss}': choose from {', '.join(LOSSES)}, or join some with +, as in kl+tv")


def is_muon(optimizer: str) -> bool:
    """Raises InputError for an optimizer other than adamw and muon."""
    if optimizer not in ("adamw", "muon"):
        raise InputError(f"unknown optimizer '{optimizer}': choose adamw or muon")
    return optimizer == "muon"


def _optimizer(muon: bool) -> str:
    return "muon" if muon else "adamw"


@dataclass(frozen=True)
class DraftRecipe:
    """How a draft is trained.

    Attributes:
        kind: "glide", "glide-no-cross" (the ablation), "eagle", "medusa" or "lm" (an independent LM).
        preset: of GliDe, "default" or "paper"; the paper's shape and deepest lag. Its training is loss="ce" with
            lags="block" besides.
        loss: one of `losses.LOSSES`, or several joined by "+"; for EAGLE also "feature" (`kinds.eagle`). "" takes
            "feature" for EAGLE, else "kl".
        lags: one of `lags.LAGS`; of GliDe.
        max_lag: deepest lag trained; 0 takes the preset's. Of EAGLE the deepest node, of Medusa the number of heads.
        noise: on the features that EAGLE is trained on (`features.noisy`); 0: none.
        length, rows: window in tokens and windows a step.
        positions: of a window's tokens, one of `POSITIONS`: from zero, or `positions.window_positions`.
        muon: hidden matrices with Muon instead of AdamW.
        loss_on: "all" tokens, or "completion": only what an assistant or a completion column said.
        documents: "joined": those of a window see each other; "apart": none sees another, and positions begin anew with each.
        accumulate: batches of `rows` windows whose gradients make one step.
        clip: largest norm of a step's gradient; 0: none.
        layers: of GliDe, 1 or 2; of an LM, any number.
        read: which target layers GliDe reads (`GlideConfig.for_target`); "" as the preset says.
        glimpse: GliDe with the target's last hidden state, "on", "off", or "" as the preset says; the ablation has none by
            itself.
        width: of the draft, as a multiple of the target's; its heads grow and shrink with it.
        window: tokens that GliDe's self-attention looks back; 0: all; -1: as the preset says.
        embedding: "shared" with the target and frozen, "own", or "" as the preset says.
        norm: before the cross-attention: "on", "off", or "" as the preset says.
        draft_vocab: propose only so many tokens, the most frequent of the training text; 0: all.
    """

    kind: str = option("glide", "glide, glide-no-cross (the ablation), eagle, medusa or lm (an independent LM).")
    preset: str = option("default", "default, or paper: the paper's own choices.")
    loss: str = option("", "kl, rkl, tv, nla, lk_hybrid or ce, several joined by +; feature for eagle, its default.")
    max_lag: int = option(0, "Most tokens drafted a round that it is trained for, or heads of medusa; 0: the preset's.")
    length: int = option(256, "Window in tokens.", least=16)
    rows: int = option(16, "Windows a step.", least=1)
    positions: str = option(
        "zero",
        "Positions of a window: from zero; or anchor-offset: all but its first four tokens stand at a random place of the "
        "target's context, for long contexts.",
    )
    rate: float = option(2e-3, "Peak learning rate.")
    muon: bool = option(
        False, "adamw, or muon for the hidden matrices.", flag="optimizer", type=str, read=is_muon, write=_optimizer
    )
    seed: int = option(0, "Of weights and batches.")
    lags: str = option("block-random", "block-random, block (the paper's), balanced or shift.")
    loss_on: str = option("all", "all tokens, or completion: of prompt+completion and chat data.")
    documents: str = option("joined", "joined: documents that share a window see each other; apart: none sees another.")
    accumulate: int = option(1, "Batches of --rows windows a step.", least=1)
    clip: float = option(1.0, "Largest norm of a step's gradient; 0: any.", least=0)
    layers: int = option(1, "Layers of the draft; GliDe has 1 or 2.", least=1)
    read: str = option(
        "",
        "Target layers that it reads: last; upper, three quarters of the way up; numbers joined by +; or mix: a "
        "learned mean. Default: the preset's.",
    )
    glimpse: str = option(
        "", "on: the draft also takes the target's last hidden state; off: it does not. Default: the preset's."
    )
    width: float = option(1.0, "Width of the draft over the target's.")
    window: int = option(-1, "Earlier tokens that its self-attention sees; 0: all; -1: the preset's, 64.", least=-1)
    embedding: str = option("", "Embedding: shared with the target, or own; default: the preset's.")
    norm: str = option("", "Norm before the cross-attention: on or off; default: the preset's.")
    draft_vocab: int = option(0, "Draft only this many of the most frequent tokens; 0: all.")
    noise: float = option(0.1, "Noise added to the features that eagle is trained on; 0: none.")

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"unknown kind of draft '{self.kind}': choose one of {', '.join(KINDS)}")
        if not self.loss:
            object.__setattr__(self, "loss", FEATURE if self.kind == "eagle" else "kl")
        fits = ("layers", "width") if self.kind == "lm" else ()
        alone = [name for name in OF_GLIDE if name not in fits]
        if self.kind not in GLIDE_KINDS and (
            given := [name for name in alone if getattr(self, name) != _default(name)]
        ):
            raise InputError(f"{given[0].replace('_', '-')} is an option of GliDe, not of a draft of kind {self.kind}")
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise InputError(f"the learning rate is a positive number, not {self.rate}")
        if self.length < 2 or self.rows < 1 or self.seed < 0 or self.max_lag < 0:
            raise InputError(
                f"a window has at least 2 tokens, a step at least 1 window; seed and max lag are not negative: not length "
                f"{self.length}, rows {self.rows}, seed {self.seed}, max lag {self.max_lag}"
            )
        if self.noise < 0:
            raise InputError(f"noise on features must not be negative, as {self.noise} is")
        if self.lags not in LAGS:
            raise InputError(f"unknown lag scheme '{self.lags}': choose from {', '.join(LAGS)}")
        if self.positions not in POSITIONS:
            raise InputError(f"unknown positions '{self.positions}': choose zero or anchor-offset")
        if self.loss_on not in ("all", "completion"):
            raise InputError(f"--loss-on takes all or completion, not '{self.loss_on}'")
        if self.documents not in ("joined", "apart"):
            raise InputError(f"--documents takes joined or apart, not '{self.documents}'")
        if self.documents == "apart" and self.positions != "zero":
            raise InputError(
                "positions begin anew with each document under --documents apart: leave --positions out, or train with joined"
            )
        if self.accumulate < 1 or self.clip < 0:
            raise InputError(f"accumulate {self.accumulate} must be at least 1, clip {self.clip} at least 0")
        if self.embedding not in ("", "shared", "own"):
            raise InputError(f"--embedding takes shared or own, not '{self.embedding}'")
        for name in ("norm", "glimpse"):
            if getattr(self, name) not in ("", "on", "off"):
                raise InputError(f"--{name} takes on or off, not '{getattr(self, name)}'")
        if not 0 < self.width <= 16 or self.window < -1 or self.draft_vocab < 0:
            raise InputError(
                f"a draft's width is 0 to 16 times its target's, not {self.width}; window {self.window} and draft "
                f"vocabulary {self.draft_vocab} must not be negative"
            )
        if self.loss != FEATURE:
            check_loss(self.loss)
        elif self.kind != "eagle":
            raise InputError(f"the loss '{FEATURE}' is EAGLE's: a draft of kind {self.kind} has no features to compare")

    def changed(self, **changes: Any) -> DraftRecipe:
        """The recipe with these fields; a kind that changes brings its own loss, unless another than its kind's was given."""
        if "kind" in changes and "loss" not in changes and self.loss == DraftRecipe(self.kind).loss:
            changes = changes | {"loss": ""}
        return replace(self, **changes)


def _default(name: str) -> Any:
    return DraftRecipe.__dataclass_fields__[name].default


@dataclass(frozen=True)
class TargetShape:
    """The size of a target; the defaults make a Llama of 12 M parameters with a 4k vocabulary.

    `architecture` is "llama", or "qwen3": queries and keys are normalised, and with a `window` (tokens) a layer attends to
    so many only, but for each `full_every`-th counted from the last, which stays full.
    """

    layers: int = option(6, "Layers.")
    width: int = option(384, "Width of the hidden states.")
    ffn: int = option(1024, "Width inside a feed-forward network.")
    heads: int = option(6, "Query heads.")
    kv_heads: int = option(6, "Key and value heads.")
    context: int = option(8192, "Longest sequence that the model declares.")
    rope_theta: float = option(1e5, "Base of the rotary embedding.")
    architecture: str = option("llama", "llama, or qwen3: normalised queries and keys.")
    window: int = option(0, "Earlier tokens that a layer with a window sees (qwen3); 0: all.", least=0)
    full_every: int = option(4, "Every how many layers one has no window.", least=1)

    @property
    def layer_types(self) -> list[str]:
        """Which kind of attention each layer has, in transformers' words."""
        last = self.layers - 1
        full = [not self.window or (last - i) % self.full_every == 0 for i in range(self.layers)]
        return ["full_attention" if one else "sliding_attention" for one in full]


@dataclass(frozen=True)
class Windowing:
    """Tokens a training window, windows a step; the last `long_share` of the run sees `long_length` instead.

    A step holds `rows * length` tokens throughout: long windows come in smaller numbers, and are no longer than the model's
    context.
    """

    length: int = option(512, "Window in tokens.", least=16)
    rows: int = option(16, "Windows a step.", least=1)
    long_length: int = option(2048, "Window at the end of the run.")
    long_share: float = option(0.1, "Share of the run with long windows, 0 to 1.", least=0)

    @property
    def longest(self) -> int:
        """Tokens of the longest window that a run sees."""
        return max(self.length, self.long_length if self.long_share else 0)

    def at(self, progress: float) -> tuple[int, int]:
        """(rows, length) at that share of the run."""
        if progress < 1 - self.long_share or self.long_length <= self.length:
            return self.rows, self.length
        return max(1, self.rows * self.length // self.long_length), self.long_length
