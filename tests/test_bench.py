"""The benchmark run: what it records, that it goes on after a kill, that a wrong output fails it, and its report."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glidecape import cli
from glidecape.bench import runner
from glidecape.bench.draw import Drawn, draw, encode, in_jobs, pad
from glidecape.bench.headline import headline
from glidecape.bench.methods import read_methods
from glidecape.bench.metrics import summarise
from glidecape.bench.peers.registry import PEERS
from glidecape.bench.plots import have_matplotlib
from glidecape.bench.records import Difference, Item, RunFolder
from glidecape.bench.report import html, markdown, write_report
from glidecape.bench.runner import run_job, run_peer
from glidecape.bench.settings import Settings
from glidecape.bench.suites import Prompt, Suite
from glidecape.bench.tables import show
from glidecape.bench.watch import overlap, watch
from glidecape.core.params import SamplingParams
from glidecape.costmodel import Prices
from glidecape.costs import ALONE_ROWS
from glidecape.drafting.auto.drafter import AutoDrafter
from glidecape.drafting.auto.reliability import Bin
from glidecape.drafting.drafter import ModelDrafter, NoDraft
from glidecape.drafting.expansions.chain import Chain
from glidecape.drafting.options import MethodOptions
from glidecape.drafting.stop import FixedLength
from glidecape.errors import DataError
from glidecape.target.target import Target
from processes import Child, glidecape
from toys import ToyDraft, ToyTarget, run_checked, scripted_rule

VOCAB = 64
RIGHT = [[n % 50] for n in range(200)]
TARGET: Any = ToyTarget(scripted_rule(RIGHT, VOCAB), VOCAB)
# Wrong at positions 3 and 4
DRAFT = ToyDraft(scripted_rule([[63] if n in (3, 4) else right for n, right in enumerate(RIGHT)], VOCAB), VOCAB)
METHODS = "plain,vanilla,glide+cape+svip,glide@length=2"
TEXTS = [
    "def load_table(table, size=0):\n    for item in",
    "def save_index(index, size=1):\n    for",
    "def check_page(page, size=3):\n    size",
    "def merge_frame(frame",
]


def toy_item(number: int = 0) -> Item:
    return Item(number, f"toy/{number}", "toy", "steady", False, number, (0,))


# --- one job


def test_a_record_holds_the_rounds_that_the_loop_made() -> None:
    drafter = ModelDrafter(DRAFT, Chain(), FixedLength(3))
    record, tokens = run_job(TARGET, drafter, [toy_item()], Settings(max_new_tokens=10))
    _, events, _ = run_checked(TARGET, drafter, [[0]], SamplingParams(max_new_tokens=10))
    assert tokens == [list(range(1, 11))]
    (row,) = record.rows
    for name in ("drafted", "depth", "accepted", "tested", "emitted"):
        assert getattr(row, name) == [getattr(event.stats, name) for event in events]
    assert record.emitted == 10
    assert len(record.round_us) == len(record.draft_us) == len(record.verify_us) == len(events)
    assert all(
        whole >= a + b - 2 for whole, a, b in zip(record.round_us, record.draft_us, record.verify_us, strict=True)
    )
    assert record.prefill_us > 0


def test_rows_of_a_batch_share_the_times_of_their_rounds() -> None:
    items = [toy_item(0), toy_item(1)]
    record, tokens = run_job(TARGET, ModelDrafter(DRAFT, Chain(), FixedLength(3)), items, Settings(max_new_tokens=6))
    assert tokens == [list(range(1, 7))] * 2
    assert len(record.round_us) == len(record.rows[0].emitted) == len(record.rows[1].emitted)
    assert record.emitted == 12


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ([1, 2, 3, 9, 5, 6], [Difference(7, 3, 9, 4)]),
        ([1, 2, 3, 4], [Difference(7, 4, -1, 5)]),
        ([1, 2, 3, 4, 5, 6, 7], [Difference(7, 6, 7, -1)]),
        ([1, 2, 3, 4, 5, 6], []),
    ],
)
def test_the_first_difference_is_found(expected: list[int], found: list[Difference]) -> None:
    item = Item(7, "toy/7", "toy", "steady", False, 7, (0,))
    settings = Settings(max_new_tokens=6)
    assert run_job(TARGET, NoDraft(), [item], settings, [expected])[0].differs == found

    class Peer:
        name, version = "toy", "1"

        def run(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
            return [1, 2, 3, 4, 5, 6], 0.5

    record = run_peer(Peer(), [item], settings, [expected])
    assert (record.differs, record.emitted, record.seconds, record.peer) == (found, 5, 0.5, True)
    sampled = run_peer(Peer(), [item], Settings(temperature=1.0, max_new_tokens=6), [expected])
    assert sampled.differs is None  # a peer draws by its own means: nothing to compare


def test_what_a_draft_thinks_is_noted_at_every_position() -> None:
    seen = watch(TARGET, DRAFT, [0], SamplingParams(max_new_tokens=8), depth=3)
    # Tokens 3 and 4 are guessed wrong, the others right; at the end there is less to draft.
    assert seen.matches == [2, 1, 0, 0, 3, 2, 1, 1]
    assert [len(e) for e in seen.entropy] == [3, 3, 3, 3, 3, 2, 1, 1]
    assert seen.overlap == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert all(x > 0.9 for at, x in enumerate(seen.overlap_1) if at not in (2, 3))
    assert max(seen.overlap_1[2:4]) < 0.5
    _, events, _ = run_checked(
        TARGET, ModelDrafter(DRAFT, Chain(), FixedLength(3)), [[0]], SamplingParams(max_new_tokens=8)
    )
    at = 0
    for event in events:
        assert event.stats.accepted == min(seen.matches[at], event.stats.drafted)
        at += event.stats.emitted


def test_overlap_is_that_of_the_laws_at_the_serving_temperature() -> None:
    p, q = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 0.0])
    assert overlap(p, q, SamplingParams(0.0)) == 0.0
    by_hand = torch.minimum((p / 0.5).softmax(0), (q / 0.5).softmax(0)).sum()
    assert overlap(p, q, SamplingParams(0.5)) == pytest.approx(float(by_hand), abs=1e-5)


# --- prompts


def test_prompts_are_padded_with_earlier_text_nearest_last() -> None:
    assert pad([7, 8], [[3, 4], [1, 2]], 6, None) == [1, 2, 3, 4, 7, 8]
    assert pad([7, 8], [[3, 4]], 7, None) == [4, 3, 4, 3, 4, 7, 8]
    assert pad([7, 8], [[]], 5, None) == [7, 8]  # there is nothing to pad with


def test_a_conversation_gets_the_template_and_its_second_turn_the_first_answer(world) -> None:
    target = Target.from_pretrained(world["target"], dtype=torch.float32)
    prompt = Prompt("1", "chats", ("load table", "save index"), True)
    raw = Prompt("2", "chats", ("def load_",), False)
    settings = Settings(max_new_tokens=12, limit=4, looping=4)
    drawn = draw(target, [Suite("chats", (prompt, raw), "x", "y")], settings)
    assert sorted(item.id for item in drawn.items) == ["chats/1#1", "chats/1#2", "chats/2"]
    texts = {item.id: target.tokenizer.decode(item.ids) for item in drawn.items}
    assert texts["chats/1#1"] == "<|endoftext|>load table"
    assert texts["chats/1#2"].startswith("<|endoftext|>load table\n\n")
    assert texts["chats/1#2"].endswith("\n\nsave index")
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    target.tokenizer.chat_template = template
    ids, chat = encode(target, prompt, settings, ("done",))
    assert chat
    assert target.tokenizer.decode(ids) == "user: load table\nassistant: done\nuser: save index\na:"
    assert encode(target, raw, settings) == (target.encode("def load_"), False)
    assert encode(target, prompt, Settings(chat=False))[1] is False
    # end-of-text ends conversations only, if nothing else is said
    assert [settings.params("1", chat).ignore_eos for chat in (True, False)] == [False, True]
    assert Settings(stop_at_eos=True).params("1", False).ignore_eos is False


def test_a_small_limit_takes_both_turns_of_the_first_conversations(world) -> None:
    target = Target.from_pretrained(world["target"], dtype=torch.float32)
    prompts = tuple(Prompt(str(i), "chats", (text, "for item in"), True) for i, text in enumerate(TEXTS))
    drawn = draw(target, [Suite("chats", prompts, "x", "y")], Settings(temperature=1.0, max_new_tokens=4, limit=3))
    assert [item.id for item in drawn.items] == ["chats/0#1", "chats/0#2", "chats/1#1"]
    assert drawn.counts == {"chats": {"steady": 3}}


def test_padding_reaches_the_length_and_long_prompts_are_counted(world) -> None:
    target = Target.from_pretrained(world["target"], dtype=torch.float32)
    prompts = tuple(Prompt(str(i), "code", (text,), False) for i, text in enumerate(TEXTS))
    suite = Suite("code", prompts, "x", "y")
    drawn = draw(target, [suite], Settings(context=60, max_new_tokens=8, looping=8))
    assert {len(item.ids) for item in drawn.items} == {60}
    tails = [target.encode(text) for text in TEXTS]
    assert {item.ids[0] for item in drawn.items} == {tails[0][0]}  # the token that begins a text stays first
    assert all(tails[0][0] not in item.ids[1:] for item in drawn.items)
    assert sorted(int(item.id[-1]) for item in drawn.items) == [0, 1, 2, 3]
    assert all(item.ids[-len(own) + 1 :] == tuple(own[1:]) for item in drawn.items for own in [tails[int(item.id[-1])]])
    long = Suite("code", (*prompts, Prompt("9", "code", ("def load_table(" * 100,), False)), "x", "y")
    assert draw(target, [long], Settings(max_new_tokens=8)).counts["code"]["too_long"] == 1
    # a conversation whose first turn has no answer has no second turn
    first = Prompt("9", "code", ("def load_table(" * 100, "for item in"), True)
    drawn = draw(target, [Suite("code", (*prompts, first), "x", "y")], Settings(max_new_tokens=8))
    assert drawn.counts["code"]["too_long"] == 1
    assert len(drawn.items) == len(TEXTS)


def test_jobs_hold_prompts_of_one_kind() -> None:
    kinds = [("a", "steady")] * 3 + [("a", "looping")] + [("b", "steady")] * 2
    items = [Item(-1, str(i), category, kind, False, -1, (1,)) for i, (category, kind) in enumerate(kinds)]
    made = in_jobs(items, 2)
    assert [(item.number, item.job) for item in made] == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (5, 3)]
    assert [(item.number, item.job) for item in in_jobs(items[:2], 1, made)] == [(6, 4), (7, 5)]


# --- whole runs


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Single steps are timed once. Runs set the number of threads; other tests have their own."""
    monkeypatch.setattr("glidecape.bench.costs.REPEATS", 1)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "code.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def words(world, file: Path, out: Path | None, **options: Any) -> list[str]:
    chosen = {
        "prompts": file,
        "methods": METHODS,
        "max-new-tokens": 12,
        "repeats": 2,
        "watch": 1,
        "threads": 1,
    } | options
    made = [
        "bench",
        "--target",
        world["target"],
        "--draft",
        f"glide={world['glide']}",
        "--draft",
        f"vanilla={world['lm']}",
    ]
    made += [word for name, value in chosen.items() for word in (f"--{name}", value)]
    return [*map(str, made), *(["--out", str(out)] if out else [])]


