"""From suites to the prompts that are measured: encoded, padded, sorted by whether plain decoding loops, and put into jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..batch.text import text_of
from ..core.stats import loops
from ..engine.decode import generate
from ..errors import InputError
from ..target.target import Target
from .records import Item
from .settings import Settings
from .suites import Prompt, Suite

TOKENS = 8192  # of the rows that are decoded side by side to sort prompts
KINDS = ("steady", "looping")


@dataclass
class Drawn:
    """Prompts with their jobs, and for each category how many were decoded to find them ("steady", "looping") and how many
    did not fit the context ("too_long")."""

    items: list[Item] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Ready:
    prompt: Prompt
    id: str
    ids: list[int]
    chat: bool


def encode(target: Target, prompt: Prompt, settings: Settings, answers: tuple[str, ...] = ()) -> tuple[list[int], bool]:
    """Token ids of the turn that follows `answers`, and whether a chat template was applied.

    Without a template, turns and answers follow each other in paragraphs.
    """
    turns = prompt.turns[: len(answers) + 1]
    if prompt.conversation and settings.chat and getattr(target.tokenizer, "chat_template", None):
        messages: list[dict[str, str]] = []
        for turn, answer in zip(turns, (*answers, None), strict=True):
            messages.append({"role": "user", "content": turn})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        ids = target.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return list(ids), True
    said = [part for pair in zip(turns, answers, strict=False) for part in pair] + list(turns[len(answers) :])
    return target.encode("\n\n".join(said) if prompt.conversation else said[-1]), False


def pad(ids: list[int], earlier: list[list[int]], length: int, start: int | None) -> list[int]:
    """`ids` with the end of `earlier` prompts (nearest last) put before them, `length` tokens in all; cut to their end if
    they are longer. `start`: a token that the tokenizer puts first; it stays there.

    >>> pad([7, 8], [[1, 2], [3, 4]], 5, None), pad([0, 7, 8], [[0, 1, 2]], 5, 0), pad([1, 2, 3], [[4]], 2, None)
    ([4, 1, 2, 7, 8], [0, 1, 2, 7, 8], [2, 3])
    """
    lead = [start] if start is not None and ids[:1] == [start] else []
    own = ids[len(lead) :][-(length - len(lead)) :]
    need, filler = length - len(lead) - len(own), list[int]()
    pieces = [piece[len(lead) :] if piece[: len(lead)] == lead else piece for piece in earlier]
    at = 0
    while need > len(filler) and any(pieces):
        filler = pieces[at % len(pieces)] + filler
        at += 1
    return lead + (filler[-need:] if need else []) + own


def draw(target: Target, suites: list[Suite], settings: Settings, advance: Callable[[int], Any] | None = None) -> Drawn:
    """All categories of the suites, see `draw_category`.

    Raises:
        InputError: a category without a prompt that fits the context.
    """
    drawn = Drawn()
    for suite, category in categories_of(suites):
        one = draw_category(target, suite, category, settings, advance)
        drawn.items += in_jobs(one.items, settings.batch, drawn.items)
        drawn.counts |= one.counts
    return drawn


def categories_of(suites: Sequence[Suite]) -> list[tuple[Suite, str]]:
    """Every suite's categories, in the order of their first prompts."""
    return [(suite, category) for suite in suites for category in dict.fromkeys(p.category for p in suite.prompts)]


