"""Training on several processes: what one process learns, resumed on another number of them, and ended together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glidecape.cli import main
from glidecape.drafts.checkpoint import WEIGHTS
from glidecape.errors import InputError
from glidecape.target.target import Target
from glidecape.train.draft import train_draft
from glidecape.train.kinds import BY_RECIPE
from glidecape.train.loop import Budget
from glidecape.train.ranks import Ranks, process_group
from glidecape.train.recipe import DraftRecipe
from processes import Child
from states import STATE, clock_in

ROWS, LENGTH, STEPS = 4, 32, 6
RECIPE = DraftRecipe(
    length=LENGTH, rows=ROWS, rate=1e-2, muon=True, lags="shift", loss="kl+tv", accumulate=2, positions="anchor-offset"
)
BATCH = 2 * ROWS * LENGTH
KINDS = {
    "glide": RECIPE,
    "glide, a reduced vocabulary": replace(RECIPE, draft_vocab=40, loss="ce", positions="zero"),
    "eagle": replace(RECIPE, kind="eagle", loss="feature", noise=0.2),
    "medusa": replace(RECIPE, kind="medusa", max_lag=2, loss="kl"),
    "lm": replace(RECIPE, kind="lm"),
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return int(one.getsockname()[1])


def join(rank: int, count: int, port: int) -> None:
    """What torchrun sets."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}


def train(
    rank: int, count: int, port: int, target: Path, data: Path, runs: list, steps: int, save_every_s: float = 300
) -> None:
    """Each recipe to its folder, in whole float32, so that rounding is small."""
    join(rank, count, port)
    torch.autocast = lambda *_, **__: contextlib.nullcontext()
    with process_group():
        for out, recipe in runs:
            model = Target.from_pretrained(target, dtype=torch.float32, pack=False)
            train_draft(model, data, out, recipe, Budget(tokens=steps * BATCH), prompts=0, save_every_s=save_every_s)
            split = [name for name, one in model.model.named_parameters() if type(one).__name__ == "DTensor"]
            assert all(".layers." in name for name in split)
            assert bool(split) == (count > 1)


def train_on(count: int, world: dict, runs: list, steps: int = STEPS) -> None:
    run_all([Child(train, *one, world["target"], world["corpus"], runs, steps) for one in ranks_of(count)])


def curve(out: Path) -> list[float]:
    return list(json.loads((out / "curve.json").read_text())["loss"])


def weights(out: Path) -> torch.Tensor:
    found = load_file(out / WEIGHTS) if (out / WEIGHTS).exists() else load_file(out / "model.safetensors")
    return torch.cat([found[name].float().flatten() for name in sorted(found)])


def test_two_processes_learn_what_one_does(world, tmp_path: Path) -> None:
    assert {recipe.kind for recipe in KINDS.values()} == BY_RECIPE.keys() - {"glide-no-cross"}
    runs = {count: [(tmp_path / f"{count} {name}", recipe) for name, recipe in KINDS.items()] for count in (1, 2)}
    for count, each in runs.items():
        train_on(count, world, each)
    for (one, recipe), (two, _) in zip(runs[1], runs[2], strict=True):
        assert curve(two) == pytest.approx(curve(one), rel=2e-4), recipe.kind
        assert len(set(curve(one))) == STEPS
        torch.testing.assert_close(weights(two), weights(one), atol=0.01, rtol=0.02)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """What one process learns that is never stopped."""
    out = tmp_path_factory.mktemp("whole")
    train_on(1, world, [(out, RECIPE)])
    return out


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (2, 4)])
def test_a_run_resumes_on_another_number_of_processes(
    world, whole: Path, tmp_path: Path, first: int, then: int
) -> None:
    """The schedule belongs to the budget, so the first part has the same one, and is stopped in its middle."""
    stop_in_the_middle(world, [tmp_path] * first)
    assert clock_in(tmp_path)["step"] == 3
    shares = [one.stat().st_size for one in (tmp_path / STATE).glob("*.safetensors")]
    assert len(shares) == first  # each process wrote one, and all about as much
    assert max(shares) < 2 * min(shares)
    train_on(then, world, [(tmp_path, RECIPE)])
    assert curve(tmp_path) == pytest.approx(curve(whole), rel=2e-4)
    torch.testing.assert_close(weights(tmp_path), weights(whole), atol=0.01, rtol=0.02)