def run_cli(monkeypatch, capfd, argv: list[str]) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["glidecape", *argv])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    out, err = capfd.readouterr()
    return int(code), out, err


@pytest.fixture(scope="module")
def finished(world, prompts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its command, made in a process of its own that is killed once and torn on the way."""
    out = tmp_path_factory.mktemp("runs") / "killed"
    command, said = words(world, prompts, out, watch=1), tmp_path_factory.mktemp("said")
    process = Child(glidecape, *command, said=said / "first")
    records = out / "records.jsonl"
    until = time.monotonic() + 200
    while not (records.is_file() and records.read_bytes().count(b"\n") >= 5):
        assert time.monotonic() < until
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with records.open("ab") as file:
        file.write(b'{"job":0,"repeat":1,"meth')
    (out.parent / "before").write_bytes(records.read_bytes())
    again = Child(glidecape, *command, said=said / "second")
    assert again.wait() == 0, again.stderr.read()
    return out


def test_a_killed_run_goes_on_and_a_torn_line_is_dropped(finished: Path) -> None:
    before = (finished.parent / "before").read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert (finished / "records.jsonl").read_bytes().startswith(whole)
    folder = RunFolder(finished)
    keys = Counter((r.job, r.repeat, r.method) for r in folder.records)
    methods = [*METHODS.split(","), "transformers"]
    jobs = {item.job for item in folder.items}
    assert keys == Counter((job, repeat, method) for job in jobs for repeat in range(2) for method in methods)
    assert 5 <= whole.count(b"\n") < len(keys)
    assert len(folder.header["sessions"]) == 2
    assert len({line["item"] for line in folder.outputs.lines}) == len(folder.outputs.lines) == len(folder.items)
    assert {line["draft"] for line in folder.watched.lines} == {"vanilla", "glide"} or not any(
        item.kind == "steady" for item in folder.items
    )


def test_the_methods_order_rotates_from_job_to_job(finished: Path) -> None:
    second = [line["method"] for line in RunFolder(finished).measured.lines if line["repeat"] == 1]
    methods = [*METHODS.split(","), "transformers"]
    firsts = second[:: len(methods)]
    assert firsts == [methods[turn % len(methods)] for turn in range(len(firsts))]


def test_summary_of_a_run(finished: Path, prompts: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["finished"]["records"] == summary["finished"]["of"]
    assert summary["suites"][0]["source"] == prompts.name
    assert len(summary["suites"][0]["sha256"]) == 64
    assert sum(group["prompts"] for group in summary["groups"]) == len(TEXTS)
    for group in summary["groups"]:
        rows = {row["method"]: row for row in group["rows"]}
        assert set(rows) == {*METHODS.split(","), "transformers"}
        assert all(row["equal"] for row in rows.values())
        assert rows["plain"]["acceptance_length"] == 1.0
        assert rows["glide@length=2"]["draft_length"] <= 2
        assert 0 < rows["vanilla"]["alpha"] <= 1
        assert all(row["peak_bytes"] is None or row["peak_bytes"] > 1e6 for row in rows.values() if not row["peer"])
    assert set(summary["costs"]["c"]) == {"glide", "vanilla"}
    assert summary["costs"]["v"]["0"] == 1.0


def test_a_finished_run_measures_nothing_again(finished, world, prompts, monkeypatch, capfd) -> None:
    before = (finished / "records.jsonl").read_bytes()
    monkeypatch.setattr(runner, "run_job", None)
    code, out, err = run_cli(monkeypatch, capfd, words(world, prompts, finished, watch=1))
    assert (code, (finished / "records.jsonl").read_bytes()) == (0, before), err
    assert "acceptance" in out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": 1}, "run with temperature 0.0, not 1.0"),
        ({"methods": "plain,glide"}, "run with methods"),
        ({"max-new-tokens": 11}, "run with max_new_tokens 12, not 11"),
        ({"prompts": "stdlib:2"}, "run with"),
    ],
)
def test_other_settings_are_refused(option, message, finished, world, prompts, monkeypatch, capfd) -> None:
    code, _, err = run_cli(monkeypatch, capfd, words(world, prompts, finished, **({"watch": 1} | option)))
    assert code == 2
    assert re.search(f"error: .*{message}", err), err


def test_a_wrong_output_fails_the_run(world, prompts, tmp_path, monkeypatch, capfd) -> None:
    import glidecape.core.verify as loop

    right = loop.verify_points

    def wrong(tree, chosen):
        verdict = right(tree, chosen)
        return replace(verdict, bonus=(verdict.bonus + 1) % 400) if tree.nodes > 3 else verdict

    monkeypatch.setattr(loop, "verify_points", wrong)
    argv = words(world, prompts, tmp_path / "run", methods="plain,glide")
    code, _, err = run_cli(monkeypatch, capfd, argv)
    assert code == 1
    assert re.search(
        r"error: glide on prompt code/\d: new token \d+ is \d+, plain decoding's is \d+; run glidecape certify", err
    )
    assert all(not r.differs for r in RunFolder(tmp_path / "run").records)
    monkeypatch.setattr(loop, "verify_points", right)
    assert run_cli(monkeypatch, capfd, argv)[0] == 0
    # with temperature it is counted, not refused: rounding may be the cause
    monkeypatch.setattr(loop, "verify_points", wrong)
    sampled = words(world, prompts, tmp_path / "sampled", methods="plain,glide", temperature=1, repeats=1, peers="")
    assert run_cli(monkeypatch, capfd, sampled)[0] == 0
    rows = {
        r["method"]: r for r in json.loads((tmp_path / "sampled" / "summary.json").read_text())["groups"][0]["rows"]
    }
    assert (rows["glide"]["equal"], rows["plain"]["equal"]) == (False, True)
    assert rows["glide"]["differing"] > 0


def test_sorted_categories_stay_after_a_stop(world, prompts, tmp_path, monkeypatch, capfd) -> None:
    right, seen = runner.draw_category, []

    def stopped(target, suite, category, *rest):
        seen.append(category)
        if seen == ["code", "stdlib"]:
            raise KeyboardInterrupt
        return right(target, suite, category, *rest)

    monkeypatch.setattr(runner, "draw_category", stopped)
    argv = words(world, f"{prompts},stdlib:1", tmp_path / "run", methods="glide", repeats=1, watch=0, peers="")
    argv += ["--prompt-tokens", "20"]
    assert run_cli(monkeypatch, capfd, argv)[0] == 130
    before = (tmp_path / "run" / "prompts.jsonl").read_bytes()
    # a kill between the two writes of a category: its lines are made again
    line = json.loads(before.splitlines()[0]) | {"category": "stdlib", "id": "stdlib/torn"}
    (tmp_path / "run" / "prompts.jsonl").write_bytes(before + json.dumps(line).encode() + b"\n")
    assert run_cli(monkeypatch, capfd, argv)[0] == 0
    assert seen == ["code", "stdlib", "stdlib"]
    folder = RunFolder(tmp_path / "run")
    assert (tmp_path / "run" / "prompts.jsonl").read_bytes().startswith(before)
    assert [item.number for item in folder.items] == list(range(5))
    assert folder.items[-1].id == "stdlib/0"
    assert len({item.job for item in folder.items}) == 5


def test_an_interrupted_run_leaves_its_figures(world, prompts, tmp_path, monkeypatch, capfd) -> None:
    calls = Counter[str]()
    right = runner.run_job

    def interrupted(*args, **options):
        calls["jobs"] += 1
        if calls["jobs"] == 9:
            raise KeyboardInterrupt
        return right(*args, **options)

    monkeypatch.setattr(runner, "run_job", interrupted)
    code, _, err = run_cli(monkeypatch, capfd, words(world, prompts, tmp_path / "run", methods="plain,glide"))
    assert code == 130
    assert "give the same command again to resume" in err
    page, text, _ = write_report([tmp_path / "run"], tmp_path)
    assert "Not finished: " in text.read_text()
    assert "Not finished:" in page.read_text()


def test_batches_sampling_and_json(world, prompts, monkeypatch, capfd) -> None:
    argv = words(world, prompts, None, batch=2, temperature=1, repeats=1, context=40)
    code, out, err = run_cli(monkeypatch, capfd, [*argv, "--json"])
    assert code == 0, err
    summary = json.loads(out)
    (group,) = summary["groups"]
    assert (group["prompts"], len(group["rows"])) == (4, 4)
    assert all(row["equal"] for row in group["rows"])
    assert group["rows"][0]["rounds"] == 4 * 12
    argv = words(
        world, prompts, None, temperature=1, repeats=1, sampling="residual", methods="glide", **{"max-new-tokens": 6}
    )
    code, out, err = run_cli(monkeypatch, capfd, [*argv, "--json"])
    assert code == 0, err
    rows = json.loads(out)["groups"][0]["rows"]
    assert [(row["method"], row["equal"]) for row in rows] == [("plain", None), ("glide", None), ("transformers", None)]


def test_thresholds_are_fitted_on_prompts_that_are_not_the_tests(world, prompts, tmp_path, monkeypatch, capfd) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "def split_queue(queue, size=2):"}\n')
    argv = words(
        world,
        prompts,
        tmp_path / "run",
        methods="glide+svip,glide+svip@threshold=0.1,glide+cape+svip",
        repeats=1,
        **{"svip-fit": other},
    )
    code, out, err = run_cli(monkeypatch, capfd, argv)
    assert code == 0, err
    fits = RunFolder(tmp_path / "run").header["fits"]
    assert set(fits) == {"glide+svip", "glide+cape+svip"}
    assert f"threshold fitted, {fits['glide+svip']['threshold']}" in out
    for bad, methods, message in (
        (prompts, "glide+svip", "fit on other prompts"),
        (other, "glide,glide+svip@threshold=0.1", "no SVIP threshold"),
    ):
        argv = words(world, prompts, None, methods=methods, **{"svip-fit": bad})
        code, _, err = run_cli(monkeypatch, capfd, argv)
        assert (code, message in err) == (2, True), err


def test_greedily_the_fit_leaves_out_calibration_prompts_that_loop(
    world, prompts, tmp_path, monkeypatch, capfd
) -> None:
    other, seen = tmp_path / "other.jsonl", []
    other.write_text('{"prompt": "def split_queue(queue, size=2):"}\n{"prompt": "def join_queues(a, b):"}\n')
    fit, draw_all = runner.with_fitted_threshold, runner.draw
    monkeypatch.setattr(
        runner, "with_fitted_threshold", lambda *args: seen.append((len(args[2]), args[3].ignore_eos)) or fit(*args)
    )
    for kinds, kept, chat in ((("looping", "steady"), 1, False), (("looping", "looping"), 2, True)):

        def drawn(*args, kinds=kinds, chat=chat) -> Drawn:
            items = draw_all(*args).items
            assert len(items) == 2
            return Drawn([replace(item, kind=kind, chat=chat) for item, kind in zip(items, kinds, strict=True)])

        monkeypatch.setattr(runner, "draw", drawn)
        argv = words(world, prompts, tmp_path / f"run{kept}", methods="glide+svip", repeats=1, **{"svip-fit": other})
        code, _, err = run_cli(monkeypatch, capfd, argv)
        assert (code, seen.pop()) == (0, (kept, not chat)), err


def test_a_category_that_only_loops_is_left_out_and_a_run_of_nothing_else_is_refused(
    world, prompts, tmp_path, monkeypatch, capfd
) -> None:
    monkeypatch.setattr("glidecape.bench.draw.loops", lambda tokens: True)
    argv = words(world, prompts, tmp_path / "run", methods="glide", repeats=1, looping=0)
    code, _, err = run_cli(monkeypatch, capfd, argv)
    assert (code, "every greedy continuation loops" in err) == (2, True), err
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "def split_queue(queue, size=2):"}\n')
    verdicts = iter([False] + 99 * [True])  # the first file's only
    monkeypatch.setattr("glidecape.bench.draw.loops", lambda tokens: next(verdicts))
    argv = words(world, f"{prompts},{other}", tmp_path / "both", methods="glide", repeats=1, looping=0)
    code, _, err = run_cli(monkeypatch, capfd, argv)
    assert code == 0, err
    assert len(RunFolder(tmp_path / "both").items) == 1


def test_peers_run_beside_the_methods(world, prompts, monkeypatch, capfd) -> None:
    class Slow:
        name, version = "slow", "7"

        def __init__(self, source) -> None:
            self.drafts = source.drafts

        def run(self, prompt, params):
            return [1] * params.max_new_tokens, 99.0

    monkeypatch.setitem(PEERS, "slow", Slow)
    argv = words(world, prompts, None, methods="plain,glide", repeats=1, peers="slow")
    code, out, err = run_cli(monkeypatch, capfd, [*argv, "--json"])
    assert code == 0, err
    row = json.loads(out)["groups"][0]["rows"][-1]
    assert (row["method"], row["equal"], row["over"]["plain"]["ratio"] < 0.1) == ("slow", False, True)
    assert row["tokens_per_s"] == pytest.approx(11 / 99, abs=0.01)


BAD = {
    "no prompts": ({"prompts": ""}, "no prompts: name suites"),
    "unknown suite": ({"prompts": "poems"}, "no suite or file named 'poems'"),
    "unknown method": ({"methods": "glyde"}, "unknown method"),
    "unknown option": ({"methods": "glide@speed=3"}, "unknown option 'speed'"),
    "no number": ({"methods": "glide@length=long"}, "length takes a number"),
    "named twice": ({"methods": "glide,glide"}, "named twice"),
    "no such draft": ({"methods": "nocross:glide"}, "needs a draft named 'nocross'"),
    "no length": ({"methods": "glide@length=0"}, "at least 1"),
    "unknown peer": ({"peers": "abacus"}, "unknown peer 'abacus': choose from"),
    "mistyped peer": ({"peers": "transfomers"}, "did you mean transformers?"),
    "peer of a batch": ({"peers": "transformers", "batch": 2}, "one prompt at a time"),
    "no repeats": ({"repeats": 0}, "repeats must be at least 1"),
    "unknown sampling": ({"sampling": "magic"}, "sampling"),
    "no room": ({"max-new-tokens": 500}, "longer than the target's context"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_sentence(case, world, prompts, monkeypatch, capfd) -> None:
    options, message = BAD[case]
    argv = words(world, prompts, None, **options)
    code, _, err = run_cli(monkeypatch, capfd, argv)
    assert code == 2, err
    assert "Traceback" not in err
    assert re.search(f"error: .*{re.escape(message)}", err), err


def test_without_a_draft_plain_and_lookup_are_compared(world, prompts, monkeypatch, capfd) -> None:
    options = {"--limit": 1, "--repeats": 1, "--max-new-tokens": 8, "--prompt-tokens": 32, "--watch": 0, "--peers": ""}
    argv = [
        "bench",
        str(world["target"]),
        "--prompts",
        str(prompts),
        *(str(one) for pair in options.items() for one in pair),
    ]
    code, out, err = run_cli(monkeypatch, capfd, argv)
    assert code == 0, err
    assert "lookup" in out
    assert "glide" not in out.replace("glidecape", "")


def test_folders_that_cannot_be_used(finished, world, prompts, tmp_path, monkeypatch, capfd) -> None:
    assert "no benchmark run in" in run_cli(monkeypatch, capfd, ["report", str(tmp_path)])[2]
    (tmp_path / "records.jsonl").write_text("{}\n")
    assert "no run.json" in run_cli(monkeypatch, capfd, words(world, prompts, tmp_path))[2]
    header = json.loads((finished / "run.json").read_text())
    for text, message in (
        (json.dumps(header | {"format": 99}), "of format 99"),
        ("{", "is not JSON: the folder is torn"),
    ):
        (tmp_path / "run.json").write_text(text)
        assert message in run_cli(monkeypatch, capfd, ["report", str(tmp_path)])[2]
    (tmp_path / "run.json").write_text(json.dumps(header))
    (tmp_path / "records.jsonl").write_text("{\n{}\n")
    assert "line 1 is not JSON" in run_cli(monkeypatch, capfd, ["report", str(tmp_path)])[2]


def test_the_recipes_name_options_and_methods_that_exist() -> None:
    import typer

    command = typer.main.get_command(cli.app).commands["bench"]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    for name in ("bench.sh", "results.sh"):
        text = (Path(__file__).resolve().parents[1] / "runs" / name).read_text()
        used = set(re.findall(r"(?<=[\s(])--[a-z-]+", re.sub(r"#.*|\$\(git.*|.*glidecape report.*", "", text)))
        assert len(used) > 8
        assert used <= known, used - known
        for methods in re.findall(r"(?:methods|all|ours)=(plain\S+)", text):
            assert read_methods(methods.split(","), MethodOptions())


# --- the report


def test_the_report_says_once_and_at_its_end_where_the_figures_come_from(finished: Path, tmp_path: Path) -> None:
    page, text, sentence = write_report([finished, finished], tmp_path)
    summary = json.loads((finished / "summary.json").read_text())
    where, command = summary["circumstances"], summary["sessions"][-1]["command"]
    shown, facts = page.read_text().split("Where the figures come from")
    assert re.findall("<h1>.*?</p>", shown, re.S)[0].count(escape(sentence)) == 1
    for told, body in ((escape, (shown, facts)), (str, text.read_text().split("Where the figures come from"))):
        for word in (where["commit"], where["torch"], where["transformers"], told(command)):
            assert word not in body[0]
            assert body[1].count(word) >= 2  # of each run
    for word in (where["processor"], summary["suites"][0]["sha256"], "max_new_tokens 12"):
        assert word in facts


def test_the_first_sentence_names_what_won_over_plain_and_over_the_best_other_library() -> None:
    def row(method, plain, low, peer=False, **over):
        mine = {"plain": {"ratio": plain, "interval": [low, plain + 0.1]}} if method != "plain" else {}
        return {"method": method, "peer": peer, "over": mine | {name: {"ratio": ratio} for name, ratio in over.items()}}

    def of(temperature, *rows):
        group = [{"kind": "steady", "category": "all", "rows": rows}] if rows else []
        return {"settings": {"temperature": temperature}, "groups": group}

    slow, quick = row("slow", 0.5, 0.4, True), row("quick", 2.5, 2.4, True)
    plain, good = row("plain", 1, 1, slow=2.0), row("glide", 2.0, 1.8, slow=4.0, quick=0.8)
    unsure = row("lookup", 1.1, 0.9, slow=2.2)
    won = "glide won: it is 2.00 times as fast as plain decoding (95 % interval 1.80 to 2.10)"
    library = " times as fast as slow, the fastest other library"
    cases = [
        ([of(0, plain, good)], f"With greedy decoding, {won}."),
        (
            [of(0, plain, good, slow), of(1, plain, unsure, slow)],
            f"With greedy decoding, {won} and 4.00{library}; at T=1, no method is certainly faster than plain decoding: the "
            f"best, lookup, is 1.10 times as fast as plain decoding (95 % interval 0.90 to 1.20) and 2.20{library}.",
        ),
        (
            [of(0.5, plain, good, slow, quick)],
            "At T=0.5, another library won, quick; our fastest method, glide, is 2.00 times as fast as plain decoding (95 % "
            "interval 1.80 to 2.10) and 0.80 times as fast as quick, the fastest other library.",
        ),
        ([of(0, plain, slow)], "With greedy decoding, only plain decoding was measured."),
        (
            [of(0), of(0, plain, good)],
            f"With greedy decoding, a, nothing is measured yet; with greedy decoding, b, {won}.",
        ),
    ]
    for runs, sentence in cases:
        assert headline(runs, ["a", "b"][: len(runs)]) == sentence


def test_the_report_is_one_file_and_its_figures_are_the_summarys(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    page, text = html([summary], ["run <1>"]).replace("<wbr>", ""), markdown([summary], ["run"])
    assert "run &lt;1&gt;" in page
    assert not re.search(r"<(script|link|img|iframe)|url\(|@import", page.split("<svg")[0])
    assert not re.search(r'(?:src|href)="(?!#)|rdf:|@import', page)
    for group in summary["groups"]:
        for row in group["rows"]:
            assert f"{row['tokens_per_s']:.1f}" in page
            assert f"| {row['method']} | {row['tokens_per_s']:.1f} |" in text


def test_without_matplotlib_the_report_has_tables_and_says_so(finished, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run_cli(monkeypatch, capfd, ["report", str(finished), "--out", str(tmp_path)])
    assert code == 0
    assert "need matplotlib" in err
    assert out.startswith("With greedy decoding, ")
    page = (tmp_path / "report.html").read_text()
    assert "plots need matplotlib" in page
    assert "<svg" not in page
    assert 'class="bars"' in page
    assert "tokens/s" in page


def test_plots_are_in_the_page(finished: Path) -> None:
    if not have_matplotlib():
        pytest.skip("matplotlib, the extra 'plots', is not installed here")
    summary = json.loads((finished / "summary.json").read_text())
    page = html([summary], ["run"])
    assert "plots need matplotlib" not in page
    assert page.count("<svg") == page.count("<figure>") >= 3
    assert "accepted / tested" in page


# --- what auto predicted


def test_a_record_of_auto_counts_what_it_offered_by_predicted_probability() -> None:
    drafter = AutoDrafter(ModelDrafter(DRAFT, Chain(), FixedLength(3)))
    record, _ = run_job(TARGET, drafter, [toy_item()], Settings(max_new_tokens=40))
    bins = [Bin(*each) for each in record.calibration]
    (row,) = record.rows
    assert sum(one.offered for one in bins) == sum(row.drafted)
    # At its end a row emits less than was accepted, by a round at most.
    assert 0 <= sum(one.accepted for one in bins) - sum(row.accepted) <= 12
    assert all(one.offered >= one.reached >= one.accepted for one in bins)
    assert sum(one.reached for one in bins) < sum(one.offered for one in bins)  # siblings below a rejection
    assert drafter.offered is None  # later decoding keeps nothing
    assert run_job(TARGET, NoDraft(), [toy_item()], Settings(max_new_tokens=4))[0].calibration == []


def test_what_is_measured_of_auto_knows_what_rounds_cost(monkeypatch) -> None:
    prices = [Prices.guess(0.123), Prices.guess(0.456)]
    priced: list[object] = []
    monkeypatch.setattr("glidecape.interface.load.prices_file", lambda *_: None)  # a toy has no digest
    monkeypatch.setattr("glidecape.interface.load.prices_of", lambda *_, rows: priced.append(rows) or prices)
    methods = read_methods(["plain", "lookup+auto", "glide+auto"], MethodOptions())
    plan = runner.Plan(TARGET, {"glide": DRAFT}, {}, methods, [], Settings())
    made = runner._drafters(plan, SimpleNamespace(header={}))
    assert [made[name].prices for name in ("lookup+auto", "glide+auto")] == [prices, prices]
    assert priced == [ALONE_ROWS, ALONE_ROWS]  # batch 1
    runner._drafters(replace(plan, settings=Settings(batch=4)), SimpleNamespace(header={}))
    assert priced[2:] == [None, None]  # all


def test_the_report_shows_behind_a_fold_how_true_auto_s_predictions_are(tmp_path: Path, monkeypatch) -> None:
    import report_runs

    monkeypatch.setattr(report_runs, "METHODS", {"plain": (0.0, 1.0), "glide+auto": (2.2, 1.5)})
    monkeypatch.setattr(report_runs, "PEERS", {})
    folder = report_runs.made(tmp_path / "run", 0.0)
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for line in lines:
        if (
            line["method"] == "glide+auto"
        ):  # 0.1 of 40 nodes were accepted where 0.05 was predicted, 0.9 of 60 as predicted
            line["calibration"] = [[90, 40, 2.0, 4], *([[0, 0, 0.0, 0]] * 8), [70, 60, 54.0, 54]]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = summarise(RunFolder(folder))
    (row,) = [row for row in summary["groups"][0]["rows"] if row["method"] == "glide+auto"]
    assert row["calibration"] == {"error": 0.02, "bins": [[0.05, 0.1, 360, 810], [0.9, 0.9, 540, 630]]}
    page = html([summary], ["run"]).replace("<wbr>", "")
    shown, folded = page.split("<details", 1)
    assert "What auto predicted of the nodes that it offered" in folded
    assert "calibration" not in shown
    if have_matplotlib():
        assert "glide+auto, expected calibration error 0.020" in folded
    lines[-1]["calibration"] = [[1, 2, 0.5, 3]] * 10
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match="a calibration that counts no nodes"):
        RunFolder(folder)


def test_the_main_table_fits_a_terminal_and_says_where_the_rest_is(tmp_path: Path, capsys) -> None:
    import report_runs

    summary = summarise(RunFolder(report_runs.made(tmp_path / "run", 0.0)))
    show(summary, None)
    told = capsys.readouterr().out
    assert max(len(line) for line in told.splitlines() if line.startswith(("┃", "│"))) <= 100
    assert "transformers" in told
    assert "from each prompt's own pace" in told
    assert "give --output FOLDER, then glidecape report FOLDER" in told
    show(summary, tmp_path / "run")
    assert f"All other columns: glidecape report {tmp_path / 'run'}" in capsys.readouterr().out


@pytest.mark.parametrize(("share", "told"), [(0.61, True), (0.98, False), (None, False)])
def test_a_run_beside_other_programs_says_so_and_whether_programs_were_compiled(
    share: float | None, told: bool, tmp_path: Path, capsys
) -> None:
    import report_runs

    folder = RunFolder(report_runs.made(tmp_path / "run", 0.0))
    folder.keep(sessions=[folder.header["sessions"][0] | {"share": share}])
    summary = summarise(RunFolder(folder.path))
    show(summary, None)
    out = capsys.readouterr().out
    assert ("had its processor for 61% of the time" in out) == told
    assert ("Other programs were running" in markdown([summary], ["run"])) == told
    assert "float32, eager, 1 repeat" in out


def test_the_share_of_the_processor_is_kept_with_the_session(finished: Path) -> None:
    """Of one that measured to its end: not of one that was killed, or had nothing left to do."""
    sessions = json.loads((finished / "run.json").read_text())["sessions"]
    (share,) = [one["share"] for one in sessions if "share" in one]
    assert 0 < share <= 1
