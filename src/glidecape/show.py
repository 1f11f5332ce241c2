"""What `glidecape generate` prints: one prompt streams, a batch comes when it is done, or one JSON object a prompt."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TextIO

from .batch.row import new_row
from .batch.text import Prompt
from .core.params import SamplingParams
from .core.stats import Stats
from .engine.decode import Completion
from .interface.language_model import LanguageModel
from .progress import bar, say


def show(
    lm: LanguageModel,
    prompts: list[Prompt],
    params: SamplingParams,
    batch: int,
    as_json: bool,
    chat: bool = False,
    out: TextIO | None = None,
) -> None:
    """Complete the prompts, `batch` of them side by side, and print them to `out` or standard output; figures go to standard
    error. Prompt i has the seed + i.

    With `chat` prompts go through the chat template, and answers are shown without them.
    """
    ids = [prompt.ids(lm.target, chat) for prompt in prompts]
    each = [replace(params, seed=params.seed + i) for i in range(len(ids))]
    for i, (prompt, own) in enumerate(zip(ids, each, strict=True)):
        new_row(i, prompt, own, lm.target)  # all of them, before anything is printed
    seen = out is None and sys.stdout.isatty()  # then the text itself says how far it is
    # Else figures are the last that is said.
    with nullcontext() if seen else bar("writing", len(ids), ends=as_json) as shown:
        for first in range(0, len(ids), batch):
            rows = range(first, min(first + batch, len(ids)))
            stats = Stats()
            before = ["" if chat else prompts[row].text for row in rows]
            if not as_json and len(rows) == 1:
                print(before[0], end="", flush=True, file=out)
                for piece in lm.stream(ids[first], each[first], stats):
                    print(piece, end="", flush=True, file=out)
                print(file=out)
            else:
                found = lm.batch([ids[row] for row in rows], 1, batch, each[first], stats)
                for row, text, one in zip(rows, before, found, strict=True):
                    whole = f"--- {row}\n{text}{one.text}"
                    print(json.dumps(_as_dict(prompts[row], one, lm.method, stats)) if as_json else whole, file=out)
            if not as_json:
                say(
                    f"[{lm.method}: {stats.emitted} tokens, {stats.tokens_per_s:.1f} tokens/s, "
                    f"acceptance length {stats.acceptance_length:.2f}]"
                )
            if shown is not None:
                shown.advance(len(rows))


def _as_dict(prompt: Prompt, one: Completion, method: str, stats: Stats) -> dict[str, Any]:
    line = {"prompt": prompt.text, "text": one.text, "tokens": one.tokens, "origins": one.origins}
    return line | {"finish": one.finish, "method": method, "batch_stats": stats.as_dict()}
