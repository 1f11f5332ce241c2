"""A training process that is killed with SIGKILL, more than once, and resumed: the weights of a run never killed."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file

from glidecape.commands.shared import resumable
from glidecape.drafts.checkpoint import CARD, WEIGHTS
from glidecape.errors import CheckpointError
from glidecape.files import only_writer, remove_leftovers, write_folder
from glidecape.target.target import Target
from glidecape.train import figures, loop
from glidecape.train.draft import train_draft
from glidecape.train.loop import WRITTEN, Budget
from glidecape.train.recipe import DraftRecipe
from glidecape.train.stopping import stop_requests
from processes import Child, glidecape
from states import RUN, STATE, clock_in, weights_in

STEPS, ROWS, LENGTH = 60, 4, 32
RECIPE = DraftRecipe(
    length=LENGTH, rows=ROWS, rate=1e-2, muon=True, lags="shift", loss="kl+tv", accumulate=2, positions="anchor-offset"
)
BUDGET = Budget(tokens=STEPS * 2 * ROWS * LENGTH)


def train(target, data, out, dies_at_save):
    """In a process of its own, which kills itself before a save is renamed; 0: never."""
    left, rename = dies_at_save, os.replace

    def replace(source, place):
        nonlocal left
        left -= Path(place).name == STATE
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, place)

    os.replace = replace
    model = Target.from_pretrained(target, dtype=torch.float32)
    train_draft(model, data, out, RECIPE, BUDGET, "test", prompts=0, save_every_s=0)


def start(world, out, dies_at_save=0):
    return Child(train, world["target"], world["corpus"], out, dies_at_save)


def wait_for_saves(child, path, count):
    """Until `path` has been replaced `count` times; fails when the child ends before."""
    seen = set()
    while len(seen) < count:
        assert child.poll() is None, child.stderr.read()
        with suppress(FileNotFoundError):
            seen.add(path.stat().st_mtime_ns)
        time.sleep(0.001)


def test_sigkill_at_any_moment_costs_nothing_but_time(world, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    child = start(world, killed)
    wait_for_saves(child, killed / STATE / RUN, 6)
    time.sleep(random.Random(1).random() / 50)  # anywhere: in a forward, in a save
    child.kill()
    assert child.wait() == -signal.SIGKILL
    child.stderr.close()
    first = clock_in(killed)["step"]
    assert 6 <= first < STEPS
    # The second time in the middle of a save: the new state is written, not yet renamed.
    child = start(world, killed, dies_at_save=4)
    assert child.wait() == -signal.SIGKILL, child.stderr.read()
    child.stderr.close()
    assert clock_in(killed)["step"] == first + 3
    assert [p for p in killed.iterdir() if p.name.startswith(f".{STATE}.")]

    for out in (killed, whole):
        child = start(world, out)
        assert child.wait() == 0, child.stderr.read()
        child.stderr.close()
    clocks, weights = ([of(out) for out in (whole, killed)] for of in (clock_in, weights_in))
    assert [one["step"] for one in clocks] == [STEPS, STEPS]
    assert clocks[0]["losses"] == clocks[1]["losses"]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    drafts = [load_file(out / "draft.safetensors") for out in (whole, killed)]
    assert all(torch.equal(t, drafts[1][name]) for name, t in drafts[0].items())
    assert not [p.name for p in killed.iterdir() if p.name.startswith(".")]


def train_until(number, at_step, words):
    """The command line, in a process of its own, which gets a signal in the middle of a step."""
    step = loop._step

    def interrupted(modules, made, losses, now, clip):
        if now == at_step:
            os.kill(os.getpid(), number)
        step(modules, made, losses, now, clip)

    loop._step = interrupted
    glidecape(*words)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_a_training_finish_its_step_and_save(world, tmp_path, number, code):
    out = tmp_path / "draft"
    words = ["train", world["target"], "--data", world["corpus"], "--output", out, "--tokens", 4 * 64]
    words += ["--length", 32, "--rows", 2, "--save-every", 9999]
    child = Child(train_until, number, 2, words)
    assert child.wait() == code
    assert f"stopped; give the same command again to resume from {out}" in child.stderr.read()
    child.stderr.close()
    assert clock_in(out)["step"] == 2
    child = Child(glidecape, *words)
    assert child.wait() == 0, child.stderr.read()
    child.stderr.close()
    assert clock_in(out)["step"] == 4


def test_a_signal_after_the_last_step_says_how_to_go_on(capfd, tmp_path):
    """Such as while the trained draft is tried."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as end, resumable(tmp_path):
        signal.raise_signal(signal.SIGTERM)
    assert end.value.exit_code == 143
    assert capfd.readouterr().err == f"stopped; give the same command again to resume from {tmp_path}\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_second_interruption_does_not_wait_for_the_step():
    with stop_requests() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


SHORT = Budget(tokens=4 * 2 * 32)


def short_recipe(kind):
    return DraftRecipe(kind=kind, length=32, rows=2, rate=1e-2)


