"""Train a small target, Llama's or Qwen3's architecture, so that a fresh machine has a model with no download; or train any
causal LM further."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError, InputError
from ..progress import bar, say
from ..target.loading import load_model
from ..target.target import digest_of
from .data import corpus_tokenizer, load_streams
from .figures import trial_prompts
from .joint import JointDraft
from .loop import Budget, Clock, fit, optimizers, recent_mean, save_lm
from .recipe import DraftRecipe, TargetShape, Windowing
from .state import forget_before, load_state, save_state
from .stream import Windows


def new_model(shape: TargetShape, tokenizer: Any) -> Any:
    """A transformers causal LM of that shape with fresh weights.

    Raises:
        InputError: an unknown architecture, or sizes that don't divide.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    if shape.architecture not in ("llama", "qwen3"):
        raise InputError(f"unknown architecture '{shape.architecture}': choose llama or qwen3")
    if min(shape.layers, shape.width, shape.ffn, shape.heads, shape.kv_heads, shape.context) < 1:
        raise InputError(f"layers, width, ffn, heads, kv-heads and context are 1 or more: {shape}")
    if shape.width % (2 * shape.heads) or shape.heads % shape.kv_heads:
        raise InputError(
            f"width {shape.width} must be an even multiple of heads {shape.heads}, and heads a multiple of kv-heads "
            f"{shape.kv_heads}"
        )
    if shape.window and shape.architecture == "llama":
        raise InputError("llama has no window: choose --architecture qwen3, or leave --window 0")
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.width // shape.heads,
        "max_position_embeddings": shape.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if shape.architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**common))
    windows: dict[str, Any] = {"layer_types": shape.layer_types}
    if shape.window:
        windows |= {"use_sliding_window": True, "sliding_window": shape.window, "max_window_layers": 0}
    return Qwen3ForCausalLM(Qwen3Config(**common, **windows))


