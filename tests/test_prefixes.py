"""Prefix reuse: a row that begins like another one takes what is cached of it, and gets the tokens that it gets alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from glidecape import SamplingParams, Target, load_draft, make_drafter
from glidecape.batch.prefixes import LEAST
from glidecape.batch.row import Row, new_row
from glidecape.drafting.drafter import ModelDrafter
from glidecape.drafting.expansions.cape import Cape
from glidecape.drafting.expansions.chain import Chain
from glidecape.drafting.lookup import LookupDrafter
from glidecape.drafting.medusa import MedusaDrafter
from glidecape.drafting.stop import FixedLength, Heuristic
from glidecape.engine.decode import generate
from glidecape.engine.engine import Engine
from glidecape.engine.steady import SteadyEngine
from toys import ReRun, ToyDraft, ToyHeads, ToyTarget, check_invariants, random_rule

MODELS = Path(__file__).parents[1] / "models" / "pysource"
VOCAB = 5
RULE = random_rule("target", VOCAB, 0.8)
DRAFTERS = {
    "chain": lambda: ModelDrafter(ToyDraft(RULE, VOCAB), Chain(), FixedLength(3)),
    "cape": lambda: ModelDrafter(ToyDraft(RULE, VOCAB), Cape((3, 1)), FixedLength(3)),
    "heuristic": lambda: ModelDrafter(ToyDraft(RULE, VOCAB), Chain(), Heuristic(2, 6)),
    "runs again": lambda: ModelDrafter(ReRun(RULE, VOCAB), Chain(), FixedLength(3)),
    "heads": lambda: MedusaDrafter(ToyHeads(RULE), Chain(), FixedLength(3)),
    "lookup": lambda: LookupDrafter(3, 2),
}


def talk(engine: Engine, chance: random.Random, turns: int, checked: bool = True) -> list[Row]:
    """Rows of conversations, two at a time and more: each goes on with an earlier one, or begins like it, or is new."""
    vocab, done, running = engine.target.vocab_size, [], []
    known = [[chance.randrange(vocab) for _ in range(30)] for _ in range(2)]
    while len(done) < turns:
        number = len(done) + len(running)
        if len(running) < chance.choice((1, 2, 2, 5)) and number < turns:
            begin = chance.choice(known[-4:])
            if chance.random() < 0.3:
                begin = begin[: chance.randrange(LEAST, 60)]
            prompt = [*begin[:90], *(chance.randrange(vocab) for _ in range(chance.randrange(1, 20)))]
            params = SamplingParams(number % 2, seed=number, max_new_tokens=chance.randrange(2, 20), ignore_eos=True)
            row = new_row(number, prompt, params, engine.target)
            row.salt = "" if number % 7 else None
            engine.submit(row)
            running.append(row)
        engine.step()
        engine.batch.use(0, engine.ready)
        if checked:
            check_invariants(engine.batch)
        for row in [one for one in running if one.finish is not None]:
            running.remove(row)
            done.append(row)
            known.append(list(row.tokens))
    return done


def assert_as_alone(target, rows: list[Row]) -> None:
    for row in rows:
        prompt = row.tokens[: row.prompt_length]
        assert row.new_tokens == generate(target, prompt, None, row.params)[0].tokens, row.index


@pytest.mark.parametrize("method", DRAFTERS)
@pytest.mark.parametrize("slots", [1, 2, 4, 9])
def test_rows_of_conversations_get_what_they_get_alone(method: str, slots: int) -> None:
    target = ToyTarget(random_rule("target", VOCAB), VOCAB)
    engine = SteadyEngine(target, DRAFTERS[method](), slots, 130, 130)
    rows = talk(engine, random.Random(slots), 60, checked=method not in ("lookup", "heads"))
    assert_as_alone(target, rows)
    assert sum(row.reused > 0 for row in rows) > 20
    assert all(row.reused < len(row.tokens) - 1 for row in rows)
    assert not any(row.reused for row in rows if row.salt is None)
    assert engine.draft_failures == 0


def row_of(target: ToyTarget, prompt: list[int], salt: str | None = "", new: int = 4) -> Row:
    row = new_row(0, prompt, SamplingParams(max_new_tokens=new), target)
    row.salt = salt
    return row


def run(engine: Engine, *rows: Row) -> None:
    for row in rows:
        engine.submit(row)
    while not engine.idle:
        engine.step()


def test_a_turn_that_follows_is_read_from_where_the_last_one_ended() -> None:
    target = ToyTarget(random_rule("target", VOCAB), VOCAB)
    engine = Engine(target, DRAFTERS["chain"](), 6, 200, 200)
    first = row_of(target, [1, 2, 3, 4] * 10)
    run(engine, first)
    before = target.forwards
    second = row_of(target, [*first.tokens, 0, 1], new=1)
    run(engine, second)
    assert second.reused == len(first.tokens) - 1
    assert target.forwards == before + 2  # one chunk, one round
    other = row_of(target, first.tokens[:30], salt="somebody else")
    nobody = row_of(target, first.tokens[:30], salt=None)
    short = row_of(target, first.tokens[: LEAST + 1])
    again = row_of(target, first.tokens[: LEAST + 2])
    run(engine, other, nobody, short, again)
    assert [other.reused, nobody.reused, short.reused, again.reused] == [0, 0, 0, LEAST]


def test_a_row_takes_the_prefix_of_one_that_is_still_being_decoded() -> None:
    target = ToyTarget(random_rule("target", VOCAB), VOCAB)
    engine = Engine(target, DRAFTERS["cape"](), 3, 200, 200)
    long = row_of(target, [1, 2, 3, 4] * 10, new=100)
    engine.submit(long)
    while long.emitted < 20:
        engine.step()
    begin = len(long.tokens)
    late = row_of(target, [*long.tokens, 3, 3, 3])
    run(engine, late)
    assert late.reused >= begin - 1
    assert_as_alone(target, [long, late])


def test_rows_that_come_together_and_begin_alike_read_what_they_share_once() -> None:
    """The first one is read; the others wait for its prefix, keep their places, and take it while the first is decoding."""
    target = ToyTarget(random_rule("target", VOCAB), VOCAB)
    engine = Engine(target, DRAFTERS["cape"](), 3, 200, 200)
    begin = [1, 2, 3, 4] * 15
    alike = [row_of(target, [*begin, k, 3], new=20 + k) for k in range(3)]
    other, nobody = row_of(target, [4, 4, 1], new=5), row_of(target, [*begin, 1], salt=None)
    for row in (*alike[:2], other, alike[2], nobody):
        engine.submit(row)
    engine.step()
    assert engine.batch.slots == [other, alike[0]]  # the second waits, and its slot is not given away
    while not alike[1].reused:
        engine.step()
    assert alike[0].finish is None
    run(engine)
    assert [row.reused for row in (alike[0], other, nobody)] == [0, 0, 0]
    assert all(60 - LEAST < row.reused <= 60 for row in alike[1:])
    assert_as_alone(target, [*alike, other, nobody])


def test_a_row_that_waits_for_a_prefix_reads_by_itself_when_its_source_goes_away() -> None:
    target = ToyTarget(random_rule("target", VOCAB), VOCAB)
    engine = Engine(target, DRAFTERS["chain"](), 4, 200, 200)
    first, second = row_of(target, [1, 2, 3, 4] * 15), row_of(target, [1, 2, 3, 4] * 15)
    engine.submit(first)
    engine.submit(second)
    engine.step()
    assert engine.batch.slots == [first]
    engine.abort(first)
    run(engine)
    assert second.finish == "length"
    assert_as_alone(target, [second])


def test_the_oldest_tokens_make_room_and_failed_rows_leave_none() -> None:
    target = ToyTarget(random_rule("target", VOCAB), VOCAB)
    engine = SteadyEngine(target, DRAFTERS["chain"](), 3, 200, 200)
    texts = [[i, *([i, 1] * 15)] for i in range(4)]
    told = [row_of(target, text) for text in texts]
    for row in told:
        run(engine, row)
    found = [row_of(target, [*row.tokens, 2]) for row in reversed(told)]
    for row in found:
        run(engine, row)
    assert [row.reused > 0 for row in found] == [True, True, True, False]
    whole = target.forward

    def forward(tokens, *rest, **named):
        if any(row.tokens[:2] == [3, 4] for row in engine.batch.rows) and engine.batch.rows[0].emitted:
            raise ValueError("this one")
        return whole(tokens, *rest, **named)

    target.forward = forward
    failing = row_of(target, [3, 4, *([1, 2] * 15)], new=50)
    run(engine, failing)
    assert failing.finish == "error"
    assert not any(held.tokens[:2] == [3, 4] for held in engine.batch.prefixes.left.values())
    engine.restart()
    assert not engine.batch.prefixes.left


METHODS = {
    "glide+auto": "glide",
    "glide": "glide",
    "glide+cape": "glide",
    "eagle": "eagle",
    "medusa": "medusa",
    "vanilla": "lm",
    "lookup": None,
}


@pytest.fixture(scope="module")
def shipped() -> Target:
    return Target.from_pretrained(MODELS / "target", dtype=torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_on_the_shipped_pair(shipped: Target, method: str) -> None:
    folder = METHODS[method]
    drafter = make_drafter(
        method,
        None if folder is None else load_draft(MODELS / folder, shipped),
        **({} if method.endswith("auto") else {"length": 4}),
    )
    engine = SteadyEngine(shipped, drafter, 4, 160, 160)
    rows = talk(engine, random.Random(5), 14, checked=False)
    assert_as_alone(shipped, rows)
    assert sum(row.reused for row in rows) > 100
    assert engine.draft_failures == 0