def draw_category(
    target: Target, suite: Suite, category: str, settings: Settings, advance: Callable[[int], Any] | None = None
) -> Drawn:
    """Of a category the first prompts whose plain continuation doesn't loop, up to `limit`, and up to `looping` others;
    with temperature none counts as looping. Both turns of a conversation count, each for itself; the second follows plain
    decoding's own answer, the same for every method. The items have no numbers and jobs yet, see `in_jobs`.

    Args:
        advance: called with the number of prompts looked at.

    Raises:
        InputError: no prompt fits the context.
    """
    start = (target.tokenizer("")["input_ids"] or [None])[0]
    texts = [encode(target, p, settings)[0] for p in suite.prompts] if settings.context else []
    places = {id(prompt): i for i, prompt in enumerate(suite.prompts)}
    own = [p for p in suite.prompts if p.category == category]
    counts: Counter[str] = Counter()
    taken: dict[str, list[Item]] = {kind: [] for kind in KINDS}
    at = 0
    while at < len(own) and len(taken["steady"]) < settings.limit:
        rows = _rows_at_once(target, settings, own[at])
        batch, at = own[at : at + rows], at + rows
        if advance:
            advance(len(batch))
        answers: dict[int, tuple[str, ...]] = {id(p): () for p in batch}
        found: dict[int, list[Item]] = {id(p): [] for p in batch}
        for turn in range(max(len(p.turns) for p in batch)):
            ready = []
            for prompt in (p for p in batch if len(p.turns) > turn == len(answers[id(p)])):
                ids, chat = encode(target, prompt, settings, answers[id(prompt)])
                if settings.prompt_tokens:
                    ids = ids[: settings.prompt_tokens]
                if settings.context:
                    i = places[id(prompt)]
                    ids = pad(ids, texts[:i][::-1] + texts[i:][::-1], settings.context, start)
                if len(ids) + settings.max_new_tokens > target.context:
                    counts["too_long"] += 1
                    continue
                name = f"{suite.name}/{prompt.id}" + (f"#{turn + 1}" if len(prompt.turns) > 1 else "")
                ready.append(_Ready(prompt, name, ids, chat))
            _sort(target, ready, settings, category, found, answers)
        for item in (item for prompt in batch for item in found[id(prompt)]):  # a second turn follows its first
            counts[item.kind] += len(taken["steady"]) < settings.limit
            if len(taken[item.kind]) < (settings.limit if item.kind == "steady" else settings.looping):
                taken[item.kind].append(item)
    if not counts["steady"] + counts["looping"]:
        raise InputError(
            f"every prompt of {category} is longer than the target's context of {target.context} leaves room for: "
            "set --prompt-tokens, or emit fewer tokens"
        )
    return Drawn(taken["steady"] + taken["looping"], {category: dict(counts)})


def _rows_at_once(target: Target, settings: Settings, prompt: Prompt) -> int:
    longest = max(settings.context, settings.prompt_tokens or len(prompt.turns[0]) // 3) + settings.max_new_tokens
    return max(1, min(16, TOKENS // max(1, longest)))


def _sort(
    target: Target,
    ready: list[_Ready],
    settings: Settings,
    category: str,
    found: dict[int, list[Item]],
    answers: dict[int, tuple[str, ...]],
) -> None:
    """Decode the batch by plain decoding, where something depends on it, and say which of it loops."""
    if not ready:
        return
    greedy = settings.temperature == 0
    outputs: list[list[int]] = [[] for _ in ready]
    if greedy or any(len(one.prompt.turns) > 1 for one in ready):  # else nothing depends on what comes out
        params = [settings.params(one.id, one.chat) for one in ready]
        outputs = [one.tokens for one in generate(target, [r.ids for r in ready], params=params)]
    for one, tokens in zip(ready, outputs, strict=True):
        kind = "looping" if greedy and loops(tokens) else "steady"
        answers[id(one.prompt)] += (text_of(target.tokenizer, tokens),)
        found[id(one.prompt)].append(Item(-1, one.id, category, kind, one.chat, -1, tuple(one.ids)))


def in_jobs(items: Sequence[Item], batch: int, before: Sequence[Item] = ()) -> list[Item]:
    """Numbered after the items that came `before`, and put into jobs of up to `batch` prompts of one category and kind."""
    job = max((item.job for item in before), default=-1)
    made: list[Item] = []
    size, last = 0, ("", "")
    for number, item in enumerate(items, len(before)):
        fresh = (item.category, item.kind) != last or size == batch
        job, size, last = job + fresh, 1 if fresh else size + 1, (item.category, item.kind)
        made.append(replace(item, number=number, job=job))
    return made