def test_a_run_resumes_where_machines_share_no_folder(world, whole: Path, tmp_path: Path) -> None:
    """Two machines of one process each: the first one's folder alone holds the state, and its tensors are sent."""
    folders = [tmp_path / "first", tmp_path / "second"]
    stop_in_the_middle(world, folders, machines=True)
    assert clock_in(folders[0])["step"] == 3
    assert not (folders[1] / STATE).exists()
    run_all([Child(train_apart, *facts, world["target"], world["corpus"], folders) for facts in ranks_of(2)])
    assert curve(folders[0]) == pytest.approx(curve(whole), rel=2e-4)
    torch.testing.assert_close(weights(folders[0]), weights(whole), atol=0.01, rtol=0.02)


def test_a_torn_share_is_noticed_and_the_save_before_it_is_used(world, whole: Path, tmp_path: Path) -> None:
    stop_in_the_middle(world, [tmp_path] * 2)
    share = sorted((tmp_path / STATE).glob("*.safetensors"))[1]
    share.write_bytes(share.read_bytes()[:-8])
    train_on(2, world, [(tmp_path, RECIPE)])
    assert curve(tmp_path) == pytest.approx(curve(whole), rel=2e-4)
    torch.testing.assert_close(weights(tmp_path), weights(whole), atol=0.01, rtol=0.02)


def ranks_of(count: int) -> list[tuple[int, int, int]]:
    port = free_port()
    return [(rank, count, port) for rank in range(count)]


def run_all(children: list[Child], code: int = 0) -> None:
    for child in children:
        assert child.wait() == code, child.stderr.read()
        child.stderr.close()


def stop_in_the_middle(world: dict, folders: list[Path], machines: bool = False) -> None:
    """Three steps on as many processes as folders; the last one alone hears SIGTERM."""
    facts = ranks_of(len(folders))
    run_all(
        [Child(stopped_after, 3, *one, world["target"], world["corpus"], folders, machines) for one in facts], code=143
    )


def train_apart(rank: int, count: int, port: int, target: Path, data: Path, folders: list[Path]) -> None:
    """As many machines as processes, each with a folder of its own."""
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank)}
    train(rank, count, port, target, data, [(folders[rank], RECIPE)], STEPS)


def stopped_after(
    steps: int, rank: int, count: int, port: int, target: Path, data: Path, folders: list[Path], machines: bool
) -> None:
    """The last process alone hears SIGTERM, after so many steps."""
    from glidecape.train import loop

    take = loop._step

    def step(*facts: object) -> None:
        take(*facts)
        if facts[3] == steps and rank == count - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    loop._step = step
    try:
        if machines:
            train_apart(rank, count, port, target, data, folders)
        else:
            train(rank, count, port, target, data, [(folders[rank], RECIPE)], STEPS, save_every_s=0)
    except KeyboardInterrupt as stop:
        raise SystemExit(128 + stop.signal) from None


def command(rank: int, count: int, port: int, *words: object) -> None:
    import sys

    join(rank, count, port)
    sys.argv = ["glidecape", *map(str, words)]
    main()


def test_a_process_that_dies_ends_the_others_with_one_sentence(world, tmp_path: Path) -> None:
    out, port = tmp_path / "out", free_port()
    words = ["train", world["target"], "--data", world["corpus"], "--output", out, "--minutes", 5, "--save-every", 0]
    words += ["--rows", ROWS, "--length", LENGTH]
    said = [tmp_path / f"said{rank}" for rank in range(2)]
    children = [Child(command, rank, 2, port, *words, said=said[rank]) for rank in range(2)]
    began = time.monotonic()
    while not (out / STATE).exists():
        assert time.monotonic() - began < 120, said[0].read_text()
        assert [child.poll() for child in children] == [None, None], [one.read_text() for one in said]
        time.sleep(0.01)
    children[1].kill()
    assert children[0].wait(60) == 2
    words = said[0].read_text()
    assert words.count("error: another process of this training ended") == 1
    assert "Traceback" not in words


def test_rows_that_cannot_be_shared_and_commands_of_one_process_are_refused(monkeypatch, capfd) -> None:
    assert Ranks(1, 4).share(8) == 2
    with pytest.raises(InputError, match="3 processes cannot share 8 rows evenly"):
        Ranks(0, 3).share(8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["glidecape", "train-target", "--data", "x", "--output", "y", "--tokens", "1e3"])
    with pytest.raises(SystemExit):
        main()
    assert "train-target runs in one process: start it without torchrun" in capfd.readouterr().err
