"""The server weighs what drafts cost: by planted prices they stop under load, and no answer depends on it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from glidecape import load_draft, make_drafter
from glidecape.costmodel import Prices
from glidecape.drafting.priced import PricedDrafter
from glidecape.serve.server import priced
from glidecape.serve.settings import ServeSettings
from serving import MODELS, PROMPTS, alone


def planted(*nodes: float, draft: float = 0.0) -> list[Prices]:
    """A node of each row costs so many plain rounds, where there are 1, 4 and 16 rows."""
    tables = tuple(((1.0, 1.0 + 10 * node),) for node in nodes)
    return [Prices((1, 4, 16), (100,), (1, 11), tables, ((draft,),) * 3, ((draft,),) * 3)] * 2


def answers(one, target) -> None:
    """Sixteen answers together are what plain decoding gives, some greedy and some drawn."""
    with ThreadPoolExecutor(16) as pool:
        asked = [{"max_tokens": 30 + i, "temperature": float(i % 2), "seed": i, "ignore_eos": True} for i in range(16)]
        texts = list(pool.map(lambda i: one.complete(PROMPTS[i], **asked[i]), range(16)))
    for i, text in enumerate(texts):
        own = {"temperature": float(i % 2), "seed": i, "ignore_eos": True}
        assert text == alone(target, PROMPTS[i], max_new_tokens=30 + i, **own), i
    assert one.metric("draft_failures_total") == 0


def test_time_won_against_plain_rounds_is_counted_by_their_price(server, drafter) -> None:
    cheap = planted(0.0, 0.0, 0.0)
    one = server(drafter=PricedDrafter(drafter, cheap))
    for seconds, name in ((1.0, "won"), (1e-9, "lost")):
        one.service.worker.prices = [replace(cheap[0], verify=((((seconds, 1.0)),),) * 3)] * 2
        before = one.metric(f"draft_time_{name}_seconds_total")
        one.complete(PROMPTS[0], max_tokens=20, ignore_eos=True)
        assert one.metric(f"draft_time_{name}_seconds_total") > before
    assert 5 < one.metric("draft_time_won_seconds_total") < 20  # a second a token, less what the rounds took


def test_drafts_stop_under_load_and_no_answer_depends_on_it(server, target, drafter) -> None:
    """A node is free for a few rows and dear for sixteen."""
    one = server(drafter=PricedDrafter(drafter, planted(0.0, 0.0, 1.0)))
    one.complete(PROMPTS[0], max_tokens=24, ignore_eos=True)
    assert one.metric("spec_decode_num_skipped_drafts_total") == 0
    assert one.metric("spec_decode_num_drafts_total") > 0
    answers(one, target)
    assert one.metric("spec_decode_num_skipped_drafts_total") > 100


@pytest.mark.parametrize("cost", [0.01, 3.0], ids=["cheap", "dear"])
def test_auto_in_a_server_gives_plain_decoding_s_answers(server, target, cost) -> None:
    drafter = make_drafter("glide+auto", load_draft(MODELS / "glide", target))
    drafter.set_prices(planted(cost, cost, cost, draft=cost))
    one = server(drafter=drafter)
    answers(one, target)
    skipped, drafts = (one.metric(f"spec_decode_num_{name}_total") for name in ("skipped_drafts", "drafts"))
    assert (skipped > drafts) == (cost > 1)


def test_only_methods_that_do_not_choose_themselves_are_weighed(target, drafter, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr("glidecape.serve.server.prices_of", lambda *_, **given: asked.append(given) or planted(1, 1, 1))
    settings = ServeSettings(max_batch=6, max_context=300)
    for method, is_weighed in (("plain", False), ("lookup", True), ("lookup+auto", False)):
        made = priced(target, make_drafter(method), settings)
        assert isinstance(made, PricedDrafter) == is_weighed
    assert priced(target, drafter, settings).inner is drafter
    assert asked == [{"rows": [1, 4, 6], "tokens": 300}] * 2
