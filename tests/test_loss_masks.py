"""What is learned of prompt+completion, chat and token rows, and rows that are refused, by their number."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from glidecape.errors import DataError
from glidecape.target.target import Target
from glidecape.train.data import load_streams
from glidecape.train.draft import DraftLoss, make_draft, train_draft
from glidecape.train.loop import Budget
from glidecape.train.recipe import DraftRecipe
from glidecape.train.rows import preview, read_prompts
from glidecape.train.stream import Stream, Windows
from test_command_line import run

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "user", "content": "load it"},
    {"role": "assistant", "content": "loaded"},
    {"role": "user", "content": "save it"},
    {"role": "assistant", "content": "saved"},
]


@pytest.fixture(scope="module")
def target(world):
    return Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)


def streams(tmp_path, target, rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = load_streams(path, target.tokenizer, target.vocab_size, **options)
    tokens = np.concatenate([parts["train"].tokens, parts["valid"].tokens]).tolist()
    if parts["train"].learned is None:
        return tokens, None
    return tokens, np.concatenate([parts["train"].learned, parts["valid"].learned]).tolist()


def learned_text(target, tokens, learned):
    return target.tokenizer.decode([t for t, m in zip(tokens, learned, strict=True) if m])


def test_only_the_completion_and_the_end_after_it_are_learned(target, tmp_path):
    rows = [{"prompt": "def load_", "completion": "table(table)"}, {"prompt": "def ", "completion": "save_page"}]
    tokens, learned = streams(tmp_path, target, rows, loss_on="completion")
    assert target.tokenizer.decode(tokens) == "<|endoftext|>def load_table(table)<|endoftext|>def save_page"
    assert learned_text(target, tokens, learned) == "table(table)<|endoftext|>save_page"
    assert streams(tmp_path, target, rows) == (tokens, None)


def test_chat_is_rendered_as_in_decoding_and_the_assistant_is_learned(target, tmp_path, monkeypatch):
    rows = [{"messages": TALK}, {"messages": TALK[:1]}]
    tokens, learned = streams(tmp_path, target, [rows[0]], loss_on="completion")
    assert learned_text(target, tokens, learned) == "loaded\nsaved"
    monkeypatch.setattr(target.tokenizer, "chat_template", CHAT)
    tokens, learned = streams(tmp_path, target, [rows[0]], loss_on="completion")
    whole = "<user>load it</user><assistant>loaded</assistant><user>save it</user><assistant>saved</assistant>"
    assert target.tokenizer.decode(tokens) == "<|endoftext|>" + whole
    assert learned_text(target, tokens, learned) == "loaded</assistant>saved</assistant>"
    with pytest.raises(DataError, match="row 2 has no completion"):
        streams(tmp_path, target, rows, loss_on="completion")
    assert target.tokenizer.decode(streams(tmp_path, target, rows)[0]).endswith("<|endoftext|><user>load it</user>")


def test_a_template_that_rewrites_its_past_is_refused(target, tmp_path, monkeypatch):
    monkeypatch.setattr(target.tokenizer, "chat_template", "{{ messages | length }}" + CHAT)
    with pytest.raises(DataError, match=r"row 1: .* rewrites earlier turns"):
        streams(tmp_path, target, [{"messages": TALK}])


def test_token_rows_bring_their_own_mask(target, tmp_path):
    rows = [{"tokens": [5, 6, 7, 8], "loss_mask": [0, 1, 1, 0]}]
    assert streams(tmp_path, target, rows, loss_on="completion") == ([0, 5, 6, 7, 8], [False, False, True, True, False])
    assert streams(tmp_path, target, rows) == ([0, 5, 6, 7, 8], None)


GOOD = {"prompt": "def a", "completion": "b", "tokens": [5, 6], "loss_mask": [0, 1]}
REFUSED = {
    "empty mask": ({"tokens": [5, 6], "loss_mask": [0, 0]}, "row 2 counts no token: its loss_mask is all zero"),
    "short mask": ({"tokens": [5, 6], "loss_mask": [1]}, "row 2: loss_mask must be 2 numbers .* not 1"),
    "grey mask": ({"tokens": [5, 6], "loss_mask": [0.5, 1]}, "row 2: loss_mask must be"),
    "words": ({"tokens": ["a"], "loss_mask": [1]}, "row 2: tokens must be a list of whole numbers"),
    "beyond": ({"tokens": [5, 99_999], "loss_mask": [0, 1]}, "row 2 holds token 99999, outside .* vocabulary of 3"),
    "negative": ({"tokens": [-1, 5], "loss_mask": [0, 1]}, "row 2 holds token -1, outside"),
    "empty completion": ({"prompt": "a", "completion": ""}, "row 2 has an empty completion"),
    "no completion": ({"prompt": "a", "answer": "b"}, r"row 2 has no completion but \['answer', 'prompt'\]"),
    "plain text": ({"text": "a"}, "row 2 has no completion"),
    "null": ({"prompt": "a", "completion": None}, "row 2: its completion is no text, but NoneType"),
    "unknown column": ({"body": "a"}, r"row 2 has no text, prompt, messages or tokens column, but \['body'\]"),
    "empty talk": ({"messages": [{"role": "assistant", "content": ""}]}, "row 2 has an empty completion"),
    "picture": ({"messages": [{"role": "user", "content": [{}]}]}, "row 2: each of its messages needs a role"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_rows_are_refused_with_their_number(name, target, tmp_path):
    row, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        streams(tmp_path, target, [GOOD, row], loss_on="completion")


def test_a_corpus_has_no_completions_and_may_not_leave_the_vocabulary(world, target, tmp_path):
    with pytest.raises(DataError, match="leave --loss-on all"):
        load_streams(world["corpus"], target.tokenizer, target.vocab_size, "completion")
    with pytest.raises(DataError, match=r"train.bin holds token \d+, outside the target's vocabulary of 300"):
        load_streams(world["corpus"], target.tokenizer, 300)


def test_prompts_of_token_ids_are_no_texts(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"tokens": [1]}\n')
    with pytest.raises(DataError, match="row 2 holds token ids"):
        list(read_prompts(tmp_path / "p.jsonl"))


def test_a_preview_is_coloured_on_a_terminal_and_plain_where_piped():
    class Letters:
        def decode(self, tokens):
            return "".join(map(chr, tokens))

    seen = preview(Letters(), [97, 91, 98, 93, 99], [False, True, True, False, False])
    assert str(seen).splitlines()[1] == "a\u27e6[b\u27e7]c"
    lines = io.StringIO()
    Console(file=lines, force_terminal=True, color_system="standard").print(seen)
    first, second = lines.getvalue().splitlines()
    assert first.startswith("5 tokens, 2 learned (40%), in green:")
    assert second == "\x1b[2ma\x1b[0m\x1b[32m[b\x1b[0m\x1b[2m]c\x1b[0m"  # nothing of it is markup
    assert (preview(Letters(), [97], None).learned, preview(Letters(), [97], None).pieces) == (1, [("a", True)])


def test_windows_in_which_nothing_is_learned_are_passed_over():
    learned = np.zeros(50, dtype=bool)
    learned[[13, 20, 44]] = True  # 20 begins its window: nothing before it predicts it
    windows = Windows(Stream(np.arange(50), learned), 0)
    assert sorted(windows.batch(0, 2, 10)[:, 0].tolist()) == [10, 40]
    assert windows.batch_learned(0, 2, 10).sum().item() == 2
    with pytest.raises(DataError, match="no window of 10 tokens"):
        Windows(Stream(np.arange(50), np.zeros(50, dtype=bool)), 0).batch(0, 1, 10)


def test_the_loss_sees_learned_tokens_only(target):
    """Changing what follows at positions that are not learned changes no loss; at a learned one it does."""
    recipe = DraftRecipe(rows=1, length=16, lags="shift", loss="ce")
    draft_loss = DraftLoss(target, make_draft(target, recipe), recipe, 16)
    batch = torch.arange(10, 26)[None]
    learned = torch.zeros(1, 16, dtype=torch.bool)
    learned[0, 12] = True
    value = draft_loss(batch, 0, learned)
    last, middle = batch.clone(), batch.clone()
    last[0, 13:] = 3
    middle[0, 12] = 3
    assert torch.equal(draft_loss(last, 0, learned), value)
    assert not torch.equal(draft_loss(middle, 0, learned), value)
    assert not torch.equal(draft_loss(batch, 0), value)


def test_a_completion_run_trains_and_its_preview_shows_the_mask(world, target, tmp_path, capfd, monkeypatch):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"def load_{n}(", "completion": f"table, size={n}):"} for n in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = DraftRecipe(rows=2, length=32, loss_on="completion")
    figures = train_draft(target, path, tmp_path / "out", recipe, Budget(tokens=4 * 64), prompts=0)
    assert figures["steps"] == 4
    words = ["train", "--target", world["target"], "--data", path, "--out", tmp_path / "none", "--preview"]
    code, out, _ = run(capfd, monkeypatch, *words, "--length", 32, "--loss-on", "completion")
    assert code == 0
    assert out.startswith("32 tokens, ")
    assert ":\u27e7" not in out.splitlines()[0]
    assert "(\u27e6table, size=" in out
    assert not (tmp_path / "none").exists()
    code, out, _ = run(capfd, monkeypatch, *words, "--length", 32)
    assert out.startswith("32 tokens, 32 learned (100%)")
