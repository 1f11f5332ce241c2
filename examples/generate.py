"""Write with the shipped pair, with and without its draft, and show that the text is the same.

python examples/generate.py                                   # in a checkout
python examples/generate.py path/to/model path/to/draft      # your own
"""

import sys
from pathlib import Path

import glidecape
from glidecape import LanguageModel, Stats, make_drafter

SHIPPED = Path(__file__).parents[1] / "models" / "pysource"
PROMPT = 'def read_lines(path):\n    """Return the lines of a file, stripped."""\n'


def main(model: str | Path = SHIPPED / "target", draft: str | Path = SHIPPED / "glide", tokens: str = "64") -> None:
    lm = glidecape.load(model, draft=draft, dtype="float32")
    plain = LanguageModel(lm.target, make_drafter("plain"), "plain")
    for options in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 7}):
        texts = {}
        for one in (plain, lm):
            stats = Stats()
            texts[one.method] = one(PROMPT, stats=stats, max_tokens=int(tokens), ignore_eos=True, **options).text
            speed = f"{stats.tokens_per_s:.0f} tokens/s, acceptance length {stats.acceptance_length:.2f}"
            print(f"{one.method} at {options}: {speed}")
        assert len(set(texts.values())) == 1, "the draft changed the text: this must not happen"
        print(PROMPT + texts["plain"], "\n")


if __name__ == "__main__":
    main(*sys.argv[1:4])
