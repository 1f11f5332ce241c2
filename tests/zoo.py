"""Any model type of transformers at tiny size, checked against transformers' own `generate`."""

import copy
import warnings
from dataclasses import dataclass

import torch

from glidecape.core.params import SamplingParams
from glidecape.drafting.drafter import NoDraft
from glidecape.drafting.methods import make_drafter
from glidecape.drafts.causal_lm import StandaloneDraft
from glidecape.drafts.glide.adapter import GlideDraft
from glidecape.drafts.glide.config import GlideConfig
from glidecape.drafts.glide.network import GlideModel
from glidecape.engine.decode import generate
from glidecape.errors import GlideCapeError
from glidecape.target.target import Target, refuse_by_config
from test_against_transformers import BASE

TINY = BASE | {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
}
# Sizes that only decoders of encoder-decoder models have, or that go by other names in composite ones.
TINY |= {
    "decoder_layers": 4,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "max_target_positions": 256,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "intermediate_size_mlp": 96,
}
PARTS = {  # of composite models, beside the text
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vocab_size": 97,
}
# What single types need beside the sizes above, or instead of them.
OWN: dict[str, dict] = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 12},
    "dots1": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 6,
        "activation_sparsity_pattern": [0.0] * 6,
        "laurel_rank": 8,
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
    },
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "blenderbot-small": {"bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
}
WINDOW, NEW, MOST = 12, 64, 20_000_000
PROMPTS = [[7, 11, 13, 17, 19], list(range(10, 27))]


@dataclass
class Verdict:
    """`passes`, `refused` (by us, with a sentence), `not built` (by this recipe) or `WRONG` (tokens differ, a crash)."""

    kind: str
    verdict: str
    reason: str = ""


def build(kind, **changes):
    """A random causal LM of that type, float32; `changes` to its sizes.

    Raises whatever transformers raises when these sizes do not fit the type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    usual = AutoConfig.for_model(kind)
    sizes = _sizes(type(usual), TINY | OWN.get(kind, {}))
    if getattr(usual, "sliding_window", None):
        sizes["sliding_window"] = WINDOW
    for name, part in type(usual).sub_configs.items():
        text = name == "text_config"
        own = getattr(usual, name, None)
        kind_of_part = getattr(own, "model_type", "")
        sizes[name] = _sizes(
            type(own) if own is not None else part, TINY | OWN.get(kind_of_part, {}) if text else PARTS
        )
        if text and getattr(own, "sliding_window", None):
            sizes[name]["sliding_window"] = WINDOW
        if kind_of_part and type(part).__name__ != "type":
            sizes[name]["model_type"] = kind_of_part
    config = AutoConfig.for_model(kind, **(sizes | changes))
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


def _sizes(cls, sizes):
    """Those of the sizes that are not computed from others there."""
    computed = {n for n in sizes if isinstance(p := getattr(cls, n, None), property) and p.fset is None}
    return {name: size for name, size in sizes.items() if name not in computed}


def refused_by_config(kind):
    """Why we refuse the type before its weights are looked at, or None; for types that are not built here."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(kind)
        # As a causal LM such a type is its decoder alone, which is probed.
        if not getattr(config, "is_encoder_decoder", False):
            refuse_by_config(config.get_text_config())
    except GlideCapeError as error:
        return _sentence(error)
    except Exception:
        return None
    return None


def expected_tokens(reference, prompt, use_cache=True, new=NEW):
    ids = torch.tensor([prompt])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=use_cache,
        )
    return out[0, len(prompt) :].tolist()


def check(kind, new=NEW):
    """Plain, chain, CaPE and beam, alone and in a ragged batch, with a draft that is often right, and GliDe with CaPE.

    Args:
        new: tokens of each output.
    """
    try:
        model = build(kind)
        reference = copy.deepcopy(model)
        expected = [expected_tokens(reference, p, new=new) for p in PROMPTS]
    except Exception as error:
        if reason := refused_by_config(kind):
            return Verdict(kind, "refused", f"{reason} (by its configuration; not built here)")
        said = _sentence(error).rstrip(":")
        return Verdict(
            kind, "not built", said if "at this size" in said else f"not at this size: transformers says «{said}»"
        )
    try:
        target = Target(model)
        noisy = copy.deepcopy(reference)
        for p in noisy.parameters():
            if p.ndim > 1:
                p.data += 0.004 * torch.randn_like(p)
        drafters = {"plain": NoDraft()}
        for method in ("vanilla", "vanilla+cape", "vanilla+beam"):
            drafters[method] = make_drafter(method, StandaloneDraft(Target(noisy)))
        note = ""
        try:
            glide = GlideDraft(GlideModel.new(GlideConfig.for_target(target), target))
            drafters["glide+cape"] = make_drafter("glide+cape", glide)
        except GlideCapeError as error:
            note = f"without GliDe: {_sentence(error)}"
        params = SamplingParams(max_new_tokens=new, ignore_eos=True)
        if generate(target, PROMPTS, NoDraft(), params)[1].tokens != expected[1]:
            # A cache of theirs may drop what their own mask still shows, past a window.
            expected = [expected_tokens(reference, p, use_cache=False, new=new) for p in PROMPTS]
            note = "as transformers' generate without a cache: its cache forgets what its mask shows" + (
                note and f"; {note}"
            )
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
