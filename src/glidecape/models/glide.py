"""GliDe: a one-layer draft that cross-attends to the target's own keys and values.

A layer is self-attention, then cross-attention to the cache of one target layer, then a feed-forward network, each
added to the residual stream. The module is plain tensors in, tensors out: trainer and decode loop call the same
`forward`, and only fill in `visible` differently.

Source: GliDe paper, section 4.1. Differs in the default preset, as LongSpec repaired it: a norm before the
cross-attention, embedding and head shared with the target and frozen, the first block's cross-attention is zero. The
preset "paper" takes those three back (but keeps the target's own rotary base, where the official code fixes 10,000).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cache import KVCache
from ..errors import CheckpointError, UnsupportedError
from ..masks import visible_mask
from .layers import GatedFeedForward, RMSNorm, attend, linear, rotate, split_heads
from .packed import PackedLinear, draft_products, pack, packable
from .rotary import TargetRotary

if TYPE_CHECKING:
    from .target import Target

KV = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GlideConfig:
    """Everything that decides the shape of a GliDe draft; stored in its checkpoint.

    Attributes:
        width, ffn, heads, head_dim: of the draft's residual stream, feed-forward network and self-attention.
        target_heads, target_kv_heads, target_head_dim, target_layer: of the target layer whose cache is read.
        vocab_size: the target's.
        max_lag: deepest lag seen in training; drafts never go deeper unless the user says so.
        cross_attention: False makes the ablation "the same draft without the target's cache".
        cross_norm: a norm before the cross-attention.
        share_embedding: use the target's embedding and head, frozen. False: own, untied, trained.
        eps: of the norms.
    """

    width: int
    ffn: int
    heads: int
    head_dim: int
    target_heads: int
    target_kv_heads: int
    target_head_dim: int
    target_layer: int
    vocab_size: int
    max_lag: int = 8
    cross_attention: bool = True
    cross_norm: bool = True
    share_embedding: bool = True
    eps: float = 1e-6

    @classmethod
    def for_target(cls, target: Target, preset: str = "default", **changes: Any) -> GlideConfig:
        """The configuration that fits a target: its width and heads, reading its last full-attention layer.

        `preset` is "default" or "paper" (see the module). Keywords override single fields.

        Raises:
            UnsupportedError: unknown preset, or no layer of the target keeps the whole context.
        """
        config = target.text_config
        if preset not in ("default", "paper"):
            raise UnsupportedError(f"no preset '{preset}': there are 'default' and 'paper'")
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(target.shapes)
        # Our cache keeps every layer's whole context, windowed ones too, but a windowed layer's keys were only ever
        # trained to be read within its window: take the last one that reads everything, if there is one.
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"] or list(range(len(kinds)))
        layer = full[-1]
        kv_heads, head_dim = target.shapes[layer]
        heads = max(1, config.num_attention_heads)
        fields: dict[str, Any] = {
            "width": config.hidden_size,
            "ffn": config.intermediate_size if isinstance(getattr(config, "intermediate_size", None), int) else 0,
            "heads": heads,
            "head_dim": head_dim,
            "target_heads": heads,
            "target_kv_heads": kv_heads,
            "target_head_dim": head_dim,
            "target_layer": layer,
            "vocab_size": target.vocab_size,
            "eps": getattr(config, "rms_norm_eps", 1e-6),
        }
        fields["ffn"] = fields["ffn"] or 4 * config.hidden_size
        if preset == "paper":
            fields |= {"cross_norm": False, "share_embedding": False, "max_lag": 5}
        return cls(**(fields | changes))


@dataclass(frozen=True)
class Readable:
    """What the cross-attention may read: keys and values, the mask (None: all of them), and where a query sees
    anything at all (`(batch, queries, 1)`; None: everywhere). A query that sees nothing gets zero."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    sees: Tensor | None


def _readable(target_kv: KV, visible: Tensor | int) -> Readable | None:
    most, least = (visible, visible) if isinstance(visible, int) else (int(visible.max()), int(visible.min()))
    if most == 0:
        return None  # the very beginning of a text
    keys, values = (t[:, :, :most] for t in target_kv)
    if isinstance(visible, int) or least == most:
        return Readable(keys, values, None, None)
    return Readable(keys, values, visible_mask(visible, most), (visible > 0)[..., None] if least == 0 else None)


