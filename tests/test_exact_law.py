"""The output has the target's law: exactly, under every method, by enumeration of the shipped code's random outcomes.

Nothing is left to chance in this file but the tests of the noise itself, whose seeds are fixed.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from glidecape.batch import laws as laws_module
from glidecape.core.noise import gumbel
from glidecape.core.params import RESIDUAL, SamplingParams
from glidecape.core.penalties import adjust
from glidecape.core.stats import RoundStats
from glidecape.core.tree import TokenTree
from glidecape.core.verify import DenseLaw, verify_row
from glidecape.costmodel import Prices
from glidecape.drafting.auto.drafter import AutoDrafter
from glidecape.drafting.drafter import ModelDrafter, NoDraft
from glidecape.drafting.expansions.base import Expansion
from glidecape.drafting.expansions.beam import Beam
from glidecape.drafting.expansions.cape import Cape
from glidecape.drafting.expansions.chain import Chain
from glidecape.drafting.expansions.eagle_tree import EagleTree
from glidecape.drafting.expansions.static_tree import StaticTree
from glidecape.drafting.law import DraftLaw
from glidecape.drafting.lookup import LookupDrafter
from glidecape.drafting.medusa import MedusaDrafter
from glidecape.drafting.methods import METHODS, make_drafter
from glidecape.drafting.stop import Entropy, FixedLength, Heuristic, StopPolicy
from glidecape.errors import InputError
from toys import (
    Context,
    EnumeratingChance,
    ReRun,
    ToyDraft,
    ToyHeads,
    ToyTarget,
    exact_law,
    random_rule,
    run_checked,
    total_variation,
)

PROMPT = (2, 0)
TARGET, DRAFT = random_rule("target"), random_rule("draft", sharpness=1.5)

EXPANSIONS = {
    "chain": Chain,
    "cape of 1 or 2": lambda: Cape((2, 2, 1, 1)),
    "cape of 0 to 2": lambda: Cape((0, 2, 2, 0, 1, 1, 2, 0, 1, 0)),
    "beam of 2": lambda: Beam(2),
    "beam of 4": lambda: Beam(4),  # more than the vocabulary holds
}
TREES = {  # with fewer of the settings below, and with all of them in the slow suite
    "tree of 2 and 4": lambda: EagleTree(2, 4),
    "tree of 3 and 12": lambda: EagleTree(3, 12),
    "static of 2 and 5": lambda: StaticTree(2, 5, 2),
    "static of 4 and 12": lambda: StaticTree(4, 12, 2),
}
STOPS = {
    "fixed 1": lambda: FixedLength(1),
    "fixed 2": lambda: FixedLength(2),
    "entropy": lambda: Entropy(0.3, cap=2),  # stops where H > 0.6 nat, which some of the draft's laws have
    "heuristic": lambda: Heuristic(1, cap=2),
}
PENALTIES = {
    "repetition_penalty": 1.6,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.7,
    "logit_bias": {1: 0.8, 2: -0.3},
}


def echo(tokens: Tensor, logits: Tensor) -> Tensor:
    """A processor that depends on the path: the last token again, the one before it rather not, one less each time."""
    made = logits.clone()
    made[tokens[-1]] += 0.8
    made[tokens[-2:-1]] -= 0.6
    made[0] -= 0.3 * (len(tokens) % 2)
    return made


PARAMS = {
    "temperature 1": SamplingParams(temperature=1.0, sampling=RESIDUAL, max_new_tokens=8),
    "temperature 0.7 top_p 0.8": SamplingParams(temperature=0.7, top_p=0.8, sampling=RESIDUAL, max_new_tokens=8),
    "top_k 2": SamplingParams(temperature=1.0, top_k=2, sampling=RESIDUAL, max_new_tokens=8),
    "greedy": SamplingParams(max_new_tokens=8),
    "penalties": SamplingParams(temperature=0.8, sampling=RESIDUAL, max_new_tokens=8, **PENALTIES),
    "greedy penalties": SamplingParams(max_new_tokens=8, **PENALTIES),
    "min_p 0.4": SamplingParams(temperature=1.3, min_p=0.4, sampling=RESIDUAL, max_new_tokens=8),
    "processor": SamplingParams(temperature=1.1, sampling=RESIDUAL, max_new_tokens=8, processor=echo),
    "greedy processor": SamplingParams(max_new_tokens=8, processor=echo),
    "no stop in the first two": SamplingParams(
        temperature=1.0, sampling=RESIDUAL, max_new_tokens=8, min_new_tokens=2, stop_token_ids=(1,)
    ),
}


def adjusted_by_hand(logits: list[float], context: Context, params: SamplingParams, new: int) -> list[float]:
    """Bias, penalties and min_new_tokens, token by token; the last `new` tokens of the context were emitted."""
    made = []
    for token, z in enumerate(logits):
        z += dict(params.logit_bias).get(token, 0.0)
        if token in context:
            z = z / params.repetition_penalty if z > 0 else z * params.repetition_penalty
        count = context[len(context) - new :].count(token)
        z -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        made.append(-math.inf if new < params.min_new_tokens and token in params.stop_token_ids else z)
    if params.processor is not None:
        made[context[-1]] += 0.8
        if len(context) > 1:
            made[context[-2]] -= 0.6
        made[0] -= 0.3 * (len(context) % 2)
    return made


def law_by_hand(context: Context, params: SamplingParams, new: int) -> list[float]:
    """The target's processed law, written once more and differently, without tensors."""
    logits = adjusted_by_hand(TARGET(context).tolist(), context, params, new)
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if params.greedy:
        return [float(token == order[0]) for token in range(len(logits))]
    weight = [math.exp(x / params.temperature) for x in logits]
    kept = order[: params.top_k] if params.top_k else order
    total, mass, stay = sum(weight[t] for t in kept), 0.0, set()
    for token in kept:
        if mass < params.top_p:
            stay.add(token)
        mass += weight[token] / total
    stay = {token for token in stay if weight[token] >= params.min_p * max(weight)}
    total = sum(weight[token] for token in stay)
    return [weight[token] / total if token in stay else 0.0 for token in range(len(logits))]


