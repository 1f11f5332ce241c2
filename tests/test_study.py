"""A study: rows trained side by side are rows trained alone; killed, resumed, added to, compared, refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from glidecape.drafts.checkpoint import load_draft
from glidecape.errors import CheckpointError, InputError
from glidecape.target.target import Target
from glidecape.train import study
from glidecape.train.draft import train_draft
from glidecape.train.loop import Budget
from glidecape.train.recipe import DraftRecipe
from glidecape.train.study import Trial, run_study
from glidecape.train.study_rows import FACTORS, changes_of, study_rows
from glidecape.train.study_table import summary, table_of
from states import STATE
from test_command_line import run

BASE = DraftRecipe(length=32, rows=2, rate=1e-2, muon=True, accumulate=2, max_lag=2, positions="anchor-offset")
BUDGET = Budget(tokens=5 * 2 * 64)
GIVEN = [
    "other=loss:kl+tv,lags:shift,max_lag:3,muon:no,draft_vocab:200",
    "lm=kind:lm",
    "wide=glimpse:on,read:0+1,layers:2",
]
TRIAL = Trial(prompts=2, prompt_tokens=24, new_tokens=16)


@pytest.fixture
def target(world):
    return Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)


def test_rows_trained_side_by_side_are_those_trained_alone(world, target, tmp_path):
    """Bit for bit, with other lags, losses, rates and kinds beside them; and each is ready for decoding."""
    rows = study_rows(BASE, ["cross"], GIVEN)
    result = run_study(target, world["corpus"], tmp_path / "study", rows, BUDGET, (3,), TRIAL)
    assert list(result["rows"]) == ["baseline", "cross-none", "other", "lm", "wide"]
    for name, recipe in rows.items():
        alone = DraftRecipe(**(vars(recipe) | {"seed": 3}))
        fresh = Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)
        figures = train_draft(fresh, world["corpus"], tmp_path / name, alone, BUDGET, prompts=0)
        folder = tmp_path / "study" / "seed-3" / name
        weights = "model.safetensors" if name == "lm" else "draft.safetensors"
        ours, theirs = load_file(folder / weights), load_file(tmp_path / name / weights)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
        told = result["rows"][name]["seeds"]["3"]
        assert {key: told[key] for key in ("steps", "tokens", "train_loss", "parameters")} == {
            key: figures[key] for key in ("steps", "tokens", "train_loss", "parameters")
        }
        assert len(json.loads((folder / "curve.json").read_text())["loss"]) == 5
        load_draft(folder, Target.from_pretrained(world["target"], dtype=torch.float32))


def test_the_targets_forward_is_paid_once(world, target, tmp_path, monkeypatch):
    calls = []
    real = study.Teacher.run
    monkeypatch.setattr(study.Teacher, "run", lambda *a: calls.append(1) or real(*a))
    rows = study_rows(BASE, ["lags"])
    assert len(rows) == 4  # the baseline is "block-random" already
    run_study(target, world["corpus"], tmp_path, rows, BUDGET, (0,), TRIAL)
    assert len(calls) == 5 * 2  # steps times accumulated batches


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def whole(world):
    """Runs the study of two rows to its end."""
    target = Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)
    rows = study_rows(BASE, [], ["tv=loss:tv"])
    return lambda out: run_study(target, world["corpus"], out, rows, BUDGET, (0,), TRIAL, save_every_s=0)


@pytest.fixture(scope="module")
def never_killed(whole, tmp_path_factory):
    return whole(tmp_path_factory.mktemp("never"))


@pytest.mark.parametrize("moment", ["training", "trial", "row"])
def test_a_killed_study_goes_on_and_ends_as_one_never_killed(moment, whole, never_killed, tmp_path, monkeypatch):
    where = {"training": (torch.nn.utils, "clip_grad_norm_", 5), "trial": (study, "stats_by_prompt", 6)}
    where["row"] = (study, "write_row", 2)
    place, name, last = where[moment]
    real, calls = getattr(place, name), []

    def dies(*arguments, **keywords):
        calls.append(1)
        if len(calls) == last:
            raise KilledError
        return real(*arguments, **keywords)

    monkeypatch.setattr(place, name, dies)
    with pytest.raises(KilledError):
        whole(tmp_path / "killed")
    monkeypatch.setattr(place, name, real)
    assert (tmp_path / "killed" / "seed-0" / STATE).exists()
    done = (tmp_path / "killed" / "seed-0" / "baseline" / "row.json").exists()
    assert done == (moment != "training")
    killed = whole(tmp_path / "killed")
    for row in ("baseline", "tv"):
        ours, theirs = (dict(r["rows"][row]["seeds"]["0"]) for r in (killed, never_killed))
        assert {**ours, "tokens_per_s": 0} == {**theirs, "tokens_per_s": 0}  # that is a time
    assert not (tmp_path / "killed" / "seed-0" / STATE).exists()


def test_rows_and_seeds_are_added_without_training_the_others_again(world, target, tmp_path, monkeypatch):
    def whole(rows, seeds, **options):
        return run_study(target, world["corpus"], tmp_path, rows, options.pop("budget", BUDGET), seeds, TRIAL)

    first = whole(study_rows(BASE, []), (0,))
    trained = []
    real = study._trained
    monkeypatch.setattr(study, "_trained", lambda *a: trained.append((a[2].name, list(a[4]))) or real(*a))
    second = whole(study_rows(BASE, [], ["tv=loss:tv"]), (0, 1))
    assert trained == [("seed-0", ["tv"]), ("seed-1", ["baseline", "tv"])]
    assert second["rows"]["baseline"]["seeds"]["0"] == first["rows"]["baseline"]["seeds"]["0"]
    with pytest.raises(
        CheckpointError,
        match=r"baseline holds a row of that name made with recipe\.max_lag 2, not 0; .*recipe\.muon True, not False",
    ):
        whole({"baseline": DraftRecipe(length=32, rows=2)}, (0,))
    with pytest.raises(CheckpointError, match="made with tokens 640, not 64: give the row"):
        whole(study_rows(BASE, []), (0,), budget=Budget(tokens=64))


def figures(alphas, tau=2.0):
    one = {"alpha": sum(alphas) / len(alphas), "acceptance_length": tau, "alpha_by_prompt": alphas}
    names = ("chain_greedy", "cape_greedy", "chain_t1", "cape_t1")
    return dict.fromkeys(names, one) | {"parameters": 1_500_000, "tokens_per_s": 100.0}


def test_the_table_compares_with_the_first_row_prompt_by_prompt():
    low, high = [0.1 + 0.01 * i for i in range(20)], [0.2 + 0.01 * i for i in range(20)]
    results = {"baseline": {"0": figures(low), "1": figures(high)}, "better": {"0": figures(high), "1": figures(high)}}
    first, better = summary(results)
    assert "p_greedy" not in first
    assert first["alpha_greedy"] == pytest.approx(0.245)
    assert first["spread_greedy"] == pytest.approx(0.1 / 2**0.5, abs=1e-4)
    assert better["difference_greedy"] == pytest.approx(0.05)
    assert better["p_greedy"] < 1e-3
    turned = {"0": figures(high), "1": figures(low)}  # the same over seeds
    assert summary(results | {"same": turned})[2]["p_t1"] == 1.0
    table = table_of(summary(results)).markdown().splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert "| better | 0.2950 ± 0.0000 | +0.0500 | 0.0" in table[3]
    assert "1.50 M" in table[3]


REFUSED = {
    "field": (["a=depth:3"], "a recipe has no field 'depth'"),
    "value": (["a=rate:fast"], "'fast' is no value for rate, which takes float"),
    "flag": (["a=muon:maybe"], "'maybe' is no value for muon"),
    "loss": (["a=loss:mse"], "unknown loss 'mse'"),
    "shared": (["a=length:64"], "row 'a' changes length, which all rows of a study share"),
    "twice": (["a=loss:tv", "a=loss:ce"], "two rows named 'a'"),
    "name": (["../a=loss:tv"], "--row takes NAME=field:value"),
    "nameless": (["loss:tv"], "--row takes NAME=field:value"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_rows_that_cannot_be_are_refused(name):
    rows, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        study_rows(BASE, [], rows)
    with pytest.raises(InputError, match="unknown factor 'weather': choose from cross, glimpse"):
        study_rows(BASE, ["weather"])


def test_every_named_factor_is_a_recipe():
    for factor in FACTORS:
        assert len(study_rows(DraftRecipe(), [factor])) >= 2
    read = study_rows(DraftRecipe(), ["read"], (), 8)
    assert [recipe.read for recipe in read.values()] == ["", "0", "last", "mix", "2", "4"]
    assert changes_of("max-lag:5,rate:1e-3") == {"max_lag": 5, "rate": 1e-3}


def test_the_command_writes_and_prints_the_table(world, tmp_path, capfd, monkeypatch):
    words = ["study", "--target", world["target"], "--data", world["corpus"], "--out", tmp_path, "--length", 32]
    words += ["--rows", 2, "--prompts", 2, "--prompt-tokens", 24, "--new-tokens", 16]
    code, out, _ = run(capfd, monkeypatch, *words, "--tokens", 128, "--factor", "cross", "--base", "max_lag:3")
    assert code == 0
    assert "cross-none" in out
    table = json.loads((tmp_path / "study.json").read_text())["table"]
    assert [line["row"] for line in table] == ["baseline", "cross-none"]
    assert (tmp_path / "study.md").read_text() == table_of(table).markdown() + "\n"
    assert json.loads((tmp_path / "seed-0" / "baseline" / "row.json").read_text())["identity"]["recipe"]["muon"] is True
    code, _, err = run(capfd, monkeypatch, *words)
    assert (code, "equal tokens" in err) == (2, True)
    code, _, err = run(capfd, monkeypatch, *words, "--tokens", 128, "--seeds", "a")
    assert (code, "--seeds takes numbers" in err) == (2, True)
