"""Targets in bfloat16 and with int8 weights: every method runs, and a draft of the full-precision target is taken."""

import json
import sys
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from glidecape.certify import BUG, EQUAL, certify
from glidecape.core.params import SamplingParams
from glidecape.drafting.methods import DRAFTLESS, METHODS, make_drafter
from glidecape.drafts.checkpoint import load_draft
from glidecape.engine.decode import generate
from glidecape.errors import InputError
from glidecape.target.packed import PackedLinear
from glidecape.target.quantize import quantize
from glidecape.target.streamed import StreamedLinear, dense_of
from glidecape.target.target import Target
from test_command_line import pair, run

PROMPTS = ["def load_table(", "    return"]


def needs_torchao():
    """torchao is the extra int8, which `make test-all` installs: transformers takes a second more to import beside it."""
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        pytest.skip(f"torchao does not load: {error}")


def drafters_of(world, target):
    """Every method, its draft loaded from its folder."""
    drafts = {base: load_draft(world[base], target) for base in ("glide", "eagle", "medusa")}
    drafts["vanilla"] = load_draft(world["lm"], target)
    return {m: make_drafter(m, None if m.split("+")[0] in DRAFTLESS else drafts[m.split("+")[0]]) for m in METHODS}


def test_a_bfloat16_target_runs_with_every_method_and_takes_the_float32_draft_without_a_note(world):
    target = Target.from_pretrained(world["target"], dtype=torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(world["target"], dtype=torch.bfloat16).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drafters = drafters_of(world, target)
    found = certify(target, reference, drafters, PROMPTS, SamplingParams(max_new_tokens=24))
    assert BUG not in {f.verdict for f in found}, [f for f in found if f.verdict == BUG]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_int8_target_runs_with_every_method_and_takes_the_draft_with_a_note(world, dtype):
    needs_torchao()
    target = Target.from_pretrained(world["target"], dtype=dtype, quantize="int8")
    reference = AutoModelForCausalLM.from_pretrained(world["target"], dtype=dtype).eval()
    quantize(reference, "int8")
    assert not any(isinstance(module, PackedLinear) for module in target.model.modules())
    with pytest.warns(UserWarning, match="other weights of this architecture"):
        drafters = drafters_of(world, target)
    found = certify(target, reference, drafters, PROMPTS, SamplingParams(max_new_tokens=24))
    verdicts = {f.verdict for f in found}
    assert verdicts == {EQUAL} if dtype == torch.float32 else BUG not in verdicts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_product_of_int8_weights_is_the_eager_one(dtype):
    needs_torchao()
    torch.manual_seed(0)
    layer = nn.Linear(96, 100, dtype=dtype)
    quantize(layer, "int8")
    assert dense_of(layer) is not None
    x = torch.randn(2, 3, 96, dtype=dtype)
    found, eager = StreamedLinear(layer.weight, layer.bias)(x), layer(x)
    torch.testing.assert_close(found, eager, atol=0.03 if dtype == torch.bfloat16 else 1e-5, rtol=0.01)
    assert (found - nn.functional.linear(x, layer.weight.dequantize() * 1.1, layer.bias)).abs().max() > 0.05


def test_int8_weights_of_another_kind_stay_eager():
    """Scales of groups of inputs, and inputs that are rounded, too, are other products."""
    needs_torchao()
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = nn.Sequential(nn.Linear(96, 64))
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    assert dense_of(layer[0]) is None


@pytest.mark.slow  # a minute of compiling each
@pytest.mark.filterwarnings("ignore:the draft in")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_int8_target_writes_what_the_eager_one_does(world, dtype, tmp_path, monkeypatch):
    needs_torchao()
    monkeypatch.setenv("GLIDECAPE_CACHE", str(tmp_path))
    quantized, eager = (Target.from_pretrained(world["target"], dtype=dtype, quantize="int8") for _ in range(2))
    assert quantized.compile("on")
    drafters = drafters_of(world, quantized)

    def written(target, name, temperature):
        params = SamplingParams(max_new_tokens=32, temperature=temperature, seed=3, ignore_eos=True)
        return [one.tokens for one in generate(target, [[1, 2, 3, 4], [5, 6]], drafters[name], params)]

    for temperature in (0.0, 1.0):
        plain = written(quantized, "plain", temperature)
        assert dtype != torch.float32 or plain == written(eager, "plain", temperature)
        for name in ("glide", "glide+cape", "lookup"):
            assert written(quantized, name, temperature) == plain, name


def test_a_model_that_transformers_quantized_runs(world):
    """The head stays as it is there, and is packed; quantized layers are not."""
    needs_torchao()
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = AutoModelForCausalLM.from_pretrained(
        world["target"], dtype=torch.float32, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    target = Target(model, pack=True)
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert packed in ([], ["lm_head"])
    full = Target.from_pretrained(world["target"], dtype=torch.float32)
    assert target.weights_digest != full.weights_digest


def test_the_digest_of_quantized_weights_is_theirs_alone(world):
    needs_torchao()
    digests = [Target.from_pretrained(world["target"], quantize=q).weights_digest for q in ("int8", "int8", None)]
    assert digests[0] == digests[1] != digests[2]


def test_the_command_quantizes(world, capfd, monkeypatch):
    needs_torchao()
    words = ["generate", *pair(world), "--quantize", "int8", "-p", "def load_table("]
    code, out, err = run(capfd, monkeypatch, *words)
    assert (code, "note: the draft" in err, out.startswith("def load_table(")) == (0, True, True)
    words = ["certify", "--target", world["target"], "--dtype", "float32", "--quantize", "int8", "--max-new-tokens", 8]
    code, out, _ = run(capfd, monkeypatch, *words, "--methods", "plain,lookup")
    assert (code, "verdict: equal" in out) == (0, True)


def test_the_benchmark_measures_a_quantized_target(world, capfd, monkeypatch):
    needs_torchao()
    words = [
        "bench",
        *pair(world),
        "--quantize",
        "int8",
        "--methods",
        "plain,glide",
        "--suite",
        "own:2",
        "--limit",
        1,
        "--json",
    ]
    words += ["--looping", 1, "--repeats", 1, "--watch", 0, "--max-new-tokens", 8, "--prompt-tokens", 32]
    code, out, err = run(capfd, monkeypatch, *words)
    assert (code, "note: the draft" in err) == (0, True)
    assert json.loads(out)["circumstances"]["dtype"] == "float32, int8 weights"


def test_other_libraries_beside_a_quantized_target_are_refused(world, capfd, monkeypatch):
    needs_torchao()
    words = ["bench", *pair(world), "--quantize", "int8", "--suite", "own:2", "--peers", "transformers"]
    code, _, err = run(capfd, monkeypatch, *words)
    assert (code, "leave --peers out" in err) == (2, True)


def test_a_quantizer_that_is_unknown_or_not_installed_is_refused(world, capfd, monkeypatch):
    with pytest.raises(InputError, match="choose int8"):
        Target.from_pretrained(world["target"], quantize="int3")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    code, _, err = run(capfd, monkeypatch, "generate", *pair(world), "--quantize", "int8", "-p", "x")
    assert (code, "glidecape[int8]" in err, "Traceback" in err) == (2, True, False)
