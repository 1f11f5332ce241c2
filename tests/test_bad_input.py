"""Bad input, one by one: a documented exception in Python, one sentence and exit code 2 on the command line.

| what is wrong | exception | noticed |
|---|---|---|
| a draft that was trained for another target | MismatchError | loading the draft |
| a draft LM with another vocabulary, or another tokenizer of the same size | MismatchError | loading the draft |
| a prompt longer than the context | InputError | before the first forward |
| a token id out of range: of a prompt, to stop at, to bias | InputError | before the first forward |
| weights that are not numbers | UnsupportedError | loading the target |
| logits that are not numbers, later on | UnsupportedError | before a token is made of them |
| a torn checkpoint: draft, draft LM, target | CheckpointError | loading it |
| a checkpoint of a newer format | CheckpointError | loading it |
| a checkpoint that holds pickled code, which is not run | CheckpointError | loading it |
"""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from glidecape import cli
from glidecape.core.params import SamplingParams
from glidecape.drafts.checkpoint import WEIGHTS, read_card
from glidecape.engine.decode import generate
from glidecape.errors import CheckpointError, InputError, MismatchError, UnsupportedError
from glidecape.target.target import Target, TargetOutput
from test_command_line import only_sentence, run


def options(world, **changes):
    given = {"target": world["target"], "draft": world["glide"], "prompt": "def load_table(", "method": "glide"}
    given |= {"dtype": "float32", "max-new-tokens": 16} | changes
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def copied(world, kind, folder):
    shutil.copytree(world[kind], folder / kind)
    return folder / kind


def edited(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_target(world, folder):
    target = copied(world, "target", folder)
    edited(target / "config.json", num_attention_heads=4, num_key_value_heads=4, head_dim=8)
    return options(world, target=target)


def other_vocabulary(world, folder):
    draft = copied(world, "lm", folder)
    weights = load_file(draft / "model.safetensors")
    size = json.loads((draft / "config.json").read_text())["vocab_size"]
    cut = {name: w[:-8].clone() if w.shape[0] == size else w for name, w in weights.items()}
    save_file(cut, draft / "model.safetensors", {"format": "pt"})
    edited(draft / "config.json", vocab_size=size - 8)
    return options(world, draft=draft, method="vanilla")


def other_tokenizer(world, folder):
    draft = copied(world, "lm", folder)
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    names = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    a, b = names[60], names[61]  # two letters of the alphabet change places
    vocab = tokenizer["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    return options(world, draft=draft, method="vanilla")


def too_long(world, folder):
    return options(world, prompt="def load(" * 200)


def out_of_range(world, folder):
    """A tokenizer that knows a word more than the model."""
    target = copied(world, "target", folder)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    word = tokenizer["added_tokens"][0] | {"id": 1000, "content": "<new>", "special": True}
    (target / "tokenizer.json").write_text(json.dumps(tokenizer | {"added_tokens": [*tokenizer["added_tokens"], word]}))
    return options(world, target=target, prompt="def <new>", method="plain")


def not_numbers(world, folder):
    target = copied(world, "target", folder)
    weights = load_file(target / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name][0, 0] = float("nan")
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return options(world, target=target, method="plain")


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def torn_draft(world, folder):
    cut_in_half(copied(world, "glide", folder) / WEIGHTS)
    return options(world, draft=folder / "glide")


def torn_lm(world, folder):
    cut_in_half(copied(world, "lm", folder) / "model.safetensors")
    return options(world, draft=folder / "lm", method="vanilla")


def torn_target(world, folder):
    cut_in_half(copied(world, "target", folder) / "model.safetensors")
    return options(world, target=folder / "target")


def newer_format(world, folder):
    draft = copied(world, "glide", folder)
    card = read_card(draft).model_dump() | {"format": 99}
    (draft / WEIGHTS).write_bytes(save(load_file(draft / WEIGHTS), metadata={"glidecape": json.dumps(card)}))
    return options(world, draft=draft)


class Payload:
    """Unpickled by a careless loader, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled_draft(world, folder):
    draft = copied(world, "glide", folder)
    (draft / WEIGHTS).write_bytes(pickle.dumps(Payload(folder / "ran")))
    return options(world, draft=draft)


def pickled_target(world, folder):
    target = copied(world, "target", folder)
    (target / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(folder / "ran")}, target / "pytorch_model.bin")
    return options(world, target=target)


BAD = {
    "draft for another target": (other_target, MismatchError, "another shape"),
    "another vocabulary": (other_vocabulary, MismatchError, "needs one vocabulary"),
    "another tokenizer": (other_tokenizer, MismatchError, "another tokenizer"),
    "prompt longer than the context": (too_long, InputError, "context of 192"),
    "token id out of range": (out_of_range, InputError, r"token id (\d+), outside the vocabulary of \1"),
    "weights that are not numbers": (not_numbers, UnsupportedError, "not finite"),
    "torn draft": (torn_draft, CheckpointError, "torn"),
    "torn draft LM": (torn_lm, CheckpointError, "torn|cannot load"),
    "torn target": (torn_target, CheckpointError, "torn|cannot load"),
    "newer format": (newer_format, CheckpointError, r"format 99, this version reads \d: update"),
    "pickled code as a draft": (pickled_draft, CheckpointError, "torn or not a GlideCape draft"),
    "pickled code as a target": (pickled_target, CheckpointError, "cannot load|unreadable"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_documented_exception_and_one_sentence(case, world, capfd, monkeypatch, tmp_path):
    prepare, exception, message = BAD[case]
    words = prepare(world, tmp_path)
    with pytest.raises(exception, match=message):
        cli.app(["generate", *words], standalone_mode=False)
    code, _, err = run(capfd, monkeypatch, "generate", *words)
    only_sentence(code, err, message)
    assert not (tmp_path / "ran").exists(), "pickled code was run"


@pytest.mark.parametrize("bad", [-1, 400, 10**9])
def test_token_ids_out_of_range_are_refused_wherever_they_are_given(bad, world):
    target = Target.from_pretrained(world["target"], dtype=torch.float32)
    size = target.vocab_size
    assert not 0 <= bad < size
    for prompt, params in (
        ([5, bad], SamplingParams()),
        ([5], SamplingParams(stop_token_ids=(7, bad))),
    ):
        with pytest.raises(InputError, match=f"token id {bad}, outside the vocabulary of {size}"):
            generate(target, [prompt], None, params)
    with pytest.raises(InputError, match="logit_bias"):
        generate(target, [[5]], None, SamplingParams(logit_bias={bad: 1.0}))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("sampling", ["noise", "residual"])
@pytest.mark.parametrize("method", ["plain", "glide+cape"])
def test_logits_that_stop_being_numbers_end_with_a_sentence(method, sampling, temperature, world, capfd, monkeypatch):
    """Fine while the probe looks; later one logit of one node is not a number."""
    right = Target.forward

    def forward(self, tokens, positions, cache, *rest, **options):
        out = right(self, tokens, positions, cache, *rest, **options)
        late = positions[0, 0] > 14
        return TargetOutput(out.logits.index_fill(2, torch.tensor([3]), float("nan"))) if late else out

    monkeypatch.setattr(Target, "forward", forward)
    words = options(world, method=method, sampling=sampling, temperature=temperature)
    with pytest.raises(UnsupportedError, match="not numbers"):
        cli.app(["generate", *words, "--ignore-eos"], standalone_mode=False)
    code, _, err = run(capfd, monkeypatch, "generate", *words, "--ignore-eos")
    only_sentence(code, err, "not numbers")
