"""What users really type and pipe: each ends in the right output, or in one sentence."""

import io
import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from glidecape import cli
from glidecape.batch.text import GrowingText, StopStrings, TextStream, text_of
from glidecape.bench.provenance import commit
from glidecape.bench.records import JsonLines, RunFolder
from glidecape.bench.settings import Settings
from glidecape.commands.shared import kind_of, read_prompts
from glidecape.core.params import SamplingParams
from glidecape.core.tree import TokenTree
from glidecape.demo import run_demo
from glidecape.drafting.methods import make_drafter
from glidecape.drafting.stop import Entropy
from glidecape.drafts.causal_lm import StandaloneDraft
from glidecape.drafts.checkpoint import load_draft
from glidecape.engine.decode import generate
from glidecape.errors import DataError, InputError
from glidecape.target.target import Target
from test_command_line import run


@pytest.fixture
def target(world):
    return Target.from_pretrained(world["target"], dtype=torch.float32)


@pytest.mark.parametrize("depth", [255, 256, 257, 600])
def test_deep_chains_know_all_their_ancestors(depth):
    tree = TokenTree(torch.tensor([1]), depth + 1)
    above = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(depth):
        above = tree.add(above, torch.tensor([[2]]), torch.zeros(1, 1))
    assert torch.equal(tree.ancestors[0], torch.ones(depth + 1, depth + 1).tril().bool())


def test_drafts_deeper_than_256_stay_lossless(tmp_path, world):
    """The target as its own draft, so that all of a draft of 299 is accepted or something is wrong."""
    from glidecape.train.loop import Budget
    from glidecape.train.recipe import TargetShape, Windowing
    from glidecape.train.target import train_target

    shape = TargetShape(layers=1, width=16, ffn=16, heads=2, kv_heads=2, context=400)
    train_target(world["corpus"], tmp_path, shape, Budget(tokens=128), Windowing(32, 2, long_share=0.0))
    deep = Target.from_pretrained(tmp_path, dtype=torch.float32)
    params = SamplingParams(max_new_tokens=300, ignore_eos=True)
    (plain,) = generate(deep, [[1, 2, 3]], None, params)
    (drafted,) = generate(deep, [[1, 2, 3]], make_drafter("vanilla", StandaloneDraft(deep), length=299), params)
    assert drafted.tokens == plain.tokens
    assert len(drafted.rounds) <= 3


def pieces():
    """A tokenizer whose decoder drops the space that a text begins with, as SentencePiece's do."""
    vocab = {"<unk>": 0, "▁Once": 1, "▁upon": 2, "▁a": 3, "▁time": 4, "▁girl": 5, ",": 6}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def test_the_space_between_prompt_and_completion_is_kept():
    tokenizer, prompt = pieces(), [1, 2, 3]
    assert tokenizer.decode([4, 6]) == "time,"
    assert text_of(tokenizer, [4, 6], prompt) == " time,"
    stream = TextStream(tokenizer, (), prompt)
    assert stream.push([4]) + stream.push([6], True) == " time,"
    cut = StopStrings(tokenizer, (" girl",), prompt=prompt).find([4, 6, 5], 0)
    assert (cut.tokens, cut.text) == (3, " time,")
    assert StopStrings(tokenizer, (" time",), prompt=prompt).find([4], 0).text == ""


def test_half_a_character_at_the_end_of_a_prompt_changes_nothing():
    class Bytes:
        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode(errors="replace")

    whole = list("ab字c".encode())
    for cut in range(len(whole)):
        text = text_of(Bytes(), whole[cut:], whole[:cut])
        assert text.replace("\ufffd", "") in "ab字c"
        assert text.endswith("c")


@pytest.mark.parametrize("kind", ["byte level", "spaces dropped"])
def test_text_that_grows_is_the_text_of_all_tokens_and_decodes_each_token_a_few_times(kind, world):
    """4,000 random tokens: most of the bytes are no characters."""
    real = AutoTokenizer.from_pretrained(world["target"]) if kind == "byte level" else pieces()

    class Counting:
        decoded = 0

        def decode(self, tokens, skip_special_tokens):
            self.decoded += len(tokens)
            return real.decode(tokens, skip_special_tokens=skip_special_tokens)

    counting, draw, prompt = Counting(), random.Random(0), [1, 2, 3]
    tokens, growing = [draw.randrange(len(real)) for _ in range(4000)], GrowingText(counting, prompt)
    for count, token in enumerate(tokens, 1):
        text = growing.push(token)
        if count < 40 or count % 100 == 0:
            assert text == text_of(real, tokens[:count], prompt).rstrip("\ufffd")
    assert counting.decoded < 20 * len(tokens)


