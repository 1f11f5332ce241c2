"""Structured output of the server on the shipped pair, and what a constraint that fails half-way does to other rows."""

from __future__ import annotations

import functools
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from glidecape.batch.row import new_row
from glidecape.core.constraint import Constraint
from glidecape.core.params import SamplingParams
from glidecape.engine.decode import generate
from glidecape.engine.steady import SteadyEngine
from glidecape.errors import InputError
from glidecape.serve.prompts import plain_chat
from glidecape.target.target import TargetOutput
from serving import PROMPTS, SAY, SCHEMA, Point, Running, alone, wait_for

MODELS = Path(__file__).parents[1] / "models" / "pysource"
CALL = r"[a-z]{3,9}\([a-z]{1,8}\)"


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint.json_object()),
        ({"response_format": SCHEMA}, Constraint.json_schema(Point.model_json_schema())),
        ({"structured_outputs": {"regex": CALL}}, Constraint.regex(CALL)),
    ],
)
def test_a_constrained_answer_is_plain_decoding_s_under_the_same_constraint(
    running, target, fields, constraint
) -> None:
    greedy, drawn = {"temperature": 0.0}, {"temperature": 1.0, "seed": 3}
    expected = alone(target, PROMPTS[0], max_new_tokens=24, constraint=constraint, **greedy)
    assert running.complete(PROMPTS[0], max_tokens=24, **greedy, **fields) == expected
    expected = alone(target, plain_chat(SAY), max_new_tokens=24, constraint=constraint, **drawn)
    body = {"messages": SAY, "max_tokens": 24, **drawn, **fields}
    assert running.ask("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"] == expected
    if constraint is not None and constraint.kind == "regex":
        assert re.fullmatch(CALL, expected)


def test_the_shadow_check_knows_constraints(target, drafter) -> None:
    one = Running(target, drafter, shadow=1.0)
    one.complete(PROMPTS[0], max_tokens=32, temperature=1, seed=1, structured_outputs={"regex": CALL})
    wait_for(lambda: one.metric("shadow_requests_total", result="equal") == 1)
    one.close()


def schema(text) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": text}}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (schema({"type": "nothing"}), "response_format.json_schema.schema", "the json schema cannot be used"),
        (schema({"type": "object", "not": {}}), "response_format.json_schema.schema", "cannot be used"),
        (schema({"const": 1, "enum": [2]}), "response_format.json_schema.schema", "cannot be used"),
        (schema("{}"), "response_format.json_schema.schema", "dictionary"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "the regex cannot be used"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "no text but the empty one"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_object'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema belongs to"),
        ({"response_format": schema({})["response_format"] | {"type": "text"}}, "response_format", "both"),
        ({"guided_regex": "a"}, "guided_regex", 'write "structured_outputs": {"regex"'),
        ({"guided_json": {}}, "guided_json", "response_format"),
        ({"structured_outputs": {"choice": ["a"]}}, None, "regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", '"yes|no"'),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, None, "give one of them"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, None, "min_tokens cannot be kept"),
    ],
)
def test_a_constraint_that_cannot_be_used_is_a_400_that_names_the_field(running, fields, param, words) -> None:
    for path, body in (("/v1/chat/completions", {"messages": SAY}), ("/v1/completions", {"prompt": "x"})):
        status, answer, _ = running.ask(path, body | fields)
        assert status == 400, answer
        assert words in answer["error"]["message"]
        assert param is None or answer["error"]["param"] == param


