"""`glidecape doctor`: each cause is planted in a tiny pair and found, alone; a healthy pair has none."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from glidecape import SamplingParams, Target, generate
from glidecape.bench.suites import read_suites
from glidecape.costmodel import Prices
from glidecape.costs import measured_prices
from glidecape.doctor.acceptance import Acceptance
from glidecape.doctor.examine import Diagnosis, _cost, _while_decoding, examine
from glidecape.doctor.origin import Figures, Origin
from glidecape.drafts.card import CARD, WEIGHTS
from glidecape.drafts.checkpoint import save_network
from glidecape.drafts.glide.adapter import GlideDraft
from glidecape.drafts.glide.config import GlideConfig
from glidecape.drafts.glide.network import GlideModel
from glidecape.errors import CheckpointError
from glidecape.target.packages import FOLDER
from test_command_line import run

MODELS = Path(__file__).parents[1] / "models" / "pysource"
CHEAP = Prices((1,), (1,), (1, 31), (((1.0, 1.3),),), ((0.05,),), ((0.02,),))
DEAR = Prices((1,), (1,), (1, 31), (((1.0, 1.3),),), ((1.5,),), ((0.1,),))
STEEP = Prices((1,), (1,), (1, 31), (((1.0, 10.0),),), ((0.01,),), ((0.0,),))
USUAL = Prices((1,), (1,), (1, 31), (((1.0, 3.4),),), ((0.12,),), ((0.1,),))
MORE = [1.3] * 8  # more than can be accepted, so that any acceptance now is below it
PROMPTS = ("def load_table(table, size=0):\n", "def save_index(index, size=1):\n    for", "def merge_frame(frame")
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
OTHER = "0" * 64


@pytest.fixture(scope="module")
def target(world) -> Target:
    return Target.from_pretrained(world["target"], dtype=torch.float32)


def diagnosis(target: Target, folder: Path, prices: Prices = CHEAP, params: SamplingParams = GREEDY) -> Diagnosis:
    return examine(target, folder, [target.encode(text) for text in PROMPTS], params, lambda _: [prices, prices])


def causes(found: Diagnosis) -> set[str]:
    return {row.cause for row in found.findings}


@pytest.fixture(scope="module")
def before(target, world) -> set[str]:
    """What is found in the tiny pair as it is: it has learned for seconds only."""
    found = causes(diagnosis(target, world["glide"]))
    assert found <= {"acceptance in training", "length of a draft"}
    return found


def planted(source: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a draft whose description is changed."""
    folder.mkdir()
    with safe_open(source / WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        card = json.loads(file.metadata()["glidecape"])
    change(card)
    save_file(tensors, folder / WEIGHTS, {"glidecape": json.dumps(card)})
    return folder


def test_a_healthy_pair_has_no_finding(tmp_path) -> None:
    """The shipped one, with what training stores since."""
    target = Target.from_pretrained(MODELS / "target", dtype=torch.float32)
    trained = {"length": 512, "dtype": "float32", "chat_template": None}
    folder = planted(MODELS / "glide", tmp_path / "glide", lambda card: card["figures"].update(trained_on=trained))
    prompts = [target.encode(prompt.turns[0]) for prompt in read_suites(["own:4"], None, False)[0].prompts[:4]]
    params = SamplingParams(max_new_tokens=48, ignore_eos=True)
    found = examine(target, folder, prompts, params, lambda _: [USUAL, USUAL])
    assert [row.verdict for row in found.rows] == ["fine"] * len(found.rows), found.rows
    assert found.sentence.endswith("there is nothing to change.")
    assert found.length is not None
    assert found.length >= 4
    assert f"Expect {found.speedup:.2f} times plain decoding from drafts of {found.length} tokens" in found.sentence


def test_what_training_stores_is_compared_and_what_it_did_not_store_is_said(target, world, tmp_path) -> None:
    found = {row.cause: row for row in diagnosis(target, world["glide"]).rows}
    for cause in ("chat template", "dtype", "context", "weights of the target"):
        assert found[cause].verdict == "fine", found[cause]
    old = planted(world["glide"], tmp_path / "old", lambda card: card.update(figures={}))
    found = {row.cause: row for row in diagnosis(target, old).rows}
    for cause in ("chat template", "dtype", "context", "acceptance in training"):
        assert found[cause].verdict == "unknown", found[cause]
        assert "does not" in found[cause].found


@pytest.mark.parametrize(
    ("cause", "change"),
    [
        ("weights of the target", lambda card: card["fingerprint"].update(weights=OTHER)),
        ("context", lambda card: card["figures"]["trained_on"].update(length=24)),
        ("acceptance on this text", lambda card: card["figures"].update(greedy_acceptance_by_lag=MORE)),
        ("acceptance in training", lambda card: card["figures"].update(greedy_acceptance_by_lag=[0.1] * 8)),
        ("chat template", lambda card: card["figures"]["trained_on"].update(chat_template=OTHER)),
    ],
)
def test_a_cause_that_the_card_tells(target, world, before, tmp_path, cause, change) -> None:
    found = diagnosis(target, planted(world["glide"], tmp_path / "draft", change))
    assert cause in causes(found)
    if cause != "acceptance on this text":  # a change there says what was accepted in training, too
        assert causes(found) - {"acceptance in training"} == (before | {cause}) - {"acceptance in training"}


@pytest.mark.parametrize(("part", "cause"), [("shape", "shape of the target"), ("tokenizer", "tokenizer")])
def test_a_draft_of_another_target_is_told_and_not_measured(target, world, tmp_path, part, cause) -> None:
    folder = planted(world["glide"], tmp_path / "draft", lambda card: card["fingerprint"].update({part: OTHER}))
    found = diagnosis(target, folder)
    assert causes(found) == {cause}
    assert (found.costs, found.decoded) == (None, [])
    assert found.sentence == (
        "This draft cannot be used with this target: train a draft for this target with glidecape train."
    )


def test_a_draft_lm_of_another_tokenizer_is_told(target, world, tmp_path) -> None:
    folder = Path(shutil.copytree(world["lm"], tmp_path / "lm"))
    assert "tokenizer" not in causes(diagnosis(target, folder))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    one, other = [word for word, number in vocab.items() if number in (300, 301)]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    path.write_text(json.dumps(tokenizer))
    found = diagnosis(target, folder)
    assert causes(found) == {"tokenizer"}
    assert "another tokenizer" in found.rows[-1].found


def test_a_chat_template_that_has_changed_since(target, world, before, monkeypatch) -> None:
    monkeypatch.setattr(target.tokenizer, "chat_template", "{{ messages }}")
    found = diagnosis(target, world["glide"])
    assert causes(found) == before | {"chat template"}
    assert (
        next(row for row in found.rows if row.cause == "chat template").found
        == "another one: none in training, one now"
    )


def test_another_dtype_is_a_cause_only_where_less_is_accepted(target, world, before, tmp_path) -> None:
    def other(card: dict[str, Any]) -> None:
        card["figures"]["trained_on"]["dtype"] = "bfloat16"

    def worse(card: dict[str, Any]) -> None:
        other(card)
        card["figures"]["greedy_acceptance_by_lag"] = MORE

    mild = diagnosis(target, planted(world["glide"], tmp_path / "mild", other))
    assert causes(mild) == before
    row = next(
        row for row in diagnosis(target, planted(world["glide"], tmp_path / "bad", worse)).rows if row.cause == "dtype"
    )
    assert (row.found, row.change) == ("float32; in training bfloat16", "load the target with --dtype bfloat16")


def test_a_reduced_vocabulary_that_lacks_what_is_written(target, tmp_path) -> None:
    made = generate(target, [target.encode(text) for text in PROMPTS], params=GREEDY)
    written = Counter(token for one in made for token in one.tokens)
    (usual, _), *_ = written.most_common(1)
    for name, kept, cause in (("most", sorted(written.keys() - {usual}), True), ("all", sorted(written), False)):
        config = GlideConfig.for_target(target, draft_vocab=len(kept))
        module = GlideModel.new(config, target, torch.tensor(kept))
        save_network(tmp_path / name, module, target, "", {}, torch.float32)
        found = diagnosis(target, tmp_path / name)
        assert ("vocabulary of the draft" in causes(found)) == cause


def test_a_loop_that_shows_the_draft_something_else_than_training(target, world, before, monkeypatch) -> None:
    """Decoding reads wrong tokens; teacher-forced nothing is wrong."""
    hidden = GlideDraft.hidden

    def wrong(self, queries, own, target_cache):
        return hidden(self, replace(queries, tokens=(queries.tokens + 7) % target.vocab_size), own, target_cache)

    monkeypatch.setattr(GlideDraft, "hidden", wrong)
    found = diagnosis(target, world["glide"])
    assert "acceptance while decoding" in causes(found)
    assert "acceptance on this text" not in causes(found)
    row = next(row for row in found.rows if row.cause == "acceptance while decoding")
    assert "teacher-forced on the same text" in row.found


def test_a_draft_that_costs_too_much(target, world, before) -> None:
    found = diagnosis(target, world["glide"], DEAR)
    assert causes(found) - before == {"cost of drafting", "length of a draft"} - before
    findings = [row.is_finding for row in found.rows]
    assert findings == sorted(findings, reverse=True)  # what is to be changed comes first
    (cost,) = (row for row in found.rows if row.cause == "cost of drafting")
    assert cost.change.startswith("give --compile on")
    half = SimpleNamespace(compiled=None, dtype=torch.float16, device=torch.device("cpu"))
    assert _cost(DEAR.at(1, 9), half).change.startswith("give --dtype float32 --compile on")
    assert (found.length, found.speedup) == (0, 1.0)
    assert found.sentence.startswith("Expect no gain over plain decoding")


def test_a_usual_length_that_is_far_from_the_best(target, world, before) -> None:
    found = diagnosis(target, world["glide"], STEEP)
    assert causes(found) == before | {"length of a draft"}
    assert found.length is not None
    assert found.length < 5


def test_sampled_acceptance_is_the_overlap(target, world) -> None:
    found = diagnosis(target, world["glide"], params=SamplingParams(1.0, seed=3, max_new_tokens=48, ignore_eos=True))
    assert found.training == Origin.of(world["glide"]).figures.overlap_by_lag
    assert len(found.forced) == len(found.training)


@pytest.mark.parametrize("kind", ["eagle", "medusa", "lm"])
def test_every_kind_of_draft_is_examined(target, world, kind) -> None:
    found = diagnosis(target, world[kind])
    assert found.forced
    assert sum(count for _, count in found.decoded) > 40
    # The LM learned its text by heart, and accepts less of what the prompts lead to.
    assert ("acceptance while decoding" in causes(found)) == (kind == "lm")


def test_a_draft_of_which_hardly_anything_is_accepted_is_not_fine() -> None:
    nothing = Origin("glide", None, Figures())
    for alpha, verdict in ((0.03, "cause"), (0.19, "cause"), (0.3, "fine")):
        found = Acceptance([alpha] * 8, [(alpha, 100)], alpha, [])
        assert _while_decoding(nothing, found, 0.0).verdict == verdict


def test_figures_that_are_none_are_refused(target, world, tmp_path) -> None:
    folder = planted(world["glide"], tmp_path / "draft", lambda card: card["figures"].update(alpha_greedy="high"))
    with pytest.raises(CheckpointError, match="figures that cannot be read: alpha_greedy"):
        diagnosis(target, folder)
    lm = Path(shutil.copytree(world["lm"], tmp_path / "lm"))
    (lm / CARD).write_text("{")
    with pytest.raises(CheckpointError, match="is no card of a draft"):
        diagnosis(target, lm)


def test_the_command_prints_a_table_or_json(world, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "kept"))
    monkeypatch.setattr(measured_prices, "__defaults__", (0.0, (1,), lambda _: None))
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    words = [
        "doctor",
        world["target"],
        "--draft",
        world["glide"],
        "--dtype",
        "float32",
        "--prompts",
        tmp_path / "p.jsonl",
    ]
    code, out, err = run(capfd, monkeypatch, *words, "--max-new-tokens", 24)
    assert code == 0
    assert "measuring what a round costs" in err
    for word in ("why a pair is slow", "cost of drafting", "acceptance by depth", "Expect "):
        assert word in out
    code, out, err = run(capfd, monkeypatch, *words, "--json", "--output", tmp_path / "why.json", "--limit", 2)
    assert (code, out, err) == (0, "", "")
    found = json.loads((tmp_path / "why.json").read_text())
    assert (found["prompts"], found["dtype"]) == (2, "float32")
    assert {row["verdict"] for row in found["rows"]} <= {"cause", "fine", "unknown"}
    assert found["costs"]["verification"][0] == 1.0
    code, _, err = run(capfd, monkeypatch, "doctor", world["target"])
    assert (code, err) == (2, "error: there is no draft to examine: name its folder with --draft\n")