def product_law(params: SamplingParams, length: int = 3, prompt: Context = PROMPT) -> Counter[Context]:
    law: Counter[Context] = Counter()
    for tokens in itertools.product(range(3), repeat=length):
        p = 1.0
        for n, token in enumerate(tokens):
            p *= law_by_hand(prompt + tokens[:n], params, n)[token]
        if p:
            law[tokens] = p
    return law


def distance(drafter: object, params: SamplingParams, length: int = 3) -> float:
    """Total variation between the first tokens of the shipped loop and of the target itself."""
    law = exact_law(ToyTarget(TARGET), drafter, PROMPT, params, length)  # type: ignore[arg-type]
    assert sum(law.values()) == pytest.approx(1, abs=1e-12)
    return total_variation(law, product_law(params, length))


# --- residual sampling and greedy


def test_every_method_is_enumerated_here() -> None:
    """A new expansion or stop policy must be added above."""
    expansions = {type(make()) for make in (EXPANSIONS | TREES).values()}
    stops = {type(make()) for make in STOPS.values()}
    for method in METHODS:
        drafter = make_drafter(method, ToyDraft(DRAFT))
        if isinstance(drafter, ModelDrafter):
            assert type(drafter.expansion) in expansions, method
            assert type(drafter.stop) in stops, method
        else:
            assert isinstance(drafter, NoDraft | LookupDrafter | AutoDrafter), method


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("price", [0.02, 0.5])
def test_auto_has_the_target_law(price: float, params: str) -> None:
    prices = Prices((1,), (1,), (1, 11), (((1.0, 1.0 + 10 * price),),), ((price,),), ((price,),))
    runner = ModelDrafter(ToyDraft(DRAFT), Chain(), FixedLength(2))
    assert distance(AutoDrafter(runner, [prices, prices]), PARAMS[params]) <= 1e-12


