"""The loop. `run_round` is the only way in which tokens are made: generation, the benchmark and training's evaluation
all call it, with any drafter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .drafting.drafter import Drafter, NoDraft
from .errors import InputError
from .models.target import Target
from .noise import Noise, gumbel
from .sampling import SamplingParams
from .state import DecodeState, Emitted, Row, new_row
from .stats import RoundStats, Stats
from .text import text_of
from .tree import TokenTree
from .verify import verify_row


@torch.no_grad()
def run_round(target: Target, drafter: Drafter, state: DecodeState, stats: Stats | None = None) -> list[Emitted]:
    """One proposal and one target forward: every row emits its accepted tokens and a bonus token."""
    started = _seconds(state, stats)
    tree = drafter.propose(state)
    drafted = _seconds(state, stats)
    output = target.forward(tree.tokens, tree.positions(state.root_positions), state.cache, tree.ancestors)
    laws = state.laws(tree, output.logits)
    verified = _seconds(state, stats)
    sizes = list(zip(tree.num_drafted.tolist(), tree.deepest.tolist(), strict=True))
    events, paths = [], []
    for i, row in enumerate(state.rows):
        path, bonus = verify_row(tree, i, laws[i], row.chance)
        kept, tokens = state.clip(row, tree, path, bonus, i)
        events.append(_emit(row, tree, i, path, tokens, *sizes[i]))
        paths.append(kept)
    state.cache.keep(paths)
    drafter.commit(state, tree, paths)
    if stats is not None:
        stats.draft_s += drafted - started
        stats.verify_s += verified - drafted
        stats.total_s += _seconds(state, stats) - started
        for event in events:
            stats.add(event.stats)
    return events


def _seconds(state: DecodeState, stats: Stats | None) -> float:
    """The time now; where somebody counts it, after all work on the device."""
    device = state.cache.keys[0].device
    if stats is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _emit(row: Row, tree: TokenTree, i: int, path: list[int], tokens: list[int], drafted: int, depth: int) -> Emitted:
    """Append a round's tokens to its row (the last one becomes the root) and describe the round."""
    row.tokens.extend(tokens)
    accepted = min(len(path) - 1, len(tokens))
    rejected = any(tree.children(i)[path[-1]]) if len(tokens) > len(path) - 1 else False
    round_stats = RoundStats(drafted, accepted, len(tokens), accepted + rejected, depth)
    origins = [*tree.origins(i, path)[:accepted], "bonus"][: len(tokens)]
    if row.cut is None:
        return Emitted(row.index, tokens, origins, round_stats, row.finish)
    cut = row.cut.tokens - row.cut.kept
    return Emitted(row.index, tokens, origins, round_stats, row.finish, row.cut.text, cut)


def start(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    noise: Noise = gumbel,
    limit_bytes: int | None = None,
) -> DecodeState:
    """Check the prompts, allocate the caches and read the prompts.

    Raises:
        InputError: no prompt, an empty one, a token id out of range, a prompt longer than the context, an option that does
            not fit the target (`state.new_row`), or not enough room for the cache.
    """
    if not prompts:
        raise InputError("no prompt: give at least one")
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise InputError(f"{len(prompts)} prompts but {len(each)} sampling parameters: give one, or one a prompt")
    rows = [checked_row(i, prompt, own, target) for i, (prompt, own) in enumerate(zip(prompts, each, strict=True))]
    # Room for the longest row, a proposal after it, and the padding of ragged catch-ups.
    proposal = drafter.budget(max(own.max_new_tokens for own in each))
    capacity = max(len(p) + own.max_new_tokens for p, own in zip(prompts, each, strict=True)) + 2 * proposal + 2
    state = DecodeState(rows, target.new_cache(len(rows), capacity, limit_bytes, drafter.reads_hidden), noise=noise)
    with torch.no_grad():
        target.prefill([row.tokens for row in rows], state.cache)
        drafter.admit(state)
    return state


def checked_row(i: int, prompt: Sequence[int], params: SamplingParams, target: Target) -> Row:
    """The row of prompt `i` at its beginning.

    Raises:
        InputError: see `start`.
    """
    if not prompt:
        raise InputError(f"prompt {i} is empty: give at least one token to continue")
    if bad := [t for t in prompt if not 0 <= t < target.vocab_size]:
        raise InputError(f"prompt {i} holds token id {bad[0]}, outside the vocabulary of {target.vocab_size}")
    if len(prompt) + params.max_new_tokens > target.context:
        raise InputError(
            f"prompt {i} has {len(prompt)} tokens; with max_new_tokens {params.max_new_tokens} that is more than the "
            f"target's context of {target.context}: shorten it, or emit {max(0, target.context - len(prompt))} at most"
        )
    return new_row(i, list(prompt), params, target)


def decode(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    stats: Stats | None = None,
    noise: Noise = gumbel,
    limit_bytes: int | None = None,
) -> Iterator[Emitted]:
    """Decode a batch of prompts; yields what each row emitted, round by round, until all rows have ended.

    Rows that end leave the batch at once, so the others don't wait for them.
    """
    started = time.perf_counter()
    state = start(target, drafter, prompts, params or SamplingParams(), noise, limit_bytes)
    if stats is not None:
        stats.prefill_s += _seconds(state, stats) - started
    for i, row in enumerate(state.rows):
        if row.params.max_new_tokens == 0:
            row.finish = "length"
            yield Emitted(i, [], [], RoundStats(0, 0, 0, 0), "length")
    while True:
        running = [i for i, row in enumerate(state.rows) if row.finish is None]
        if not running:
            return
        if len(running) < len(state.rows):
            state.select(running)
        yield from run_round(target, drafter, state, stats)


@dataclass
class Completion:
    """What one prompt became.

    Attributes:
        tokens: emitted ids, a stop token included. A stop string is left out; the token in which it begins stays if
            text before the stop string begins in it, too.
        text: their text, special tokens and a stop string left out; "" without a tokenizer.
        origins: of each token: "chain", "sibling" or "bonus".
        finish: "stop" or "length".
        rounds: counts of each round.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    origins: list[str] = field(default_factory=list)
    finish: str = "length"
    rounds: list[RoundStats] = field(default_factory=list)


def generate(
    target: Target,
    prompts: Sequence[str | Sequence[int]],
    drafter: Drafter | None = None,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    stats: Stats | None = None,
) -> list[Completion]:
    """Complete a batch of prompts, text or token ids; without a drafter by plain decoding.

    Raises:
        InputError: see `start`.
    """
    ids = [target.encode(p) if isinstance(p, str) else list(p) for p in prompts]
    done = [Completion() for _ in ids]
    cut_text: dict[int, str] = {}
    for event in decode(target, drafter or NoDraft(), ids, params, stats):
        one = done[event.row]
        one.tokens += event.tokens
        one.origins += event.origins
        if event.stats.emitted:
            one.rounds.append(event.stats)
        one.finish = event.finish or one.finish
        if event.text is not None:
            kept = len(one.tokens) - event.cut
            one.tokens, one.origins = one.tokens[:kept], one.origins[:kept]
            cut_text[event.row] = event.text
    for i, one in enumerate(done):
        if target.tokenizer is not None:
            one.text = cut_text[i] if i in cut_text else text_of(target.tokenizer, one.tokens, ids[i])
    return done
