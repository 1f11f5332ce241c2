"""The command line: what works, and bad input: exit code 2, one sentence, no traceback."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glidecape import SamplingParams, cli, generate
from glidecape.core.stats import loops, repetition
from glidecape.drafting.methods import METHODS
from glidecape.drafts.card import STATE
from glidecape.target.target import Target

ROOT = Path(__file__).resolve().parents[1]


def run(capfd, monkeypatch, *words, stdin=None):
    """Exit code, standard output and standard error of `glidecape WORDS`, in this process."""
    import io

    monkeypatch.setattr(sys, "argv", ["glidecape", *map(str, words)])
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    out, err = capfd.readouterr()
    return code, out, err


def pair(world, draft="glide"):
    return ["--target", world["target"], "--draft", world[draft], "--dtype", "float32", "--max-new-tokens", "16"]


def test_every_method_gives_the_same_text(world, capfd, monkeypatch):
    texts = {}
    for method in (m for m in METHODS if not m.startswith("vanilla")):
        base = method.split("+")[0]
        words = [
            "generate",
            *pair(world, base if base in world else "glide"),
            "--method",
            method,
            "-p",
            "def load_table(",
            "--json",
            "--ignore-eos",
        ]
        code, out, _ = run(capfd, monkeypatch, *words)
        assert code == 0
        line = json.loads(out)
        assert len(line["tokens"]) == len(line["origins"]) == 16
        texts[method] = line["text"]
    assert len(set(texts.values())) == 1


def test_sampling_options_reach_the_decoder_and_a_stop_string_is_left_out(world, capfd, monkeypatch):
    words = ["generate", *pair(world), "-p", "def load_table(", "--ignore-eos", "--temperature", 1, "--seed", 5]
    plain = json.loads(run(capfd, monkeypatch, *words, "--json")[1])
    for option in (
        ["--min-p", 0.9],
        ["--repetition-penalty", 3],
        ["--presence-penalty", 5],
        ["--frequency-penalty", 5],
        ["--logit-bias", f"{plain['tokens'][0]}=-100", "--logit-bias", "7=1"],
    ):
        assert json.loads(run(capfd, monkeypatch, *words, *option, "--json")[1])["tokens"] != plain["tokens"], option
    text = plain["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut = text[: text.index(stop)]
    for method in ("plain", "lookup", "glide+beam+svip"):
        chosen = [*words, "--stop", stop, "--stop", "no such text", "--method", method]
        line = json.loads(run(capfd, monkeypatch, *chosen, "--json")[1])
        assert (line["text"], line["finish"]) == (cut, "stop")
        assert len(line["tokens"]) == len(line["origins"]) < 16
        assert run(capfd, monkeypatch, *chosen)[1] == f"def load_table({cut}\n"
    first = ["--stop-token", plain["tokens"][0]]
    assert len(json.loads(run(capfd, monkeypatch, *words, *first, "--json")[1])["tokens"]) == 1
    line = json.loads(run(capfd, monkeypatch, *words, *first, "--min-new-tokens", 6, "--json")[1])
    assert len(line["tokens"]) >= 6


def test_svip_is_fitted_on_calibration_prompts(world, capfd, monkeypatch, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "def save_"}\n{"prompt": "for item in"}\n')
    words = ["generate", *pair(world), "-p", "def", "--svip-fit", tmp_path / "p.jsonl"]
    code, _, err = run(capfd, monkeypatch, *words, "--method", "glide+cape+svip")
    assert code == 0
    assert "[svip threshold 0." in err
    only_sentence(*run(capfd, monkeypatch, *words, "--method", "glide")[::2], r"needs \+svip")


def test_vanilla_batches_files_and_standard_input(world, capfd, monkeypatch, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "def save_"}\n{"prompt": "for item in"}\n{"prompt": "def"}\n')
    words = [
        "generate",
        "--target",
        world["target"],
        "--draft",
        world["lm"],
        "--method",
        "vanilla",
        "--dtype",
        "float32",
    ]
    code, out, _ = run(capfd, monkeypatch, *words, "-f", tmp_path / "p.jsonl", "--batch", 2, "--json")
    assert code == 0
    assert len(out.splitlines()) == 3
    code, out, err = run(capfd, monkeypatch, *words, "--max-new-tokens", 8, stdin="def merge_")
    assert code == 0
    assert out.startswith("def merge_")
    assert "tokens/s" in err


BAD = {
    "missing target": (["--target", "nowhere/at/all"], "no model|cannot load"),
    "no config": (["--target", "{empty}"], "config.json"),
    "a file for a model": (["--target", __file__], "is a file: name the model's folder"),
    "missing draft": (["--draft", "./nowhere"], "no draft folder at ./nowhere: check the path, train a draft"),
    "mistyped draft": (["--draft", f"{Path.cwd().name}/../{Path.cwd().name}"], "no draft folder"),
    "a file for a draft": (["--draft", __file__], "is a file: name the folder that holds it"),
    "empty draft folder": (["--draft", "{empty}"], "no draft in .*: it holds neither"),
    "unknown method": (["--method", "glyde"], "unknown method"),
    "expanded plain": (["--method", "plain+cape"], "drafts nothing"),
    "two stop policies": (["--method", "glide+svip+heuristic"], "more than one stop policy"),
    "no beams": (["--method", "glide+beam", "--beams", "0"], "1 to 64 beams"),
    "unknown entropy": (["--method", "glide+svip", "--svip-over", "worst"], "best, mean, min"),
    "bad bias": (["--logit-bias", "seven"], "ID=NUMBER"),
    "bias of no token": (["--logit-bias", "999999=1"], "outside the vocabulary"),
    "bad min-p": (["--min-p", "2"], "min_p must be"),
    "more tokens than most": (["--min-new-tokens", "17"], "from 0 to max_new_tokens 16"),
    "no n-gram": (["--method", "lookup", "--lookup-ngram", "0"], "at least 1"),
    "wrong kind of draft": (["--method", "vanilla"], "and this is a GliDe draft"),
    "empty prompt": (["--prompt", " "], "prompt 1 is empty"),
    "long prompt": (["--prompt", "def load(" * 200], "context of 192"),
    "unknown dtype": (["--dtype", "float12"], "unknown dtype"),
    "unknown device": (["--device", "abacus"], "cannot be used"),
    "bad bins": (["--cape-bins", "7,x"], "cape-bins"),
    "too many siblings": (["--cape-bins", "99"], "bins"),
    "negative temperature": (["--temperature", "-1"], "temperature"),
    "bad top-p": (["--top-p", "0"], "top_p"),
    "negative threshold": (["--method", "glide+svip", "--svip-threshold", "-1"], "threshold"),
    "draft of no token": (["--draft-length", "0", "--method", "glide"], "at least 1"),
    "unknown sampling": (["--sampling", "magic"], "sampling"),
}


def only_sentence(code, err, message):
    assert code == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_to_generate_is_one_sentence(case, world, capfd, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    words, message = BAD[case]
    words = [w.format(empty=tmp_path / "empty") if w == "{empty}" else w for w in words]
    code, _, err = run(capfd, monkeypatch, "generate", *pair(world), "--prompt", "def", *words)
    only_sentence(code, err, message)


def test_a_draft_is_needed_and_must_belong_to_the_target(world, capfd, monkeypatch, tmp_path):
    words = ["generate", "--target", world["target"], "--prompt", "def"]
    only_sentence(*run(capfd, monkeypatch, *words, "--method", "glide")[::2], "needs a GliDe draft")
    other = tmp_path / "other"
    shutil.copytree(world["target"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"num_attention_heads": 4, "head_dim": 8, "num_key_value_heads": 4})
    )
    words = ["generate", "--target", other, "--draft", world["glide"], "--prompt", "def"]
    only_sentence(*run(capfd, monkeypatch, *words)[::2], "another shape")
    (other / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:200])
    only_sentence(*run(capfd, monkeypatch, *words)[::2], "torn|cannot load")


TRAIN = {
    "unknown loss": (["--loss", "huge"], "unknown loss"),
    "unknown kind": (["--kind", "duck"], "unknown kind"),
    "unknown preset": (["--preset", "mine"], "no preset"),
    "unknown optimizer": (["--optimizer", "sgd"], "unknown optimizer"),
    "missing data": (["--data", "nowhere.jsonl"], "no data at"),
    "a draft for a model": (["--target", "{draft}"], "no config.json.* a draft's folder belongs to --draft"),
}


@pytest.mark.parametrize("case", list(TRAIN))
def test_bad_input_to_train_is_one_sentence(case, world, capfd, monkeypatch, tmp_path):
    words, message = TRAIN[case]
    base = ["train", "--target", world["target"], "--data", world["corpus"], "--out", tmp_path / "o", "--tokens", "64"]
    code, _, err = run(capfd, monkeypatch, *base, *(word.format(draft=world["glide"]) for word in words))
    only_sentence(code, err, message)


MISSING = {
    "a draft": ["generate", "{target}", "--draft", "./nowhere", "--method", "glide", "-p", "def"],
    "a draft to certify": ["certify", "{target}", "--draft", "glide=./nowhere"],
    "a draft to measure": ["bench", "{target}", "--draft", "glide=./nowhere", "--suite", "own:1"],
    "data": ["train", "{target}", "--data", "nowhere.jsonl", "--output", "{out}", "--tokens", "64"],
    "data of a study": ["study", "{target}", "--data", "nowhere.jsonl", "--output", "{out}", "--tokens", "64"],
    "data to plan for": ["plan", "{target}", "--data", "nowhere.jsonl"],
    "prompts to continue": ["regenerate", "{target}", "--data", "nowhere.jsonl", "--output", "{out}.jsonl"],
}


@pytest.mark.parametrize("case", list(MISSING))
def test_what_is_missing_is_noticed_before_a_model_is_loaded(case, world, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(Target, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    words = [word.format(target=world["target"], out=tmp_path / "out") for word in MISSING[case]]
    only_sentence(*run(capfd, monkeypatch, *words)[::2], r"no (draft folder|data) at (\./)?nowhere")


def test_a_draft_whose_training_has_not_ended_is_told_from_one_that_is_none(world, capfd, monkeypatch, tmp_path):
    (tmp_path / STATE).mkdir()
    words = ["generate", world["target"], "--draft", tmp_path, "-p", "def"]
    only_sentence(*run(capfd, monkeypatch, *words)[::2], "has not ended: give its `glidecape train` command again")
    words += ["--method", "glide"]
    only_sentence(*run(capfd, monkeypatch, *words)[::2], "has not ended")


@pytest.mark.parametrize("method", ["usual", "auto", "plain", "lookup", "lookup+auto", "glide"])
def test_a_draft_alone_is_enough_with_every_method(method, world, capfd, monkeypatch):
    words = ["generate", world["glide"], "--method", method, "-p", "def load_table(", "--max-new-tokens", 4]
    code, out, err = run(capfd, monkeypatch, *words)
    assert (code, out.startswith("def load_table(")) == (0, True), err


def test_training_without_an_end_or_into_a_file_is_one_sentence(world, capfd, monkeypatch, tmp_path):
    words = ["train", "--target", world["target"], "--data", world["corpus"], "--out"]
    only_sentence(*run(capfd, monkeypatch, *words, tmp_path / "o")[::2], "--tokens or --minutes")
    (tmp_path / "file").write_text("in the way")
    only_sentence(*run(capfd, monkeypatch, *words, tmp_path / "file", "--tokens", "64")[::2], "is a file, and a folder")
    words = ["train-target", "--data", tmp_path, "--out", tmp_path / "t", "--tokens", "64"]
    only_sentence(*run(capfd, monkeypatch, *words)[::2], "no corpus")


def test_help_names_every_command_and_importing_is_light():
    script = "import sys, glidecape; assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", script], check=True)
    help_text = subprocess.run(
        [sys.executable, "-m", "glidecape.cli", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("generate", "train", "train-target", "bench", "report", "demo", "data"):
        assert command in help_text.stdout


def test_the_demo_runs_on_the_shipped_pair_in_plain_lines_where_it_is_piped(capfd, monkeypatch):
    if not (ROOT / "models" / "pysource" / "target" / "config.json").is_file():
        pytest.skip("the shipped pair is not in this checkout")
    code, out, _ = run(capfd, monkeypatch, "demo", "--max-new-tokens", 4)
    assert code == 0
    assert "NO" not in "".join(out.split("outputs equal")[1:])
    assert out.count("  yes") == 6  # three racers, greedily and sampled
    prompts = json.loads((ROOT / "src" / "glidecape" / "demo_prompts.json").read_text())
    headings = [line for line in out.splitlines() if line.startswith("--- prompt ")]
    assert len(headings) == 6 * len(prompts)
    assert headings[0] == "--- prompt 1, greedy, plain"
    assert headings[-1] == f"--- prompt {len(prompts)}, T=0.8, seed 7, glide+cape"


def test_what_the_demo_writes_does_not_loop(target):
    prompts = json.loads((ROOT / "src" / "glidecape" / "demo_prompts.json").read_text())
    params = SamplingParams(max_new_tokens=96, ignore_eos=True)
    for one in generate(target, [target.encode(prompt) for prompt in prompts], params=params):
        assert not loops(one.tokens)
        assert repetition(one.tokens) < 0.25