class Pruned(AutoDrafter):
    """Under the residual rule, too, what is not worth its cost is left out: a drawn token is dropped for what it is."""

    def propose(self, batch):
        tree = super().propose(batch)
        if batch.laws.residual and tree.nodes > 1 and int(tree.tokens[0, 1]) == 0:
            return tree.pack(1)
        return tree


def test_dropping_a_drawn_token_by_its_price_breaks_the_law() -> None:
    runner = ModelDrafter(ToyDraft(DRAFT), Chain(), FixedLength(2))
    assert distance(Pruned(runner), PARAMS["temperature 1"]) > 0.01


def triples() -> Iterator[Any]:
    """Every expansion, stop policy and sampling setting. The default suite has so many of them that each expansion meets each
    stop policy and each setting, and each stop policy each setting."""
    for e, s, p in itertools.product(range(len(EXPANSIONS)), range(len(STOPS)), range(len(PARAMS))):
        names = (list(EXPANSIONS)[e], list(STOPS)[s], list(PARAMS)[p])
        yield pytest.param(*names, marks=[] if (e + p) % len(STOPS) == s else [pytest.mark.slow])


def test_every_two_of_an_expansion_a_stop_policy_and_a_setting_meet_in_the_default_suite() -> None:
    fast = [one.values for one in triples() if not one.marks]
    for a, b in itertools.combinations((EXPANSIONS, STOPS, PARAMS), 2):
        met = {(x, y) for names in fast for x, y in itertools.permutations(names, 2)}
        assert set(itertools.product(a, b)) <= met, "choose more in `triples`"


@pytest.mark.parametrize(("expansion", "stop", "params"), list(triples()))
def test_first_three_tokens_have_the_target_law(expansion: str, stop: str, params: str) -> None:
    drafter = ModelDrafter(ToyDraft(DRAFT), EXPANSIONS[expansion](), STOPS[stop]())
    assert distance(drafter, PARAMS[params]) <= 1e-12


def settings(fast: set[tuple[str, str]]) -> list[Any]:
    """Every stop policy with every sampling setting; those that are not fast are for the slow suite."""
    every = itertools.product(STOPS, PARAMS)
    return [pytest.param(*one, marks=[] if one in fast else [pytest.mark.slow]) for one in every]


@pytest.mark.parametrize(
    ("stop", "params"),
    settings({("fixed 2", "temperature 1"), ("fixed 2", "penalties"), ("entropy", "top_k 2"), ("heuristic", "greedy")}),
)
@pytest.mark.parametrize("expansion", TREES)
def test_first_three_tokens_of_trees_have_the_target_law(expansion: str, stop: str, params: str) -> None:
    drafter = ModelDrafter(ToyDraft(DRAFT), TREES[expansion](), STOPS[stop]())
    assert distance(drafter, PARAMS[params]) <= 1e-12


@pytest.mark.parametrize("expansion", [lambda: Beam(2), lambda: EagleTree(2, 6)], ids=["beam", "tree"])
@pytest.mark.parametrize("over", Entropy.OVER)
@pytest.mark.parametrize("threshold", [0.25, 0.35])
def test_svip_by_depth_has_the_target_law(over: str, threshold: float, expansion: Callable[[], Expansion]) -> None:
    drafter = ModelDrafter(ToyDraft(DRAFT), expansion(), Entropy(threshold, 3, over))
    assert distance(drafter, PARAMS["temperature 1"]) <= 1e-12


