"""Teacher-forced forwards of target and draft on whole windows, as training and evaluation take them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.cache import KVCache
from ..drafts.eagle.network import EagleModel
from ..drafts.glide.network import GlideModel
from ..drafts.medusa.network import MedusaModel
from ..target.target import Target


class Teacher:
    """The frozen target on whole windows: logits and, through one reused cache, the keys and values of its layers.

    Args:
        hidden: keep its last hidden states in the cache, too.
    """

    def __init__(self, target: Target, rows: int, length: int, hidden: bool = False) -> None:
        self.target = target.model.requires_grad_(False) and target
        self.cache: KVCache = target.new_cache(rows, length, hidden=hidden)
        self.positions = torch.arange(length, device=target.device).expand(rows, -1)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        self.cache.truncate([0] * tokens.shape[0])
        logits = self.target.forward(tokens, self.positions, self.cache).logits
        self.cache.commit([tokens.shape[1]] * tokens.shape[0])
        return logits

    def features(self, tokens: Tensor) -> Tensor:
        """Last hidden states `(rows, length, hidden_size)` of the window that it ran last."""
        assert self.cache.hidden is not None, "this teacher does not keep them"
        return self.cache.hidden[: tokens.shape[0], : tokens.shape[1]]

    def run(self, tokens: Tensor, number: int, learned: Tensor | None = None) -> TeacherOutput:
        """A batch with what the target says of it, in bfloat16 products; any number of drafts may learn from it until the
        next one is output."""
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            return TeacherOutput(tokens, number, learned, self(tokens), self)


@dataclass(frozen=True)
class TeacherOutput:
    """A batch of a training and the target's forward over it.

    Attributes:
        tokens: `(rows, length)`.
        number: of the batch in its run; what is drawn for it follows from it.
        learned: `(rows, length)` bool, the tokens to be learned, each by the position before it; None: all.
        logits: the target's, `(rows, length, vocab)`.
        teacher: holds the keys and values of the target's layers.
    """

    tokens: Tensor
    number: int
    learned: Tensor | None
    logits: Tensor
    teacher: Teacher

    def counted(self) -> Tensor:
        """`(rows, length)` bool: positions whose next token is to be learned."""
        if self.learned is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        return nn.functional.pad(self.learned[:, 1:], (0, 1))


def previous(hidden: Tensor) -> Tensor:
    """`(batch, length, width)`: at each position the hidden state of the one before; zeros at the first."""
    return nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0))


def draft_hidden(
    module: GlideModel, tokens: Tensor, positions: Tensor, cache: KVCache, visible: Tensor, passes: int = 2
) -> Tensor:
    """Teacher-forced last hidden states `(batch, length, width)` of a GliDe draft.

    With a glimpse, a node below the root takes the draft's hidden state at its parent, which only a pass over the window
    can make. The first pass gives roots their true glimpse and other nodes that of their root; each further one is exact
    one depth deeper. So `max_lag` passes are what decoding does (with two layers, whose second reads keys that depend on
    glimpses, only nearly); training takes two, the first without gradients.

    Args:
        visible: `(batch, length)`; a position that sees all keys before its own is a root.
    """
    kv = {layer: cache.committed(layer) for layer in module.config.layers_read}
    if not module.config.glimpse:
        return module.hidden(tokens, positions, kv, visible)
    of_root = module.glimpse_projection(cache.hidden_at(visible - 1).to(module.dtype))
    is_root, glimpse = (visible == positions)[..., None], of_root
    for _ in range(passes - 1):
        with torch.no_grad():
            above = module.hidden(tokens, positions, kv, visible, glimpse=glimpse)
        glimpse = torch.where(is_root, of_root, module.own_glimpse_projection(previous(above)))
    return module.hidden(tokens, positions, kv, visible, glimpse=glimpse)


def hidden_by_lag(
    module: GlideModel, tokens: Tensor, positions: Tensor, cache: KVCache, deepest: int
) -> Iterator[Tensor]:
    """Teacher-forced last hidden states with every position at lag 1, then at 2, and so on; each `(batch, length, width)`.

    As in decoding, the glimpse of lag d is the draft's own hidden state, one position and one lag before.
    """
    kv = {layer: cache.committed(layer) for layer in module.config.layers_read}
    above: Tensor | None = None
    for lag in range(1, deepest + 1):
        glimpse = None
        if module.config.glimpse and above is None:
            glimpse = module.glimpse_projection(cache.hidden_at(positions - 1).to(module.dtype))
        elif above is not None and module.config.glimpse:
            glimpse = module.own_glimpse_projection(previous(above))
        above = module.hidden(tokens, positions, kv, (positions + 1 - lag).clamp(min=0), glimpse=glimpse)
        yield above


def num_lags(module: nn.Module | Target) -> int:
    """At how many lags `logits_by_lag` judges a draft."""
    if isinstance(module, MedusaModel):
        return module.config.heads
    if isinstance(module, GlideModel) and (module.config.cross_attention or module.config.glimpse):
        return module.config.max_lag
    return 1


def reads_hidden(module: nn.Module | Target) -> bool:
    """Does the draft read the target's last hidden states?"""
    return isinstance(module, EagleModel | MedusaModel) or (isinstance(module, GlideModel) and module.config.glimpse)


def logits_by_lag(module: nn.Module | Target, tokens: Tensor, teacher: Teacher) -> Iterator[Tensor]:
    """Teacher-forced logits `(batch, length, vocab)` of the token after each position, at lags 1 .. `num_lags`; the first
    positions have no such lag and hold anything. A draft LM is a module while it is trained, and a `Target` once loaded."""
    if isinstance(module, GlideModel):
        yield from map(module.logits, hidden_by_lag(module, tokens, teacher.positions, teacher.cache, num_lags(module)))
    elif isinstance(module, EagleModel):
        before = previous(teacher.features(tokens))
        yield module.logits(module.hidden(tokens, teacher.positions, before))
    elif isinstance(module, MedusaModel):
        for lag in range(1, module.config.heads + 1):
            found = module.head_logits(lag - 1, teacher.features(tokens)[:, :-lag])
            yield nn.functional.pad(found, (0, 0, lag, 0))
    elif isinstance(module, Target):
        yield Teacher(module, *tokens.shape)(tokens)
    else:
        yield module(input_ids=tokens).logits


def draft_logits(
    module: nn.Module, tokens: Tensor, positions: Tensor, cache: KVCache, visible: Tensor, passes: int = 2
) -> Tensor:
    """Teacher-forced draft logits `(batch, length, vocab)` of either kind of draft; a GliDe draft with a reduced
    vocabulary gives those of the tokens that it can propose."""
    if isinstance(module, GlideModel):
        return module.head_logits(draft_hidden(module, tokens, positions, cache, visible, passes))
    return module(input_ids=tokens).logits
