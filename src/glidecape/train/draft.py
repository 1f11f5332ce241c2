"""Train a draft for a frozen target: GliDe, GliDe without cross-attention, or an independent one-layer LM.

The target runs on each batch and its keys and values are used at once: nothing is stored. The draft sees them through
`visible`, as in decoding (masks.block_visible), so a teacher-forced position of lag d is the state of depth d - 1.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from ..cache import KVCache
from ..decode import decode
from ..drafting.methods import make_drafter
from ..errors import DataError, InputError
from ..models.checkpoint import save_glide
from ..models.glide import GlideConfig, GlideDraft, GlideModel
from ..models.standalone import StandaloneDraft
from ..models.target import Target
from ..sampling import SamplingParams
from ..stats import Stats
from .data import Windows, load_tokens
from .lags import LAGS, lag_visible
from .loop import Budget, Clock, fit, load_state, optimizers, save_state
from .losses import check_loss, distillation_loss


@dataclass(frozen=True)
class DraftRecipe:
    """How a draft is trained.

    Attributes:
        kind: "glide", "glide-no-cross" (the ablation) or "lm" (an independent LM of one layer).
        preset: of GliDe, "default" or "paper"; the paper's brings its loss and lag with it.
        loss: one of `losses.LOSSES`, or several joined by "+".
        lags: one of `lags.LAGS`.
        max_lag: deepest lag trained; 0 takes the preset's.
        length, rows: window in tokens and windows a step.
        muon: hidden matrices with Muon instead of AdamW.
    """

    kind: str = "glide"
    preset: str = "default"
    loss: str = "kl"
    max_lag: int = 0
    length: int = 256
    rows: int = 16
    rate: float = 2e-3
    muon: bool = False
    seed: int = 0
    lags: str = "block-random"

    def __post_init__(self) -> None:
        if self.kind not in ("glide", "glide-no-cross", "lm"):
            raise InputError(f"unknown kind of draft '{self.kind}': choose glide, glide-no-cross or lm")
        if self.lags not in LAGS:
            raise InputError(f"unknown lag scheme '{self.lags}': choose from {', '.join(LAGS)}")
        check_loss(self.loss)


def make_draft(target: Target, recipe: DraftRecipe) -> nn.Module:
    """The untrained draft network of a recipe, float32, on the target's device."""
    target.unpack()  # gradients pass through its head
    torch.manual_seed(recipe.seed)
    if recipe.kind == "lm":
        from transformers import LlamaConfig, LlamaForCausalLM

        c = target.text_config
        config = LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_attention_heads,
            head_dim=c.hidden_size // c.num_attention_heads,
            max_position_embeddings=target.context,
            tie_word_embeddings=True,
            bos_token_id=c.bos_token_id,
            eos_token_id=c.eos_token_id,
        )
        return LlamaForCausalLM(config).float().to(target.device)
    changes: dict[str, Any] = {"cross_attention": recipe.kind == "glide"}
    if recipe.max_lag:
        changes["max_lag"] = recipe.max_lag
    return GlideModel(GlideConfig.for_target(target, recipe.preset, **changes), target).float()


class Teacher:
    """The frozen target on whole windows: logits and, through one reused cache, the keys and values of its layers."""

    def __init__(self, target: Target, rows: int, length: int) -> None:
        self.target = target.model.requires_grad_(False) and target
        self.cache: KVCache = target.new_cache(rows, length)
        self.positions = torch.arange(length, device=target.device).expand(rows, -1)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        self.cache.truncate([0] * tokens.shape[0])
        logits = self.target.forward(tokens, self.positions, self.cache).logits
        self.cache.commit([tokens.shape[1]] * tokens.shape[0])
        return logits


def draft_logits(module: nn.Module, tokens: Tensor, positions: Tensor, cache: KVCache, visible: Tensor) -> Tensor:
    """Teacher-forced draft logits `(batch, length, vocab)` of either kind of draft."""
    if isinstance(module, GlideModel):
        return module(tokens, positions, cache.committed(module.config.target_layer), visible)
    return module(input_ids=tokens).logits


class Lesson:
    """The loss of a batch: the target's forward, its keys and values read at the recipe's lags, the draft's forward.

    Args:
        length: of the windows, in tokens.
    """

    def __init__(self, target: Target, module: nn.Module, recipe: DraftRecipe, length: int) -> None:
        self.target, self.module, self.recipe = target, module, recipe
        self.teacher = Teacher(target, recipe.rows, length)
        self.max_lag = module.config.max_lag if isinstance(module, GlideModel) else 8

    def __call__(self, batch: Tensor, number: int) -> Tensor:
        """Mean loss over `batch (rows, length)`, the run's batch of that number."""
        rows, length = batch.shape
        visible = lag_visible(self.recipe.lags, self.recipe.seed, number, rows, length, self.max_lag)
        visible = visible.to(batch.device)
        with torch.autocast(batch.device.type, dtype=torch.bfloat16):
            taught = self.teacher(batch)
            drafted = draft_logits(self.module, batch, self.teacher.positions, self.teacher.cache, visible)
        # Every kind of draft learns from the same positions.
        return distillation_loss(drafted, taught, batch, visible > 0, self.recipe.loss)