@pytest.mark.parametrize("params", ["temperature 1", "greedy penalties"])
@pytest.mark.parametrize("expansion", [Chain, TREES["tree of 2 and 4"]], ids=["chain", "tree"])
def test_a_draft_that_runs_accepted_tokens_again_has_the_target_law(
    expansion: Callable[[], Expansion], params: str
) -> None:
    assert distance(ModelDrafter(ReRun(DRAFT), expansion(), FixedLength(2)), PARAMS[params]) <= 1e-12


@pytest.mark.parametrize(("stop", "params"), settings({("fixed 2", "temperature 1"), ("entropy", "penalties")}))
@pytest.mark.parametrize(
    "expansion", [Chain, TREES["static of 2 and 5"], TREES["tree of 2 and 4"]], ids=["chain", "static", "tree"]
)
def test_heads_that_predict_all_depths_have_the_target_law(
    expansion: Callable[[], Expansion], stop: str, params: str
) -> None:
    drafter = MedusaDrafter(ToyHeads(DRAFT), expansion(), STOPS[stop]())
    assert distance(drafter, PARAMS[params]) <= 1e-12


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("ngram", [1, 2])
def test_prompt_lookup_has_the_target_law(ngram: int, params: str) -> None:
    """With three tokens nearly every context has a match; the prompt is longer here, so that the first has one, too."""
    drafter = LookupDrafter(2, ngram)
    law = exact_law(ToyTarget(TARGET), drafter, (2, 0, 1, 2, 0), PARAMS[params])
    expected = product_law(PARAMS[params], prompt=(2, 0, 1, 2, 0))
    assert total_variation(law, expected) <= 1e-12


@pytest.mark.parametrize("params", PARAMS)
def test_plain_decoding_has_the_target_law(params: str) -> None:
    assert distance(NoDraft(), PARAMS[params]) <= 1e-12


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_law_holds_when_max_new_tokens_shortens_drafts_and_clips_rounds(expansion: str) -> None:
    params = SamplingParams(temperature=1.0, sampling=RESIDUAL, max_new_tokens=3)
    assert distance(ModelDrafter(ToyDraft(DRAFT), EXPANSIONS[expansion](), FixedLength(2)), params) <= 1e-12


def test_entropy_stop_used_here_sometimes_stops_and_sometimes_goes_on() -> None:
    contexts = [PROMPT + tokens for n in range(3) for tokens in itertools.product(range(3), repeat=n)]
    entropies = [float(torch.special.entr(DRAFT(c).softmax(-1)).sum()) for c in contexts]
    stopped = [math.sqrt(0.15 * h) > 0.3 for h in entropies]
    assert 0 < sum(stopped) < len(stopped)


class TwoSampled(Chain):
    """Two children of the root drawn without replacement; `keep` may drop one, which is not lossless."""

    keep = "both"

    def capacity(self, depth: int) -> int:
        return 1 + 2 * depth

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        assert law.drawn is not None
        assert law.drawn_law is not None
        q = law.drawn_law[0, 0].exp()
        first = int(law.drawn[0, 0])
        rest = q.clone()
        rest[first] = 0
        second = self.chance.categorical(rest / rest.sum())  # type: ignore[attr-defined]
        tokens = [first, second]
        if self.keep == "better":
            tokens = [max(tokens, key=lambda token: float(q[token]))]
        drawn = torch.tensor([tokens])
        k = len(tokens)
        log_prob = law.log_q[:, 0].gather(1, drawn)
        added = tree.add(frontier.expand(1, k), drawn, log_prob, sampled_from=law.drawn_law.expand(1, k, -1))
        return added[:, :1]


def test_siblings_drawn_without_replacement_have_the_target_law() -> None:
    drafter = ModelDrafter(ToyDraft(DRAFT), TwoSampled(), FixedLength(2))
    assert distance(drafter, PARAMS["temperature 1"], length=2) <= 1e-12


