"""`model.generate(…, custom_generate=glidecape_generate)`: transformers' own front door, our rounds behind it.

transformers prepares the call as ever: generation config, padding, logits processors, stopping criteria. What it would do
token by token is done here round by round, and the output is the one that it would have given. The model is borrowed: its
attention is ours while a call runs and its own again afterwards.

Differs from transformers: a row that ended by a criterion of the user's is padded, end-of-text token or not, where
transformers lets it run on until all rows have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compat import (
    CACHE_ARGUMENTS,
    GenerateDecoderOnlyOutput,
    attention_of,
    is_the_callers,
    set_attention,
    token_ids,
)
from ..core.params import NOISE, SamplingParams
from ..core.stats import Stats
from ..drafting.drafter import Drafter
from ..drafting.methods import make_drafter, method_for
from ..drafting.options import MethodOptions
from ..drafts.base import DraftModel
from ..drafts.causal_lm import StandaloneDraft
from ..drafts.checkpoint import load_draft
from ..engine.decode import decode
from ..errors import InputError, UnsupportedError
from ..target.attention import ATTENTION
from ..target.target import Target
from ..usual import kind_of, usual_drafter

_KEPT = "_glidecape"  # attribute of a model: what later calls use again
_PREPARED = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position", *CACHE_ARGUMENTS}
_EXTRAS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# These run the model, or carry something from call to call: a tree asks them about tokens that are never emitted.
_STATEFUL = ("ClassifierFreeGuidance", "SynthIDText", "WhisperTimeStamp", "DiaEOS")


def glidecape_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    draft: str | Path | DraftModel | Any = None,
    method: str | None = None,
    options: MethodOptions | None = None,
    seed: int | None = None,
    sampling: str = NOISE,
    glide_streamer: Any = None,
    glide_stats: Stats | None = None,
    **model_kwargs: Any,
) -> Any:
    """Generate with a drafter, for transformers' `custom_generate`: the tokens are those of `model.generate` without it.

    Greedily they are the same tokens; with `do_sample` they have the same law, and `seed` decides them.

    Args:
        model: from `generate`, as the next four.
        input_ids: `(batch, tokens)`, padded on the left.
        logits_processor: sees each node with its own path and the row's padding, and depends on its arguments alone.
        stopping_criteria: judge each row after every token; they must depend on their arguments alone.
        generation_config: what the call and the model's own configuration ask for.
        draft: folder or Hub name, a loaded draft, or a transformers model that drafts. A folder is loaded once a model.
        method: as for `glidecape.load`; None: "usual". Without `options`, too, measured costs decide what is drafted: the first
            call of a model and a draft measures them, which takes a few seconds (docs/auto.md).
        options: of the method, such as `MethodOptions(length=4)`; None: the defaults.
        seed: of row 0; row i has seed + i. None: drawn from PyTorch's generator, so that `torch.manual_seed` decides.
        sampling: "noise" or "residual", see `SamplingParams`.
        glide_streamer: a transformers streamer, for one row. transformers keeps `streamer=` to itself.
        glide_stats: counts and times are added to it.
        **model_kwargs: from `generate`: the attention mask. What cannot be used is refused.

    Returns:
        Sequences `(batch, tokens)`, prompt and output, padded on the right; or, as asked for, transformers' output class.

    Raises:
        InputError: input that cannot be decoded: holes in the attention mask, embeddings, positions or a cache of one's own.
        UnsupportedError: the model cannot decode trees, or beams, scores and the like are asked for.
        CheckpointError, MismatchError: see `load_draft`.

    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> model = AutoModelForCausalLM.from_pretrained("path/to/model")
    >>> inputs = AutoTokenizer.from_pretrained("path/to/model")("def load(", return_tensors="pt")
    >>> out = model.generate(**inputs, custom_generate=glidecape_generate, draft="path/to/draft", max_new_tokens=8)
    >>> out.shape[1] - inputs.input_ids.shape[1] <= 8
    True
    """
    _refuse(generation_config, logits_processor, model_kwargs, glide_streamer, len(input_ids))
    prompts, pads = _unpad(input_ids, model_kwargs)
    room = generation_config.max_length - input_ids.shape[1]
    params = _params(generation_config, logits_processor, stopping_criteria, pads, room, seed, sampling)
    streamer = _NoStreamer() if glide_streamer is None else glide_streamer
    streamer.put(input_ids.cpu())
    with _our_attention(model, draft):
        emitted = _emitted(*_prepare(model, draft, method, options), prompts, params, glide_stats, streamer)
    sequences = _join(input_ids, emitted, _token_ids(token_ids(generation_config, "pad")))
    return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences


def _emitted(
    target: Target, drafter: Drafter, prompts: list[list[int]], params: Any, stats: Stats | None, streamer: Any
) -> list[list[int]]:
    """The tokens of each row; the streamer gets them as they come, and the end."""
    emitted: list[list[int]] = [[] for _ in prompts]
    for event in decode(target, drafter, prompts, params, stats):
        emitted[event.row] += event.tokens
        if event.tokens:
            streamer.put(torch.tensor(event.tokens))
    streamer.end()
    return emitted


class _NoStreamer:
    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


def _params(
    generation_config: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    pads: list[Tensor],
    room: int,
    seed: int | None,
    sampling: str,
) -> list[SamplingParams]:
    """How each row is sampled: processors and criteria see the row's own padding before its tokens."""
    ends = _token_ids(token_ids(generation_config, "eos"))
    criteria = [c for c in stopping_criteria or [] if not _ours(c, ends, generation_config.max_length)]
    common = SamplingParams(
        # transformers' list of processors ends with its own temperature, top-k and so on.
        temperature=1.0 if generation_config.do_sample else 0.0,
        seed=int(torch.randint(2**62, (1,))) if seed is None else seed,
        max_new_tokens=room,
        stop_token_ids=ends,
        ignore_eos=True,  # the generation config's are all there are
        sampling=sampling,
    )
    return [
        replace(
            common,
            seed=common.seed + i,
            processor=processor_of(logits_processor, i, len(pads), pad) if logits_processor else None,
            ends=ends_of(criteria, i, len(pads), pad) if criteria else None,
        )
        for i, pad in enumerate(pads)
    ]


