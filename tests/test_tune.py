"""`glidecape tune`: prices shown and measured again, the lengths that follow from them, and acceptance stored with a draft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from glidecape import SamplingParams, Target, generate, load_draft, make_drafter
from glidecape.costmodel import Prices, RoundCosts, chain_speedup
from glidecape.drafting.auto.acceptance import DRAFTED
from glidecape.drafting.auto.drafter import AutoDrafter
from glidecape.drafting.auto.stored import FILE, store
from glidecape.errors import CheckpointError, InputError
from glidecape.target.packages import FOLDER
from glidecape.tune import ACCEPTANCE, learn, lengths_of
from test_command_line import run

PROMPTS = ("def load_table(table, size=0):\n", "def save_index(index, size=1):\n    for", "def merge_frame(frame")


@pytest.fixture(scope="module")
def target(world) -> Target:
    return Target.from_pretrained(world["target"], dtype=torch.float32)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch) -> Path:
    """Prices in a folder of their own, measured in a moment."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "kept"))
    monkeypatch.setattr("glidecape.costs.ROWS", (1,))
    return tmp_path / "kept"


@pytest.fixture
def draft(world, tmp_path: Path) -> Path:
    """A copy of the draft, whose folder may be written to."""
    return Path(shutil.copytree(world["glide"], tmp_path / "draft"))


def test_the_best_fixed_lengths_are_those_of_the_cost_model() -> None:
    prices = Prices(
        (1, 4), (64, 512), (1, 9), (((1.0, 1.8),) * 2, ((1.5, 6.3),) * 2), ((0.1,) * 2, (0.6,) * 2), ((0.05,) * 2,) * 2
    )
    found = {(n.rows, n.copied, n.acceptance): n for n in lengths_of(prices, 6)}
    assert len(found) == 2 * 2 * len(ACCEPTANCE)
    for (rows, copied, acceptance), one in found.items():
        costs = prices.at(rows, 64)
        if copied:
            costs = RoundCosts(0.0, costs.sizes, costs.verification)
        for length in range(7):
            assert chain_speedup(costs, [acceptance] * length) <= one.speedup + 1e-3
        assert chain_speedup(costs, [acceptance] * one.length) == pytest.approx(one.speedup, abs=1e-3)
    assert found[1, False, 0.9].length > found[1, False, 0.5].length > 0
    assert found[4, False, 0.5].length == 0  # a draft step is 0.4 of a round there, and a node another 0.4
    assert all(found[rows, True, a].speedup >= found[rows, False, a].speedup for rows in (1, 4) for a in ACCEPTANCE)


def test_prices_are_shown_with_their_file_and_measured_again_when_asked(world, quick, monkeypatch, capfd) -> None:
    words = ["tune", world["target"], "--draft", world["glide"], "--dtype", "float32"]
    code, out, err = run(capfd, monkeypatch, *words)
    (path,) = (quick / "packages").glob("prices-*.json")
    assert code == 0
    assert "measuring what a round costs" in err
    for word in (
        "what a round costs, greedily",
        "what a round costs, at T=1",
        "drafted, 1 row",
        "copied, 1 row",
        "v(25)",
    ):
        assert word in out
    assert f"prices: measured now, kept in {path}" in out
    kept = path.read_text()
    first = json.loads(run(capfd, monkeypatch, *words, "--json")[1])
    assert (first["measured_now"], first["file"]) == (False, str(path))
    assert path.read_text() == kept
    assert [first[heat]["verify"] for heat in ("greedy", "t1")] == [one["verify"] for one in json.loads(kept)]
    again = json.loads(run(capfd, monkeypatch, *words, "--json", "--again")[1])
    assert again["measured_now"]
    assert path.read_text() != kept
    assert {n["acceptance"] for n in again["greedy"]["lengths"]} == set(ACCEPTANCE)


def test_without_a_draft_only_copies_are_priced(world, quick, monkeypatch, capfd) -> None:
    code, out, _ = run(capfd, monkeypatch, "tune", world["target"], "--dtype", "float32", "--json")
    found = json.loads(out)
    assert (code, found["draft"]) == (0, None)
    assert {n["copied"] for n in found["greedy"]["lengths"]} == {True}
    assert found["greedy"]["draft"] == [[0.0] * len(found["greedy"]["contexts"])]