def test_verify_row_with_two_sampled_siblings_has_the_target_law() -> None:
    """A hand-built tree: both children of the root drawn from q without replacement, one more below the first."""
    p, q = {}, {}
    for node in range(4):
        p[node] = TARGET((node,)).softmax(-1)
        q[node] = DRAFT((node,)).softmax(-1)
    law: Counter[Context] = Counter()
    for a, b, c in itertools.product(range(3), repeat=3):
        if a == b:
            continue
        drawn = float(q[0][a] * q[0][b] / (1 - q[0][a]) * q[1][c])
        tree = TokenTree(torch.tensor([0]))
        both = q[0].log().expand(1, 2, -1)
        tree.add(torch.tensor([[0, 0]]), torch.tensor([[a, b]]), torch.zeros(1, 2), sampled_from=both)
        tree.add(torch.tensor([[1]]), torch.tensor([[c]]), torch.zeros(1, 1), sampled_from=q[1].log()[None, None])
        # The target's law after a token, whichever node proposed it.
        after = {0: p[0], 1: p[1 + a], 2: p[1 + b], 3: None}
        script: list[int] | None = []
        while script is not None:
            chance = EnumeratingChance(script)
            path, bonus = verify_row(tree, 0, lambda node, at=after: DenseLaw(at[node] if node < 3 else p[0]), chance)
            tokens = (*tree.path_tokens(0, path[1:]), bonus)[:2]
            if len(tokens) == 2:
                law[tokens] += drawn * chance.weight
            else:  # nothing accepted: the next token would come from the target itself
                for token in range(3):
                    law[(*tokens, token)] += drawn * chance.weight * float(p[1 + tokens[0]][token])
            script = chance.next_script()
    expected: Counter[Context] = Counter()
    for a, b in itertools.product(range(3), repeat=2):
        expected[a, b] = float(p[0][a] * p[1 + a][b])
    assert total_variation(law, expected) <= 1e-12


# --- negative controls: each of these is known not to be lossless, so the enumeration must see it


class DroppingChain(Chain):
    """Drops a drawn token when the draft gave it a low probability."""

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        ahead = super().grow(tree, frontier, law)
        low = law.log_q.gather(2, tree.tokens[:, -1:, None])[..., 0].exp() < 0.4
        tree.valid[:, -1:] &= ~low
        return ahead.masked_fill(low, -1)


class DroppingStop(FixedLength):
    """Stops *before* a drawn token of low probability, where it may only stop after it."""

    def more(self, tree: TokenTree, depth: int, law: DraftLaw) -> bool:
        if float(law.log_q[0, 0, tree.tokens[0, -1]].exp()) < 0.4:
            tree.valid[:, -1] = False
            return False
        return super().more(tree, depth, law)


class Pruning(TwoSampled):
    """Draws two siblings and keeps the one the draft likes better."""

    keep = "better"


class FalselySampled(Chain):
    """Takes the draft's first choice and says it was drawn from the draft's law."""

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        first = law.rank.argmax(-1)
        log_prob = law.log_q.gather(2, first[..., None])[..., 0]
        return tree.add(frontier, first, log_prob, sampled_from=law.drawn_law)


class WrongResidual(DenseLaw):
    """The residual the wrong way round: relu(q - p)."""

    def without(self, drawn_from: Tensor | None, token: int) -> DenseLaw:
        if drawn_from is None:
            return super().without(drawn_from, token)
        rest = (drawn_from - self.p).clamp(min=0.0)
        return WrongResidual(rest / rest.sum()) if rest.sum() > 0 else self


@pytest.mark.parametrize(
    ("expansion", "stop"),
    [
        (DroppingChain, FixedLength),
        (Chain, DroppingStop),
        (Pruning, FixedLength),
        (FalselySampled, FixedLength),
    ],
    ids=["expansion drops a drawn token", "stop drops a drawn token", "prunes a drawn sibling", "argmax as sampled"],
)
def test_enumeration_catches(expansion: type[Chain], stop: type[FixedLength]) -> None:
    drafter = ModelDrafter(ToyDraft(DRAFT), expansion(), stop(2))
    assert distance(drafter, PARAMS["temperature 1"], length=2) > 0.01