def test_the_answers_of_a_file_are_not_prompts(tmp_path):
    rows = [
        {"prompt": "def f(", "completion": "SECRET"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "SECRET"}]},
        {"text": "once"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [prompt.text for prompt in read_prompts(None, path)] == ["def f(", "hi\n", "once"]


def test_an_empty_file_is_not_standard_input(tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").write_text("")
    monkeypatch.setattr(sys, "stdin", io.StringIO("not this"))
    with pytest.raises(InputError, match=r"empty\.jsonl holds no prompt"):
        read_prompts(None, tmp_path / "empty.jsonl")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="no prompt: give --prompt"):
        read_prompts(None, None)


def test_a_prompt_that_is_no_text_is_said(target):
    with pytest.raises(InputError, match="not UTF-8"):
        target.encode("\ud800")


def test_all_prompts_are_checked_before_the_first_is_printed(world, capfd, monkeypatch):
    command = ["generate", "--target", world["target"], "--method", "plain", "--max-new-tokens", "4", "--threads", "1"]
    code, out, err = run(capfd, monkeypatch, *command, "--prompt", "def a(", "--prompt", "def " * 300)
    assert (code, out) == (2, "")
    assert "prompt 1 has" in err


@pytest.mark.parametrize("kind", ["eagle", "medusa", "lm"])
def test_a_draft_of_another_kind_is_refused_wherever_it_is_used(kind, world, target):
    with pytest.raises(InputError, match="needs a GliDe draft, and this is"):
        make_drafter("glide+cape", load_draft(world[kind], target))


def test_folders_below_home_are_found(world, target, monkeypatch):
    monkeypatch.setenv("HOME", str(world["glide"].parent))
    assert kind_of("~/glide") == "glide"
    assert kind_of("~/lm") == "lm"
    assert Target.from_pretrained("~/target", probe=False).vocab_size == target.vocab_size


def test_a_cache_has_room_for_what_can_be_emitted_and_no_more(target):
    seen = []
    new_cache = target.new_cache
    watched = SimpleNamespace(
        take=lambda batch, capacity, *rest: seen.append(capacity) or new_cache(batch, capacity, *rest)
    )
    target.new_cache = watched.take
    drafter = make_drafter("vanilla+cape+svip", StandaloneDraft(target), cap=10**6)
    generate(target, [[1, 2, 3]], drafter, SamplingParams(max_new_tokens=4, ignore_eos=True))
    assert max(seen) < 100


def test_the_demo_takes_a_pair_or_none(world):
    with pytest.raises(InputError, match="takes a pair"):
        run_demo(world["target"], None)


def test_the_demo_says_by_its_exit_code_that_outputs_differ(monkeypatch):
    monkeypatch.setattr("glidecape.demo.run_demo", lambda *_: False)
    monkeypatch.setattr(sys, "argv", ["glidecape", "demo"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()


@pytest.mark.parametrize("out", ["study.md", "."])
def test_a_study_s_file_is_checked_first(out, world, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    some = ["--target", world["target"], "--draft", f"glide={world['glide']}", "--suite", "own:1"]
    code, _, err = run(capfd, monkeypatch, "measure", "batch", *some, "--out", out)
    assert (code, "--output names a JSON file" in err) == (2, True)


@pytest.mark.parametrize("text", ["[]", '{"format": 1}', '"x"'])
def test_a_torn_benchmark_is_said(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DataError, match=r"no benchmark's|is of format"):
        RunFolder(tmp_path)


def test_lines_are_dropped_without_a_moment_in_which_all_are_gone(tmp_path, monkeypatch):
    lines = JsonLines(tmp_path / "lines.jsonl")
    lines.append({"a": 1}, {"a": 2})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            lines.keep_only(lambda line: line["a"] == 2)
    assert len(JsonLines(tmp_path / "lines.jsonl").lines) == 2
    lines.keep_only(lambda line: line["a"] == 2)
    assert JsonLines(tmp_path / "lines.jsonl").lines == [{"a": 2}]


def test_counts_below_zero_and_thresholds_that_are_no_number_are_refused():
    for name in ("watch", "looping", "prompt_tokens", "context"):
        with pytest.raises(InputError, match=f"{name} must be at least 0"):
            Settings(**{name: -1})
    with pytest.raises(InputError, match="threshold"):
        Entropy(float("nan"))


def test_the_commit_is_this_checkout_s(monkeypatch, tmp_path):
    assert commit()
    from glidecape.bench import provenance

    inside = tmp_path / "site" / "glidecape" / "bench"
    inside.mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(inside / "provenance.py"))
    assert commit().startswith("glidecape ")


def test_a_draft_with_a_shorter_context_is_noted(world, target, tmp_path):
    import shutil

    folder = shutil.copytree(world["lm"], tmp_path / "lm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    with pytest.warns(UserWarning, match="context of 64 tokens, the target 192"):
        load_draft(folder, target)
