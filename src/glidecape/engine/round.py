"""The loop's one round: `run_round` is the only way in which tokens are made. Generation, the benchmark, training's
evaluation and the engine all call it, with any drafter."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.laws import refuse_no_number
from ..batch.row import Emitted, Outcome, Proposal, Row
from ..core.stats import RoundStats, Stats
from ..core.transfer import to_host
from ..core.tree import TokenTree
from ..core.verify import verdict_numbers, verify_row
from ..drafting.drafter import Drafter
from ..target.target import Target
from .logprobs import token_logprobs

Verdict = Callable[[TokenTree, Tensor], Tensor]


@torch.no_grad()
def run_round(target: Target, drafter: Drafter, batch: Batch, stats: Stats | None = None) -> list[Emitted]:
    """One proposal and one target forward: every row emits its accepted tokens and a bonus token."""
    started = seconds(batch, stats)
    tree = drafter.propose(batch)
    drafted = seconds(batch, stats)
    output = target.forward(tree.tokens, tree.positions(batch.root_positions), batch.cache, tree.ancestors)
    outcomes = verify(batch, tree, output.logits, target.verdict)
    verified = seconds(batch, stats)
    shown = {i: _shown(tree, i, outcomes[i].path) for i, row in enumerate(batch.rows) if row.watched}
    events = [_emit(row, outcome) for row, outcome in zip(batch.rows, outcomes, strict=True)]
    for i, proposal in shown.items():
        events[i].proposal = proposal
    _add_logprobs(batch, outcomes, events, output.logits)
    batch.cache.keep([outcome.path for outcome in outcomes])
    drafter.commit(batch, outcomes)
    if stats is not None:
        stats.draft_s += drafted - started
        stats.verify_s += verified - drafted
        stats.total_s += seconds(batch, stats) - started
        for event in events:
            stats.add(event.stats)
    return events


def seconds(batch: Batch, stats: Stats | None) -> float:
    """The time now; where somebody counts it, after all work on the device."""
    if stats is not None and batch.device.type == "cuda":
        torch.cuda.synchronize(batch.device)
    return time.perf_counter()


def verify(batch: Batch, tree: TokenTree, logits: Tensor, verdict: Verdict = verdict_numbers) -> list[Outcome]:
    """The outcome of each row; point laws are verified together and brought to the host in one transfer.

    Args:
        logits: `(batch, nodes, vocab)` of the target.
        verdict: `verdict_numbers`, compiled or not.

    Raises:
        UnsupportedError: the law of a node on a row's path holds values that are not numbers.
    """
    laws, roots, positions = batch.laws, batch.cache.host_lengths, batch.root_positions
    logits = laws.adjusted(tree, laws.masked(tree, logits))
    outcomes: dict[int, Outcome] = {}
    if laws.points:
        scores = laws.scores(logits, roots, positions, tree.depth, tree.levels)
        alone = tree.nodes == 1 and tree.memo is None
        outcomes = _bonus_alone(scores, laws.points) if alone else _verify_points(tree, scores, laws.points, verdict)
    noise = None
    if laws.one_by_one and laws.ahead is not None:
        noise = laws.ahead.at(roots, positions, tree.depth, tree.levels, logits.shape[-1])
    for i in laws.one_by_one:
        law_at = laws.law_at(i, tree, logits[i], None if noise is None else noise[i])
        path, bonus = verify_row(tree, i, law_at, batch.rows[i].chance)
        outcomes[i] = _outcome_of_row(tree, i, path, bonus)
    return [outcomes[i] for i in range(len(outcomes))]


def _verify_points(tree: TokenTree, scores: Tensor, rows: list[int], verdict: Verdict) -> dict[int, Outcome]:
    """The outcome of each of `rows`, whose laws are points; all that the host needs crosses in one transfer."""
    host, size = to_host(verdict(tree, scores)), tree.levels + 1
    outcomes = {}
    for i in rows:
        numbers = host[i]
        length, bonus, drafted, depth, rejects, is_broken = numbers[:6]
        path, tokens, first, before = (numbers[6 + k * size : 6 + k * size + length] for k in range(4))
        if is_broken:
            refuse_no_number()
        origins = ["chain" if chain else "sibling" for chain in first[1:]]
        memo = numbers[6 + 4 * size :]
        outcomes[i] = Outcome(path, [*tokens[1:], bonus], origins, drafted, depth, bool(rejects), before, memo)
    return outcomes


def _bonus_alone(scores: Tensor, rows: list[int]) -> dict[int, Outcome]:
    """The same where no row has a proposal: nothing can be accepted, and the verdict's program would be a large part of a short
    round."""
    best = scores[:, 0].max(-1)
    host = to_host(torch.stack([best.indices, best.values.isnan()], 1))
    outcomes = {}
    for i in rows:
        bonus, is_broken = host[i]
        if is_broken:
            refuse_no_number()
        outcomes[i] = Outcome([0], [bonus], [], 0, 0, False, [0], [])
    return outcomes


def _outcome_of_row(tree: TokenTree, i: int, path: list[int], bonus: int) -> Outcome:
    grown = path if tree.grown_as is None else tree.grown_as[i, path].tolist()
    return Outcome(
        path,
        [*tree.path_tokens(i, path[1:]), bonus],
        tree.origins(i, path),
        int(tree.num_drafted[i]),
        int(tree.deepest[i]),
        bool(tree.children(i)[path[-1]]),
        grown,
        [] if tree.memo is None else tree.memo[i].tolist(),
    )


def _emit(row: Row, outcome: Outcome) -> Emitted:
    """Append a round's tokens to its row (the last one becomes the root) and describe the round.

    The outcome's path keeps the nodes to commit: the root and accepted nodes, but never the last emitted token.
    """
    accepted, offered = len(outcome.path) - 1, len(outcome.tokens)
    tokens = row.clip(outcome.tokens)
    rejected = outcome.rejected and len(tokens) == offered
    row.tokens.extend(tokens)
    outcome.path, outcome.grown = outcome.path[: len(tokens)], outcome.grown[: len(tokens)]
    accepted = min(accepted, len(tokens))
    round_stats = RoundStats(outcome.drafted, accepted, len(tokens), accepted + rejected, outcome.depth)
    origins = [*outcome.origins[:accepted], "bonus"][: len(tokens)]
    if row.cut is None:
        return Emitted(row.index, tokens, origins, round_stats, row.finish)
    return Emitted(row.index, tokens, origins, round_stats, row.finish, row.cut.text, row.cut.tokens - row.cut.kept)


def _shown(tree: TokenTree, i: int, path: list[int]) -> Proposal:
    nodes, tokens, parents, probabilities = tree.listed(i)
    return Proposal(tokens, parents, probabilities, [nodes.index(node) for node in path])


def _add_logprobs(batch: Batch, outcomes: list[Outcome], events: list[Emitted], logits: Tensor) -> None:
    """Log-probabilities of the emitted tokens, in the events of rows that want them."""
    for i, (row, outcome, event) in enumerate(zip(batch.rows, outcomes, events, strict=True)):
        if row.params.logprobs is not None:
            event.logprobs = token_logprobs(logits[i], outcome.path, event.tokens, row.params.logprobs)