def test_without_the_library_a_400_says_what_to_install(running, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    body = {"prompt": "x", "max_tokens": 2}
    assert running.ask("/v1/completions", body)[0] == 200
    status, answer, _ = running.ask("/v1/completions", body | {"response_format": {"type": "json_object"}})
    assert status == 400
    assert answer["error"]["message"] == "a constraint needs llguidance: pip install 'glidecape[grammar]'"
    assert answer["error"]["param"] == "response_format"


# --- a constraint that fails in the middle of a row


def test_a_limit_of_the_grammar_library_ends_that_answer_alone(running, target, monkeypatch) -> None:
    """The limit is lower than usual, so that a small pattern, whose automaton grows with every letter, reaches it."""
    import llguidance

    limits = functools.partial(llguidance.LLParserLimits, max_lexer_states=100)
    monkeypatch.setattr(llguidance, "LLParserLimits", limits)
    growing = {"structured_outputs": {"regex": r"[a-z]{3}.*a.{30}b"}}

    def ask(i):
        body = {"prompt": PROMPTS[i], "max_tokens": 40, "temperature": 0, "stream": i == 2} | (
            growing if i == 2 else {}
        )
        return running.ask("/v1/completions", body)[1]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    *pieces, error = [json.loads(line.removeprefix("data: ")) for line in answers[2].strip().split("\n\n")]
    assert "too complex for llguidance" in error["error"]["message"]
    assert error["error"]["type"] == "invalid_request_error"
    assert "".join(piece["choices"][0]["text"] for piece in pieces)
    for i in (0, 1, 3):
        assert answers[i]["choices"][0]["text"] == alone(target, PROMPTS[i], max_new_tokens=40)


def run(target, drafter, rows) -> SteadyEngine:
    engine = SteadyEngine(target, drafter, 3, 100, 60)
    for row in rows:
        engine.submit(row)
    while not engine.idle:
        engine.step()
    return engine


def work(count: int) -> list[SamplingParams]:
    constraints = (Constraint.regex(CALL), Constraint.json_schema(Point.model_json_schema()), None)
    return [
        SamplingParams(float(i % 2), seed=i, max_new_tokens=24, constraint=constraints[i % 3]) for i in range(count)
    ]


def test_a_target_that_leaves_no_token_ends_that_row_alone(target, drafter, monkeypatch) -> None:
    """A model's own code may forbid tokens by logits of -inf: here it writes no digit, and a row is to write nothing else."""
    whole = target.forward
    digits = [token for token in range(target.vocab_size) if target.tokenizer.decode([token])[:1].isdigit()]
    off = torch.zeros(target.vocab_size).index_fill(0, torch.tensor(digits), float("-inf"))
    monkeypatch.setattr(target, "forward", lambda *a, **k: TargetOutput(whole(*a, **k).logits + off))
    params = [*work(4), SamplingParams(max_new_tokens=40, constraint=Constraint.regex("[0-9]{3}"))]
    ids = [target.encode(prompt) for prompt in PROMPTS[:5]]
    rows = [new_row(i, prompt, own, target) for i, (prompt, own) in enumerate(zip(ids, params, strict=True))]
    engine = run(target, drafter, rows)
    assert [(row.index, type(error)) for row, error in engine.failed] == [(4, InputError)]
    for row, prompt, own in zip(rows[:4], ids, params, strict=False):
        assert row.new_tokens == generate(target, prompt, None, own)[0].tokens


def test_rows_with_a_constraint_survive_faults_that_leave_their_matcher_in_error(target, drafter, monkeypatch) -> None:
    params, ids = work(4), [target.encode(prompt) for prompt in PROMPTS[:4]]
    rows = [new_row(i, prompt, own, target) for i, (prompt, own) in enumerate(zip(ids, params, strict=True))]
    whole, calls = drafter.propose, []

    def propose(batch):
        calls.append(len(batch.rows))
        made = whole(batch)
        if len(calls) % 3 == 0:
            for row in batch.rows:
                if row.grammar is not None:
                    row.grammar._matcher.consume_token(row.grammar.vocabulary.end)
                    assert row.grammar._matcher.is_error() or row.grammar._matcher.is_stopped()
            raise RuntimeError("a bug of a draft")
        return made

    monkeypatch.setattr(drafter, "propose", propose)
    engine = run(target, drafter, rows)
    monkeypatch.undo()
    assert engine.draft_failures > 0
    assert not engine.failed
    for row, prompt, own in zip(rows, ids, params, strict=True):
        assert row.new_tokens == generate(target, prompt, None, own)[0].tokens


# --- constraints that are meant to do harm


def nested(depth: int) -> dict:
    return functools.reduce(lambda inner, _: {"type": "object", "properties": {"a": inner}}, range(depth), {})


HOSTILE = {
    "never read": {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (9973, 9967, 9949, 9941)]},
    "too much memory": {"allOf": [{"type": "string", "pattern": f"^.*a.{{{k}}}b.*$"} for k in range(5, 25)]},
    "a cycle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "nothing": {"type": "array", "items": {"enum": []}, "minItems": 1},
    "far away": {"$ref": "http://127.0.0.1:1/schema"},
    "a file": {"$ref": "file:///etc/passwd"},
    "deep": nested(150),
    "huge": {"enum": [f"word{i}" for i in range(20_000)]},
}
PATTERNS = ["a{1000000000}", "(" * 5000 + "a" + ")" * 5000, "[a-z]*" * 3000, r"[^\s\S]", "a" * 200_000]


def test_hostile_constraints_are_refused_and_other_requests_go_on(running, target) -> None:
    """The first takes minutes to read; requests without a constraint are answered meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        never = pool.submit(
            running.ask, "/v1/completions", {"prompt": "x", "max_tokens": 2} | schema(HOSTILE["never read"])
        )
        expected, answered = alone(target, PROMPTS[0], max_new_tokens=8), 0
        while not never.done():
            assert running.complete(PROMPTS[0], max_tokens=8) == expected
            answered += 1
        status, body, _ = never.result()
    assert (status, body["error"]["param"]) == (400, "response_format.json_schema.schema")
    assert "cannot be read in 5 seconds and 256 MiB" in body["error"]["message"]
    assert answered > 5


@pytest.mark.parametrize("fields", [*(schema(one) for name, one in HOSTILE.items() if name != "never read"),
                                    *({"structured_outputs": {"regex": one}} for one in PATTERNS)])  # fmt: skip
def test_hostile_constraints_are_a_400(running, fields) -> None:
    status, body, _ = running.ask("/v1/completions", {"prompt": "x", "max_tokens": 2, "temperature": 0} | fields)
    assert status == 400, body
    assert len(body["error"]["message"]) < 500


def test_many_answers_under_a_constraint_that_is_slow_to_read_are_refused(running, monkeypatch) -> None:
    monkeypatch.setattr(running.service.constraints, "_ask", lambda constraint: 0.5)
    slow = {"structured_outputs": {"regex": "[a-f]{2}"}, "prompt": "x", "max_tokens": 1}
    assert running.ask("/v1/completions", slow | {"n": 2})[0] == 200
    status, body, _ = running.ask("/v1/completions", slow | {"n": 16})
    assert status == 400
    assert "takes 8.0 seconds to read for 16 answers" in body["error"]["message"]
