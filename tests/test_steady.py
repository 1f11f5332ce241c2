"""The engine under faults and while prompts come in: rows get what they get alone, and nobody waits for long."""

from __future__ import annotations

import itertools
import random
from statistics import median
from typing import Any

import pytest
import torch

from glidecape.batch.row import new_row
from glidecape.core.params import SamplingParams
from glidecape.drafting.drafter import ModelDrafter, NoDraft
from glidecape.drafting.expansions.cape import Cape
from glidecape.drafting.expansions.chain import Chain
from glidecape.drafting.lookup import LookupDrafter
from glidecape.drafting.stop import FixedLength, Heuristic
from glidecape.engine.decode import generate
from glidecape.engine.engine import Engine
from glidecape.engine.pace import LEAST, Pace
from glidecape.engine.steady import SteadyEngine
from toys import ToyDraft, ToyTarget, check_invariants, random_rule

VOCAB = 5


def draft() -> ToyDraft:
    return ToyDraft(random_rule("target", VOCAB, 0.8), VOCAB)


DRAFTERS = {
    "chain": lambda: ModelDrafter(draft(), Chain(), FixedLength(3)),
    "cape": lambda: ModelDrafter(draft(), Cape((3, 1)), FixedLength(3)),
    "heuristic": lambda: ModelDrafter(draft(), Chain(), Heuristic(2, 6)),
    "lookup": lambda: LookupDrafter(3, 2),
}


def target() -> ToyTarget:
    return ToyTarget(random_rule("target", VOCAB), VOCAB)


