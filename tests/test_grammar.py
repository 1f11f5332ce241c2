"""Structured output: under a constraint every method gives what plain decoding gives, and plain decoding what the grammar
library and transformers' own forward give step by step."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from glidecape.batch import laws as laws_module
from glidecape.batch.grammar import Vocabulary, new_grammar
from glidecape.core.constraint import Constraint
from glidecape.core.noise import gumbel
from glidecape.core.params import RESIDUAL, SamplingParams
from glidecape.core.stats import Stats
from glidecape.core.tree import TokenTree
from glidecape.drafting.drafter import ModelDrafter, NoDraft
from glidecape.drafting.expansions.beam import Beam
from glidecape.drafting.expansions.cape import Cape
from glidecape.drafting.expansions.chain import Chain
from glidecape.drafting.expansions.eagle_tree import EagleTree
from glidecape.drafting.expansions.static_tree import StaticTree
from glidecape.drafting.lookup import LookupDrafter
from glidecape.drafting.medusa import MedusaDrafter
from glidecape.drafting.methods import METHODS, make_drafter
from glidecape.drafting.stop import Entropy, FixedLength
from glidecape.drafts.checkpoint import load_draft
from glidecape.engine.decode import generate
from glidecape.errors import InputError, UnsupportedError
from glidecape.target.target import Target, TargetOutput
from test_command_line import only_sentence, run
from toys import Context, ToyDraft, ToyHeads, ToyTarget, exact_law, random_rule, total_variation

ROOT = Path(__file__).resolve().parents[1]
PAIR = ROOT / "models" / "pysource"


# --- the law, exactly: three tokens "a", "b", "c", and a constraint that is written once more as a set of texts

PATTERN = "(ab?|bc+|ca[ab])+c[ac]{2}"
TEXTS = {
    "".join(t) for n in range(4, 10) for t in itertools.product("abc", repeat=n) if re.fullmatch(PATTERN, "".join(t))
}
RULE, GUESS = random_rule("target"), random_rule("draft", sharpness=1.5)
PROMPT = (2, 0)


class Letters:
    """Three letters, as llguidance takes a tokenizer; the fourth token is the end."""

    eos_token_id, bos_token_id = 3, None
    tokens = (b"a", b"b", b"c", b"<end>")
    special_token_ids = (3,)

    def __call__(self, text: bytes | str) -> list[int]:
        return ["abc".index(letter) for letter in (text if isinstance(text, str) else text.decode())]


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    from llguidance import LLTokenizer, TokenizerWrapper

    known = Vocabulary(LLTokenizer(TokenizerWrapper(Letters()), n_vocab=4), size=3, end=3)
    monkeypatch.setattr(Vocabulary, "of", classmethod(lambda cls, tokenizer, size: known))


def law_by_hand(emitted: Context, params: SamplingParams) -> list[float]:
    """The target's law after some emitted tokens, written without the library, tensors or masks."""
    text = "".join("abc"[t] for t in emitted)
    allowed = [t for t in range(3) if any(whole.startswith(text + "abc"[t]) for whole in TEXTS)]
    logits = RULE(PROMPT + emitted).tolist()
    for token, value in dict(params.logit_bias).items():
        logits[token] += value
    order = sorted(allowed, key=lambda t: -logits[t])
    if params.greedy:
        return [float(t == order[0]) for t in range(3)]
    kept = order[: params.top_k] if params.top_k else order
    weight = torch.tensor([logits[t] / params.temperature for t in kept], dtype=torch.float64).softmax(0).tolist()
    return [weight[kept.index(t)] if t in kept else 0.0 for t in range(3)]


def product_law(params: SamplingParams) -> Counter[Context]:
    law: Counter[Context] = Counter()
    for tokens in itertools.product(range(3), repeat=3):
        p = 1.0
        for n, token in enumerate(tokens):
            p *= p and law_by_hand(tokens[:n], params)[token]
        if p:
            law[tokens] = p
    return law