class GlideLayer(nn.Module):
    def __init__(self, c: GlideConfig) -> None:
        super().__init__()
        self.inner = inner = c.heads * c.head_dim
        self.heads, self.target_heads = c.heads, c.target_heads
        self.scale, self.cross_scale = c.head_dim**-0.5, c.target_head_dim**-0.5
        self.self_norm = RMSNorm(c.width, c.eps)
        self.qkv = linear(c.width, 3 * inner)
        self.self_out = linear(inner, c.width)
        if c.cross_attention:
            self.cross_norm = RMSNorm(c.width, c.eps) if c.cross_norm else nn.Identity()
            self.cross_q = linear(c.width, c.target_heads * c.target_head_dim)
            self.cross_out = linear(c.target_heads * c.target_head_dim, c.width)
        self.ffn_norm = RMSNorm(c.width, c.eps)
        self.ffn = GatedFeedForward(c.width, c.ffn)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> KV:
        """The draft's own keys and values: for a first layer, functions of token and position only."""
        k, v = self.qkv(self.self_norm(x))[..., self.inner :].chunk(2, dim=-1)
        return rotate(split_heads(k, self.heads), cos, sin), split_heads(v, self.heads)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cross_rotary: KV | None,
        read: Readable | None,
        own: KVCache | None,
        own_mask: Tensor | None,
    ) -> Tensor:
        qk, v = self.qkv(self.self_norm(x)).split([2 * self.inner, self.inner], dim=-1)
        q, k = rotate(split_heads(qk, 2 * self.heads), cos, sin).chunk(2, dim=1)
        v = split_heads(v, self.heads)
        if own is None:
            x = x + self.self_out(attend(q, k, v, None, self.scale, causal=True))
        else:
            k, v = own.write(0, k, v)
            x = x + self.self_out(attend(q, k, v, own_mask, self.scale))
        if read is not None:
            q = split_heads(self.cross_q(self.cross_norm(x)), self.target_heads)
            if cross_rotary is not None:
                q = rotate(q, *cross_rotary)
            # A query takes the cache's dtype, never the other way round: that would copy the cache each step.
            q = q.to(read.keys.dtype)
            found = self.cross_out(attend(q, read.keys, read.values, read.mask, self.cross_scale).to(x.dtype))
            x = x + (found if read.sees is None else found * read.sees)
        return x + self.ffn(self.ffn_norm(x))