def _refuse(config: Any, processors: Any, model_kwargs: dict[str, Any], streamer: Any, rows: int) -> None:
    """Everything that would be ignored, or would not be lossless, as an error."""
    if config is None:
        raise InputError("glidecape_generate is for model.generate(…, custom_generate=glidecape_generate)")
    mode = config.get_generation_mode()
    if mode not in ("greedy_search", "sample"):
        raise UnsupportedError(f"glidecape_generate decodes greedily or by sampling, not by {mode.value}")
    if asked := [name for name in _EXTRAS if getattr(config, name, None)]:
        raise UnsupportedError(f"glidecape_generate gives sequences only: leave {', '.join(asked)} out")
    if config.cache_implementation == "quantized":
        raise UnsupportedError("a quantized cache changes the output: glidecape_generate keeps the cache in full")
    refuse_stateful(processors)
    for name in CACHE_ARGUMENTS:
        if is_the_callers(model_kwargs.get(name)):
            raise InputError(f"glidecape_generate keeps a cache of its own: leave {name} out")
    for name, value in model_kwargs.items():
        harmless = value is None or (name == "token_type_ids" and not value.any())
        if name not in _PREPARED and not harmless:
            raise InputError(f"glidecape_generate decodes from input_ids and an attention mask: leave {name} out")
    if streamer is not None and rows > 1:
        raise InputError(f"a streamer shows one row, and there are {rows}: stream prompts one by one")


def refuse_stateful(processors: Any) -> None:
    """Raises UnsupportedError for logits processors that carry something from token to token."""
    for processor in processors or ():
        if any(part in type(processor).__name__ for part in _STATEFUL):
            raise UnsupportedError(
                f"{type(processor).__name__} keeps a state from token to token, and a tree asks about tokens that are never "
                "emitted: leave it out"
            )