@torch.no_grad()
def valid_loss(model: torch.nn.Module, tokens: np.ndarray, length: int, max_rows: int = 64) -> float:
    """Mean loss in nats a token on the first windows of `tokens`."""
    rows = min(max_rows, len(tokens) // length)
    if rows < 1:
        return float("nan")
    windows = torch.from_numpy(tokens[: rows * length].astype(np.int64)).view(rows, length)
    device = next(model.parameters()).device
    total = 0.0
    with bar("evaluating the model", rows) as shown:
        for part in (part.to(device) for part in windows.split(8)):
            total += len(part) * float(model(input_ids=part, labels=part).loss)
            shown.advance(len(part))
    return total / rows


@dataclass(frozen=True)
class TargetRun:
    """What is trained on what, all of it checked before the first step."""

    model: Any
    tokenizer: Any
    windows: Windows
    valid: np.ndarray
    windowing: Windowing
    digest: str


def _begin(
    data: Path, out: Path, shape: TargetShape, windowing: Windowing, seed: int, start_from: Path | None
) -> TargetRun:
    """The model and the text of a run; see `train_target`."""
    if start_from is not None:
        model, tokenizer = load_model(start_from, torch.float32, {})
    elif not (data / "train.bin").is_file():
        raise DataError(f"no corpus at {data}: make one with `glidecape data pysource --output {data}`, or data chat")
    else:
        tokenizer = corpus_tokenizer(data)
        torch.manual_seed(seed)
        model = new_model(shape, tokenizer)
    config = model.config.get_text_config()
    streams = load_streams(data, tokenizer, config.vocab_size, keep=out)
    windows = Windows(streams["train"], seed)
    context = getattr(config, "max_position_embeddings", None) or windowing.longest
    if windowing.length > context:
        raise InputError(
            f"windows of {windowing.length} tokens are longer than the model's context of {context}: lower --length"
        )
    windowing = replace(windowing, long_length=min(windowing.long_length, context))
    for length in {windowing.length, windowing.longest}:
        windows.usable(length)  # too little text is an error now, not when the first long window is cut
    return TargetRun(model, tokenizer, windows, streams["valid"].tokens, windowing, streams["train"].digest)


def train_target(
    data: Path,
    out: Path,
    shape: TargetShape,
    budget: Budget,
    windowing: Windowing = Windowing(),
    rate: float = 3e-3,
    compile_model: bool = False,
    device: str = "cpu",
    seed: int = 0,
    command: str = "",
    save_every_s: float = 300.0,
    draft: DraftRecipe | None = None,
    draft_out: Path | None = None,
    prompts: int = 16,
    start_from: Path | None = None,
) -> dict[str, Any]:
    """Train on a corpus folder (`glidecape data`) and write a Hugging Face model folder to `out`.

    An interrupted run resumes from the state in `out/training`. Weights are written in bfloat16.

    Args:
        draft: of a draft that is trained beside it on the same batches, and written to `draft_out` (default: `out/draft`),
            with an evaluation on `prompts` held-out prompts. The target's weights are the same with and without.
        start_from: a model folder, trained further instead of a new model of `shape`; `data` may then also be text as
            `train_draft` takes it, in that model's tokens.

    Returns:
        Figures: steps, tokens, seconds, train_loss, valid_loss (nats a token); draft: those of `train_draft`.
    Raises:
        DataError: no corpus folder at `data`.
        CheckpointError: `out` holds a run that cannot be resumed, or `start_from` no model.
    """
    run = _begin(data, out, shape, windowing, seed, start_from)
    model = run.model.to(device)
    if draft is not None:
        trial_prompts(run.valid, prompts, getattr(model.config, "max_position_embeddings", None) or 2**31, seed)
    joint = JointDraft(model, run.tokenizer, draft, run.windows.text.tokens) if draft is not None else None
    about = {"shape": asdict(shape), "windowing": asdict(run.windowing), "seed": seed}
    identity = about | {"rate": rate, "draft": draft and asdict(draft), "compile": compile_model, "data": run.digest}
    identity["start_from"] = start_from and [str(start_from), digest_of(model.state_dict())[:16]]
    clock = _fit(run, joint, out, identity, budget, rate, save_every_s)
    counts = clock.counts
    began: Any = asdict(shape) if start_from is None else {"start_from": str(start_from)}
    figures = _write(out, run, clock, counts, about | {"command": command, "shape": began})
    if (data / "sources.json").exists():
        shutil.copy(data / "sources.json", out / "sources.json")
    if joint is not None:
        options = {"length": run.windowing.length, "prompts": prompts, "seed": seed, "command": command}
        figures["draft"] = joint.finish(draft_out or out / "draft", out, run.valid, counts, clock.each[1], **options)
    forget_before(out)
    return figures


def _fit(
    run: TargetRun,
    joint: JointDraft | None,
    out: Path,
    identity: dict[str, Any],
    budget: Budget,
    rate: float,
    save_every_s: float,
) -> Clock:
    """Train the model, and the draft on the same batches, from where `out` was left."""
    model, loss_of = run.model, _next_token_loss(run.model, identity["compile"])
    trained, made = [model], optimizers(model, rate, muon=True)
    state: torch.nn.Module = model
    if joint is not None:
        trained, made = [model, joint.module], made + joint.made
        state = torch.nn.ModuleDict({"target": model, "draft": joint.module})
    out.mkdir(parents=True, exist_ok=True)
    clock = load_state(out, state, made, identity)

    def losses_of(step: int) -> tuple[Iterator[torch.Tensor], int]:
        # Long windows are another numbering of the same text: a step's batch still depends on the step alone.
        rows, length = run.windowing.at(budget.progress(clock.tokens, clock.seconds))
        batch = run.windows.batch(step, rows, length).to(model.device)
        return losses(batch, step), batch.numel()

    def losses(batch: torch.Tensor, step: int) -> Iterator[torch.Tensor]:
        yield loss_of(batch)
        if joint is not None:
            yield joint.loss(batch, step)

    def save(now: Clock) -> None:
        save_state(out, state, made, now, identity)

    return fit(trained, made, budget, losses_of, clock, save, save_every_s)


def _next_token_loss(model: torch.nn.Module, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """The mean loss in nats over a batch `(rows, length)`, products in bfloat16."""

    def loss(batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    run = torch.compile(loss, dynamic=False) if compiled else loss

    def autocast(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(batch.device.type, dtype=torch.bfloat16):
            return run(batch)

    return autocast


def _write(out: Path, run: TargetRun, clock: Clock, counts: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Evaluate the model and write its folder; its figures."""
    model = run.model.eval()
    figures = counts | {
        "train_loss": recent_mean(clock.losses),
        "valid_loss": round(valid_loss(model, run.valid, run.windowing.length), 4),
    }
    save_lm(model.to(torch.bfloat16), run.tokenizer, out, about | {"figures": figures})
    say(f"wrote {out}: {figures}")
    return figures
