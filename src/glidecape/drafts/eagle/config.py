"""The configuration of an EAGLE draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..card import STRICT, Count, Epsilon, Lag, Size, Vocabulary

if TYPE_CHECKING:
    from ...target.target import Target


@dataclass(frozen=True)
class EagleConfig:
    """Stored in a draft's checkpoint.

    Attributes:
        ffn, heads, kv_heads, head_dim: of its layer.
        layer: the target layer whose rotary embedding it shares.
        vocab_size, embed_width, hidden_size: the target's.
        max_lag: deepest node that it drafts; it is trained on the target's own features alone, whatever the depth.
        eps: of the norm before the feed-forward network.
    """

    __pydantic_config__ = STRICT
    ffn: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    layer: Count
    vocab_size: Vocabulary
    embed_width: Size
    hidden_size: Size
    max_lag: Lag = 10
    eps: Epsilon = 1e-6

    @classmethod
    def for_target(cls, target: Target, **changes: Any) -> EagleConfig:
        """A layer like the target's last full-attention one; `changes` are single fields."""
        config = target.text_config
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(target.shapes)
        full = [i for i, kind in enumerate(kinds) if kind == "full_attention"] or list(range(len(kinds)))
        kv_heads, head_dim = target.shapes[full[-1]]
        ffn = getattr(config, "intermediate_size", None)
        fields: dict[str, Any] = {
            "ffn": ffn if isinstance(ffn, int) and ffn else 4 * target.hidden_size,
            "heads": target.query_heads(full[-1]),
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "layer": full[-1],
            "vocab_size": target.vocab_size,
            "embed_width": target.model.get_input_embeddings().weight.shape[1],
            "hidden_size": target.hidden_size,
            "eps": getattr(config, "rms_norm_eps", 1e-6),
        }
        return cls(**(fields | changes))
