"""Train a small target, Llama's or Qwen3's architecture, so that a fresh machine has a model with no download; or train any
causal LM further."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..errors import CheckpointError, DataError, InputError, first_line
from ..target.target import digest_of
from .beside import Beside
from .data import Windows, corpus_tokenizer, load_streams
from .draft import DraftRecipe
from .figures import trial_prompts
from .loop import Budget, Clock, fit, load_state, optimizers, recent_mean, save_lm, save_state


@dataclass(frozen=True)
class TargetShape:
    """The size of a target; the defaults make a Llama of 12 M parameters with a 4k vocabulary.

    `architecture` is "llama", or "qwen3": queries and keys are normalised, and with a `window` (tokens) a layer attends to
    so many only, but for each `full_every`-th counted from the last, which stays full.
    """

    layers: int = 6
    width: int = 384
    ffn: int = 1024
    heads: int = 6
    kv_heads: int = 6
    context: int = 8192
    rope_theta: float = 100_000.0
    architecture: str = "llama"
    window: int = 0
    full_every: int = 4

    @property
    def layer_types(self) -> list[str]:
        """Which kind of attention each layer has, in transformers' words."""
        last = self.layers - 1
        full = [not self.window or (last - i) % self.full_every == 0 for i in range(self.layers)]
        return ["full_attention" if one else "sliding_attention" for one in full]


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


def known_model(folder: Path) -> tuple[Any, Any]:
    """A saved causal LM in float32, all its weights trainable, and its tokenizer.

    Raises:
        CheckpointError: there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # safetensors and configurations have exceptions of their own
        raise CheckpointError(f"cannot load a model to start from at {folder}: {first_line(error)}") from None


@dataclass(frozen=True)
class Windowing:
    """Tokens a training window, windows a step; the last `long_share` of the run sees `long_length` instead.

    A step holds `rows * length` tokens throughout: long windows come in smaller numbers, and are no longer than the model's
    context.
    """

    length: int = 512
    rows: int = 16
    long_length: int = 2048
    long_share: float = 0.1

    @property
    def longest(self) -> int:
        """Tokens of the longest window that a run sees."""
        return max(self.length, self.long_length if self.long_share else 0)

    def at(self, progress: float) -> tuple[int, int]:
        """(rows, length) at that share of the run."""
        if progress < 1 - self.long_share or self.long_length <= self.length:
            return self.rows, self.length
        return max(1, self.rows * self.length // self.long_length), self.long_length


@torch.no_grad()
def valid_loss(model: torch.nn.Module, tokens: np.ndarray, length: int, max_rows: int = 64) -> float:
    """Mean loss in nats a token on the first windows of `tokens`."""
    rows = min(max_rows, len(tokens) // length)
    if rows < 1:
        return float("nan")
    windows = torch.from_numpy(tokens[: rows * length].astype(np.int64)).view(rows, length)
    device = next(model.parameters()).device
    parts = [part.to(device) for part in windows.split(8)]
    return sum(len(part) * float(model(input_ids=part, labels=part).loss) for part in parts) / rows


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

    An interrupted run goes on from `out/training.pt`. Weights are written in bfloat16.

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
    if start_from is not None:
        model, tokenizer = known_model(start_from)
    elif not (data / "train.bin").is_file():
        raise DataError(f"no corpus at {data}: make one with `glidecape data pysource --out {data}`, or data chat")
    else:
        tokenizer = corpus_tokenizer(data)
        torch.manual_seed(seed)
        model = new_model(shape, tokenizer)
    model.to(device)
    config = model.config.get_text_config()
    streams = load_streams(data, tokenizer, config.vocab_size)
    windows, valid = Windows(streams["train"].tokens, seed), streams["valid"].tokens
    context = getattr(config, "max_position_embeddings", None) or windowing.longest
    if windowing.length > context:
        raise InputError(
            f"windows of {windowing.length} tokens are longer than the model's context of {context}: lower --length"
        )
    windowing = replace(windowing, long_length=min(windowing.long_length, context))
    for length in {windowing.length, windowing.longest}:
        windows.usable(length)  # too little text is an error now, not when the first long window is cut
    if draft is not None:
        trial_prompts(valid, prompts, context, seed)
    made = optimizers(model, rate, muon=True)
    beside = Beside(model, tokenizer, draft, windows.tokens) if draft is not None else None
    trained: list[torch.nn.Module] = [model]
    state: torch.nn.Module = model
    if beside is not None:
        trained, made = [model, beside.module], made + beside.made
        state = torch.nn.ModuleDict({"target": model, "draft": beside.module})
    out.mkdir(parents=True, exist_ok=True)
    identity: dict[str, Any] = {"shape": asdict(shape), "windowing": asdict(windowing), "rate": rate, "seed": seed}
    identity |= {"draft": asdict(draft) if draft is not None else None, "compile": compile_model}
    identity |= {"start_from": str(start_from) if start_from is not None else None, "data": streams["train"].digest}
    if start_from is not None:
        identity["start_from_weights"] = digest_of(model.state_dict())[:16]
    clock = load_state(out, state, made, identity)
    autocast = torch.autocast(torch.device(device).type, dtype=torch.bfloat16)

    def next_token_loss(batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    compiled = torch.compile(next_token_loss, dynamic=False) if compile_model else next_token_loss

    def losses_of(step: int) -> tuple[Iterator[torch.Tensor], int]:
        # Long windows are another numbering of the same text: a step's batch still depends on the step alone.
        rows, length = windowing.at(budget.progress(clock.tokens, clock.seconds))
        batch = windows.batch(step, rows, length).to(device)
        return losses(batch, step), batch.numel()

    def losses(batch: torch.Tensor, step: int) -> Iterator[torch.Tensor]:
        with autocast:
            loss = compiled(batch)
        yield loss
        if beside is not None:
            yield beside.loss(batch, step)

    def save(now: Clock) -> None:
        save_state(out, state, made, now, identity)

    clock = fit(trained, made, budget, losses_of, clock, save, save_every_s)
    model.eval()
    counts = {"steps": clock.step, "tokens": clock.tokens, "seconds": round(clock.seconds, 1)}
    figures: dict[str, Any] = counts | {
        "train_loss": recent_mean(clock.losses),
        "valid_loss": round(valid_loss(model, valid, windowing.length), 4),
    }
    card = {
        "command": command,
        "shape": asdict(shape) if start_from is None else {"start_from": str(start_from)},
        "windowing": asdict(windowing),
        "seed": seed,
        "figures": figures,
    }
    save_lm(model.to(torch.bfloat16), tokenizer, out, card)
    if (data / "sources.json").exists():
        shutil.copy(data / "sources.json", out / "sources.json")
    Console(stderr=True).print(f"wrote {out}: {figures}")
    if beside is not None:
        options = {"length": windowing.length, "prompts": prompts, "seed": seed, "command": command}
        figures["draft"] = beside.finish(draft_out or out / "draft", out, valid, counts, clock.each[1], **options)
    return figures
