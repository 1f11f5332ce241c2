"""Write with the shipped pair, with and without its draft, and show that the text is the same.

python examples/generate.py                                   # in a checkout
python examples/generate.py path/to/model path/to/draft      # your own
"""

from pathlib import Path
from typing import Annotated

import typer

import glidecape
from glidecape import LanguageModel, Stats, make_drafter

SHIPPED = Path(__file__).parents[1] / "models" / "pysource"
PROMPT = 'def read_lines(path):\n    """Return the lines of a file, stripped."""\n'


def main(
    model: Annotated[str, typer.Argument(help="Folder or Hub name.")] = f"{SHIPPED}/target",
    draft: Annotated[str, typer.Argument(help="Folder or Hub name.")] = f"{SHIPPED}/glide",
    tokens: Annotated[int, typer.Argument(help="Tokens to write after each prompt.")] = 64,
) -> None:
    """Write with a pair, with and without its draft."""
    lm = glidecape.load(model, draft=draft, dtype="float32")
    plain = LanguageModel(lm.target, make_drafter("plain"), "plain")
    for options in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 7}):
        texts = {}
        for one in (plain, lm):
            stats = Stats()
            texts[one.method] = one(PROMPT, stats=stats, max_tokens=tokens, ignore_eos=True, **options).text
            speed = f"{stats.tokens_per_s:.0f} tokens/s, acceptance length {stats.acceptance_length:.2f}"
            print(f"{one.method} at {options}: {speed}")
        assert len(set(texts.values())) == 1, "the draft changed the text: this must not happen"
        print(PROMPT + texts["plain"], "\n")


if __name__ == "__main__":
    typer.run(main)
