"""`GlideConfig`: everything that decides the shape of a GliDe draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ...errors import UnsupportedError
from ..card import STRICT, Count, Epsilon, Lag, Size, Vocabulary

if TYPE_CHECKING:
    from ...target.target import Target

PRESETS = ("default", "paper")
Layers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=64)]
Reads = Annotated[tuple[Layers, ...], Field(min_length=1, max_length=2)]


@dataclass(frozen=True)
class GlideConfig:
    """Stored in a draft's checkpoint.

    Attributes:
        width, ffn, heads, head_dim: of the draft's residual stream, feed-forward network and self-attention.
        target_heads, target_kv_heads, target_head_dim: of the target layers whose cache is read.
        reads: for each layer of the draft the target layers that it reads; its length is the number of layers.
        vocab_size, embed_width, hidden_size: the target's; widths of its embedding and of its last hidden states.
        max_lag: deepest lag seen in training; drafts never go deeper unless the user says so.
        cross_attention: False makes the ablation "the same draft without the target's cache".
        cross_norm: a norm before the cross-attention.
        share_embedding: use the target's embedding and head, frozen. False: own, untied, trained.
        mix: a layer that reads several target layers reads a learned mean of their keys and values.
        glimpse: the target's last hidden state joins the root, the draft's own last hidden state deeper nodes.
        window: tokens that the self-attention looks back, itself included; 0: all.
        draft_vocab: tokens that it can propose, the most frequent ones of its training text; 0: all.
        eps: of the norms.
    """

    __pydantic_config__ = STRICT
    width: Size
    ffn: Size
    heads: Size
    head_dim: Size
    target_heads: Size
    target_kv_heads: Size
    target_head_dim: Size
    reads: Reads
    vocab_size: Vocabulary
    embed_width: Size
    hidden_size: Size
    max_lag: Lag = 8
    cross_attention: bool = True
    cross_norm: bool = True
    share_embedding: bool = True
    mix: bool = False
    glimpse: bool = False
    window: Count = 0
    draft_vocab: Annotated[int, Field(ge=0, le=2**24)] = 0
    eps: Epsilon = 1e-6

    @property
    def layers(self) -> int:
        return len(self.reads)

    @property
    def layers_read(self) -> tuple[int, ...]:
        """Numbers of all target layers that are read, ascending."""
        return tuple(sorted({layer for reads in self.reads for layer in reads})) if self.cross_attention else ()

    @classmethod
    def for_target(
        cls, target: Target, preset: str = "default", layers: int = 1, read: str = "", **changes: Any
    ) -> GlideConfig:
        """The configuration that fits a target: its width and heads, reading layers with full attention.

        Args:
            preset: "default", with a window of 64 tokens, or "paper" (see `network.py`).
            layers: of the draft, 1 or 2. Draft layer m of n reads the n - m'th target layer from the top.
            read: "last"; "upper", three quarters of the way up; the number of a target layer; several joined by +, one
                for each layer of the draft or all for its only one; or "mix", a learned mean of four layers over the
                target's whole depth. "" is the preset's: "upper", of the paper "last".
            changes: single fields.

        Raises:
            UnsupportedError: unknown preset, a layer that does not exist, or layers of different shapes.
        """
        config = target.text_config
        if preset not in PRESETS:
            raise UnsupportedError(f"no preset '{preset}': there are 'default' and 'paper'")
        if layers not in (1, 2):
            raise UnsupportedError(f"a GliDe draft has 1 or 2 layers, not {layers}")
        reads, mix = _reads(target, layers, read or ("last" if preset == "paper" else "upper"))
        kinds = target.layer_kinds
        alike = {(kinds[layer], *target.shapes[layer]) for own in reads for layer in own}
        if len(alike) > 1:
            raise UnsupportedError(f"layers {read} of this target differ in kind or heads: read layers of one kind")
        _, kv_heads, head_dim = alike.pop()
        heads, ffn = target.query_heads(reads[-1][-1]), getattr(config, "intermediate_size", None)
        fields: dict[str, Any] = {
            "width": config.hidden_size,
            "ffn": ffn if isinstance(ffn, int) and ffn else 4 * config.hidden_size,
            "heads": heads,
            "head_dim": head_dim,
            "target_heads": heads,
            "target_kv_heads": kv_heads,
            "target_head_dim": head_dim,
            "reads": reads,
            "mix": mix,
            "vocab_size": target.vocab_size,
            "embed_width": target.embed_width,
            "hidden_size": target.hidden_size,
            "eps": getattr(config, "rms_norm_eps", 1e-6),
        }
        if preset == "default":
            fields["window"] = 64
        else:
            fields |= {"cross_norm": False, "share_embedding": False, "max_lag": 5}
        return cls(**(fields | changes))


def _reads(target: Target, layers: int, read: str) -> tuple[tuple[tuple[int, ...], ...], bool]:
    """For each draft layer the target layers that it reads, and whether as a learned mean."""
    kinds = target.layer_kinds
    # Our cache keeps every layer's whole context, windowed ones too, but a windowed layer's keys were only ever
    # trained to be read within its window: take the last ones that read everything, if there are any.
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"] or list(range(len(kinds)))
    if read in ("last", "upper"):
        end = len(full) if read == "last" else round(3 * (len(full) - 1) / 4) + 1
        top = full[:end][-layers:]
        return tuple((layer,) for layer in ([top[0]] * (layers - len(top)) + top)), False
    if read == "mix":
        spread = tuple(sorted({full[round(part * (len(full) - 1) / 3)] for part in range(4)}))
        return (spread,) * layers, True
    try:
        numbers = tuple(int(part) for part in read.split("+"))
    except ValueError:
        raise UnsupportedError(f"layers to read are last, upper, mix, or numbers joined by +, not '{read}'") from None
    if wrong := [n for n in numbers if not 0 <= n < len(target.shapes)]:
        raise UnsupportedError(f"this target has no layer {wrong[0]}: its layers are 0 to {len(target.shapes) - 1}")
    if layers == 1:
        return (numbers,), False
    if len(numbers) not in (1, layers):
        raise UnsupportedError(f"a draft of {layers} layers reads 1 or {layers} target layers, not {len(numbers)}")
    return tuple((n,) for n in (numbers * layers)[:layers]), False
