"""Any model type of transformers at tiny size, checked against transformers' own `generate`."""

import copy
import warnings
from dataclasses import dataclass

import torch

from glidecape.decode import generate
from glidecape.drafting.drafter import NoDraft
from glidecape.drafting.methods import make_drafter
from glidecape.errors import GlideCapeError
from glidecape.models.glide import GlideModel
from glidecape.models.glide_config import GlideConfig
from glidecape.models.glide_draft import GlideDraft
from glidecape.models.standalone import StandaloneDraft
from glidecape.models.target import Target
from glidecape.sampling import SamplingParams
from test_against_transformers import BASE

TINY = BASE | {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
}
WINDOW, NEW, MOST = 12, 48, 5_000_000
PROMPTS = [[7, 11, 13, 17, 19], list(range(10, 27))]


@dataclass
class Verdict:
    """`passes`, `refused` (by us, with a sentence), `not built` (by this recipe) or `WRONG` (tokens differ, a crash)."""

    kind: str
    verdict: str
    reason: str = ""


def build(kind):
    """A random causal LM of that type, float32.

    Raises whatever transformers raises when these sizes do not fit the type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    usual = AutoConfig.for_model(kind)
    computed = {n for n in TINY if isinstance(p := getattr(type(usual), n, None), property) and p.fset is None}
    sizes = {name: size for name, size in TINY.items() if name not in computed}
    if getattr(usual, "sliding_window", None):
        sizes["sliding_window"] = WINDOW
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST:
        raise ValueError(f"{count / 1e6:.0f} M parameters at this size: its sizes go by other names")
    torch.manual_seed(3)
    try:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa")
    except (ValueError, ImportError):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
    model = model.float().eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.12)
    return model


def expected_tokens(reference, prompt):
    ids = torch.tensor([prompt])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def check(kind):
    """Plain, chain and CaPE, alone and in a ragged batch, with a draft that is often right, and with GliDe."""
    try:
        model = build(kind)
        reference = copy.deepcopy(model)
        expected = [expected_tokens(reference, p) for p in PROMPTS]
    except Exception as error:
        return Verdict(kind, "not built", _sentence(error))
    try:
        target = Target(model)
        noisy = copy.deepcopy(reference)
        for p in noisy.parameters():
            if p.ndim > 1:
                p.data += 0.004 * torch.randn_like(p)
        drafters = {"plain": NoDraft()}
        for method in ("vanilla", "vanilla+cape"):
            drafters[method] = make_drafter(method, StandaloneDraft(Target(noisy)))
        note = ""
        try:
            glide = GlideDraft(GlideModel(GlideConfig.for_target(target), target))
            drafters["glide+cape"] = make_drafter("glide+cape", glide)
        except GlideCapeError as error:
            note = f"without GliDe: {_sentence(error)}"
        params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
        for name, drafter in drafters.items():
            batch = [one.tokens for one in generate(target, PROMPTS, drafter, params)]
            alone = generate(target, PROMPTS[1:], drafter, params)[0].tokens
            if batch != expected or alone != expected[1]:
                return Verdict(kind, "WRONG", f"{name}: tokens differ from transformers' generate")
    except GlideCapeError as error:
        return Verdict(kind, "refused", _sentence(error))
    except Exception as error:
        return Verdict(kind, "WRONG", f"{type(error).__name__}: {_sentence(error)}")
    return Verdict(kind, "passes", note)


def _sentence(error):
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]


def every_kind():
    """Model types with a causal LM, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
