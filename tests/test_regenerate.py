"""`glidecape regenerate`: the target's own continuations, whatever draft, batch or interruption there was."""

import json
import signal
import time

import pytest
import torch

from glidecape.core.params import SamplingParams
from glidecape.drafting.methods import make_drafter
from glidecape.drafts.checkpoint import load_draft
from glidecape.engine.decode import generate
from glidecape.errors import CheckpointError, DataError, InputError
from glidecape.target.target import Target
from glidecape.train import regenerate as module
from glidecape.train.data import load_streams
from glidecape.train.draft import train_draft
from glidecape.train.loop import Budget
from glidecape.train.recipe import DraftRecipe
from glidecape.train.regenerate import Regeneration, prompts_of, regenerate
from processes import Child
from test_command_line import run

PLAN = Regeneration(prompt_tokens=12, new_tokens=16, seed=3)
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"


@pytest.fixture(scope="module")
def target(world):
    return Target.from_pretrained(world["target"], dtype=torch.float32)


@pytest.fixture(scope="module")
def made(world, target, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "own.jsonl"
    figures = regenerate(target, world["corpus"], out, PLAN, batch=5)
    return out, figures


def test_rows_are_what_generate_says_of_the_documents_beginnings(world, target, made):
    out, figures = made
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    prompts = list(prompts_of(target, world["corpus"], PLAN))
    assert len(rows) == len(prompts) == figures["rows"] == 20  # five packages of four modules; one is held out
    start = target.tokenizer.eos_token_id
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        assert (prompt[0], len(prompt)) == (start, 12)
        assert start not in prompt[1:]
        params = SamplingParams(1.0, seed=3 + i, max_new_tokens=16)
        one = generate(target, [prompt], None, params)[0]
        text = [t for t in one.tokens if t != start]
        assert row["tokens"] == prompt[1:] + text
        learned = [0] * 11 + [1] * len(text)
        if one.finish == "length":
            learned[-1] = 0
        assert (row["loss_mask"], row["finish"]) == (learned, one.finish)
    assert len({tuple(row["tokens"][11:]) for row in rows}) > 15  # each row draws by its own seed


@pytest.mark.parametrize("method", ["glide+cape", "vanilla", "lookup"])
def test_a_draft_and_the_batch_change_the_time_and_not_the_file(method, world, target, made, tmp_path):
    draft = {"glide+cape": "glide", "vanilla": "lm"}.get(method)
    loaded = None if draft is None else load_draft(world[draft], target)
    regenerate(target, world["corpus"], tmp_path / "own.jsonl", PLAN, make_drafter(method, loaded, length=4), batch=7)
    assert (tmp_path / "own.jsonl").read_bytes() == made[0].read_bytes()


class Counted(list):
    """A prompt that tells how many of its kind are in memory."""

    alive = most = 0

    def __init__(self, ids):
        super().__init__(ids)
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self):
        Counted.alive -= 1


def test_few_prompts_are_in_memory(world, target, made, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "prompts_of", lambda *facts: map(Counted, prompts_of(*facts)))
    regenerate(target, world["corpus"], tmp_path / "own.jsonl", PLAN, batch=2)
    assert (tmp_path / "own.jsonl").read_bytes() == made[0].read_bytes()
    assert 2 <= Counted.most <= 6 < made[1]["rows"]


@pytest.mark.parametrize("torn", [True, False])
def test_a_file_cut_anywhere_is_finished(torn, world, target, made, tmp_path):
    whole = made[0].read_bytes()
    line = whole.index(b"\n", len(whole) // 2) + 1
    (tmp_path / "own.jsonl").write_bytes(whole[: line + 9 * torn])
    (tmp_path / "own.card.json").write_bytes(made[0].with_name("own.card.json").read_bytes())
    figures = regenerate(target, world["corpus"], tmp_path / "own.jsonl", PLAN)
    assert (tmp_path / "own.jsonl").read_bytes() == whole
    assert figures["tokens"] < made[1]["tokens"]
    assert regenerate(target, world["corpus"], tmp_path / "own.jsonl", PLAN)["tokens"] == 0


def regenerate_slowly(target, data, out):
    """In a process of its own."""
    regenerate(Target.from_pretrained(target, dtype=torch.float32), data, out, PLAN, batch=2)


def test_sigkill_costs_nothing_but_time(world, target, made, tmp_path):
    out = tmp_path / "own.jsonl"
    child = Child(regenerate_slowly, world["target"], world["corpus"], out)
    while not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.001)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    child.stderr.close()
    assert 3 <= out.read_bytes().count(b"\n") < 20
    regenerate(target, world["corpus"], out, PLAN)
    assert out.read_bytes() == made[0].read_bytes()


