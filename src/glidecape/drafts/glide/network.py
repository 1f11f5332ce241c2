"""GliDe: a draft of one or two layers that cross-attends to the target's own keys and values.

A layer is self-attention, then cross-attention to the cache of target layers, then a feed-forward network, each added to
the residual stream. `forward` is plain tensors in, tensors out: trainer and decode loop call the same, and only fill in
`visible`, `self_attention` and `glimpse` differently.

Source: GliDe paper, section 4.1. Differs in the default preset, as LongSpec repaired it: a norm before the
cross-attention, embedding and head shared with the target and frozen, the first block's cross-attention is zero. The
preset "paper" takes those three back (but keeps the target's own rotary base, where the official code fixes 10,000).

It reads the target layer three quarters of the way up and looks back 64 tokens itself, where the paper's reads the last layer
and looks back to the beginning: both accept more (docs/drafts.md).

Beyond the paper, where it is asked for, a `glimpse`: the target's last hidden state at the newest verified position joins
the root's embedding; a deeper node takes the draft's own last hidden state at its parent instead. It joins the queries, not
the keys and values, so that those of a first layer stay functions of token and position alone.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from ...core.masks import documents_mask, visible_mask, window_mask
from ...target.attention import attend
from ...target.operators import no_mask, path_attention
from ...target.packed import draft_products, pack
from ..layers import GatedFeedForward, SelfAttention, WholeSequence, linear, rotate, side_by_side, split_heads
from ..network import DraftNetwork
from .config import GlideConfig

if TYPE_CHECKING:
    from ...target.target import Target

KV = tuple[Tensor, Tensor]


class CrossInputs:
    """What the cross-attention may read: keys and values of target layers, and how many of them each query sees.

    Args:
        layers: keys and values `(batch, kv_heads, keys, head_dim)` by the number of the target layer.
        visible: `(batch, queries)`, target keys that each query may read: 0 .. visible-1, or `(batch, 1)` for all queries of
            a row; None: all keys.
        begins: `(batch, queries)`, the slot from which visible keys are counted; None: the first.
    """

    def __init__(self, layers: dict[int, KV], visible: Tensor | None, begins: Tensor | None = None) -> None:
        self.layers, self.visible = layers, visible
        keys = next(iter(layers.values()))[0].shape[2] if layers else 0
        # The very beginning of a text; a compiled program reads one key at least.
        self.empty = not torch.compiler.is_exporting() and keys == 0
        # A query that sees nothing gets zero.
        self.mask = None if visible is None else visible_mask(visible, keys, begins)
        self.sees = None if visible is None else (visible > 0)[..., None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of the queries `(batch, heads, queries, head_dim)`; `(batch, queries, heads x head_dim)`."""
        if not torch.compiler.is_exporting() or self.visible is None:
            return attend(q, k, v, self.mask, scale)
        # A compiled program reads them as committed tokens, before which no query stands.
        lengths = self.visible.amax(1).clamp(min=1)
        nowhere = torch.zeros(q.shape[0], q.shape[2], 1, dtype=torch.bool, device=q.device)
        seen = no_mask() if self.visible.shape[1] == 1 or self.mask is None else self.mask
        return path_attention(q, k, v, lengths, lengths[:, None], nowhere, seen, scale, 0.0).flatten(2)


class CrossAttention(nn.Module):
    """Attention to the target's cached keys and values as they are: only queries and outputs have weights.

    Several layers are read each by its own queries; or, with `mix`, as one: a learned mean of their keys and values.
    """

    def __init__(self, c: GlideConfig, reads: tuple[int, ...]) -> None:
        super().__init__()
        self.reads, self.heads, self.scale = reads, c.target_heads, c.target_head_dim**-0.5
        inner = c.target_heads * c.target_head_dim * (1 if c.mix else len(reads))
        self.norm = nn.RMSNorm(c.width, eps=c.eps) if c.cross_norm else nn.Identity()
        self.q = linear(c.width, inner)
        self.out = linear(inner, c.width)
        self.mix = nn.Parameter(torch.zeros(2, len(reads))) if c.mix else None

    def _sources(self, read: CrossInputs) -> list[KV]:
        sources = [read.layers[layer] for layer in self.reads]
        if self.mix is None:
            return sources
        share = self.mix.softmax(1).to(sources[0][0].dtype)
        keys = torch.stack([w * k for w, (k, _) in zip(share[0], sources, strict=True)]).sum(0)
        values = torch.stack([w * v for w, (_, v) in zip(share[1], sources, strict=True)]).sum(0)
        return [(keys, values)]

    def forward(self, x: Tensor, rotary: KV | None, read: CrossInputs) -> Tensor:
        sources = self._sources(read)
        queries = split_heads(self.q(self.norm(x)), len(sources) * self.heads)
        if rotary is not None:
            queries = rotate(queries, *rotary)
        # A query takes the cache's dtype, never the other way round: that would copy the cache each step.
        each = queries.to(sources[0][0].dtype).chunk(len(sources), dim=1)
        found = [read.attend(q, k, v, self.scale) for q, (k, v) in zip(each, sources, strict=True)]
        out = self.out((found[0] if len(found) == 1 else torch.cat(found, -1)).to(x.dtype))
        return out if read.sees is None else out * read.sees


