"""Prompts keep what they say, and options do what they say or are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from glidecape import fit as fit_module
from glidecape.batch.text import Prompt
from glidecape.commands import effects
from glidecape.commands.shared import opened, read_prompts
from glidecape.core.params import SamplingParams
from glidecape.drafting.drafter import NoDraft
from glidecape.drafting.methods import METHODS
from glidecape.engine import engine as engine_module
from glidecape.engine.decode import generate
from glidecape.errors import CheckpointError, DataError, InputError
from glidecape.files import only_writer
from glidecape.target.target import Target
from test_command_line import only_sentence, run

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.fixture(scope="module")
def target(world) -> Target:
    target = Target.from_pretrained(world["target"], probe=False, pack=False)
    target.tokenizer.chat_template = TEMPLATE
    return target


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- prompts


def test_a_conversation_keeps_its_roles(target: Target, tmp_path: Path) -> None:
    rows = [{"messages": TALK}, {"messages": [*TALK, {"role": "assistant", "content": "four"}]}, {"text": "once"}]
    path = write(tmp_path / "chats.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    whole, without_answer, plain = read_prompts(None, path)
    assert whole == without_answer
    decoded = target.tokenizer.decode(whole.ids(target, chat=True)).replace(" ", "")
    assert decoded == "<system>bebrief<user>one<assistant>two<user>three<answer>"
    assert target.tokenizer.decode(plain.ids(target, chat=True)) == "<user>once<answer>"
    assert target.tokenizer.decode(plain.ids(target), skip_special_tokens=True) == "once"


def test_the_prompts_that_svip_is_fitted_on_go_through_the_template_too(world, target, monkeypatch, tmp_path, capfd):
    seen = []

    def fit(target, drafter, prompts, params=None):
        seen.extend(prompts)
        raise InputError("that is all")

    monkeypatch.setattr(fit_module, "with_fitted_threshold", fit)
    monkeypatch.setattr(Target, "from_pretrained", classmethod(lambda cls, *a, **k: target))
    monkeypatch.setattr(
        "glidecape.interface.load.load_draft", lambda *a: type("Any", (), {"kind": "glide", "max_lag": 8})()
    )
    path = write(tmp_path / "chats.jsonl", json.dumps({"messages": TALK}))
    words = [
        "--target",
        "x",
        "--draft",
        world["glide"],
        "--method",
        "glide+svip",
        "--svip-fit",
        path,
        "--chat",
        "-p",
        "hi",
    ]
    only_sentence(*run(capfd, monkeypatch, "generate", *words)[::2], "that is all")
    assert target.tokenizer.decode(seen[0]).startswith("<system>")


def test_a_byte_order_mark_and_a_json_list_are_read(tmp_path: Path) -> None:
    row = json.dumps({"text": "once"})
    marked = write(tmp_path / "marked.jsonl", b"\xef\xbb\xbf" + row.encode())
    listed = write(tmp_path / "listed.json", f"[{row}, {row}]")
    assert read_prompts(None, marked) == [Prompt("once")]
    assert read_prompts(None, listed) == [Prompt("once")] * 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 5}', r"row 2: its prompt is no text, but int"),
        ("p.jsonl", "[1]", r"row 1 has no text, prompt"),
        ("p.jsonl", '{"text": "a"}\n{', r"row 2 is not readable"),
        ("p.jsonl", "[" * 100_000, r"row 1 is not readable"),
        ("p.jsonl", b"\xff\xfe{}", r"not readable as UTF-8"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', r"row 1: each of its messages needs"),
        ("p.json", '{"text": "a"}', r"holds no JSON list of rows, but dict: write one, or \.jsonl"),
        ("p.json", '["a", {"text": "b"}]', r"row 1 has no text"),
        ("p.csv", "text\nonce\n", r"is a table \(\.csv\), which is not read: write its rows as \.jsonl"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused_with_the_row(name, text, message, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(None, write(tmp_path / name, text))


# --- what the library takes


def test_one_prompt_needs_no_list(target: Target) -> None:
    params = SamplingParams(max_new_tokens=4)
    (text,), (ids,) = (
        generate(target, "once upon", params=params),
        generate(target, target.encode("once upon"), None, params),
    )
    assert text.tokens == ids.tokens
    assert len(generate(target, ["once", "upon"], params=params)) == 2
    assert generate(target, ["once upon"], params=params)[0].tokens == text.tokens


def test_a_name_is_no_drafter(target: Target) -> None:
    with pytest.raises(InputError, match=r"make_drafter\(method, draft\), and this is 'glide'"):
        generate(target, "once", "glide")  # type: ignore[arg-type]


def test_rows_under_one_set_of_options_get_noise_of_their_own(target: Target) -> None:
    params = SamplingParams(1.0, seed=7, max_new_tokens=12, ignore_eos=True)
    found = [one.tokens for one in generate(target, ["once"] * 3, params=params)]
    assert len({tuple(tokens) for tokens in found}) == 3
    each = [SamplingParams(1.0, seed=7 + i, max_new_tokens=12, ignore_eos=True) for i in range(3)]
    assert found == [one.tokens for one in generate(target, ["once"] * 3, params=each)]
    highest = SamplingParams(1.0, seed=2**63 - 1, max_new_tokens=2)
    assert len(generate(target, ["once"] * 2, params=highest)) == 2


def test_a_long_list_is_decoded_a_batch_at_a_time(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    most = []
    run_round = engine_module.run_round

    def counted(target, drafter, batch, stats=None):
        most.append(len(batch.rows))
        return run_round(target, drafter, batch, stats)

    monkeypatch.setattr("glidecape.engine.engine.run_round", counted)
    prompts = [[3 + i, 4, 5][: 1 + i % 3] for i in range(7)]
    params = [SamplingParams(1.0, seed=i, max_new_tokens=2 + i, ignore_eos=True) for i in range(7)]
    bounded = generate(target, prompts, NoDraft(), params, batch=3)
    assert max(most) == 3
    assert [one.tokens for one in bounded] == [one.tokens for one in generate(target, prompts, NoDraft(), params)]
    with pytest.raises(InputError, match="at least 1 prompt"):
        generate(target, prompts, batch=0)


# --- options


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("glide+cape", ["--svip-threshold", "0.4"], r"--svip-threshold has no effect .* needs \+svip"),
        ("glide+cape", ["--svip-over", "mean"], "--svip-over has no effect"),
        ("glide", ["--svip-cap", "9"], r"needs \+svip or \+heuristic"),
        ("glide", ["--cape-bins", "small"], r"needs \+cape"),
        ("glide", ["--beams", "2"], r"needs \+beam"),
        ("glide", ["--tree-top", "2"], r"needs \+tree or \+static"),
        ("glide", ["--lookup-ngram", "2"], "needs lookup"),
        ("glide+svip", ["--draft-length", "4"], "needs a fixed length"),
    ],
)
def test_an_option_that_its_method_does_not_use_is_refused(method, words, message, monkeypatch, capfd) -> None:
    code, _, err = run(capfd, monkeypatch, "generate", "--target", "x", "-p", "hi", "--method", method, *words)
    only_sentence(code, err, message)


def test_an_option_is_used_by_every_method_that_names_it() -> None:
    assert effects.uses_of("plain") == set()
    for method in METHODS:
        uses = effects.uses_of(method)
        assert uses <= set(effects.USES.values()), method
        assert ("+svip" in uses) == ("svip" in method)
        assert ("+cape" in uses) == ("cape" in method)
    assert "+tree or +static" in effects.uses_of("eagle") & effects.uses_of("medusa") & effects.uses_of("glide+tree")
    assert "+tree or +static" not in effects.uses_of("eagle+chain")


def test_options_of_sampling_are_noted_when_decoding_is_greedy(world, monkeypatch, capfd) -> None:
    words = ["generate", "--target", world["target"], "-p", "def", "--method", "plain", "--max-new-tokens", 2]
    _, _, err = run(capfd, monkeypatch, *words, "--top-k", 5, "--seed", 3)
    assert "note: --top-k, --seed: no effect at temperature 0" in err
    assert "no effect" not in run(capfd, monkeypatch, *words, "--top-k", 5, "--temperature", 1)[2]
    assert "so --draft is not loaded" in run(capfd, monkeypatch, *words, "--draft", world["glide"])[2]
    assert "so revision main has no effect" in run(capfd, monkeypatch, *words, "--revision", "main")[2]


def test_certify_notes_what_has_no_effect(world, monkeypatch, capfd) -> None:
    words = ["certify", world["target"], "--methods", "plain", "--max-new-tokens", 2, "--draft", world["glide"]]
    err = run(capfd, monkeypatch, *words, "--seed", 3)[2]
    assert "method plain needs no draft model, so --draft is not loaded" in err
    assert "note: --seed: no effect at temperature 0" in err


def test_a_draft_length_beyond_the_drafts_lag_is_noted(world, monkeypatch, capfd) -> None:
    words = ["generate", "--target", world["target"], "--draft", world["glide"], "--method", "glide", "-p", "def"]
    assert "so it drafts no more" in run(capfd, monkeypatch, *words, "--draft-length", 100, "--max-new-tokens", 2)[2]


# --- where output goes


def test_a_file_in_the_place_of_a_folder_is_noticed_before_any_work(tmp_path: Path) -> None:
    path = write(tmp_path / "draft", "x")
    with (
        pytest.raises(CheckpointError, match=r"draft is a file, and a folder is to be written"),
        only_writer(path),
    ):
        raise AssertionError("it was let in")
    with (
        pytest.raises(CheckpointError, match=r"is a folder, and a file is to be written"),
        only_writer(tmp_path, folder=False),
    ):
        raise AssertionError("it was let in")


def test_a_place_that_cannot_be_written_is_not_taken_for_a_busy_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot write to"), only_writer(write(tmp_path / "file", "x") / "below"):
        raise AssertionError("it was let in")
    if os.geteuid() == 0:
        place = Path("/proc/glidecape/draft")  # where not even root may write
    else:
        place = tmp_path / "closed" / "draft"
        place.parent.mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="cannot write to"), only_writer(place):
        raise AssertionError("it was let in")


@pytest.fixture
def unloadable(monkeypatch) -> None:
    """No model may be loaded."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("glidecape.interface.load.load_target", load)


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize("command", ["generate", "certify"])
def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    command, world, monkeypatch, capfd, tmp_path: Path
) -> None:
    words = [command, world["target"], "--draft", world["glide"]] + (["--prompt", "x"] if command == "generate" else [])
    for place, message in (
        (tmp_path, "is a folder, and a file is to be written: name another --output"),
        (write(tmp_path / "file", "x") / "below", "cannot write to"),
    ):
        code, _, err = run(capfd, monkeypatch, *words, "--output", place)
        only_sentence(code, err, message)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize("command", ["bench", "measure svip", "train", "study", "regenerate"])
def test_a_folder_or_data_file_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    command, world, monkeypatch, capfd, tmp_path: Path
) -> None:
    others = {
        "bench": ["--methods", "plain", "--suite", "own"],
        "measure svip": ["--draft", world["glide"], "--suite", "own"],
        "train": ["--data", world["corpus"], "--tokens", "1e3"],
        "study": ["--data", world["corpus"], "--tokens", "1e3", "--row", "length=8"],
        "regenerate": ["--data", world["corpus"]],
    }
    place = write(tmp_path / "file", "x") / ("below.jsonl" if command == "regenerate" else "below")
    code, _, err = run(capfd, monkeypatch, *command.split(), world["target"], *others[command], "--output", place)
    only_sentence(code, err, "cannot write to")


def test_a_device_is_written_to_and_not_replaced_by_a_file(tmp_path: Path) -> None:
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    for place in (link, Path(os.devnull)):
        with opened(place) as out:
            print("text", file=out)
    assert link.is_symlink()
    assert Path(os.devnull).is_char_device()