def test_it_is_trained_on_and_only_its_own_words_are_learned(target, made, tmp_path):
    stream = load_streams(made[0], target.tokenizer, target.vocab_size, "completion")["train"]
    start = target.tokenizer.eos_token_id
    first = json.loads(made[0].read_text().splitlines()[0])
    assert stream.tokens[: 1 + len(first["tokens"])].tolist() == [start, *first["tokens"]]
    assert stream.learned[1 : 1 + len(first["tokens"])].tolist() == [bool(m) for m in first["loss_mask"]]
    recipe = DraftRecipe(rows=2, length=24, loss_on="completion")
    assert train_draft(target, made[0], tmp_path, recipe, Budget(tokens=96), prompts=0)["steps"] == 2


def prompts(tmp_path, target, rows, plan=PLAN):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [target.tokenizer.decode(ids) for ids in prompts_of(target, path, plan)]


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def test_what_is_continued_of_each_kind_of_row(target, tmp_path, monkeypatch):
    long = "def load_table(table, size=1): return size"
    rows = [{"prompt": long, "completion": "x"}, {"text": long}, {"messages": TALK}]
    rows += [{"messages": [*TALK, {"role": "assistant", "content": "d"}]}, {"tokens": [5, 6]}]
    given = prompts(tmp_path, target, rows)
    start = "<|endoftext|>"  # this tokenizer's own special token, and training's
    assert given[0] == start + long  # never cut
    assert given[1].startswith(start + "def load_")
    assert len(given[1]) < len(start + long)
    assert given[2] == given[3] == start + "a\nb\nc\n"
    assert given[4] == start + target.tokenizer.decode([5, 6])
    monkeypatch.setattr(target.tokenizer, "chat_template", CHAT)
    assert prompts(tmp_path, target, rows[2:4]) == ["<user>a<assistant>b<user>c<go>"] * 2
    assert prompts(tmp_path, target, rows, Regeneration(limit=2, new_tokens=16))[1:] == [start + long]


REFUSED = {
    "column": ({"body": "a"}, "row 2 has no text, prompt, messages or tokens column"),
    "empty": ({"prompt": ""}, "row 2 is empty"),
    "void": ({"tokens": []}, "row 2 is empty"),
    "beyond": ({"tokens": [99_999]}, "row 2 holds token 99999, outside the target's vocabulary"),
    "long": ({"prompt": "size " * 300}, r"row 2: its prompt of \d+ tokens and 16 new ones don't fit"),
    "talk": ({"messages": TALK[1:2]}, "row 2 has no turn before the assistant's"),
    "picture": ({"messages": [{"role": "user", "content": [{}]}]}, "row 2: each of its messages needs"),
    "json": ("nothing", "row 2 has no text, prompt, messages or tokens column, but str"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_bad_rows_are_named_by_number_before_anything_is_decoded(name, target, tmp_path):
    row, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        prompts(tmp_path, target, [{"prompt": "def a"}, row])


def test_another_plan_or_a_file_of_unknown_origin_is_refused(world, target, made, tmp_path):
    with pytest.raises(CheckpointError, match=r"was started with temperature 1\.0, not 0\.5: give the same options"):
        regenerate(target, world["corpus"], made[0], Regeneration(12, 16, 0.5, seed=3))
    (tmp_path / "mine.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(CheckpointError, match=r"no mine\.card\.json says what it holds"):
        regenerate(target, world["corpus"], tmp_path / "mine.jsonl", PLAN)
    assert (tmp_path / "mine.jsonl").read_text() == '{"text": "mine"}\n'
    with pytest.raises(InputError, match="at least 1 token"):
        Regeneration(prompt_tokens=0)


def test_the_command(world, made, tmp_path, capfd, monkeypatch):
    words = ["regenerate", world["target"], "--data", world["corpus"], "--prompt-tokens", 12, "--max-new-tokens", 16]
    words += ["--seed", 3, "--limit", 4]
    code, _, err = run(capfd, monkeypatch, *words, "--out", tmp_path / "a.jsonl", "--draft", world["glide"])
    assert (code, "'rows': 4" in err) == (0, True)
    assert (tmp_path / "a.jsonl").read_text() == "".join(made[0].read_text().splitlines(keepends=True)[:4])
    assert json.loads((tmp_path / "a.card.json").read_text())["settings"]["limit"] == 4
    code, _, err = run(capfd, monkeypatch, *words, "--out", tmp_path / "a.txt")
    assert (code, "--output takes a .jsonl file" in err) == (2, True)