def test_enumeration_catches_a_wrong_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws_module, "DenseLaw", WrongResidual)
    assert distance(ModelDrafter(ToyDraft(DRAFT), Chain(), FixedLength(2)), PARAMS["temperature 1"], 2) > 0.01


def test_enumeration_catches_penalties_that_do_not_know_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node with the row's history only: right for the root, and for nothing below it."""

    def forgetful(
        logits: Tensor, params: SamplingParams, history: object, tokens: Tensor, above: Tensor, *rest: object
    ):
        return adjust(logits, params, history, tokens, torch.zeros_like(above), *rest)

    monkeypatch.setattr(laws_module, "adjust", forgetful)
    assert distance(ModelDrafter(ToyDraft(DRAFT), Chain(), FixedLength(2)), PARAMS["penalties"], 2) > 0.01


def test_enumeration_catches_a_processor_that_does_not_know_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    right = laws_module.Laws._processed

    def forgetful(self, i: int, tree: TokenTree, node: int, logits: Tensor) -> Tensor:
        return right(self, i, TokenTree(tree.tokens[:, 0]), 0, logits)

    monkeypatch.setattr(laws_module.Laws, "_processed", forgetful)
    assert distance(ModelDrafter(ToyDraft(DRAFT), Chain(), FixedLength(2)), PARAMS["processor"], 2) > 0.01


def test_enumeration_catches_a_stop_token_that_is_early_inside_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """min_new_tokens counted from the round's root instead of from each node."""

    def hasty(logits: Tensor, params: SamplingParams, history: object, tokens: Tensor, above: Tensor, emitted, ends):
        return adjust(logits, params, history, tokens, above, emitted + above.sum(1), ends)

    monkeypatch.setattr(laws_module, "adjust", hasty)
    params = SamplingParams(1.0, sampling=RESIDUAL, max_new_tokens=8, min_new_tokens=3, stop_token_ids=(1,))
    assert distance(ModelDrafter(ToyDraft(DRAFT), Chain(), FixedLength(2)), params, 3) > 0.01


def test_keep_best_refuses_a_tree_with_a_sampled_node() -> None:
    tree = TokenTree(torch.tensor([0]))
    root, one = torch.tensor([[0]]), torch.tensor([[1]])
    tree.add(root, one, torch.tensor([[-1.0]]))
    tree.add(root, one + 1, torch.tensor([[-2.0]]), sampled_from=DRAFT(()).log_softmax(-1)[None, None])
    with pytest.raises(InputError, match="dropping a drawn token is not lossless"):
        tree.keep_best(1)


# --- shared noise

