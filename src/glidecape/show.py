"""What `glidecape generate` prints: one prompt streams, a batch comes when it is done, or one JSON object a prompt."""

from __future__ import annotations

import json
import sys

from .batch.row import new_row
from .batch.text import Prompt, TextStream, text_of
from .core.params import SamplingParams
from .core.stats import Stats
from .drafting.drafter import Drafter
from .engine.decode import decode
from .target.target import Target


def show(
    target: Target,
    drafter: Drafter,
    prompts: list[Prompt],
    params: list[SamplingParams],
    batch: int,
    method: str,
    as_json: bool,
    chat: bool = False,
) -> None:
    """Complete the prompts, `batch` of them side by side, and print them; figures go to standard error.

    With `chat` prompts go through the chat template, and answers are shown without them.
    """
    ids = [prompt.ids(target, chat) for prompt in prompts]
    for i, (prompt, own) in enumerate(zip(ids, params, strict=True)):
        new_row(i, prompt, own, target)  # all of them, before anything is printed
    for first in range(0, len(ids), batch):
        rows = list(range(first, min(first + batch, len(ids))))
        stats = Stats()
        tokens: dict[int, list[int]] = {r: [] for r in rows}
        origins: dict[int, list[str]] = {r: [] for r in rows}
        finish: dict[int, str] = {}
        texts: dict[int, str] = {}
        stream = (
            TextStream(target.tokenizer, params[first].stop, ids[first]) if not as_json and len(rows) == 1 else None
        )
        if stream:
            print("" if chat else prompts[first].text, end="", flush=True)
        for event in decode(target, drafter, [ids[r] for r in rows], [params[r] for r in rows], stats):
            row = rows[event.row]
            tokens[row] += event.tokens
            origins[row] += event.origins
            finish[row] = event.finish or "length"
            if stream:
                print(stream.push(event.tokens, event.finish is not None, event.text), end="", flush=True)
            if event.text is not None:
                texts[row], kept = event.text, len(tokens[row]) - event.cut
                tokens[row], origins[row] = tokens[row][:kept], origins[row][:kept]
        for row in rows:
            text = texts.get(row, text_of(target.tokenizer, tokens[row], ids[row]))
            if as_json:
                line = {"prompt": prompts[row].text, "text": text, "tokens": tokens[row], "origins": origins[row]}
                print(json.dumps(line | {"finish": finish[row], "method": method, "batch_stats": stats.as_dict()}))
            elif stream:
                print()
            else:
                print(f"--- {row}\n{'' if chat else prompts[row].text}{text}")
        if not as_json:
            print(
                f"[{method}: {stats.emitted} tokens, {stats.tokens_per_s:.1f} tokens/s, "
                f"acceptance length {stats.acceptance_length:.2f}]",
                file=sys.stderr,
            )
