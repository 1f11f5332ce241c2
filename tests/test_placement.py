"""Targets that are split over devices, offloaded, or quantized by other libraries: each decodes as it should, or is refused.

Two devices are fake here. Offloading and quantizing are real where accelerate and bitsandbytes are installed.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fake_cuda import move_to_cuda
from glidecape import glidecape_generate
from glidecape.commands.replicas import read
from glidecape.core.params import SamplingParams
from glidecape.drafting.methods import make_drafter
from glidecape.drafts.checkpoint import load_draft
from glidecape.drafts.glide.config import GlideConfig
from glidecape.drafts.glide.network import GlideModel
from glidecape.engine.decode import generate
from glidecape.errors import InputError, UnsupportedError
from glidecape.target.target import Target
from glidecape.train.draft import make_draft
from glidecape.train.recipe import DraftRecipe
from test_command_line import pair, run
from test_fake_cuda import RAGGED, waits_of_a_round
from test_fake_cuda import waits as waits  # a fixture

PROMPTS = ["def load_table(", "    return size\n\n\ndef save_"]
MODELS = Path(__file__).parents[1] / "models" / "pysource"
SHIPPED = {name: MODELS / name for name in ("target", "glide", "eagle", "medusa", "lm")}  # quantizers want some width
DRAFTS = {"glide+cape": "glide", "eagle": "eagle", "medusa": "medusa", "vanilla": "lm", "lookup": None}


def needs(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: pip install {library}")


def moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return type(value)(moved(one, device) for one in value) if isinstance(value, (tuple, list)) else value


def split(target: Target, draft: Any) -> None:
    """The lower layers on one device, the upper ones, norm and head on another, joined as accelerate's hooks join them."""
    first, second = "cuda:0", "cuda:1"
    move_to_cuda(target.model, first)
    body = target.model.model
    layers = list(body.layers)
    for part in (*layers[len(layers) // 2 :], body.norm, target.model.lm_head):
        move_to_cuda(part, second)

        def bring(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return moved(args, second), {name: moved(value, second) for name, value in kwargs.items()}

        part.register_forward_pre_hook(bring, with_kwargs=True)
    half = len(layers) // 2
    target.layer_devices = [torch.device(first)] * half + [torch.device(second)] * (len(layers) - half)
    parts = getattr(getattr(draft, "module", None), "_target_parts", None)
    if parts is not None:
        assert not parts.split
        parts.split = target.placed


@pytest.mark.parametrize("method", ["plain", "lookup", "glide+cape+svip", "eagle", "medusa", "vanilla"])
def test_a_round_of_a_target_on_two_devices_puts_each_tensor_where_it_is_read(method: str, request: Any) -> None:
    """An operator with operands on two devices is an error here, and so is a copy that waits."""
    waits = request.getfixturevalue("waits")
    alone = waits_of_a_round(method, RAGGED[:1], 0.0, waits, place=split)
    assert waits_of_a_round(method, RAGGED, 1.0, waits, place=split) == alone


def write(target: Target, world: dict[str, Path], method: str) -> list[list[int]]:
    folder = DRAFTS[method]
    draft = None if folder is None else load_draft(world[folder], target)
    drafter = make_drafter(method, draft) if method != "plain" else None
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    return [one.tokens for one in generate(target, PROMPTS, drafter, params)]


def plain(target: Target) -> list[list[int]]:
    return [one.tokens for one in generate(target, PROMPTS, None, SamplingParams(max_new_tokens=24, ignore_eos=True))]


def on_cpu(model: Any, folder: Path) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device="cpu")


def on_disk(model: Any, folder: Path) -> None:
    from accelerate import disk_offload

    disk_offload(model, folder, execution_device="cpu")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("offload", [on_cpu, on_disk])
def test_an_offloaded_target_writes_what_it_writes_otherwise(
    world: dict[str, Path], tmp_path: Path, offload: Callable[[Any, Path], None]
) -> None:
    needs("accelerate")
    whole = Target.from_pretrained(world["target"], dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(world["target"], dtype=torch.float32)
    offload(model, tmp_path)
    target = Target(model, whole.tokenizer, pack=True)
    assert (target.placed, target.device.type, target.weights_digest) == (True, "cpu", whole.weights_digest)
    expected = plain(whole)
    assert plain(target) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the draft is for these weights, and no note says otherwise
        for method in DRAFTS:
            assert write(target, world, method) == expected, method
    said: list[str] = []
    assert not target.compile("on", said.append)
    assert "on several devices, or its weights are offloaded" in said[0]
    assert not load_draft(world["glide"], target).compile("on", said.append)
    with pytest.raises(UnsupportedError, match="training a draft needs a model on one device"):
        make_draft(target, DraftRecipe())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_device_map_with_a_disk_in_it_loads_and_generates(world: dict[str, Path], tmp_path: Path) -> None:
    needs("accelerate")
    model = AutoModelForCausalLM.from_pretrained(
        world["target"], dtype=torch.float32, device_map=MAP, offload_folder=tmp_path
    )
    assert any(one.device.type == "meta" for one in model.parameters())
    inputs = AutoTokenizer.from_pretrained(world["target"])(PROMPTS[0], return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    found = model.generate(
        **inputs, max_new_tokens=16, do_sample=False, custom_generate=glidecape_generate, draft=world["glide"]
    )
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_device_map_is_taken_at_load(world: dict[str, Path]) -> None:
    needs("accelerate")
    target = Target.from_pretrained(world["target"], dtype=torch.float32, device_map="auto")
    assert plain(target) == plain(Target.from_pretrained(world["target"], dtype=torch.float32))


MAP = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
MAP |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("where", ["auto", "cpu", json.dumps(MAP)])
def test_commands_take_a_device_map(world: dict[str, Path], capfd: Any, monkeypatch: Any, where: str) -> None:
    needs("accelerate")
    words = ["generate", *pair(world), "--dtype", "float32", "-p", PROMPTS[0], "--max-new-tokens", 16, "--method"]
    written = [
        run(capfd, monkeypatch, *words, *more)[1]
        for more in (["plain"], ["plain", "--device-map", where], ["glide", "--device-map", where])
    ]
    assert len(set(written)) == 1
    assert written[0].strip()
    words = ["certify", *pair(world), "--dtype", "float32", "--max-new-tokens", 8, "--methods", "plain,glide"]
    assert run(capfd, monkeypatch, *words, "--device-map", where)[0] == 0


REFUSED = {
    "everywhere": (
        ["--device-map", "everywhere"],
        "--device-map takes auto, balanced, balanced_low_0, sequential, cpu, or",
    ),
    "no object": (["--device-map", "[1]"], "or a JSON object from modules to devices such as"),
    "no device": (["--device-map", '{"model": null}'], "not {"),
    "a quantizer": (["--device-map", "auto", "--quantize", "int8"], "leave out the map, or the quantization"),
    "a device": (["--device-map", "auto", "--device", "meta"], "and so does device meta: give one of them"),
    "no accelerate": (["--device-map", "auto"], "needs accelerate, which is not installed: pip install accelerate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_device_maps_that_cannot_be_used_are_refused(
    world: dict[str, Path], capfd: Any, monkeypatch: Any, case: str
) -> None:
    words, sentence = REFUSED[case]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "accelerate" else object())
    code, _, err = run(capfd, monkeypatch, "generate", *pair(world), "-p", "x", *words)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err


def test_what_cannot_be_split_refuses_a_device_map(world: dict[str, Path], capfd: Any, monkeypatch: Any) -> None:
    words = ["bench", *pair(world), "--device-map", "auto", "--suite", "own:2", "--peers", "transformers"]
    assert "leave --peers out where --device-map is given" in run(capfd, monkeypatch, *words)[2]
    with pytest.raises(InputError, match="leave --device-map out with --ray"):
        read({"target": str(world["target"]), "device_map": "auto"})


def test_weights_that_nothing_brings_are_refused(world: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(world["target"]).to("meta")
    with pytest.raises(UnsupportedError, match="on the meta device, and nothing brings them: load the model's weights"):
        Target(model)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:the draft in")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_target_in_4_or_8_bits_writes_what_transformers_does(bits: int) -> None:
    needs("accelerate")
    needs("bitsandbytes")
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_threshold=0.0)
    options = {"dtype": torch.float32, "quantization_config": how, "device_map": "cpu"}
    model, reference = (AutoModelForCausalLM.from_pretrained(SHIPPED["target"], **options) for _ in range(2))
    target = Target(model, AutoTokenizer.from_pretrained(SHIPPED["target"]), pack=True)
    expected = plain(target)
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        ids = torch.tensor([target.encode(prompt)])
        found = reference.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
        assert found[0, ids.shape[1] :].tolist() == tokens
    for method in DRAFTS:
        assert write(target, SHIPPED, method) == expected, method


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_products_in_8_bits_whose_rows_depend_on_each_other_are_refused() -> None:
    needs("accelerate")
    needs("bitsandbytes")
    how = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED["target"], quantization_config=how, device_map="cpu")
    layer = model.model.layers[0].mlp.up_proj
    rows = torch.randn(2, layer.in_features)
    alone = layer(rows[:1].clone())
    rows[1] = 20.0  # outliers of another row
    assert not torch.allclose(layer(rows)[:1], alone, atol=1e-4)  # the reason for which it is refused
    with pytest.raises(UnsupportedError, match="depend on the other rows of a batch"):
        Target(model)


def test_a_part_of_a_quantized_head_is_refused(world: dict[str, Path]) -> None:
    target = Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)
    config = GlideConfig.for_target(target, draft_vocab=16)
    GlideModel.new(config, target).serve()  # of a head that is not quantized
    target.model.lm_head.weight = nn.Parameter(target.model.lm_head.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match="leave the head out of the quantization"):
        GlideModel.new(config, target).serve()