def test_what_was_learned_is_stored_with_the_draft_and_begun_with(
    target, world, draft, quick, monkeypatch, capfd, tmp_path
) -> None:
    (tmp_path / "p.txt").write_text(PROMPTS[0])
    words = ["tune", world["target"], "--draft", draft, "--dtype", "float32", "--store"]
    code, out, _ = run(capfd, monkeypatch, *words, "--json")
    assert code == 0
    stored = json.loads((draft / FILE).read_text())
    assert json.loads(out)["learned_from"] == stored["observations"]
    assert min(stored["observations"]) >= 200
    begun = make_drafter("glide+auto", load_draft(draft, target))
    assert isinstance(begun, AutoDrafter)
    assert begun.accepts.weights.tolist() == stored["drafted"]
    assert not np.allclose(begun.accepts.weights, DRAFTED)
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    ids = [target.encode(text) for text in PROMPTS]
    plain = [one.tokens for one in generate(target, ids, None, params)]
    assert [one.tokens for one in generate(target, ids, begun, params)] == plain
    code, _, err = run(capfd, monkeypatch, *words, "--prompts", tmp_path / "p.txt", "--max-new-tokens", 4)
    assert (code, json.loads((draft / FILE).read_text())) == (2, stored)
    assert "and 200 is the least: give more --prompts" in err


@pytest.fixture(scope="module")
def learned(target, world, tmp_path_factory) -> str:
    folder = Path(shutil.copytree(world["glide"], tmp_path_factory.mktemp("learned") / "draft"))
    loaded = load_draft(folder, target)
    drafter = make_drafter("glide+auto", loaded)
    assert isinstance(drafter, AutoDrafter)
    learn(target, drafter, [target.encode(text) for text in PROMPTS], 60)
    return store(drafter, loaded)[0].read_text()


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: "{",
        lambda found: "[]",
        lambda found: json.dumps(found | {"format": 2}),
        lambda found: json.dumps(found | {"more": 1}),
        lambda found: json.dumps(found | {"copied": found["copied"][:1]}),
        lambda found: json.dumps(found | {"drafted": [[*one[:-1], "1"] for one in found["drafted"]]}),
        lambda found: json.dumps(found | {"drafted": [[*one[:-1], float("nan")] for one in found["drafted"]]}),
    ],
    ids=["torn", "a list", "another version", "a field more", "a row less", "text", "no number"],
)
def test_a_damaged_file_is_refused_where_auto_would_begin_with_it(target, draft, learned: str, damage) -> None:
    (draft / FILE).write_text(damage(json.loads(learned)))
    loaded = load_draft(draft, target)
    with pytest.raises(
        CheckpointError, match=r"acceptance.json cannot be read \(.+\): make it anew with glidecape tune --store"
    ):
        make_drafter("glide+auto", loaded)
    make_drafter("glide+cape", loaded)  # which does not need it


def test_a_file_of_another_draft_is_left_out_and_that_is_said(target, draft, learned: str) -> None:
    (draft / FILE).write_text(json.dumps(json.loads(learned) | {"draft": "0" * 64}))
    with pytest.warns(UserWarning, match="is of another draft, so auto begins without it"):
        begun = make_drafter("glide+auto", load_draft(draft, target))
    assert isinstance(begun, AutoDrafter)
    assert np.allclose(begun.accepts.weights, DRAFTED)


def test_options_that_would_do_nothing_are_refused(world, monkeypatch, capfd) -> None:
    code, _, err = run(capfd, monkeypatch, "tune", world["target"], "--store")
    assert (code, err) == (2, "error: --store keeps what was learned beside a draft: name its folder with --draft\n")
    code, _, err = run(capfd, monkeypatch, "tune", world["target"], "--prompts", "p.txt")
    assert code == 2
    assert "--prompts are what --store learns from" in err
    with pytest.raises(InputError, match="of no folder"):
        store(AutoDrafter(None), object())