def train_late(target, data, out, kind, moment):
    """In a process of its own, which kills itself in the evaluation, or before a file is renamed."""
    rename = os.replace

    def dies(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def replace(source, place):
        if Path(place).name == moment:
            dies()
        rename(source, place)

    os.replace = replace
    if moment == "evaluation":
        figures.decode = dies
    model = Target.from_pretrained(target, dtype=torch.float32, pack=False)
    train_draft(model, data, out, short_recipe(kind), SHORT, "test", prompts=1)


def test_sigkill_in_evaluation_or_export_costs_nothing_but_time(world, tmp_path):
    """The card or a file of a model folder is written, not yet renamed; or nothing is, yet."""
    moments = [("glide", "evaluation"), ("glide", CARD), ("lm", "config.json")]
    children = {}
    for kind, moment in moments:
        out = tmp_path / f"{kind}-{moment}"
        children[out] = Child(train_late, world["target"], world["corpus"], out, kind, moment)
    target = Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = {}
    for kind in ("glide", "lm"):
        train_draft(target, world["corpus"], tmp_path / kind, short_recipe(kind), SHORT, "test", prompts=1)
        whole[kind] = read_all(tmp_path / kind)
    for (kind, moment), (out, child) in zip(moments, children.items(), strict=True):
        assert child.wait() == -signal.SIGKILL, child.stderr.read()
        child.stderr.close()
        assert (CARD in os.listdir(out), STATE in os.listdir(out)) == (False, True)
        assert moment == "evaluation" or any(name.startswith(".") for name in os.listdir(out))
        train_draft(target, world["corpus"], out, short_recipe(kind), SHORT, "test", prompts=1)
        assert read_all(out) == whole[kind], moment
    torch.set_num_threads(before)


def read_all(folder):
    """Every file's content but the training state's and the times in the card; fails on a file that is no result."""
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != STATE}
    for name in (CARD, WEIGHTS):
        if name in found:
            found[name] = re.sub(rb'\\?"seconds\\?": [0-9.]+', b"", found[name])
    if WEIGHTS in found:
        found[WEIGHTS] = {name: tensor.tolist() for name, tensor in load_file(folder / WEIGHTS).items()}
    return found


def test_dtype_and_compiling_belong_to_a_run(world, tmp_path):
    target = Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)
    train_draft(target, world["corpus"], tmp_path, short_recipe("glide"), SHORT, prompts=0)
    with pytest.raises(CheckpointError, match="compile False, not True"):
        train_draft(target, world["corpus"], tmp_path, short_recipe("glide"), SHORT, prompts=0, compile_model=True)
    target.model.to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"dtype torch\.float32, not torch\.bfloat16"):
        train_draft(target, world["corpus"], tmp_path, short_recipe("glide"), SHORT, prompts=0)


def test_a_full_disk_leaves_the_older_model_folder_whole(tmp_path, monkeypatch):
    def write(text):
        return lambda folder: [(folder / name).write_text(text) for name in ("a", "b", "last")]

    write_folder(tmp_path, write("old"), "last")
    real, calls = os.fsync, []

    def full(number):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_folder(tmp_path, write("new"), "last")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new", "last": "old"}


def test_leftovers_of_the_living_are_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {f".{STATE}.{pid}" for pid in (os.getpid(), os.getppid(), dead.pid)}
    names |= {".gitignore", f".notes.{dead.pid}", STATE, f"{STATE}.{dead.pid}"}
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, WRITTEN)
    assert {p.name for p in tmp_path.iterdir()} == names - {f".{STATE}.{dead.pid}"}


def test_another_recipe_or_other_data_is_refused_and_a_larger_budget_is_not(world, tmp_path):
    target = Target.from_pretrained(world["target"], dtype=torch.float32)
    small = DraftRecipe(length=32, rows=2)

    def train(recipe, steps, data=world["corpus"]):
        return train_draft(target, data, tmp_path / "out", recipe, Budget(tokens=steps * 64), prompts=0)

    train(small, 1)
    with pytest.raises(CheckpointError, match=r"rate 0\.002, not 0\.1"):
        train(DraftRecipe(length=32, rows=2, rate=0.1), 2)
    (tmp_path / "other.txt").write_text("def other(): pass\n" * 200)
    with pytest.raises(CheckpointError, match="data"):
        train(small, 2, tmp_path / "other.txt")
    assert train(small, 3)["steps"] == 3


def test_two_writers_of_one_folder_don_t_meet_and_a_killed_one_frees_it(tmp_path):
    out = tmp_path / "runs" / "draft"
    code = "import sys, time; from pathlib import Path; from glidecape.files import only_writer\n"
    code += "with only_writer(Path(sys.argv[1])):\n    print('in', flush=True); time.sleep(600)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", code, str(out)], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "in\n"
        with pytest.raises(CheckpointError, match=r"another run is writing to .*draft"), only_writer(out):
            pass
        with only_writer(tmp_path / "runs" / "other"):
            pass
    finally:
        child.kill()
        child.wait()
    with only_writer(out):
        assert not out.exists()
    assert not list(out.parent.iterdir())
