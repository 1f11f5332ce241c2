"""A stop policy of your own, measured against the built-in ones: it stops drafting after a line break.

python examples/stop_policy.py                                # the shipped pair, in a checkout
python examples/stop_policy.py path/to/model path/to/draft   # your own
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import glidecape
from glidecape import LanguageModel, Stats, Target, make_drafter
from glidecape.core.tree import TokenTree
from glidecape.drafting.drafter import ModelDrafter
from glidecape.drafting.expansions.chain import Chain
from glidecape.drafting.law import DraftLaw
from glidecape.drafting.stop import Entropy, FixedLength, StopPolicy

SHIPPED = Path(__file__).parents[1] / "models" / "pysource"
PROMPTS = ("def read_lines(path):\n    ", "class Node:\n    def __init__(self", "import os\n\n")


class StopAfterNewline:
    """Draft on until a token with a line break was drafted, at most `cap` tokens.

    Lossless: it looks at the path so far, and drops nothing.
    """

    def __init__(self, target: Target, cap: int = 8) -> None:
        texts = target.tokenizer.batch_decode([[token] for token in range(target.vocab_size)])
        self.breaks = torch.tensor(["\n" in text for text in texts])
        self.cap = cap

    def more(self, tree: TokenTree, depth: int, law: DraftLaw) -> Tensor | bool:
        newest = tree.tokens[:, -1]  # (batch,): in a chain the last node is the newest one
        return ~self.breaks[newest] if depth < self.cap else False


def main(
    model: Annotated[str, typer.Argument(help="Folder or Hub name.")] = f"{SHIPPED}/target",
    draft: Annotated[str, typer.Argument(help="Folder or Hub name.")] = f"{SHIPPED}/glide",
    tokens: Annotated[int, typer.Argument(help="Tokens to write after each prompt.")] = 64,
) -> None:
    """Compare stop policies on a pair: tokens/s, tokens drafted a round, acceptance length."""
    lm = glidecape.load(model, draft=draft, method="glide", dtype="float32", compile="off")
    plain = LanguageModel(lm.target, make_drafter("plain"), "plain")
    policies: dict[str, StopPolicy] = {
        "fixed length 4": FixedLength(4),
        "fixed length 8": FixedLength(8),
        "SVIP, threshold 0.6": Entropy(0.6, cap=8),
        "stop after a newline": StopAfterNewline(lm.target),
    }
    print(f"{'policy':22} tokens/s  drafted a round  acceptance length  output")
    for name, policy in policies.items():
        mine = LanguageModel(lm.target, ModelDrafter(lm.draft, Chain(), policy), name, lm.draft)
        stats, equal = Stats(), True
        for prompt in PROMPTS:
            found = mine(prompt, stats=stats, max_tokens=tokens, ignore_eos=True)
            equal &= found.tokens == plain(prompt, max_tokens=tokens, ignore_eos=True).tokens
        figures = f"{stats.tokens_per_s:8.0f} {stats.drafted / stats.rounds:16.2f} {stats.acceptance_length:18.2f}"
        print(f"{name:22} {figures}  {'equal' if equal else 'DIFFERENT'}")


if __name__ == "__main__":
    typer.run(main)
