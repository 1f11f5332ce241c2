"""What cannot end well is refused before the training, not after it; and Muon is kept from embeddings and heads."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from glidecape import cli
from glidecape.errors import CheckpointError, DataError, InputError
from glidecape.files import write_atomic
from glidecape.target.target import Target
from glidecape.train import losses
from glidecape.train.corpus import build_pysource
from glidecape.train.draft import make_draft, train_draft
from glidecape.train.loop import Budget, Clock, fit, hidden_matrices
from glidecape.train.recipe import DraftRecipe, TargetShape, Windowing
from glidecape.train.rows import pieces_of
from glidecape.train.study import run_study
from glidecape.train.study_rows import study_rows
from glidecape.train.target import new_model, train_target, valid_loss
from states import STATE
from test_command_line import run
from tinyworld import write_packages

SHAPE = TargetShape(layers=1, width=16, ffn=16, heads=2, kv_heads=2, context=64)
WINDOWS = Windowing(length=32, rows=2, long_share=0.0)


@pytest.fixture
def target(world):
    return Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)


@pytest.fixture
def short(world, tmp_path):
    """A corpus whose held-out text is too short to evaluate on."""
    folder = shutil.copytree(world["corpus"], tmp_path / "short")
    np.fromfile(folder / "valid.bin", dtype=np.uint16)[:200].tofile(folder / "valid.bin")
    return folder


@pytest.mark.parametrize(
    ("changes", "vocabulary"),
    [
        ({"embedding": "own"}, {"embed.weight", "head.weight"}),
        ({"preset": "paper"}, {"embed.weight", "head.weight"}),
        ({"read": "mix"}, {"layers.0.cross.mix"}),
        ({"kind": "lm"}, {"model.embed_tokens.weight"}),
        ({"kind": "eagle"}, set()),
        ({"kind": "medusa"}, set()),
    ],
)
def test_muon_has_the_matrices_between_hidden_states(changes, vocabulary, target):
    module = make_draft(target, DraftRecipe(muon=True, **changes))
    inner = {id(p) for p in hidden_matrices(module)}
    matrices = {name for name, p in module.named_parameters() if p.ndim == 2}
    assert {name for name, p in module.named_parameters() if p.ndim == 2 and id(p) not in inner} == vocabulary
    assert len(inner) == len(matrices) - len(vocabulary) > 0


def test_muon_leaves_gpt2_s_embeddings_alone():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    inner = {id(p) for p in hidden_matrices(model)}
    names = {name for name, p in model.named_parameters() if id(p) in inner}
    assert names == {
        f"transformer.h.0.{part}.weight" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


@pytest.mark.parametrize("limits", [(-5, None), (0, None), (None, -1.0), (None, float("nan")), (None, None), (10, 0.0)])
def test_a_budget_has_an_end(limits):
    with pytest.raises(InputError, match="at least 1 token"):
        Budget(*limits)


def test_tokens_of_the_command_line_are_a_number(world, tmp_path, capfd, monkeypatch):
    common = ["train", "--target", world["target"], "--data", world["corpus"], "--out", tmp_path / "draft"]
    for tokens, said in (("0.5", "at least 1 token"), ("inf", "a number such as 4e6"), ("nan", "a number such as 4e6")):
        code, _, err = run(capfd, monkeypatch, *common, "--tokens", tokens)
        assert (code, said in err) == (2, True), err
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize(
    "wrong", [{"rate": -1.0}, {"rate": float("nan")}, {"seed": -1}, {"max_lag": -2}, {"length": 0}, {"rows": 0}]
)
def test_fields_of_a_recipe_are_checked(wrong):
    with pytest.raises(InputError, match=r"positive number|at least 2 tokens"):
        DraftRecipe(**wrong)


def test_a_kind_brings_its_own_loss():
    rows = study_rows(DraftRecipe(muon=True), [], ["e=kind:eagle", "k=kind:eagle,loss:kl"])
    assert (rows["e"].loss, rows["k"].loss) == ("feature", "kl")
    assert study_rows(DraftRecipe(kind="eagle"), [], ["g=kind:glide"])["g"].loss == "kl"
    assert DraftRecipe(loss="ce").changed(kind="glide-no-cross").loss == "ce"


def test_too_little_held_out_text_is_said_before_training(target, short, world, tmp_path):
    budget = Budget(tokens=64)
    with pytest.raises(DataError, match="200 held-out tokens"):
        train_draft(target, short, tmp_path / "draft", DraftRecipe(length=32, rows=2), budget)
    with pytest.raises(DataError, match="200 held-out tokens"):
        run_study(target, short, tmp_path / "study", {"baseline": DraftRecipe(length=32, rows=2)}, budget)
    beside = DraftRecipe(rows=2, length=32)
    with pytest.raises(DataError, match="200 held-out tokens"):
        train_target(short, tmp_path / "pair", TargetShape(1, 16, 16, 2, 2, 192), budget, WINDOWS, draft=beside)
    assert not list(tmp_path.rglob(STATE))


def test_a_target_of_a_short_context_is_evaluated_on_short_prompts(world, tmp_path):
    train_target(world["corpus"], tmp_path / "target", SHAPE, Budget(tokens=128), WINDOWS)
    short = Target.from_pretrained(tmp_path / "target", dtype=torch.float32, pack=False)
    made = train_draft(
        short, world["corpus"], tmp_path / "draft", DraftRecipe(length=32, rows=2), Budget(tokens=128), prompts=1
    )
    assert made["acceptance_length_greedy"] >= 1


def test_windows_that_hold_no_lag_are_refused(target, world, tmp_path):
    with pytest.raises(InputError, match="hold no lag of 32"):
        train_draft(
            target, world["corpus"], tmp_path, DraftRecipe(length=32, max_lag=32, lags="balanced"), Budget(tokens=64)
        )


def test_a_target_is_not_resumed_with_other_text(world, tmp_path):
    other = shutil.copytree(world["corpus"], tmp_path / "other")
    np.fromfile(other / "train.bin", dtype=np.uint16)[::-1].tofile(other / "train.bin")
    train_target(world["corpus"], tmp_path / "target", SHAPE, Budget(tokens=128), WINDOWS)
    with pytest.raises(CheckpointError, match="started with data"):
        train_target(other, tmp_path / "target", SHAPE, Budget(tokens=256), WINDOWS)


def test_windows_that_the_text_or_the_model_has_no_room_for_are_refused_at_once(world, tmp_path):
    long = TargetShape(1, 16, 16, 2, 2, 10**6)
    with pytest.raises(DataError, match="fewer than one window of 100000"):
        train_target(world["corpus"], tmp_path, long, Budget(tokens=10**5), Windowing(32, 2, 100_000))
    with pytest.raises(InputError, match="longer than the model's context of 64"):
        train_target(world["corpus"], tmp_path, SHAPE, Budget(tokens=128), Windowing(128, 2))
    assert not (tmp_path / STATE).exists()


@pytest.mark.parametrize("wrong", [{"heads": 0}, {"width": 6, "heads": 2}, {"layers": 0}])
def test_shapes_that_cannot_be_are_refused(wrong):
    with pytest.raises(InputError, match=r"1 or more|even multiple"):
        new_model(TargetShape(**wrong), None)


def test_a_diverged_run_is_not_saved():
    module = torch.nn.Linear(1, 1)
    saved = []
    with pytest.raises(InputError, match="the loss is nan at step 1: lower the learning rate"):
        fit(
            [module],
            [],
            Budget(tokens=9),
            lambda n: ([module.weight.sum() * float("nan")], 1),
            Clock(),
            saved.append,
            0.0,
        )
    assert not saved


def test_a_misspelt_package_is_not_trained_on(tmp_path):
    write_packages(tmp_path / "site")
    with pytest.raises(DataError, match="no package packge1 to hold out"):
        build_pysource(tmp_path / "corpus", [tmp_path / "site"], ("package3", "packge1"))


def test_end_of_text_spelt_in_a_source_is_no_end_of_text(tmp_path):
    write_packages(tmp_path / "site")
    (tmp_path / "site/package0/odd.py").write_text('END = "<|endoftext|>"\n' * 60)
    counts = build_pysource(tmp_path / "corpus", [tmp_path / "site"], ("package1",), vocab_size=400)
    ids = np.concatenate([np.fromfile(tmp_path / f"corpus/{part}.bin", dtype=np.uint16) for part in ("train", "valid")])
    assert int((ids == 0).sum()) == counts["files"] == 25


def test_the_validation_loss_is_the_mean_over_tokens(world):
    model = AutoModelForCausalLM.from_pretrained(world["target"], dtype=torch.float32)
    tokens = np.fromfile(world["corpus"] / "train.bin", dtype=np.uint16)[: 9 * 32]
    each = [valid_loss(model, tokens[i * 32 : (i + 1) * 32], 32) for i in range(9)]
    assert valid_loss(model, tokens, 32) == pytest.approx(sum(each) / 9, rel=1e-5)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline] . x")]
)
def test_whatever_a_full_disk_is_called_the_old_file_stays(error, tmp_path):
    def write(path):
        path.write_text("half")
        raise error

    (tmp_path / "file").write_text("whole")
    with pytest.raises(
        CheckpointError, match=r"could not write .*(No space|enforce fail).*; the last good one is kept"
    ):
        write_atomic(tmp_path / "file", write)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "whole"


def test_torch_s_word_for_no_memory_is_one_sentence(monkeypatch, capsys):
    def fails():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err.startswith("error: out of memory")


class Template:
    """A tokenizer whose template drops what was thought once it is past."""

    chat_template = "there"

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        text = ""
        for i, m in enumerate(messages):
            thought = "<think>hm</think>" if m["role"] == "assistant" and i == len(messages) - 1 else ""
            text += f"<{m['role']}>{thought}{m['content']}<end>"
        return text + ("<assistant>" if add_generation_prompt else "")


def test_a_talk_that_a_template_rewrites_at_its_end_is_refused():
    turns = [{"role": r, "content": c} for r, c in (("user", "Q1"), ("assistant", "A1"), ("user", "Q2"))]
    with pytest.raises(DataError, match=r"row 1: .* rewrites earlier turns when message 3 is added"):
        pieces_of({"messages": turns}, "row 1", Template())


def test_the_header_of_a_talk_that_the_assistant_begins_is_not_learned():
    turns = [{"role": "assistant", "content": "Hello"}]
    template = Template()
    template.apply_chat_template = lambda messages, **_: "".join(f"<assistant>{m['content']}<end>" for m in messages)
    assert pieces_of({"messages": turns}, "row 1", template) == [
        ("", False),
        ("<assistant>", False),
        ("Hello<end>", True),
    ]


def test_evaluating_a_loss_makes_no_gradient(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: calls.append(1))
    draft = torch.randn(1, 3, 5, requires_grad=True)
    with torch.no_grad():
        losses.distillation_loss(draft, torch.randn(1, 3, 5), torch.ones(1, 3).long(), torch.ones(1, 3).bool(), "kl")
    assert not calls


def test_a_torn_archive_is_named(tmp_path, target):
    import gzip

    packed = bytearray(gzip.compress(json.dumps({"text": "x" * 3000}).encode()))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz row 0 is not readable"):
        train_draft(target, tmp_path / "a.jsonl.gz", tmp_path / "out", DraftRecipe(), Budget(tokens=1))