def evaluation_prompts(tokens: np.ndarray, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` prompts of `length` tokens from held-out text, at fixed random places."""
    if len(tokens) < 2 * length:
        raise DataError(f"only {len(tokens)} held-out tokens: evaluation needs {2 * length} at least")
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length, count)
    return [tokens[s : s + length].astype(int).tolist() for s in starts]


def evaluate_draft(
    target: Target, module: nn.Module, prompts: list[list[int]], new_tokens: int = 64
) -> dict[str, float]:
    """alpha and acceptance length of a chain of 5, by the real decode loop, greedy and at temperature 1."""
    figures: dict[str, float] = {}
    module.eval()
    draft = GlideDraft(module) if isinstance(module, GlideModel) else StandaloneDraft(Target(module))
    method = "glide" if isinstance(module, GlideModel) else "vanilla"
    for name, temperature in (("greedy", 0.0), ("t1", 1.0)):
        stats = Stats()
        params = SamplingParams(temperature=temperature, max_new_tokens=new_tokens, seed=1)
        for prompt in prompts:
            for _ in decode(target, make_drafter(method, draft, 5), [prompt], params, stats):
                pass
        figures[f"alpha_{name}"] = round(stats.alpha, 4)
        figures[f"acceptance_length_{name}"] = round(stats.acceptance_length, 4)
    return figures


def train_draft(
    target: Target,
    data: Path,
    out: Path,
    recipe: DraftRecipe,
    budget: Budget,
    command: str = "",
    prompts: int = 16,
    save_every_s: float = 300.0,
) -> dict[str, float]:
    """Train a draft and write it to `out`; a run killed at any moment goes on from its last save, `save_every_s` seconds
    ago at most, and ends with the weights of one never killed (with a budget of tokens, on the same machine).

    Returns:
        Figures: steps, tokens, seconds, train_loss, and `evaluate_draft`'s.
    Raises:
        DataError: no readable text in `data`. CheckpointError: `out` is not writable, not resumable, or holds a run
            with another recipe or other data.
        UnsupportedError: the target's cache cannot be read by a GliDe draft.
    """
    tokens = load_tokens(data, target.tokenizer)
    held_out = load_tokens(data, target.tokenizer, split="valid")
    length = min(recipe.length, target.context)
    windows = Windows(tokens, recipe.seed)
    module = make_draft(target, recipe)
    made = optimizers(module, recipe.rate, recipe.muon)
    out.mkdir(parents=True, exist_ok=True)
    identity = asdict(recipe) | {"data": hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest()[:16]}
    clock = load_state(out, module, made, identity)
    lesson = Lesson(target, module, recipe, length)
    module.train()

    def loss_of(step: int) -> tuple[Tensor, int]:
        # Windows and lags depend on the step alone: a resumed run repeats nothing and skips nothing.
        batch = windows.batch(step, recipe.rows, length).to(target.device)
        return lesson(batch, step), batch.numel()

    def save(now: Clock) -> None:
        save_state(out, module, made, now, identity)

    clock = fit(module, made, budget, loss_of, clock, save, save_every_s)
    figures = {
        "steps": clock.step,
        "tokens": clock.tokens,
        "seconds": round(clock.seconds, 1),
        "train_loss": round(sum(clock.losses[-50:]) / len(clock.losses[-50:]), 4),
        "parameters": sum(p.numel() for p in module.parameters()),
    }
    if prompts:
        room = min(128, target.context - 64)
        chosen = evaluation_prompts(held_out, prompts, room, recipe.seed)
        figures |= evaluate_draft(target, module, chosen)
    if isinstance(module, GlideModel):
        save_glide(out, module, target, command, figures, torch.bfloat16)
    else:
        _save_lm(module, target, out, command, figures)
    Console(stderr=True).print(f"wrote {out}: {figures}")
    return figures


def _save_lm(module: Any, target: Target, out: Path, command: str, figures: dict[str, Any]) -> None:
    """An ordinary Hugging Face model folder."""
    module.config._attn_implementation = "sdpa"
    module.to(torch.bfloat16).save_pretrained(out)
    target.tokenizer.save_pretrained(out)
    card = {"command": command, "kind": "lm", "figures": figures}
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
