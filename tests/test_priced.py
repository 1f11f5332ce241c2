"""Drafts as long as they pay, by planted prices: which lengths are chosen, and that no token depends on them."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from glidecape import SamplingParams, load_draft, make_drafter
from glidecape.batch.row import Row, new_row
from glidecape.costmodel import Prices
from glidecape.costs import prices_of
from glidecape.drafting import priced
from glidecape.drafting.drafter import ModelDrafter
from glidecape.drafting.expansions.cape import Cape
from glidecape.drafting.expansions.chain import Chain
from glidecape.drafting.lookup import LookupDrafter
from glidecape.drafting.medusa import MedusaDrafter
from glidecape.drafting.priced import FIRST, PROBE, PricedDrafter
from glidecape.drafting.stop import Entropy, FixedLength, Heuristic
from glidecape.engine.decode import generate
from glidecape.engine.engine import Engine
from glidecape.progress import Bar
from glidecape.target.packages import FOLDER
from serving import MODELS
from toys import ReRun, ToyDraft, ToyHeads, ToyTarget, check_invariants, random_rule

VOCAB = 5
RULE = random_rule("target", VOCAB)
OTHER = random_rule("another", VOCAB, 0.01)
INNER = {
    "chain": lambda rule: ModelDrafter(ToyDraft(rule, VOCAB), Chain(), FixedLength(3)),
    "cape": lambda rule: ModelDrafter(ToyDraft(rule, VOCAB), Cape((3, 1)), FixedLength(3)),
    "svip": lambda rule: ModelDrafter(ToyDraft(rule, VOCAB), Chain(), Entropy(0.35, 6)),
    "heuristic": lambda rule: ModelDrafter(ToyDraft(rule, VOCAB), Chain(), Heuristic(2, 6)),
    "runs again": lambda rule: ModelDrafter(ReRun(rule, VOCAB), Chain(), FixedLength(3)),
    "heads": lambda rule: MedusaDrafter(ToyHeads(rule), Chain(), FixedLength(3)),
    "lookup": lambda rule: LookupDrafter(3, 2),
}


def prices(node: float, rows: int = 1) -> Prices:
    """Each depth of a round costs `node` plain rounds of one row; of four rows it costs `rows` times as much."""
    of = [(1.0, 1.0 + 10 * node * times) for times in (1, rows)]
    return Prices((1, 4), (100,), (1, 11), ((of[0],), (of[1],)), ((0.0,),) * 2, ((0.0,),) * 2)


def of(inner: str, cost: Prices, rule=RULE) -> PricedDrafter:
    return PricedDrafter(INNER[inner](rule), [cost, cost])


def row_of(number: int, new: int, prompt: int = 8, temperature: float = 0.0) -> Row:
    tokens = [(number + i * i) % VOCAB for i in range(prompt)]
    params = SamplingParams(temperature, seed=number, max_new_tokens=new, ignore_eos=True)
    return new_row(number, tokens, params, ToyTarget(RULE, VOCAB))


def run(
    drafter: PricedDrafter, rows: list[Row], slots: int = 4, late: bool = False, room: int = 300
) -> list[tuple[int, int]]:
    """Decode the rows; of each round, how many there were and the length."""
    engine = Engine(ToyTarget(RULE, VOCAB), drafter, slots, room, room)
    coming, seen = list(rows), []
    while coming or not engine.idle:
        if coming and (not late or len(seen) % 5 == 0):
            engine.submit(coming.pop(0))
        if events := engine.step():
            seen.append((len(events), drafter.length))
            engine.batch.use(0, engine.ready)
            if isinstance(drafter.inner, ModelDrafter) and not isinstance(drafter.inner, MedusaDrafter):
                check_invariants(engine.batch)
    return seen


@pytest.mark.parametrize("inner", INNER)
def test_no_token_depends_on_the_lengths(inner: str, monkeypatch) -> None:
    """Rows join late, some greedy and some drawn, and drafts are whole, shortened, left out and tried again."""
    monkeypatch.setattr(priced, "PROBE", 6)
    lengths = set()
    for cost in (prices(0.0), prices(0.15, rows=2), prices(0.1, rows=20), prices(5.0)):
        rows = [row_of(i, 20 + 3 * i, 5 + i, float(i % 2)) for i in range(6)]
        lengths |= {length for _, length in run(of(inner, cost), rows, late=True)}
        for row in rows:
            prompt = row.tokens[: row.prompt_length]
            assert row.new_tokens == generate(ToyTarget(RULE, VOCAB), prompt, None, row.params)[0].tokens
    assert 0 in lengths
    assert max(lengths) >= 3


def test_drafts_are_shorter_the_more_rows_there_are() -> None:
    """Worked by hand: three depths bring 1.9, 2.35 and 2.44 tokens, and a node costs 0.02 rounds of one row, 0.4 of four."""
    drafter = of("chain", prices(0.02, rows=20))
    drafter.accepts = [[0.9, 0.5, 0.2]] * 2
    assert [drafter.best([0] * rows, 0)[0] for rows in (1, 2, 3, 4)] == [3, 2, 2, 1]
    assert drafter.best([0] * 4, 0)[1] == pytest.approx(1.9 / 1.4)
    dear = of("chain", prices(0.1, rows=20))  # 2 rounds a node of four rows, where the draft is always right
    seen = run(dear, [row_of(i, 100) for i in range(4)], late=True)
    assert {length for rows, length in seen if rows == 1} == {3}
    assert sum(length > 0 for rows, length in seen if rows == 4) <= 1 + sum(rows == 4 for rows, _ in seen) // PROBE


def test_a_draft_that_is_never_right_is_left_out_and_tried_rarely() -> None:
    drafter = of("chain", prices(0.3), OTHER)
    seen = run(drafter, [row_of(1, 290)], room=300)
    late = [length for _, length in seen[150:]]
    assert (
        0 < sum(map(bool, late)) < 0.1 * len(late)
    )  # once in 64 rounds, and a little longer where it was right by chance
    assert drafter.accepts[0][0] < FIRST
    assert drafter.accepts[1] == [FIRST] * 3  # nothing was drawn
    right = of("chain", prices(0.1))
    assert {length for _, length in run(right, [row_of(1, 100)])} == {3}
    assert right.accepts[0][0] > FIRST


def test_a_row_that_drafts_again_after_a_long_pause_catches_up_beside_a_full_one() -> None:
    """The first row lags by 150 tokens, and the second one fills its slot nearly to the end: padding must not pass it."""
    drafter = of("chain", prices(50.0))
    engine = Engine(ToyTarget(RULE, VOCAB), drafter, 2, 200, 200)
    first, second = row_of(1, 180), row_of(2, 12, prompt=186)
    engine.submit(first)
    while first.emitted < 150:
        drafter._waited = 0
        engine.step()
    assert engine.batch.cache.length(0) - engine.batch.draft.own.length(0) > 140
    engine.submit(second)
    drafter.set_prices([prices(0.0)] * 2)
    while not engine.idle:
        engine.step()
        engine.batch.use(0, engine.ready)
        check_invariants(engine.batch)
    for row in (first, second):
        prompt = row.tokens[: row.prompt_length]
        assert row.new_tokens == generate(ToyTarget(RULE, VOCAB), prompt, None, row.params)[0].tokens
    assert drafter.accepts[0][0] > FIRST


@pytest.mark.parametrize("method", ["glide+cape", "glide+svip", "lookup"])
def test_prices_of_a_method_are_those_of_its_whole_rounds(target, tmp_path, monkeypatch, method) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    draft = None if method == "lookup" else load_draft(MODELS / "glide", target)
    said: list[str] = []
    made, again = (
        PricedDrafter(make_drafter(method, draft, **({} if "svip" in method else {"length": 4}))) for _ in range(2)
    )
    shown = []
    monkeypatch.setattr(
        "glidecape.costs.bar", lambda *given: shown.append(Bar(*given, 0.0, None, None)) or nullcontext(shown[-1])
    )
    found = prices_of(target, made, said.append, rows=(1, 2), tokens=64)
    assert [(one.done, one.total) for one in shown] == [(4.0, 4)]  # one bar for both temperatures
    assert len(said) == 1
    assert prices_of(target, again, said.append, rows=(1, 2), tokens=64) == found
    assert len(said) == 1
    assert len(list((tmp_path / "packages").glob("prices-*.json"))) == 1
    for one in found:
        assert one.rows == (1, 2)
        assert one.contexts[0] < 64
        assert (one.sizes[0], one.sizes[-1]) == (1, 1 + made.longest)
        assert 0 < one.plain(1, 30) < 1
        assert one.at(1, 30).verify(1 + made.longest) >= 1