def work(count: int = 9) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of unequal lengths and options of unequal kinds."""
    chance = random.Random(3)
    prompts = [[chance.randrange(VOCAB) for _ in range(chance.randrange(1, 30))] for _ in range(count)]
    params = [
        SamplingParams(
            float(i % 2),
            seed=i,
            max_new_tokens=4 + 3 * i,
            repetition_penalty=1.3 if i % 3 == 0 else 1.0,
            presence_penalty=0.2 if i % 4 == 0 else 0.0,
        )
        for i in range(count)
    ]
    return prompts, params


def run(engine: Engine, prompts: list[list[int]], params: list[SamplingParams], late: bool = False) -> list[list[int]]:
    """The new tokens of all rows; `late`: a row comes every third step."""
    rows = [new_row(i, prompt, own, engine.target) for i, (prompt, own) in enumerate(zip(prompts, params, strict=True))]
    coming, steps = list(rows), 0
    told: list[list[int]] = [[] for _ in rows]
    while coming or not engine.idle:
        if coming and (not late or steps % 3 == 0):
            engine.submit(coming.pop(0))
        for event in engine.step():
            told[event.row] += event.tokens
        steps += 1
        assert steps < 3000, "the engine does not end"
        engine.batch.use(0, engine.ready)
        if not isinstance(engine.drafter, LookupDrafter):
            check_invariants(engine.batch)
    assert told == [row.new_tokens for row in rows]
    return told


@pytest.mark.parametrize("method", DRAFTERS)
@pytest.mark.parametrize("late", [False, True])
def test_rows_that_join_and_leave_get_what_they_get_alone(method: str, late: bool) -> None:
    prompts, params = work()
    alone = [generate(target(), prompt, None, own)[0].tokens for prompt, own in zip(prompts, params, strict=True)]
    assert run(Engine(target(), DRAFTERS[method](), 4, 80, 80), prompts, params, late) == alone


class Faulty:
    """Lets the forwards of a target or the proposals of a drafter fail now and then, wherever in a round they are."""

    def __init__(self, inner: object, name: str, seed: int, share: float, spares_single: bool) -> None:
        self.chance, self.share, self.spares = random.Random(seed), share, spares_single
        self.whole, self.raised = getattr(inner, name), 0
        setattr(inner, name, self)

    def __call__(self, first, *rest, **named):
        rows = first.shape[0] if isinstance(first, torch.Tensor) else len(first.rows)
        size = first.numel() if isinstance(first, torch.Tensor) else 2
        before = self.chance.random() < 0.5
        answer = None if before else self.whole(first, *rest, **named)
        if self.chance.random() < self.share and not (self.spares and rows == 1 and size <= LEAST):
            self.raised += 1
            raise random.Random(self.raised).choice([torch.OutOfMemoryError("out of memory"), ValueError("a bug")])
        return self.whole(first, *rest, **named) if before else answer


@pytest.mark.parametrize("method", DRAFTERS)
@pytest.mark.parametrize("seed", range(4))
def test_faults_in_forwards_of_several_rows_change_no_token(
    method: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glidecape.engine.steady.CALM", 3)
    prompts, params = work()
    alone = [generate(target(), prompt, None, own)[0].tokens for prompt, own in zip(prompts, params, strict=True)]
    engine = SteadyEngine(target(), DRAFTERS[method](), 4, 80, 80)
    fault = Faulty(engine.target, "forward", seed, 0.5, True)
    assert run(engine, prompts, params, late=True) == alone
    assert fault.raised > 2
    assert engine.out_of_memory > 0
    assert not engine.failed


@pytest.mark.parametrize("method", ["chain", "cape", "heuristic", "lookup"])
@pytest.mark.parametrize("name", ["propose", "commit", "read"])
def test_faults_of_a_drafter_change_no_token(method: str, name: str) -> None:
    prompts, params = work()
    alone = [generate(target(), prompt, None, own)[0].tokens for prompt, own in zip(prompts, params, strict=True)]
    engine = SteadyEngine(target(), DRAFTERS[method](), 4, 80, 80)
    fault = Faulty(engine.drafter, name, 1, 0.3, False)
    assert run(engine, prompts, params, late=True) == alone
    assert fault.raised > 2
    assert 0 < engine.draft_failures <= len(prompts)
    assert not engine.failed


def test_a_row_that_always_fails_is_the_only_one_that_ends() -> None:
    prompts, params = work()
    prompts[4] = [4, 4, 4, 4]
    engine = SteadyEngine(target(), DRAFTERS["cape"](), 4, 80, 80)
    whole = engine.target.forward

    def forward(tokens, *rest, **named):
        if any(row.tokens[:4] == [4, 4, 4, 4] for row in engine.batch.rows):
            raise ValueError("this one")
        return whole(tokens, *rest, **named)

    engine.target.forward = forward
    told = run(engine, prompts, params, late=True)
    alone = [generate(target(), prompt, None, own)[0].tokens for prompt, own in zip(prompts, params, strict=True)]
    assert told == [*alone[:4], [], *alone[5:]]
    assert [(row.index, str(error)) for row, error in engine.failed] == [(4, "this one")]


def test_after_out_of_memory_fewer_rows_share_a_forward_for_a_while() -> None:
    engine = SteadyEngine(target(), NoDraft(), 8, 200, 200)
    whole, most = engine.target.forward, []

    def forward(tokens, *rest, **named):
        if len(most) < 10 and tokens.shape[0] > 2:
            raise torch.OutOfMemoryError("out of memory")
        most.append(tokens.shape[0])
        return whole(tokens, *rest, **named)

    engine.target.forward = forward
    run(engine, [[1]] * 8, [SamplingParams(max_new_tokens=190)] * 8)
    assert set(most[:10]) <= {1, 2}
    assert most[100] == 2
    assert 4 in most
    assert 8 in most


def test_an_aborted_row_is_gone_at_the_next_step_wherever_it_is() -> None:
    engine = Engine(target(), DRAFTERS["chain"](), 3, 80, 80)
    rows = [new_row(i, [1] * 30, SamplingParams(max_new_tokens=40), engine.target) for i in range(6)]
    for row in rows:
        engine.submit(row)
    while engine.ready < 2:
        engine.step()
    engine.abort(rows[0])  # decoding
    engine.abort(engine.batch.slots[-1])  # decoding, or being read
    engine.abort(rows[5])  # waiting
    engine.step()
    assert not [row for row in [*engine.batch.slots, *engine.waiting] if row.finish is not None]
    others = [row for row in rows if row.finish is None]
    while not engine.idle:
        engine.step()
    alone = generate(target(), [1] * 30, None, SamplingParams(max_new_tokens=40))[0].tokens
    assert len(others) == 3
    assert all(row.new_tokens == alone for row in others)


def clocked(rows: int) -> tuple[Engine, list[float], Any]:
    """An engine, its target, and a clock that a forward moves on by a millisecond a token, and by ten of its own."""
    now = [0.0]
    made = target()
    whole = made.forward

    def forward(tokens, *rest, **named):
        now[0] += 0.01 + 0.001 * tokens.numel()
        return whole(tokens, *rest, **named)

    made.forward, made.chunk = forward, 512
    engine = Engine(made, DRAFTERS["chain"](), rows, 600, 600)
    engine.pace = Pace(512, torch.device("cpu"), lambda: now[0])
    return engine, now, made


def test_a_newcomer_holds_the_others_up_for_at_most_two_usual_rounds() -> None:
    engine, now, made = clocked(4)
    first = [new_row(i, [i, 1], SamplingParams(max_new_tokens=300), made) for i in range(3)]
    for row in first:
        engine.submit(row)
    for _ in range(20):
        engine.step()
    usual = median(engine.pace.rounds)
    late = new_row(3, [1, 2] * 200, SamplingParams(max_new_tokens=5), made)
    engine.submit(late)
    times = [now[0]]
    while late.emitted == 0:
        if engine.step():
            times.append(now[0])
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert len(waits) > 3
    assert max(waits) <= 3 * usual  # a round of its own, and two more


def test_chunks_grow_with_the_rounds_as_newcomers_join() -> None:
    """Many come at once while one row is decoded: its rounds were short, and each newcomer makes them longer."""
    engine, _, made = clocked(16)
    engine.submit(new_row(0, [1, 1], SamplingParams(max_new_tokens=500), made))
    for _ in range(20):
        engine.step()
    alone, chunks = median(engine.pace.rounds), [engine.pace.tokens]
    late = [new_row(i, [i % 5, 2] * 100, SamplingParams(max_new_tokens=400), made) for i in range(1, 16)]
    for row in late:
        engine.submit(row)
    while any(row.emitted == 0 for row in late):
        engine.step()
        chunks.append(engine.pace.tokens)
    assert median(engine.pace.rounds) > 3 * alone
    assert chunks[-1] >= 2 * min(chunks)
