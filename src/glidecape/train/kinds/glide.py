"""GliDe drafts in training, with or without cross-attention: each position reads the target's keys up to its lag."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.cache import KVCache
from ...drafts.glide.config import GlideConfig
from ...drafts.glide.network import GlideModel
from ...errors import InputError
from ...target.target import Target
from ..losses import distillation_loss
from ..recipe import DraftRecipe
from ..stream import PIECE
from ..teacher import Teacher, TeacherOutput, previous
from .base import DraftTraining


class GlideTraining(DraftTraining):
    module: GlideModel

    def __init__(self, module: GlideModel) -> None:
        super().__init__(module)
        config = module.config
        self.reads_hidden, self.deepest, self.shortest = config.glimpse, config.max_lag, config.max_lag + 1
        self.lags = config.max_lag if config.cross_attention or config.glimpse else 1

    @staticmethod
    def new(target: Target, recipe: DraftRecipe, text: np.ndarray | None) -> nn.Module:
        config, kept = glide_config(target, recipe), None
        if config.draft_vocab:
            if text is None:
                raise InputError("a reduced vocabulary needs text to count tokens in: name it with --data")
            kept = frequent_tokens(text, config.draft_vocab, target.vocab_size, target.eos_token_ids)
        return GlideModel.new(config, target, kept).float()

    def loss(self, output: TeacherOutput, recipe: DraftRecipe) -> Tensor:
        tokens, teacher, logits = output.tokens, output.teacher, output.logits
        visible, begins = self.visible(output, recipe), output.begins
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            drafted = draft_logits(self.module, tokens, output.positions, teacher.cache, visible, begins=begins)
        counted = (visible > 0) & output.counted()
        if self.module.config.draft_vocab:
            # What it cannot propose is nothing to learn: the target's law among the others.
            logits, tokens = logits[..., self.module.kept], self._among_kept(tokens)
        return distillation_loss(drafted, logits, tokens, counted, recipe.loss)

    def _among_kept(self, tokens: Tensor) -> Tensor:
        """Places of tokens in the reduced vocabulary, -100 for those outside."""
        kept = self.module.kept
        place = torch.searchsorted(kept, tokens).clamp(max=len(kept) - 1)
        return torch.where(kept[place] == tokens, place, -100)

    def logits_by_lag(self, tokens: Tensor, teacher: Teacher) -> Iterator[Tensor]:
        hidden = hidden_by_lag(self.module, tokens, teacher.positions, teacher.cache, self.lags)
        yield from map(self.module.logits, hidden)


def frequent_tokens(tokens: np.ndarray, count: int, vocab: int, always: tuple[int, ...] = ()) -> Tensor:
    """The `count` most frequent token ids of a text and those named in `always`, ascending; `(count,)`.

    >>> frequent_tokens(np.array([3, 3, 1, 1, 1, 2]), 2, 5, always=(4,)).tolist()
    [1, 4]
    """
    often = np.zeros(vocab, dtype=np.int64)
    for first in range(0, len(tokens), PIECE):  # the text may be larger than memory
        often += np.bincount(tokens[first : first + PIECE], minlength=vocab)
    for token in always:
        often[token] = np.iinfo(often.dtype).max
    return torch.from_numpy(np.sort(np.argsort(-often, kind="stable")[:count]))


def glide_config(target: Target, recipe: DraftRecipe) -> GlideConfig:
    """The shape of a recipe's GliDe draft.

    Raises:
        InputError, UnsupportedError: it does not fit the target.
    """
    plain = GlideConfig.for_target(target, recipe.preset, recipe.layers, recipe.read)
    if recipe.draft_vocab > plain.vocab_size:
        raise InputError(
            f"the target has {plain.vocab_size} tokens: a draft vocabulary cannot have {recipe.draft_vocab}"
        )
    heads = max(1, round(plain.heads * recipe.width))
    changes: dict[str, Any] = {
        "cross_attention": recipe.kind == "glide",
        "draft_vocab": recipe.draft_vocab,
        "heads": heads,
        "width": round(plain.width * recipe.width) if recipe.width != 1 else plain.width,
        "ffn": round(plain.ffn * recipe.width),
    }
    if recipe.window >= 0:
        changes["window"] = recipe.window
    if recipe.max_lag:
        changes["max_lag"] = recipe.max_lag
    if recipe.embedding:
        changes["share_embedding"] = recipe.embedding == "shared"
    if recipe.norm:
        changes["cross_norm"] = recipe.norm == "on"
    if recipe.glimpse or recipe.kind == "glide-no-cross":
        changes["glimpse"] = recipe.glimpse == "on"
    return replace(plain, **changes)


def draft_hidden(
    module: GlideModel,
    tokens: Tensor,
    positions: Tensor,
    cache: KVCache,
    visible: Tensor,
    passes: int = 2,
    begins: Tensor | None = None,
) -> Tensor:
    """Teacher-forced last hidden states `(batch, length, width)` of a GliDe draft.

    With a glimpse, a node below the root takes the draft's hidden state at its parent, which only a pass over the window
    can make. The first pass gives roots their true glimpse and other nodes that of their root; each further one is exact
    one depth deeper. So `max_lag` passes are what decoding does (with two layers, whose second reads keys that depend on
    glimpses, only nearly); training takes two, the first without gradients.

    Args:
        visible: `(batch, length)`; a position that sees all keys before its own is a root.
        begins: as in `TeacherOutput`; positions and `visible` then count from there.
    """
    kv = {layer: cache.committed(layer) for layer in module.config.layers_read}
    if not module.config.glimpse:
        return module.hidden(tokens, positions, kv, visible, begins=begins)
    places = torch.arange(tokens.shape[1], device=tokens.device)  # whatever the positions are
    newest = visible - 1 if begins is None else torch.where(visible > 0, begins + visible - 1, -1)
    of_root = module.glimpse_projection(cache.hidden_at(newest).to(module.dtype))
    is_root, glimpse = (visible == (places if begins is None else places - begins))[..., None], of_root
    for _ in range(passes - 1):
        with torch.no_grad():
            above = module.hidden(tokens, positions, kv, visible, glimpse=glimpse, begins=begins)
        glimpse = torch.where(is_root, of_root, module.own_glimpse_projection(previous(above)))
    return module.hidden(tokens, positions, kv, visible, glimpse=glimpse, begins=begins)


def hidden_by_lag(
    module: GlideModel, tokens: Tensor, positions: Tensor, cache: KVCache, deepest: int
) -> Iterator[Tensor]:
    """Teacher-forced last hidden states with every position at lag 1, then at 2, and so on; each `(batch, length, width)`.

    As in decoding, the glimpse of lag d is the draft's own hidden state, one position and one lag before.
    """
    kv = {layer: cache.committed(layer) for layer in module.config.layers_read}
    above: Tensor | None = None
    # Where keys lie, whatever their positions are.
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    for lag in range(1, deepest + 1):
        glimpse = None
        if module.config.glimpse and above is None:
            glimpse = module.glimpse_projection(cache.hidden_at(places - 1).to(module.dtype))
        elif above is not None and module.config.glimpse:
            glimpse = module.own_glimpse_projection(previous(above))
        above = module.hidden(tokens, positions, kv, (places + 1 - lag).clamp(min=0), glimpse=glimpse)
        yield above


def draft_logits(
    module: GlideModel,
    tokens: Tensor,
    positions: Tensor,
    cache: KVCache,
    visible: Tensor,
    passes: int = 2,
    begins: Tensor | None = None,
) -> Tensor:
    """Teacher-forced logits `(batch, length, vocab)`, of the tokens that the draft can propose; arguments as `draft_hidden`."""
    return module.head_logits(draft_hidden(module, tokens, positions, cache, visible, passes, begins))