LAWS = {
    "temperature 1": SamplingParams(1.0, sampling=RESIDUAL, max_new_tokens=8, constraint=Constraint.regex(PATTERN)),
    "top_k 1 of the allowed": SamplingParams(
        0.9, 1, sampling=RESIDUAL, max_new_tokens=8, logit_bias={0: -2.0}, constraint=Constraint.regex(PATTERN)
    ),
    "greedy": SamplingParams(max_new_tokens=8, constraint=Constraint.regex(PATTERN)),
}
DRAFTERS = {
    "plain": NoDraft,
    "lookup": lambda: LookupDrafter(2, 1),
    "chain": lambda: ModelDrafter(ToyDraft(GUESS), Chain(), FixedLength(2)),
    "cape": lambda: ModelDrafter(ToyDraft(GUESS), Cape((2, 2, 1, 1)), FixedLength(2)),
    "cape svip": lambda: ModelDrafter(ToyDraft(GUESS), Cape((0, 2, 1)), Entropy(0.3, 2)),
    "beam": lambda: ModelDrafter(ToyDraft(GUESS), Beam(2), FixedLength(2)),
    "tree": lambda: ModelDrafter(ToyDraft(GUESS), EagleTree(2, 4), FixedLength(2)),
    "static": lambda: ModelDrafter(ToyDraft(GUESS), StaticTree(2, 5, 2), FixedLength(2)),
    "heads": lambda: MedusaDrafter(ToyHeads(GUESS), StaticTree(2, 5, 2), FixedLength(2)),
}