class GlideLayer(nn.Module):
    def __init__(self, c: GlideConfig, number: int) -> None:
        super().__init__()
        inner = c.heads * c.head_dim
        self.number, self.heads, self.scale = number, c.heads, c.head_dim**-0.5
        self.self_norm = nn.RMSNorm(c.width, eps=c.eps)
        self.q: nn.Linear | None = linear(c.width, inner)
        self.kv = linear(c.width, 2 * inner)
        self.qkv: nn.Linear | None = None
        self.self_out = linear(inner, c.width)
        self.cross = CrossAttention(c, c.reads[number]) if c.cross_attention else None
        self.ffn_norm = nn.RMSNorm(c.width, eps=c.eps)
        self.ffn = GatedFeedForward(c.width, c.ffn)

    def keys_values(self, normed: Tensor, cos: Tensor, sin: Tensor) -> KV:
        """The draft's own keys and values, `(batch, heads, tokens, head_dim)`."""
        k, v = self.kv(normed).chunk(2, dim=-1)
        return rotate(split_heads(k, self.heads), cos, sin), split_heads(v, self.heads)

    def serve(self) -> None:
        """Share one matmul among Q, K and V: with few rows, call overhead dominates it."""
        assert self.q is not None
        self.qkv, self.q = side_by_side(self.q, self.kv), None

    def _queries_keys_values(self, x: Tensor, seen: Tensor, rotary: KV) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `seen`, which is `x` or has the glimpse added to it; keys and values of `x`."""
        if self.qkv is None:
            assert self.q is not None
            normed = self.self_norm(x)
            q = split_heads(self.q(normed if seen is x else self.self_norm(seen)), self.heads)
            return rotate(q, *rotary), *self.keys_values(normed, *rotary)
        made, count = self.qkv(self.self_norm(x if seen is x else torch.cat([seen, x], 1))), x.shape[1]
        size = made.shape[-1] // 3
        turned = made[..., : 2 * size]
        if seen is not x:
            turned = torch.cat([made[:, :count, :size], made[:, count:, size : 2 * size]], -1)
        q, k = rotate(split_heads(turned, 2 * self.heads), *rotary).chunk(2, dim=1)
        return q, k, split_heads(made[:, -count:, 2 * size :], self.heads)

    def forward(
        self,
        x: Tensor,
        rotary: KV,
        cross_rotary: KV | None,
        read: CrossInputs,
        self_attention: SelfAttention,
        glimpse: Tensor | None = None,
    ) -> Tensor:
        """The residual stream `(batch, queries, width)` after the layer; `glimpse` joins all of it but keys and values."""
        seen = x if glimpse is None else x + glimpse
        q, k, v = self._queries_keys_values(x, seen, rotary)
        x = seen + self.self_out(self_attention(self.number, q, k, v, self.scale))
        if self.cross is not None and not read.empty:
            x = x + self.cross(x, cross_rotary, read)
        return x + self.ffn(self.ffn_norm(x))


class GlideModel(DraftNetwork):
    """The draft network. Where its width is another than the target's, a projection stands between.

    Args:
        kept: `(draft_vocab,)` the tokens that it can propose, where the configuration reduces the vocabulary.
    """

    kind: ClassVar[str] = "glide"
    kept: Tensor

    def __init__(self, config: GlideConfig, kept: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.rotary_layer = config.reads[-1][-1]  # layers of one kind rotate alike
        if config.draft_vocab:
            self.register_buffer("kept", torch.arange(config.draft_vocab) if kept is None else kept.long())
        if config.share_embedding:
            if config.width != config.embed_width:
                self.embedding_projection = linear(config.embed_width, config.width)
            if config.width != config.hidden_size:
                self.head_projection = linear(config.width, config.hidden_size)
        else:
            self.embed = nn.Embedding(config.vocab_size, config.width)
            self.head = linear(config.width, config.draft_vocab or config.vocab_size)
        if config.glimpse:
            self.glimpse_projection = linear(config.hidden_size, config.width)
            self.own_glimpse_projection = linear(config.width, config.width)
        self.layers = nn.ModuleList([GlideLayer(config, m) for m in range(config.layers)])
        self.norm = nn.RMSNorm(config.width, eps=config.eps)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        if config.glimpse:
            # It begins as the draft without a glimpse: hidden states are ten times as large as embeddings.
            nn.init.zeros_(self.glimpse_projection.weight)
            nn.init.zeros_(self.own_glimpse_projection.weight)

    @classmethod
    def new(cls, config: GlideConfig, target: Target, kept: Tensor | None = None) -> GlideModel:
        """An untrained draft for a target, bound to it.

        Raises:
            UnsupportedError: the configuration asks for something that this target cannot give.
        """
        module = cls(config, kept)
        if config.share_embedding and (final := _final_norm(target)) is not None and final.shape[0] == config.width:
            # The head expects the scale of the target's last hidden state.
            with torch.no_grad():
                module.norm.weight.copy_(final.float())
        return module.bind(target)

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def embeddings(self, tokens: Tensor) -> Tensor:
        """`(batch, queries, width)` of tokens `(batch, queries)`."""
        if not self.config.share_embedding:
            return self.embed(tokens)
        x = self.target_parts.embed(tokens, self.dtype)
        # The residual stream stays in the module's dtype, whatever autocast makes of a product.
        return self.embedding_projection(x).to(self.dtype) if self.config.width != self.config.embed_width else x

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the tokens that it can propose: `(batch, queries, draft_vocab)`, or the target's vocabulary."""
        if not self.config.share_embedding:
            return self.head(hidden)
        if self.config.width != self.config.hidden_size:
            hidden = self.head_projection(hidden)
        return self.target_parts.logits(hidden, self.kept if self.config.draft_vocab else None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `(batch, queries, vocab)`: of a reduced vocabulary mapped back, -inf for what it cannot propose."""
        found = self.head_logits(hidden)
        if not self.config.draft_vocab:
            return found
        full = found.new_full((*found.shape[:-1], self.config.vocab_size), float("-inf"))
        full[..., self.kept] = found
        return full

    def serve(self) -> GlideModel:
        """Make it ready for decoding: no gradients, and weights packed, those of the borrowed head too."""
        self.num_parameters = sum(one.numel() for one in self.parameters())  # packed weights are none
        self.eval().requires_grad_(False)
        for layer in self.layers:
            cast("GlideLayer", layer).serve()
        products = draft_products(self.dtype)
        pack(self, products)
        if self.config.share_embedding:
            self.target_parts.serve(products, self.kept if self.config.draft_vocab else None)
        return self

    def first_keys_values(self, tokens: Tensor, positions: Tensor) -> KV:
        """All that a draft of one layer needs of committed tokens: two projections of their embeddings.

        Keys and values `(batch, heads, tokens, head_dim)` of the first layer.
        """
        layer = cast("GlideLayer", self.layers[0])
        return layer.keys_values(layer.self_norm(self.embeddings(tokens)), *self.rotary(positions)[0])

    def forward(
        self,
        embeddings: Tensor,
        rotary: tuple[KV, KV | None],
        cross_kv: dict[int, KV],
        visible: Tensor | None,
        self_attention: SelfAttention,
        glimpse: Tensor | None = None,
        begins: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states `(batch, queries, width)`, after the final norm.

        Args:
            embeddings: `(batch, queries, width)`.
            rotary: cosines and sines for the draft's own heads and for its cross-attention (None: it does not rotate).
            cross_kv: keys and values `(batch, kv_heads, keys, head_dim)` of the target layers that are read, by number.
            visible: `(batch, queries)`, target keys that each query may read: 0 .. visible-1; None: all.
            self_attention: stores the queries' own keys and values, and attends.
            glimpse: `(batch, queries, width)`, made by `look` or `recall`; None where there is none.
            begins: `(batch, queries)`, the slot of the target's from which visible keys are counted, where several documents
                lie in a row; None: the first.
        """
        x, (own_rotary, cross_rotary) = embeddings, rotary
        read = CrossInputs(cross_kv if self.config.cross_attention else {}, visible, begins)
        for layer in self.layers:
            x = layer(x, own_rotary, cross_rotary, read, self_attention, glimpse)
            glimpse = None
        return self.norm(x)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        cross_kv: dict[int, KV],
        visible: Tensor | None,
        self_attention: SelfAttention | None = None,
        glimpse: Tensor | None = None,
        begins: Tensor | None = None,
    ) -> Tensor:
        """`forward` of tokens and positions `(batch, queries)`; without `self_attention` they are whole sequences, or with
        `begins` documents one after the other, none of which sees another."""
        window = self.config.window
        if self_attention is None:
            mask = window_mask(positions, positions, window) if window and tokens.shape[1] > window else None
            if begins is not None:
                apart = documents_mask(begins)[:, None]
                mask = apart if mask is None else mask & apart
            self_attention = WholeSequence(mask)
        rotary = self.rotary(positions)
        return self(self.embeddings(tokens), rotary, cross_kv, visible, self_attention, glimpse, begins)


def _final_norm(target: Target) -> Tensor | None:
    base = getattr(target.model, "model", None)
    weight = getattr(getattr(base, "norm", None), "weight", None)
    return None if weight is None else copy.copy(weight.detach())