def _unpad(input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[list[list[int]], list[Tensor]]:
    """The prompts as lists, and the padding before each, `(pads,)`."""
    mask = model_kwargs.get("attention_mask")
    starts = [0] * len(input_ids)
    if mask is not None:
        starts = [int(row.argmax()) for row in mask.int()]
        for i, start in enumerate(starts):
            if not bool(mask[i, start:].all()):
                raise InputError(f"row {i} is padded on the right or has holes in its attention mask: pad on the left")
    positions = model_kwargs.get("position_ids")
    for i, start in enumerate(starts):
        if positions is None:
            break
        own = positions[i % len(positions)]
        if positions.ndim != 2 or not torch.equal(own[start:].cpu(), torch.arange(len(own) - start)):
            raise InputError("glidecape_generate counts positions from 0 in each row: leave position_ids out")
    return [row[start:].tolist() for row, start in zip(input_ids, starts, strict=True)], [
        row[:start] for row, start in zip(input_ids, starts, strict=True)
    ]


def _token_ids(tokens: Tensor | None) -> tuple[int, ...]:
    return () if tokens is None else tuple(tokens.flatten().tolist())


def _ours(criterion: Any, ends: Sequence[int], max_length: int) -> bool:
    """Is this an end that the row looks for anyway?"""
    name = type(criterion).__name__
    if name == "EosTokenCriteria":
        return set(_token_ids(criterion.eos_token_id)) <= set(ends)
    return name == "MaxLengthCriteria" and criterion.max_length >= max_length


def _as_batch(pad: Tensor | None, tokens: Tensor, rows: int) -> Tensor:
    """`(rows, length)`: a row's padded tokens, as often as the batch has rows, for what knows rows by their number."""
    return (tokens if pad is None else torch.cat([pad.to(tokens.device), tokens])).expand(rows, -1)


def processor_of(
    processors: Any, row: int, rows: int = 1, pad: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """transformers' logits processors as a `Processor` of row `row` of `rows`, with the padding before it."""

    def process(tokens: Tensor, logits: Tensor) -> Tensor:
        ids, scores = _as_batch(pad, tokens, rows), logits.expand(rows, -1).clone()  # a processor may write in place
        for one in processors:  # the list's own call inspects each signature each time
            scores = one(ids, scores)
        return scores[row]

    return process


def ends_of(criteria: Any, row: int = 0, rows: int = 1, pad: Tensor | None = None) -> Callable[[Tensor], bool]:
    """transformers' stopping criteria as the `Ends` of row `row` of `rows`, with the padding before it."""

    def ended(tokens: Tensor) -> bool:
        ids = _as_batch(pad, tokens, rows)
        return any(bool(torch.as_tensor(one(ids, None)).expand(rows)[row]) for one in criteria)

    return ended


def _join(input_ids: Tensor, emitted: list[list[int]], pad: tuple[int, ...]) -> Tensor:
    longest = max(map(len, emitted))
    if not pad and any(len(tokens) < longest for tokens in emitted):
        raise InputError("rows of unequal length need a padding token: give pad_token_id")
    padded = [tokens + list(pad[:1]) * (longest - len(tokens)) for tokens in emitted]
    return torch.cat([input_ids, torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


@dataclass
class _Kept:
    """What a model keeps for later calls: it was probed, and its drafts were loaded."""

    target: Target
    drafts: dict[str, Any] = field(default_factory=dict)
    usual: dict[Any, Drafter] = field(default_factory=dict)  # by folder or draft; `auto` learns from call to call


def _prepare(model: Any, draft: Any, method: str | None, options: MethodOptions | None) -> tuple[Target, Drafter]:
    kept = model.__dict__.get(_KEPT)
    if kept is None or kept.target.model is not model:
        kept = model.__dict__[_KEPT] = _Kept(Target(model))
    named = str(draft) if isinstance(draft, Path) else draft
    if method in (None, "usual") and options is None:
        if named not in kept.usual:
            kept.usual[named] = usual_drafter(kept.target, _loaded(kept, named))
        return kept.target, kept.usual[named]
    loaded = _loaded(kept, named)
    chosen = method_for(method or "usual", kind_of(loaded))
    return kept.target, make_drafter(chosen, loaded, options)


def _loaded(kept: _Kept, draft: Any) -> Any:
    """The draft that a caller named by its folder, or gave as a draft or a model of its own."""
    if isinstance(draft, str):
        if draft not in kept.drafts:
            kept.drafts[draft] = load_draft(draft, kept.target)
        return kept.drafts[draft]
    if not (isinstance(draft, torch.nn.Module) and hasattr(draft, "generate")):
        return draft
    own = draft.__dict__.get(_KEPT)
    if own is None or own.target.model is not draft:
        own = draft.__dict__[_KEPT] = _Kept(Target(draft))
    if own.target.vocab_size != kept.target.vocab_size:
        raise InputError(
            f"the draft has {own.target.vocab_size} tokens and the model {kept.target.vocab_size}: they need one vocabulary"
        )
    return StandaloneDraft(own.target)


@contextmanager
def _our_attention(*models: Any) -> Iterator[None]:
    """Our attention on these models, dropout off; all of it as it was when done. What is no model is left alone."""
    models = tuple(m for m in models if isinstance(m, torch.nn.Module) and hasattr(m, "set_attn_implementation"))
    attention = [(config, attention_of(config)) for model in models for config in _configs(model)]
    training = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
            if _KEPT in model.__dict__:
                model.set_attn_implementation(ATTENTION)
        yield
    finally:
        for config, name in attention:  # outer configs first: setting one sets those inside it
            set_attention(config, name)
        for module, was in training:
            module.training = was


def _configs(model: Any) -> list[Any]:
    """Every configuration in a model, each once, outer ones first."""
    found = [module.config for module in model.modules() if hasattr(getattr(module, "config", None), "sub_configs")]
    for config in found:  # grows while it is read
        found += [inner for name in config.sub_configs if (inner := getattr(config, name, None)) is not None]
    return list({id(config): config for config in found}.values())