class GlideModel(nn.Module):
    """The draft network, bound to its target's embedding, head and rotary embedding.

    The target's parts are borrowed, not owned: they are no parameters of this module and not in its checkpoint.

    Raises:
        UnsupportedError: the configuration asks for something that this target cannot give.
    """

    def __init__(self, config: GlideConfig, target: Target) -> None:
        super().__init__()
        self.config = config
        embedding = target.model.get_input_embeddings()
        if config.share_embedding:
            if config.width != embedding.weight.shape[1]:
                raise UnsupportedError(
                    f"a draft of width {config.width} cannot share an embedding of width {embedding.weight.shape[1]}"
                )
            self._borrowed: tuple[Any, ...] = (embedding, target.model.get_output_embeddings())
        else:
            self._borrowed = ()
            self.embed = nn.Embedding(config.vocab_size, config.width)
            self.head = linear(config.width, config.vocab_size)
        self._served_head: nn.Module | None = None
        self._rotary: tuple[Any, ...] = (TargetRotary(target, config.target_layer),)
        self.layer = GlideLayer(config)
        self.norm = RMSNorm(config.width, config.eps)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        if config.share_embedding and (final := _final_norm(target)) is not None:
            # The head expects the scale of the target's last hidden state.
            with torch.no_grad():
                self.norm.weight.copy_(final.float())
        self.to(target.device)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self._borrowed[0](tokens) if self._borrowed else self.embed(tokens)

    def _logits(self, x: Tensor) -> Tensor:
        if not self._borrowed:
            return self.head(x)
        if self._served_head is not None:
            return self._served_head(x)
        return self._borrowed[1](x.to(self._borrowed[0].weight.dtype))

    def serve(self) -> GlideModel:
        """Make it ready for decoding: no gradients, and weights packed, with a copy of the borrowed head if it is to be
        multiplied in another dtype than the target's."""
        self.eval().requires_grad_(False)
        products = draft_products(self.norm.weight.dtype)
        pack(self, products)
        head: Any = self._borrowed[1] if self._borrowed else None
        if isinstance(head, PackedLinear) or packable(head):
            weight = head.weight  # unpacks a copy where the head is packed and not tied: once is enough
            if weight.dtype != products:
                self._served_head = PackedLinear(weight, head.bias, products)
        return self

    def keys_values(self, tokens: Tensor, positions: Tensor) -> KV:
        """Own keys and values of committed tokens, `(batch, heads, tokens, head_dim)`: two projections of embeddings."""
        x = self._embed(tokens).to(self.norm.weight.dtype)
        (cos, sin), _ = self._rotary[0](positions)
        return self.layer.keys_values(x, cos, sin)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        target_kv: KV,
        visible: Tensor | int,
        own: KVCache | None = None,
        own_mask: Tensor | None = None,
    ) -> Tensor:
        """Draft logits `(batch, queries, vocab)`.

        Args:
            tokens, positions: `(batch, queries)`.
            target_kv: keys and values of the target layer that is read, `(batch, kv_heads, keys, head_dim)`.
            visible: `(batch, queries)`, target keys that each query may read: 0 .. visible-1; or one number for all.
            own: the draft's cache while decoding; the queries are written to its scratch. None while training: the
                queries are whole sequences from position 0.
            own_mask: `(batch, 1, queries, slots)` for `own`; None: every slot.
        """
        x = self._embed(tokens).to(self.norm.weight.dtype)
        rotary, cross_rotary = self._rotary[0](positions)
        read = _readable(target_kv, visible) if self.config.cross_attention else None
        x = self.layer(x, *rotary, cross_rotary, read, own, own_mask)
        return self._logits(self.norm(x))


def _final_norm(target: Target) -> Tensor | None:
    base = getattr(target.model, "model", None)
    weight = getattr(getattr(base, "norm", None), "weight", None)
    return None if weight is None else copy.copy(weight.detach())


class GlideDraft:
    """GliDe joined to the decode loop (a `DraftModel`, see `drafting.drafter`)."""

    def __init__(self, module: GlideModel, figures: dict[str, Any] | None = None) -> None:
        self.module, self.figures = module.eval(), figures or {}
        self.max_lag = module.config.max_lag

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        weight = self.module.norm.weight
        shape = (self.module.config.heads, self.module.config.head_dim)
        return KVCache([shape], batch, capacity, weight.dtype, weight.device)

    def catch_up(self, tokens: Tensor, positions: Tensor, own: KVCache) -> None:
        """Write the keys and values of committed tokens `(batch, count)` to scratch, without drafting from them."""
        own.write(0, *self.module.keys_values(tokens, positions))

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        own: KVCache,
        own_mask: Tensor | None,
        target_cache: KVCache,
        scratch_positions: Tensor,
    ) -> Tensor:
        """Logits `(batch, queries, vocab)`. Every query of a round reads the keys that were committed at its start."""
        layer = self.module.config.target_layer
        lengths = target_cache.lengths
        visible: Tensor | int = lengths[0]
        if len(set(lengths)) > 1:
            visible = torch.tensor(lengths, device=tokens.device)[:, None].expand_as(tokens)
        return self.module(tokens, positions, target_cache.committed(layer), visible, own, own_mask)

    @classmethod
    def from_pretrained(cls, name: str, target: Target) -> GlideDraft:
        """Load a GliDe draft from a folder or a Hub repository.

        Raises:
            CheckpointError: missing or torn, or a plain causal LM.
            MismatchError: trained for another target.
        """
        from .checkpoint import load_draft

        draft = load_draft(name, target)
        if not isinstance(draft, cls):
            raise CheckpointError(f"{name} holds a causal LM, not a GliDe draft: load it with `load_draft`")
        return draft