TABLES = torch.randn(40, 32, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.3


def table_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """A finite family of noise: the seed is the number of a table, a table has a row for each position."""
    return TABLES[seeds[:, None], positions]


def plain_by_hand(prompt: Context, table: Tensor, params: SamplingParams, length: int) -> list[int]:
    """argmax(log p + g) token by token, without the engine."""
    tokens = list(prompt)
    for n in range(length):
        p = torch.tensor(law_by_hand(tuple(tokens), params, n), dtype=torch.float64)
        tokens.append(int((p.log() + table[len(tokens)]).argmax()))
        if tokens[-1] in params.stop_token_ids:
            break
    return tokens[len(prompt) :]


NOISY = {
    "temperature 1": {"temperature": 1.0},
    "temperature 0.7 top_p 0.8": {"temperature": 0.7, "top_p": 0.8},
    "top_k 2": {"temperature": 1.0, "top_k": 2},
    "penalties": {"temperature": 0.8, **PENALTIES},
    "min_p 0.4": {"temperature": 1.3, "min_p": 0.4},
    "processor": {"temperature": 1.0, "processor": echo},
}
ENDING = {"stop late": {"temperature": 1.0, "min_new_tokens": 2, "stop_token_ids": (1,)}}


@pytest.mark.parametrize("options", NOISY | ENDING)
@pytest.mark.parametrize("method", ["plain", "lookup", *itertools.product(EXPANSIONS, STOPS)], ids=str)
def test_every_method_gives_the_tokens_of_plain_decoding_under_every_noise(
    method: str | tuple[str, str], options: str
) -> None:
    """40 noise tables, each a row of a ragged batch. Equal tokens for every table: an equal law under any noise."""
    if isinstance(method, str):
        drafter = NoDraft() if method == "plain" else LookupDrafter(3, 2)
    else:
        drafter = ModelDrafter(ToyDraft(DRAFT), EXPANSIONS[method[0]](), STOPS[method[1]]())
    prompts = [(2, 0, 1, 1, 2)[: 1 + seed % 5] for seed in range(40)]
    params = [SamplingParams(seed=seed, max_new_tokens=3 + seed % 3, **(NOISY | ENDING)[options]) for seed in range(40)]
    found, _, _ = run_checked(ToyTarget(TARGET), drafter, prompts, params, noise=table_noise)
    for seed in range(40):
        expected = plain_by_hand(prompts[seed], TABLES[seed], params[seed], params[seed].max_new_tokens)
        assert found[seed] == expected, f"table {seed}"


@pytest.mark.parametrize("sampling", ["noise", "residual"])
@pytest.mark.parametrize("options", NOISY)
def test_a_draft_equal_to_the_target_is_always_accepted(options: str, sampling: str) -> None:
    """The draft sees the context, the noise and the options that the target will see: nothing is off by one."""
    drafter = ModelDrafter(ToyDraft(TARGET), Chain(), FixedLength(3))
    prompts = [(2, 0, 1, 1, 2)[: 1 + seed % 5] for seed in range(20)]
    params = [SamplingParams(seed=seed, max_new_tokens=8, sampling=sampling, **NOISY[options]) for seed in range(20)]
    _, events, _ = run_checked(ToyTarget(TARGET), drafter, prompts, params)
    assert all(event.stats == RoundStats(drafted=3, accepted=3, emitted=4, tested=3, depth=3) for event in events)


@pytest.mark.parametrize("expansion", [Cape((2, 2, 1, 1)), Beam(3)], ids=["cape", "beam"])
@pytest.mark.parametrize(
    "stop", [Entropy(0.3, cap=3), FixedLength(3), Heuristic(2, 4)], ids=["entropy", "fixed", "heuristic"]
)
@pytest.mark.parametrize("sampling", ["noise", "residual"])
def test_rows_get_the_tokens_they_get_alone(sampling: str, stop: StopPolicy, expansion: Expansion) -> None:
    """Ragged prompts, unequal budgets, stops at unequal depths: neighbours change nothing, under both samplings."""
    drafter = ModelDrafter(ToyDraft(DRAFT), expansion, stop)
    prompts = [(2, 0, 1, 1, 2)[: 1 + i % 5] for i in range(12)]
    params = [SamplingParams(1.0, seed=i, max_new_tokens=2 + i, sampling=sampling) for i in range(12)]
    together, _, _ = run_checked(ToyTarget(TARGET), drafter, prompts, params)
    for i in range(12):
        alone, _, _ = run_checked(ToyTarget(TARGET), drafter, [prompts[i]], [params[i]])
        assert together[i] == alone[0], f"row {i}"


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_rows_with_unequal_options_do_not_mix(expansion: str) -> None:
    """Greedy, noise and residual rows, with and without penalties, one batch: each as alone."""
    drafter = ModelDrafter(ToyDraft(DRAFT), EXPANSIONS[expansion](), Heuristic(2, 4))
    prompts = [(2, 0, 1, 1, 2)[: 1 + i % 5] for i in range(12)]
    modes = [{}, {"temperature": 0.9}, {"temperature": 0.9, "sampling": RESIDUAL}]
    extras = [PENALTIES, {}, {"min_new_tokens": 3, "stop_token_ids": (1,)}, {"min_p": 0.3}]
    params = [SamplingParams(seed=i, max_new_tokens=4 + i, **modes[i % 3], **extras[i % 4]) for i in range(12)]
    together, _, _ = run_checked(ToyTarget(TARGET), drafter, prompts, params)
    for i in range(12):
        alone, _, _ = run_checked(ToyTarget(TARGET), drafter, [prompts[i]], [params[i]])
        assert together[i] == alone[0], f"row {i}"


# --- the noise itself


def tail(statistic: float, freedom: int) -> float:
    """P(chi-square with `freedom` degrees > statistic)."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def winners(seeds: Tensor, positions: Tensor, p: Tensor) -> Tensor:
    return (p.log() + gumbel(seeds, positions, p.shape[0])).argmax(-1)


LAW = torch.tensor([0.5, 0.2, 0.1, 0.08, 0.06, 0.03, 0.02, 0.01], dtype=torch.float64)


@pytest.mark.parametrize(
    ("seeds", "positions"),
    [(1, 200_000), (200_000, 1), (500, 400)],
    ids=["one seed", "one position", "500 seeds"],
)
def test_gumbel_max_draws_from_softmax(seeds: int, positions: int) -> None:
    """G-test of 200,000 draws. The noise is a fixed function; had it been drawn afresh, a good one would fail with
    probability 1e-6."""
    chosen = winners(torch.arange(seeds), torch.arange(positions).expand(seeds, -1), LAW)
    count = chosen.flatten().bincount(minlength=8).double()
    assert count.sum() == 200_000
    g = 2 * float(torch.xlogy(count, count / (count.sum() * LAW)).sum())
    assert tail(g, 7) > 1e-6


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1)], ids=["next position", "next seed", "both"])
def test_neighbouring_positions_and_seeds_are_independent(shift: tuple[int, int]) -> None:
    """Chi-square of 200,000 pairs of neighbours against independence; fails with probability 1e-6 for good noise."""
    p = LAW[:4] / LAW[:4].sum()
    chosen = winners(torch.arange(500), torch.arange(402).expand(500, -1), p)
    first = chosen[: 500 - shift[0], : 402 - shift[1]]
    second = chosen[shift[0] :, shift[1] :]
    pairs = (4 * first + second).flatten().bincount(minlength=16).double()
    expected = pairs.sum() * (p[:, None] * p).flatten()
    assert pairs.sum() > 199_000
    assert tail(float(((pairs - expected) ** 2 / expected).sum()), 15) > 1e-6


def test_noise_of_tokens_is_uncorrelated() -> None:
    """Correlation of the noise of each pair of 64 tokens over 20,000 positions: all of 2,016 within 6 standard errors
    (fails with probability below 5e-6 for good noise)."""
    noise = gumbel(torch.tensor([3]), torch.arange(20_000)[None], 64)[0].double()
    r = torch.corrcoef(noise.T) - torch.eye(64)
    assert float(r.abs().max()) < 6 / math.sqrt(20_000)


def test_noise_depends_on_seed_position_and_token_only() -> None:
    seeds, positions = torch.tensor([7, -1, 2**40 + 7]), torch.tensor([[0, 5, 9]] * 3)
    noise = gumbel(seeds, positions, 50)
    assert noise.isfinite().all()
    assert torch.equal(noise, gumbel(seeds, positions, 50))
    assert torch.equal(noise[1:, [2, 0]], gumbel(seeds[1:], positions[1:, [2, 0]], 50))
    assert torch.equal(noise[..., :20], gumbel(seeds, positions, 20))
    flat = noise.flatten(0, 1)
    assert all(not torch.equal(flat[i], flat[j]) for i in range(9) for j in range(i))
