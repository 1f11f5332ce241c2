"""Chats as a corpus, a target of another architecture trained on it, and a chat's prompt on the command line."""

import gzip
import json
import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from glidecape.core.params import SamplingParams
from glidecape.drafting.methods import make_drafter
from glidecape.drafts.checkpoint import load_draft
from glidecape.engine.decode import generate
from glidecape.errors import DataError, InputError
from glidecape.target.target import Target
from glidecape.train.chat import ChatSource, build_chat, rendered
from glidecape.train.data import load_streams
from glidecape.train.draft import train_draft
from glidecape.train.loop import Budget
from glidecape.train.recipe import DraftRecipe, TargetShape, Windowing
from glidecape.train.regenerate import Regeneration, prompts_of
from glidecape.train.target import new_model, train_target
from test_command_line import ROOT, run

WORDS = ["red", "green", "blue", "round", "square", "small", "large", "old", "new", "fast", "slow", "warm", "cold"]
WORDS += ["bright", "dark"]


def chats(count, start=0):
    """Rows of two turns or four; every fifth asks what the row before asked, and is answered otherwise."""
    rows = []
    for i in range(start, start + count):
        ask = f"What is {WORDS[(i - (i % 5 == 4)) % 15]} and {i - (i % 5 == 4)}?"
        turns = [("user", ask), ("assistant", f"It is {WORDS[i * 7 % 15]}, {WORDS[i * 4 % 15]} or {i}.\n")]
        if i % 3 == 0:
            turns += [("user", "Are you sure?"), ("assistant", f"Yes: {WORDS[i % 15]}.")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return rows


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def documents(folder, name):
    """The documents of a corpus as lists of ids, each without its first token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = np.fromfile(folder / f"{name}.bin", dtype=np.uint16)
    starts = np.flatnonzero(ids == tokenizer.bos_token_id)
    assert starts[0] == 0
    return [part[1:].tolist() for part in np.split(ids, starts[1:])]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    first, second = chats(120), chats(60, start=120)
    # One row twice, and in the second file a prompt of the first file's.
    second += [first[3], {"prompt": first[1]["messages"][0]["content"], "completion": "Nobody knows."}]
    sources = [ChatSource(write(folder / "one.jsonl.gz", first)), ChatSource(write(folder / "two.jsonl", second))]
    counts = build_chat(folder / "corpus", sources, 400, {"one": "MIT"}, valid_share=0.2)
    return folder / "corpus", first, second, counts


def test_a_document_is_what_the_chat_template_makes_of_its_row(corpus):
    folder, first, second, counts = corpus
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {tuple(ids) for name in ("train", "valid") for ids in documents(folder, name)}
    wanted = set()
    for row in first + second[:-1]:
        whole = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        asked = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        assert whole[: len(asked)] == asked  # decoding begins where training has the assistant's turn
        assert whole[-1] == tokenizer.eos_token_id
        wanted.add(tuple(whole[1:]))
    assert wanted < found
    (pair,) = found - wanted
    assert tokenizer.decode(list(pair)) == rendered(second[-1], "")[0]
    assert counts["rows"] == len(found) == 181


def test_each_row_is_there_once_and_equal_openings_fall_on_one_side(corpus):
    folder, _, _, counts = corpus
    sides = {name: documents(folder, name) for name in ("train", "valid")}
    assert len(sides["train"]) + len(sides["valid"]) == counts["rows"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    openings = {name: {tuple(ids[: ids.index(end)]) for ids in side} for name, side in sides.items()}
    assert not openings["train"] & openings["valid"]
    # The rule had something to do: openings that occur twice on either side.
    assert all(len(openings[name]) < len(sides[name]) for name in sides)
    assert 0.05 < len(sides["valid"]) / counts["rows"] < 0.4


def test_digits_are_single_tokens_and_text_comes_back(corpus):
    tokenizer = AutoTokenizer.from_pretrained(corpus[0])
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("x 2048", add_special_tokens=False))[-4:] == list("2048")
    text = "Grüße, 12.5 – naïve\n\tok"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    marks = list(range(5))
    assert (
        tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"])
        == marks
    )


def test_sources_name_licences_and_bytes_at_most_are_kept(corpus, tmp_path):
    folder, first, _, _ = corpus
    table = json.loads((folder / "sources.json").read_text())["sources"]
    assert [(one["source"], one["licence"]) for one in table] == [("one", "MIT"), ("two", "unknown")]
    assert table[0]["rows"] == 120
    assert table[1]["rows"] == 61
    part = ChatSource(write(tmp_path / "one.jsonl", first), max_bytes=5000)
    counts = build_chat(tmp_path / "corpus", [part], 400, valid_share=0.2)
    one = json.loads((tmp_path / "corpus" / "sources.json").read_text())["sources"][0]
    assert 4500 < one["bytes"] <= 5000
    assert one["rows"] == counts["rows"] < 100


def test_long_rows_are_left_out_whole(corpus, tmp_path):
    _, first, _, _ = corpus
    long = {"messages": [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "so " * 600}]}
    source = ChatSource(write(tmp_path / "rows.jsonl", [*first, long]))
    counts = build_chat(tmp_path / "corpus", [source], 400, max_row_tokens=200, valid_share=0.2)
    assert counts["too_long"] == 1
    lengths = [len(ids) + 1 for name in ("train", "valid") for ids in documents(tmp_path / "corpus", name)]
    assert len(lengths) == 120
    assert max(lengths) <= 200


BAD_ROWS = {
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "row 3.*not 'tool'"),
    "content": ({"messages": [{"role": "user", "content": None}]}, "row 3.*content of plain text"),
    "nothing": ({"messages": []}, "row 3 has no message"),
    "column": ({"body": "x"}, "row 3.*body"),
    "empty": ({"text": ""}, "row 3.*text"),
    "list": (["x"], "row 3.*list"),
    "mark": ({"prompt": "x", "completion": "a<|user|>b"}, r"row 3 holds <\|user\|>"),
}


@pytest.mark.parametrize("name", list(BAD_ROWS))
def test_a_row_that_cannot_be_used_is_named(name, tmp_path):
    row, message = BAD_ROWS[name]
    path = write(tmp_path / "rows.jsonl", [*chats(2), row])
    with pytest.raises(DataError, match=message):
        build_chat(tmp_path / "corpus", [ChatSource(path)], 400)


def test_sources_that_cannot_be_told_apart_or_split_are_refused(tmp_path):
    (tmp_path / "other").mkdir()
    paths = [write(tmp_path / "rows.jsonl", chats(20)), write(tmp_path / "other" / "rows.jsonl.gz", chats(20))]
    with pytest.raises(DataError, match="two sources of one name"):
        build_chat(tmp_path / "corpus", [ChatSource(path) for path in paths], 400)
    with pytest.raises(DataError, match="both sides need some"):
        build_chat(tmp_path / "corpus", [ChatSource(paths[0])], 400, valid_share=0.0)
    with pytest.raises(DataError, match="all rows for train are longer than 16"):
        build_chat(tmp_path / "corpus", [ChatSource(paths[0])], 400, max_row_tokens=16, valid_share=0.5)


def test_the_command_makes_the_same_corpus(corpus, tmp_path, capfd, monkeypatch):
    folder, first, second, counts = corpus
    one, two = write(tmp_path / "one.jsonl", first), write(tmp_path / "two.jsonl", second)
    licences = tmp_path / "licences.json"
    licences.write_text('{"one": "MIT"}')
    words = ["data", "chat", "--out", tmp_path / "corpus", "--source", f"{one}:1e9", "--source", two]
    options = ["--vocab-size", 512, "--valid-share", 0.2, "--licences", licences]
    code, out, _ = run(capfd, monkeypatch, *words, *options)
    assert code == 0
    assert json.loads(out)["rows"] == counts["rows"]
    table = [json.loads((place / "sources.json").read_text())["sources"] for place in (folder, tmp_path / "corpus")]
    assert table[0] == table[1]
    for wrong, message in (
        (["--source", f"{one}:many"], "FILE or FILE:BYTES"),
        (["--source", tmp_path / "none.jsonl"], "no data at"),
        (["--source", one, "--licences", one], "as JSON"),
        (["--source", one, "--licences", tmp_path / "list.json"], "JSON object"),
    ):
        (tmp_path / "list.json").write_text("[1]")
        code, out, err = run(capfd, monkeypatch, "data", "chat", "--out", tmp_path / "o", *wrong)
        assert code == 2
        assert message in err
        assert "Traceback" not in err


def test_answers_are_what_is_learned_of_completions(corpus):
    tokenizer = AutoTokenizer.from_pretrained(corpus[0])
    streams = load_streams(corpus[0], tokenizer, loss_on="completion")
    assert all(isinstance(one.tokens, np.memmap) for one in streams.values())  # not read into memory
    rows = {name: [] for name in streams}
    for name, stream in streams.items():
        starts = np.flatnonzero(stream.tokens == tokenizer.bos_token_id)
        for ids, learned in zip(np.split(stream.tokens, starts[1:]), np.split(stream.learned, starts[1:]), strict=True):
            rows[name].append(tokenizer.decode(ids[learned]))
    answers = ["".join(f"{m['content']}<|end|>" for m in row["messages"][1::2]) for row in corpus[1] + corpus[2][:-2]]
    assert sorted(rows["train"] + rows["valid"]) == sorted([*answers, "Nobody knows.<|end|>"])
    assert load_streams(corpus[0], tokenizer)["train"].learned is None


@pytest.fixture(scope="module")
def windowed(corpus, tmp_path_factory):
    """A tiny Qwen3-like target with windows of 12 tokens, trained on the chats by the trainer, and its GliDe draft."""
    out = tmp_path_factory.mktemp("windowed")
    shape = TargetShape(4, 32, 64, 4, 2, context=256, architecture="qwen3", window=12, full_every=2)
    windowing = Windowing(length=64, rows=4, long_length=128)
    train_target(corpus[0], out / "target", shape, Budget(tokens=30 * 4 * 64), windowing, rate=1e-2)
    target = Target.from_pretrained(out / "target", dtype=torch.float32)
    recipe = DraftRecipe(length=64, rows=4, rate=1e-2)
    train_draft(target, corpus[0], out / "glide", recipe, Budget(tokens=10 * 4 * 64), "test", prompts=1)
    return out


def test_layers_with_a_window_end_in_a_full_one():
    shape = TargetShape(8, architecture="qwen3", window=256, full_every=4)
    assert [kind[0] for kind in shape.layer_types] == list("sssfsssf")
    assert set(TargetShape(3).layer_types) == {"full_attention"}


def test_a_windowed_target_decodes_as_transformers_beyond_its_window(windowed, corpus):
    config = json.loads((windowed / "target" / "config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert config["sliding_window"] == 12
    assert config["use_sliding_window"]
    assert [kind[0] for kind in config["layer_types"]] == list("sfsf")
    target = Target.from_pretrained(windowed / "target", dtype=torch.float32)
    prompt = target.encode(
        "<|user|>What is red and 17? What is blue and 18? What is new, small or old?<|end|><|assistant|>"
    )
    assert len(prompt) > 2 * 12
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    plain = generate(target, [prompt], params=params)[0].tokens
    drafter = make_drafter("glide+cape", load_draft(windowed / "glide", target))
    assert generate(target, [prompt], drafter, params)[0].tokens == plain
    theirs = AutoModelForCausalLM.from_pretrained(windowed / "target", dtype=torch.float32)
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0, "eos_token_id": None}
    assert theirs.generate(ids, max_new_tokens=40, do_sample=False, **options)[0, len(prompt) :].tolist() == plain
    # The window matters at these lengths: the same weights without it say something else.
    with torch.no_grad():
        inside = theirs(input_ids=ids).logits[0, -1]
        theirs.config.layer_types = ["full_attention"] * 4
        whole = type(theirs)(theirs.config).eval()
        whole.load_state_dict(theirs.state_dict())
        outside = whole(input_ids=ids).logits[0, -1]
    assert (inside - outside).abs().max() > 1e-3


def test_shapes_that_no_architecture_has_are_refused(corpus, tmp_path, capfd, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(corpus[0])
    for shape, message in (
        (TargetShape(architecture="gpt"), "choose llama or qwen3"),
        (TargetShape(window=64), "llama has no window"),
        (TargetShape(heads=5), "must be an even multiple"),
    ):
        with pytest.raises(InputError, match=message):
            new_model(shape, tokenizer)
    words = ["train-target", "--data", corpus[0], "--out", tmp_path / "t", "--tokens", 100, "--window", 8]
    code, _, err = run(capfd, monkeypatch, *words)
    assert code == 2
    assert "llama has no window" in err
    assert "Traceback" not in err


def test_a_chat_prompt_is_answered_without_being_repeated(windowed, world, capfd, monkeypatch, tmp_path):
    pair = [
        "--target",
        windowed / "target",
        "--draft",
        windowed / "glide",
        "--dtype",
        "float32",
        "--max-new-tokens",
        12,
    ]
    message = "What is red and 17?"
    chat = run(capfd, monkeypatch, "generate", *pair, "--chat", "-p", message, "--json")
    plain = run(capfd, monkeypatch, "generate", *pair, "-p", f"<|user|>{message}<|end|><|assistant|>", "--json")
    assert chat[0] == plain[0] == 0
    assert json.loads(chat[1])["tokens"] == json.loads(plain[1])["tokens"]
    bare = run(capfd, monkeypatch, "generate", *pair, "-p", message, "--json")
    assert json.loads(bare[1])["tokens"] != json.loads(chat[1])["tokens"]
    _, out, _ = run(capfd, monkeypatch, "generate", *pair, "--chat", "-p", message)
    assert out.strip("\n") == json.loads(chat[1])["text"].strip("\n")
    assert message not in out
    code, _, err = run(
        capfd, monkeypatch, "generate", "--target", world["target"], "--method", "plain", "--chat", "-p", "x"
    )
    assert code == 2
    assert "has no chat template" in err
    broken = tmp_path / "broken"
    shutil.copytree(windowed / "target", broken)
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no user here') }}")
    code, _, err = run(capfd, monkeypatch, "generate", "--target", broken, "--method", "plain", "--chat", "-p", "x")
    assert code == 2
    assert "refuses the prompt (no user here)" in err


def test_the_recipe_says_what_it_lacks_and_knows_every_licence(tmp_path):
    options = {"cwd": tmp_path, "env": os.environ | {"SHARED": str(tmp_path / "none")}}
    (tmp_path / "runs").mkdir()
    shutil.copy(ROOT / "runs" / "general.sh", tmp_path / "runs")
    done = subprocess.run(["bash", "runs/general.sh"], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 2
    assert f"no training rows at {tmp_path}/none/data/train" in done.stderr
    mix = re.search(r"mix=\((.*?)\)", (ROOT / "runs" / "general.sh").read_text(), re.DOTALL)[1].split()
    licences = json.loads((ROOT / "runs" / "general_licences.json").read_text())
    assert {name.partition(":")[0] for name in mix} == licences.keys()


def test_a_corpus_of_chats_is_continued_where_its_last_answers_begin(corpus):
    folder = corpus[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = SimpleNamespace(tokenizer=tokenizer, vocab_size=len(tokenizer), context=4096)
    prompts = [tokenizer.decode(ids) for ids in prompts_of(target, folder, Regeneration(prompt_tokens=2))]
    talks = [tokenizer.decode(ids) for ids in documents(folder, "train")]
    assert len(prompts) == len(talks)
    for prompt, talk in zip(prompts, talks, strict=True):
        before, mark, _ = talk.rpartition("<|assistant|>")
        assert prompt == "<|endoftext|>" + before + mark


@pytest.mark.parametrize("words", [("pysource",), ("chat", "--source", "nowhere.jsonl")], ids=lambda words: words[0])
def test_a_corpus_that_cannot_be_written_is_refused_before_anything_is_read(words, tmp_path, capfd, monkeypatch):
    (tmp_path / "file").write_text("x")
    code, _, err = run(capfd, monkeypatch, "data", *words, "--output", tmp_path / "file")
    assert code == 2
    assert "is a file, and a folder is to be written: name another --output" in err
