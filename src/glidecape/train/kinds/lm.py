"""Independent draft LMs in training, and as they are judged once loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...compat import set_attention
from ...drafting.methods import AnyDraft, base_for
from ...drafts.causal_lm import StandaloneDraft
from ...drafts.sharing import name_from
from ...target.target import Target
from ..loop import save_lm
from ..losses import distillation_loss
from ..recipe import DraftRecipe
from ..teacher import Teacher, TeacherOutput
from .base import DraftTraining


class LmTraining(DraftTraining):
    @staticmethod
    def new(target: Target, recipe: DraftRecipe, text: np.ndarray | None) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        c = target.text_config
        heads, head_dim = max(1, round(c.num_attention_heads * recipe.width)), c.hidden_size // c.num_attention_heads
        config = LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=heads * head_dim,
            intermediate_size=round((getattr(c, "intermediate_size", None) or 4 * c.hidden_size) * recipe.width),
            num_hidden_layers=recipe.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=head_dim,
            max_position_embeddings=target.context,
            tie_word_embeddings=True,
            bos_token_id=c.bos_token_id,
            eos_token_id=c.eos_token_id,
        )
        return LlamaForCausalLM(config).float().to(target.device)

    def loss(self, output: TeacherOutput, recipe: DraftRecipe) -> Tensor:
        tokens = output.tokens
        visible = self.visible(output, recipe)
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            drafted = self._logits(output, recipe)
        counted = (visible > 0) & output.counted()  # every kind of draft learns from the same positions
        return distillation_loss(drafted, output.logits, tokens, counted, recipe.loss)

    def _logits(self, output: TeacherOutput, recipe: DraftRecipe) -> Tensor:
        if output.apart is None and recipe.positions == "zero":
            return self.module(input_ids=output.tokens).logits
        # With a mask, or transformers takes the jump in moved positions for the beginning of another text.
        mask = torch.ones_like(output.tokens) if output.apart is None else output.apart
        return self.module(output.tokens, mask, output.positions, use_cache=False).logits

    def logits_by_lag(self, tokens: Tensor, teacher: Teacher) -> Iterator[Tensor]:
        yield self.module(input_ids=tokens).logits

    @property
    def layers(self) -> list[nn.Module]:
        return [self.module]

    def joined(self) -> tuple[str, AnyDraft]:
        self.module.eval()
        return base_for(StandaloneDraft.kind), StandaloneDraft(Target(self.module))

    def save(self, out: Path, target: Target, command: str, figures: dict[str, Any]) -> None:
        set_attention(self.module.config, "sdpa")
        named = name_from(out, target.name)
        card = {"command": command, "kind": StandaloneDraft.kind, "figures": figures, "target": named}
        save_lm(self.module.to(torch.bfloat16), target.tokenizer, out, card)


class LoadedLm(LmTraining):
    """A draft LM that was loaded to decode, which is judged only."""

    module: Target

    def logits_by_lag(self, tokens: Tensor, teacher: Teacher) -> Iterator[Tensor]:
        yield Teacher(self.module, *tokens.shape)(tokens)
