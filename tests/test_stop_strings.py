"""Stop strings: found wherever they fall in tokens and rounds, cut from text and ids, and never shown while streaming."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glidecape.batch.text import StopStrings, TextStream
from glidecape.core.params import SamplingParams
from glidecape.drafting.drafter import ModelDrafter, NoDraft
from glidecape.drafting.expansions.cape import Cape
from glidecape.drafting.expansions.chain import Chain
from glidecape.drafting.stop import FixedLength
from glidecape.engine.decode import decode, generate
from glidecape.errors import InputError
from toys import ToyDraft, ToyTarget, random_rule, run_checked, scripted_rule

# Token n of the vocabulary; "\u00e9" comes in two halves, as in a byte-level vocabulary, and token 9 is special.
PIECES: list[bytes] = [
    b"a",
    b"b",
    b"ab",
    b"ba",
    b"abb",
    b" ",
    "\u00e9".encode()[:1],
    "\u00e9".encode()[1:],
    b"bb a",
    b"",
]
SPECIAL = 9


class Pieces:
    """A tokenizer over PIECES."""

    all_special_tokens = ("<end>",)
    all_special_ids = (SPECIAL,)

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return b"".join(PIECES[t] for t in tokens).decode("utf-8", errors="replace")


def toy(name: str = "target", sharpness: float = 1.0) -> ToyTarget:
    made = ToyTarget(random_rule(name, len(PIECES), sharpness), len(PIECES))
    made.tokenizer = Pieces()  # type: ignore[assignment]
    return made


METHODS = {
    "plain": NoDraft,
    "chain": lambda: ModelDrafter(
        ToyDraft(random_rule("target", len(PIECES), 0.9), len(PIECES)), Chain(), FixedLength(5)
    ),
    "cape": lambda: ModelDrafter(
        ToyDraft(random_rule("draft", len(PIECES), 1.5), len(PIECES)), Cape((4,)), FixedLength(4)
    ),
}


def first_stop(tokens: list[int], strings: tuple[str, ...], least: int = 0) -> tuple[int, str] | None:
    """By hand: how many tokens until a stop string is complete, and the text before it."""
    text = Pieces().decode
    for count in range(max(1, least), len(tokens) + 1):
        now, before = text(tokens[:count]).rstrip("\ufffd"), text(tokens[: count - 1]).rstrip("\ufffd")
        ends = [at for s in strings for at in range(len(now)) if now.startswith(s, at) and at + len(s) > len(before)]
        if ends:
            return count, now[: min(ends)]
    return None


token_lists = st.lists(st.integers(0, len(PIECES) - 1), max_size=14)
stop_lists = st.lists(st.text("ab \u00e9", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(token_lists, stop_lists, st.integers(0, 4), st.lists(st.integers(1, 5), min_size=14, max_size=14))
def test_a_stop_string_is_found_where_it_is_however_rounds_fall(tokens, strings, least, rounds) -> None:
    finder, expected = StopStrings(Pieces(), strings, least), first_stop(tokens, strings, least)
    known, cut = 0, None
    stream, shown = TextStream(Pieces(), strings), ""
    for size in rounds:
        if known >= len(tokens) or cut is not None:
            break
        cut = finder.find(tokens[: known + size], known)
        until = min(known + size, len(tokens)) if cut is None else cut.tokens
        shown += stream.push(tokens[known:until], cut is not None, None if cut is None else cut.text)
        known = until
        full = Pieces().decode(tokens)
        assert full.startswith(shown.rstrip("\ufffd"))
        if expected is not None:
            assert expected[1].startswith(shown), "text was shown that belongs to a stop string"
    assert (None if cut is None else (cut.tokens, cut.text)) == expected
    if cut is None:
        assert shown + stream.push([], True) == Pieces().decode(tokens)
    else:
        assert shown == cut.text
        assert cut.kept <= cut.tokens
        handed = Pieces().decode(tokens[: cut.kept])
        assert handed.startswith(cut.text)
        # At a boundary the ids end there; otherwise one token less would be too few.
        if all(Pieces().decode(tokens[:n]) != cut.text for n in range(cut.tokens)):
            shorter = Pieces().decode(tokens[: cut.kept - 1]).rstrip("\ufffd")
            assert len(shorter) <= len(cut.text) < len(handed)
        else:
            assert handed == cut.text


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_at_the_first_stop_string_of_plain_text(method: str) -> None:
    """60 seeds at temperature 1 with shared noise and greedy ones, single and as one batch: equal cuts everywhere."""
    strings = ("bba", "\u00e9a", " b")
    prompts = [(1, 0, 5)[: 1 + i % 3] for i in range(60)]
    base = [{"temperature": float(i % 4 > 0), "seed": i, "max_new_tokens": 12} for i in range(60)]
    whole = generate(toy(), prompts, None, [SamplingParams(**b) for b in base])
    out = generate(toy(), prompts, METHODS[method](), [SamplingParams(**b, stop=strings) for b in base])
    ended = 0
    for full, one in zip(whole, out, strict=True):
        expected = first_stop(full.tokens, strings)
        if expected is None:
            assert (one.tokens, one.text, one.finish) == (full.tokens, full.text, "length")
            continue
        ended += 1
        assert (one.text, one.finish) == (expected[1], "stop")
        assert full.tokens[: len(one.tokens)] == one.tokens
        assert len(one.tokens) == len(one.origins) <= expected[0]
    assert 20 < ended < 60


@pytest.mark.parametrize("across", [1, 3], ids=["in one token", "across three tokens"])
@pytest.mark.parametrize("end", range(3, 11))
def test_a_stop_string_that_ends_at_every_depth_of_an_accepted_path(end: int, across: int) -> None:
    """Token n is the letter n and the draft is always right: ends 3-5 are depths, 6 the bonus, then the next round."""

    class Letters(Pieces):
        def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
            return "".join(chr(ord("a") + t) for t in tokens)

    script = scripted_rule([[n] for n in range(30)], 30)
    target = ToyTarget(script, 30)
    target.tokenizer = Letters()  # type: ignore[assignment]
    drafter = ModelDrafter(ToyDraft(script, 30), Chain(), FixedLength(5))
    stop = "bcdefghijklm"[end - across : end]
    (one,) = generate(target, [[0]], drafter, SamplingParams(stop=stop, max_new_tokens=20))
    assert one.text == "bcdefghijklm"[: end - across]
    assert one.tokens == list(range(1, 1 + end - across))
    assert one.finish == "stop"
    assert sum(r.emitted for r in one.rounds) == end


@pytest.mark.parametrize("sampling", ["noise", "residual"])
@pytest.mark.parametrize("method", METHODS)
def test_caches_and_counts_hold_when_a_stop_string_ends_a_row(method: str, sampling: str) -> None:
    strings = ("bba", "\u00e9a", " b")
    prompts = [(1, 0, 5)[: 1 + i % 3] for i in range(20)]
    params = [SamplingParams(1.0, seed=i, max_new_tokens=12, sampling=sampling, stop=strings) for i in range(20)]
    found, events, finish = run_checked(toy(), METHODS[method](), prompts, params)
    for i in range(20):
        stop = first_stop(found[i], strings)
        assert finish[i] == ("length" if stop is None else "stop")
        assert stop is None or stop[0] == len(found[i]), "tokens after the stop string"
        assert [t for e in events if e.row == i for t in e.tokens] == found[i]
    assert all(e.stats.emitted == len(e.tokens) for e in events)


def test_a_stream_never_takes_text_back() -> None:
    strings = ("abba", "\u00e9b")
    shortened = 0
    for seed in range(40):
        params = SamplingParams(1.0, seed=seed, max_new_tokens=14, stop=strings)
        stream, shown = TextStream(Pieces(), strings), ""
        for event in decode(toy(), METHODS["chain"](), [[1]], params):
            shown += stream.push(event.tokens, event.finish is not None, event.text)
        (one,) = generate(toy(), [[1]], None, params)
        assert shown == one.text
        assert not any(s in shown for s in strings)
        shortened += one.finish == "stop"
    assert 10 < shortened < 40


def test_min_new_tokens_holds_for_stop_strings_and_stop_tokens() -> None:
    for seed, least in itertools.product(range(15), (0, 3, 6)):
        params = SamplingParams(
            1.0, seed=seed, max_new_tokens=10, stop=("a",), stop_token_ids=(5,), min_new_tokens=least
        )
        for method in METHODS.values():
            (found,), _, (finish,) = run_checked(toy(), method(), [[1]], params)
            assert len(found) >= least
            assert 5 not in found[: max(0, least - 1)]
            if finish == "stop" and found[-1] != 5:
                stop = first_stop(found, ("a",), least)
                assert stop is not None
                assert stop[0] == len(found)


def test_a_special_token_named_as_a_stop_string_is_found_by_its_id() -> None:
    hits = 0
    for seed in range(30):
        (one,) = generate(toy(), [[1]], METHODS["chain"](), SamplingParams(1.0, seed=seed, stop="<end>"))
        hits += one.finish == "stop"
        assert SPECIAL not in one.tokens[:-1]
        assert one.finish == "length" or one.tokens[-1] == SPECIAL
    assert hits > 20


def test_what_does_not_fit_the_target_is_refused() -> None:
    bare = ToyTarget(random_rule("target"))
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        generate(bare, [[1]], None, SamplingParams(stop=("a",)))
    with pytest.raises(InputError, match="logit_bias names token id 3, outside the vocabulary of 3"):
        generate(bare, [[1]], None, SamplingParams(logit_bias={3: 1.0}))
    with pytest.raises(InputError, match="every token of the vocabulary ends the row"):
        generate(bare, [[1]], None, SamplingParams(stop_token_ids=(0, 1, 2), min_new_tokens=1))