@pytest.mark.parametrize("params", LAWS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_first_three_tokens_have_the_constrained_law(drafter: str, params: str, letters: None) -> None:
    law = exact_law(ToyTarget(RULE), DRAFTERS[drafter](), PROMPT, LAWS[params])  # type: ignore[arg-type]
    assert total_variation(law, product_law(LAWS[params])) <= 1e-12


def test_enumeration_catches_masks_that_do_not_know_the_path(letters: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = laws_module.Laws.masked

    def forgetful(self: Any, tree: TokenTree, logits: Tensor, nodes: Tensor | None = None) -> Tensor:
        return logits + right(self, TokenTree(tree.tokens[:, 0]), torch.zeros_like(logits[:, :1]))

    monkeypatch.setattr(laws_module.Laws, "masked", forgetful)
    with pytest.raises(InputError, match="no token that the constraint allows"):
        exact_law(ToyTarget(RULE), DRAFTERS["chain"](), PROMPT, LAWS["temperature 1"])  # type: ignore[arg-type]


# --- the shipped pair


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(max_length=12)
    size: int = Field(ge=-9, le=999)


class Box(BaseModel):
    model_config = ConfigDict(extra="forbid")
    label: str = Field(pattern="^[a-z]{2,6}$")
    parts: list[Part] = Field(min_length=1, max_length=2)
    open: bool | None


CALL = r"[a-z_]{3,6}\([a-z]{1,5}(, [a-z]{1,5}){1,2}\)"
BOX = Constraint.json_schema(Box.model_json_schema())
CONSTRAINTS = [Constraint.regex(CALL), None, BOX]
TEXT = ["def add", "import os\nclass Queue", "x = "]


@pytest.fixture(scope="module")
def pair() -> Any:
    if not (PAIR / "target" / "config.json").is_file():
        pytest.skip("the shipped pair models/pysource is not in this checkout")
    target = Target.from_pretrained(PAIR / "target", dtype=torch.float32)
    names = {"vanilla": "lm", "glide": "glide", "eagle": "eagle", "medusa": "medusa"}
    return target, {base: load_draft(PAIR / name, target) for base, name in names.items()}


def rows(temperature: float, new: int, **more: Any) -> list[SamplingParams]:
    return [
        SamplingParams(temperature, seed=7 + i, max_new_tokens=new, constraint=c, **more)
        for i, c in enumerate(CONSTRAINTS)
    ]


def step_by_step(model: Any, tokenizer: Any, prompt: list[int], params: SamplingParams) -> list[int]:
    """The slow reference: transformers' forward on the whole text, and a matcher that only ever goes forth."""
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer

    matcher = None
    if params.constraint is not None:
        grammar = (
            LLMatcher.grammar_from_regex(params.constraint.text)
            if params.constraint.kind == "regex"
            else LLMatcher.grammar_from_json_schema(
                params.constraint.text, defaults={"whitespace_pattern": r" |\n[ \t]{0,16}"}
            )
        )
        matcher = LLMatcher(from_tokenizer(tokenizer, n_vocab=model.config.vocab_size), grammar)
    tokens: list[int] = []
    while len(tokens) < params.max_new_tokens:
        known = [*prompt, *tokens]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([known]), use_cache=False).logits[0, -1].float()
        if matcher is not None:
            bits = matcher.compute_bitmask()
            allowed = [bits[t // 8] >> t % 8 & 1 == 1 for t in range(len(scores))]
            scores = scores.masked_fill(~torch.tensor(allowed), float("-inf"))
        if not params.greedy:
            noise = gumbel(torch.tensor([params.seed]), torch.tensor([[len(known)]]), len(scores))[0, 0]
            scores = (scores / params.temperature).log_softmax(-1) + noise
        tokens.append(int(scores.argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
        if matcher is not None:
            assert matcher.consume_token(tokens[-1])
            if matcher.is_stopped():
                break
    return tokens


@pytest.fixture(scope="module")
def truth(pair: Any) -> dict[float, list[list[int]]]:
    from transformers import AutoModelForCausalLM

    target = pair[0]
    model = AutoModelForCausalLM.from_pretrained(PAIR / "target", dtype=torch.float32).eval()
    return {
        temperature: [
            step_by_step(model, target.tokenizer, target.encode(text), params)
            for text, params in zip(TEXT, rows(temperature, 24), strict=True)
        ]
        for temperature in (0.0, 1.0)
    }


# The slow suite has these with a draft LM, too: masks know the tree, not which network drafted it.
WITH_GLIDE_ONLY = {"vanilla+svip", "vanilla+heuristic", "vanilla+cape+svip", "vanilla+beam", "vanilla+beam+svip"}


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.slow) if m in WITH_GLIDE_ONLY else m for m in METHODS]
)
def test_every_method_gives_the_tokens_of_the_slow_reference(method: str, pair: Any, truth: Any) -> None:
    target, drafts = pair
    drafter = make_drafter(method, drafts.get(method.split("+")[0]), length=4, total=24)
    prompts = [target.encode(text) for text in TEXT]
    for temperature, expected in truth.items():
        together = generate(target, prompts, drafter, rows(temperature, 24))
        assert [one.tokens for one in together] == expected, temperature
        assert [one.finish for one in together][:2] == ["stop", "length"]
    alone = generate(target, prompts[0], drafter, rows(1.0, 24)[0])[0]
    assert (alone.tokens, alone.finish) == (truth[1.0][0], "stop")


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_text_that_stopped_is_valid_and_one_that_was_cut_begins_a_valid_one(temperature: float, pair: Any) -> None:
    target, drafts = pair
    drafter = make_drafter("glide+cape", drafts["glide"])
    params = rows(temperature, 80, top_p=0.9, repetition_penalty=1.1, logit_bias={5: 1.0})
    call, _, box = generate(target, TEXT, drafter, params)
    assert call.finish == "stop"
    assert re.fullmatch(CALL, call.text), call.text
    assert box.finish == "stop"
    Box.model_validate_json(box.text, strict=True)
    for most in (3, len(box.tokens) - 1):
        (cut,) = generate(target, TEXT[2], drafter, replace(params[2], max_new_tokens=most))
        assert (cut.finish, cut.tokens) == ("length", box.tokens[:most])
    plain = generate(target, TEXT, None, params)
    assert [one.tokens for one in plain] == [one.tokens for one in (call, _, box)]


def test_json_objects_and_other_patterns_are_valid_whatever_is_drawn(pair: Any) -> None:
    target, drafts = pair
    patterns = [
        r"\d{2}:\d{2}",
        r"(yes|no|maybe)",
        r"#[0-9a-fA-F]{6}",
        r"[^a]{1,8}é{1,3}",
        "日本(語|人)?",
        r"(?i)error \w{1,9}!",
    ]
    constraints = [Constraint.json_object(), *map(Constraint.regex, patterns)]
    params = [
        SamplingParams(1.5 if i else 0.7, seed=i + 2, max_new_tokens=48, constraint=c)
        for i, c in enumerate(constraints)
    ]
    found = generate(target, ["x = "] * len(params), make_drafter("glide+tree", drafts["glide"]), params)
    assert isinstance(json.loads(found[0].text), dict), found[0].text
    for pattern, one in zip(patterns, found[1:], strict=True):
        assert one.finish == "stop"
        assert re.fullmatch(pattern, one.text), one.text


@pytest.mark.parametrize("method", ["glide", "glide+cape+svip", "eagle"])
def test_residual_sampling_is_valid_under_a_constraint(method: str, pair: Any) -> None:
    target, drafts = pair
    drafter = make_drafter(method, drafts[method.split("+")[0]])
    for one in generate(
        target,
        TEXT,
        drafter,
        [SamplingParams(1.0, seed=s, sampling=RESIDUAL, constraint=CONSTRAINTS[0]) for s in range(3)],
    ):
        assert re.fullmatch(CALL, one.text), one.text


def acceptance(target: Target, drafter: Any, temperature: float) -> float:
    stats = Stats()
    params = [
        SamplingParams(temperature, seed=s, max_new_tokens=24, constraint=CONSTRAINTS[2 * (s % 2)]) for s in range(6)
    ]
    generate(target, [TEXT[0], TEXT[2]] * 3, drafter, params, stats)
    return stats.acceptance_length


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", ["glide", "glide+cape"])
def test_a_masked_draft_is_accepted_more_often(
    method: str, temperature: float, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafts = pair
    drafter = make_drafter(method, drafts[method.split("+")[0]])
    masked = acceptance(target, drafter, temperature)
    right = laws_module.Laws.masked
    of_target = lambda self, tree, logits, nodes=None: right(self, tree, logits) if nodes is None else logits  # noqa: E731
    monkeypatch.setattr(laws_module.Laws, "masked", of_target)
    assert masked > acceptance(target, drafter, temperature) + 0.3


# --- where a row ends


def test_the_end_of_text_may_come_where_the_text_may_end(pair: Any) -> None:
    target = pair[0]
    (end,) = target.eos_token_ids
    pushed = {"constraint": Constraint.regex("(ab)+"), "logit_bias": {end: 100.0}, "max_new_tokens": 9}
    (one,) = generate(target, "x", None, SamplingParams(**pushed))
    assert one.text == "ab"
    assert (one.tokens[-1], one.finish) == (end, "stop")
    (one,) = generate(target, "x", None, SamplingParams(ignore_eos=True, **pushed))
    assert re.fullmatch("(ab)+a?", one.text)
    assert (len(one.tokens), one.finish) == (9, "length")


def test_a_model_without_end_of_text_ends_where_nothing_may_follow(pair: Any) -> None:
    target, drafts = pair
    found = target.model.generation_config.eos_token_id, target.config.eos_token_id
    try:
        target.model.generation_config.eos_token_id = target.config.eos_token_id = None
        assert target.eos_token_ids == ()
        for drafter in (None, make_drafter("glide", drafts["glide"])):
            (one,) = generate(target, "x", drafter, SamplingParams(constraint=Constraint.regex("[ab]{3}")))
            assert re.fullmatch("[ab]{3}", one.text)
            assert one.finish == "stop"
    finally:
        target.model.generation_config.eos_token_id, target.config.eos_token_id = found


def test_stop_strings_and_stop_tokens_end_a_row_before(pair: Any) -> None:
    target, drafts = pair
    for drafter in (None, make_drafter("glide+cape", drafts["glide"])):
        (one,) = generate(target, "x", drafter, SamplingParams(constraint=Constraint.regex("abc[d-f]{3}"), stop=("c",)))
        assert (one.text, one.finish) == ("ab", "stop")
        comma = target.encode(",")[0]
        params = SamplingParams(constraint=Constraint.regex("(ab,){9}"), stop_token_ids=(comma,))
        (one,) = generate(target, "x", drafter, params)
        assert re.fullmatch("(ab,){1,9}", one.text)
        assert one.finish == "stop"


def test_rows_that_take_freed_slots_begin_afresh(pair: Any) -> None:
    """Five rows in two slots: a row's grammar is its own."""
    target, drafts = pair
    params = [SamplingParams(1.0, seed=s, max_new_tokens=16, constraint=CONSTRAINTS[s % 3]) for s in range(5)]
    drafter = make_drafter("glide+beam", drafts["glide"])
    together = generate(target, [TEXT[0]] * 5, drafter, params, batch=2)
    alone = [generate(target, TEXT[0], None, own)[0] for own in params]
    assert [one.tokens for one in together] == [one.tokens for one in alone]


def test_a_matcher_that_walks_a_tree_says_what_one_that_goes_straight_says(pair: Any) -> None:
    target = pair[0]
    params = SamplingParams(constraint=BOX)
    chance = random.Random(3)
    text = json.dumps({"label": "abc", "parts": [{"name": "x\\y é", "size": -3}], "open": None}, ensure_ascii=False)
    whole = target.tokenizer.encode(text, add_special_tokens=False)
    walking = new_grammar(params, (), target)
    assert walking is not None
    known = 0
    while known < len(whole) - 1:
        for _ in range(6):
            path = whole[known : known + chance.randrange(5)]
            if chance.random() < 0.5:
                path += [chance.randrange(target.vocab_size) for _ in range(2)]
            straight = new_grammar(params, (), target)
            assert straight is not None
            straight.update(whole[:known])
            assert walking.allowed(tuple(path)) == straight.allowed(tuple(path)), (known, path)
            assert walking.follows(path) == straight.follows(path)
        known += chance.randrange(1, 4)
        walking.update(whole[:known])
    assert walking.complete(whole[known:]) == len(whole) - known


# --- what is refused


SCHEMAS = {
    "not supported": ({"not": {"type": "string"}}, 'Unimplemented keys: \\["not"\\]'),
    "not supported, and told to look away": ({"x-guidance": {"lenient": True}, "not": {}}, "Unimplemented keys"),
    "unknown type": ({"type": "objekt"}, "Invalid type: objekt"),
    "unknown format": ({"type": "string", "format": "mine"}, "Unknown format: mine"),
    "nothing": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "[Uu]nsatisfiable"),
    "elsewhere": ({"$ref": "http://example.org/schema"}, "not present in a registry"),
    "itself": ({"$ref": "#"}, "no text of this vocabulary"),
}
PATTERNS = {
    "(a": "unclosed group",
    "a(?=b)": "look-around",
    r"(a)\1": "backreferences",
    r"\bfoo": "lookarounds",
    r"[^\s\S]": "no text of this vocabulary",
    "": "no text but the empty one",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_that_would_not_be_kept_are_refused(name: str, pair: Any) -> None:
    schema, message = SCHEMAS[name]
    with pytest.raises(InputError, match=message) as refusal:
        generate(pair[0], "x", None, SamplingParams(constraint=Constraint.json_schema(schema)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_that_would_not_be_kept_are_refused(pattern: str, pair: Any) -> None:
    with pytest.raises(InputError, match=PATTERNS[pattern]) as refusal:
        generate(pair[0], "x", None, SamplingParams(constraint=Constraint.regex(pattern)))
    assert "\n" not in str(refusal.value)


def test_constraints_that_are_none_are_refused() -> None:
    for wrong, message in (
        ("{", "is not JSON"),
        ("3", "is an object"),
        ("false", "is an object"),
        ({"a": {1, 2}}, "is not JSON"),
    ):
        with pytest.raises(InputError, match=message):
            Constraint.json_schema(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown kind of constraint 'xml'"):
        Constraint("xml")
    with pytest.raises(InputError, match="min_new_tokens might leave none"):
        SamplingParams(min_new_tokens=2, constraint=Constraint.json_object())
    with pytest.raises(InputError, match="processor might leave none"):
        SamplingParams(processor=lambda tokens, logits: logits, constraint=Constraint.json_object())


def test_vocabularies_that_are_not_made_of_bytes_are_refused(pair: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(UnsupportedError, match="tokens are bytes"):
        Vocabulary.of(words, 2)
    with pytest.raises(UnsupportedError, match=r"tokens are bytes.*is no token"):
        Vocabulary.of(pair[0].tokenizer, 100)
    with pytest.raises(InputError, match="has no tokenizer"):
        Vocabulary.of(None, 100)
    with pytest.raises(UnsupportedError, match="tokens are bytes"):
        Vocabulary.of(SimpleNamespace(), 100)


def test_a_target_that_leaves_no_token_is_an_error(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's own code may forbid tokens by logits of -inf."""
    whole = pair[0].forward
    monkeypatch.setattr(pair[0], "forward", lambda *a, **k: TargetOutput(whole(*a, **k).logits - float("inf")))
    params = SamplingParams(constraint=Constraint.regex("a{2}b"))
    with pytest.raises(InputError, match="no token that the constraint allows has a finite logit"):
        generate(pair[0], "x", None, params)


def test_without_the_library_a_constraint_is_refused_and_nothing_else_is(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert generate(pair[0], "x", None, SamplingParams(max_new_tokens=2))[0].tokens
    with pytest.raises(InputError, match=r"pip install 'glidecape\[grammar\]'"):
        generate(pair[0], "x", None, SamplingParams(max_new_tokens=2, constraint=Constraint.json_object()))


# --- the command line


def test_generate_takes_constraints(pair: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "box.json").write_text(BOX.text)
    (tmp_path / "torn.json").write_text('{"type": ')
    words = [
        "generate",
        "--target",
        PAIR / "target",
        "--draft",
        PAIR / "glide",
        "-p",
        "x = ",
        "--dtype",
        "float32",
        "--json",
    ]
    for more, check in (
        (["--regex", CALL], lambda text: re.fullmatch(CALL, text)),
        (["--json-schema", tmp_path / "box.json", "--temperature", 1], Box.model_validate_json),
        (
            ["--json-object", "--temperature", 0.7, "--seed", 2],
            lambda text: isinstance(json.loads(text), dict),
        ),
    ):
        code, out, _ = run(capfd, monkeypatch, *words, *more)
        assert code == 0
        assert json.loads(out)["finish"] == "stop"
        assert check(json.loads(out)["text"])
    for more, message in (
        (["--regex", "(a"], "the regex cannot be used: .*unclosed group"),
        (["--regex", "a", "--json-object"], "a text has one constraint"),
        (["--json-schema", tmp_path / "no.json"], "cannot be read"),
        (["--json-schema", tmp_path / "torn.json"], "is not JSON"),
        (["--json-object", "--min-new-tokens", 3], "a constraint decides"),
    ):
        only_sentence(*run(capfd, monkeypatch, *words, *more)[::2], message)


@pytest.mark.parametrize("temperature", [0, 1])
def test_certify_checks_a_constraint(
    temperature: int, pair: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("def add")
    words = ["certify", "--target", PAIR / "target", "--draft", PAIR / "glide", "--dtype", "float32", "--json"]
    words += ["--prompts", tmp_path / "p.txt", "--max-new-tokens", 24, "--temperature", temperature]
    words += ["--methods", "lookup,glide+cape", "--regex", CALL]
    code, out, _ = run(capfd, monkeypatch, *words)
    found = json.loads(out)
    assert (code, found["verdict"], len(found["findings"])) == (0, "equal", 3)
    right = laws_module.Laws.masked

    def worse(self: Any, tree: TokenTree, logits: Tensor, nodes: Tensor | None = None) -> Tensor:
        """The second-best token for the first one, below the root."""
        made = right(self, tree, logits, nodes)
        best = made.topk(2)
        if nodes is None and tree.nodes > 1:
            choice = best.values[:, 1:, 1:].isfinite()
            made[:, 1:].scatter_(2, best.indices[:, 1:, :1], best.values[:, 1:, :1].masked_fill(choice, float("-inf")))
        return made

    monkeypatch.setattr(laws_module.Laws, "masked", worse)
    code, out, _ = run(capfd, monkeypatch, *words)
    assert (code, json.loads(out)["verdict"]) == (1, "bug")
