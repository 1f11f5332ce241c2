"""Certify: equal where all is well, near-tie where rounding turned a token, bug where we broke something on purpose."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from glidecape import certify as certify_module
from glidecape import cli
from glidecape.certify import BUG, EQUAL, NEAR_TIE, Finding, certify
from glidecape.commands.certify import print_table
from glidecape.core import verify as verify_module
from glidecape.core.params import SamplingParams
from glidecape.core.verify import verify_points
from glidecape.drafting.methods import make_drafter
from glidecape.drafts.causal_lm import StandaloneDraft
from glidecape.engine import round as round_module
from glidecape.errors import InputError
from glidecape.target import target as target_module
from glidecape.target.target import Target

PROMPTS = [[7, 11, 13, 17, 19], [(i * 37) % 90 + 3 for i in range(30)]]
PARAMS = SamplingParams(max_new_tokens=24)


def build(dtype=torch.float32, vocab=97):
    """A random target, its reference, and drafters whose proposals are often right."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.12)
    model = model.to(dtype)
    reference, noisy = copy.deepcopy(model), copy.deepcopy(model)
    for p in noisy.parameters():
        if p.ndim > 1:
            p.data += 0.004 * torch.randn_like(p)
    draft = StandaloneDraft(Target(noisy))
    names = ("vanilla", "vanilla+cape", "vanilla+beam")
    return Target(model), reference, {name: make_drafter(name, draft) for name in names}


@pytest.fixture(scope="module")
def pair():
    return build()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_all_is_equal_in_float32(pair, temperature):
    found = certify(*pair, PROMPTS, SamplingParams(temperature, max_new_tokens=24, seed=5))
    assert [f.method for f in found] == [m for m in ("plain", *pair[2]) for _ in PROMPTS]
    assert {f.verdict for f in found} == {EQUAL}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ragged_batches_give_what_each_prompt_gives_alone(pair, temperature):
    prompts = [*PROMPTS, [50, 51, 52, 53, 54, 55, 56, 57, 58], [4]]
    params = SamplingParams(temperature, max_new_tokens=24, seed=5)
    found = certify(*pair, prompts, params, batch=3)
    assert [(f.method, f.prompt) for f in found] == [(m, i) for m in ("plain", *pair[2]) for i in range(4)]
    assert {f.verdict for f in found} == {EQUAL}


def test_a_row_that_disturbs_its_neighbours_is_a_bug(pair, monkeypatch):
    """Every row sees as many committed slots as the longest one has: right alone, and where lengths are equal."""

    def longest(cache, ancestors, queries):
        level = SimpleNamespace(
            lengths=torch.full_like(cache.lengths, cache.longest), longest=cache.longest, ragged=False, scratch=0
        )
        return RIGHT_MASK(level, ancestors, queries)

    monkeypatch.setattr(target_module, "tree_mask", longest)
    assert {f.verdict for f in certify(*pair, PROMPTS, PARAMS)} == {EQUAL}
    found = certify(*pair, PROMPTS, PARAMS, batch=2)
    assert {f.verdict for f in found if f.prompt == 0} == {BUG}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bfloat16_is_equal_or_a_near_tie(temperature):
    target, reference, drafters = build(torch.bfloat16, vocab=800)
    prompts = [[i + 3, 2 * i + 5, 7] for i in range(6)]
    found = certify(target, reference, drafters, prompts, SamplingParams(temperature, max_new_tokens=32))
    assert {f.verdict for f in found} <= {EQUAL, NEAR_TIE}
    for f in found:
        assert f.explained == (f.verdict == NEAR_TIE)
        assert f.gap <= 2 * f.rounding


def broken_verify(tree, row, law_at, chance):
    """Accepts the first child of the root unseen."""
    first = next(iter(tree.children(row)[0]), None)
    return ([0, first], law_at(first).draw(chance)) if first is not None else ([0], law_at(0).draw(chance))


def broken_points(tree, chosen):
    """The same for laws that are points."""
    unseen = chosen.clone()
    if tree.nodes > 1:
        unseen[:, 0] = torch.where(tree.valid[:, 1], tree.tokens[:, 1], chosen[:, 0])
    return verify_points(tree, unseen)


def broken_mask(cache, ancestors, queries):
    """Every node sees all nodes before it, its siblings too."""
    all_before = None if ancestors is None else torch.ones_like(ancestors).tril()
    return RIGHT_MASK(cache, all_before, queries)


RIGHT_MASK = target_module.tree_mask


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("what", ["verify", "mask", "position"])
def test_what_is_broken_on_purpose_is_a_bug(pair, monkeypatch, what, temperature):
    if what == "verify":
        monkeypatch.setattr(round_module, "verify_row", broken_verify)
        monkeypatch.setattr(verify_module, "verify_points", broken_points)
    elif what == "mask":
        monkeypatch.setattr(target_module, "tree_mask", broken_mask)
    else:
        # Depth forgotten: every node stands where the root does.
        right = pair[0].forward

        def forward(tokens, positions, cache, ancestors=None, **options):
            if ancestors is not None:
                positions = positions[:, :1].expand_as(positions)
            return right(tokens, positions, cache, ancestors, **options)

        monkeypatch.setattr(pair[0], "forward", forward)
    found = certify(*pair, PROMPTS, SamplingParams(temperature, max_new_tokens=40, seed=5))
    verdicts = {m: {f.verdict for f in found if f.method == m} for m in ("plain", *pair[2])}
    assert verdicts["plain"] == {EQUAL}
    assert BUG in verdicts["vanilla+cape"] | verdicts["vanilla+beam"]
    assert NEAR_TIE not in set().union(*verdicts.values())


def test_an_output_that_ends_early_is_a_bug(pair, monkeypatch):
    right = certify_module.generate

    def shorter(target, prompts, drafter, params):
        out = right(target, prompts, drafter, params)
        if drafter is not None:
            out[0].tokens = out[0].tokens[:-1]
        return out

    monkeypatch.setattr(certify_module, "generate", shorter)
    found = certify(*pair, PROMPTS[:1], PARAMS)
    assert [f.verdict for f in found] == [EQUAL, BUG, BUG, BUG]
    assert {f.got for f in found[1:]} == {-1}


def test_what_cannot_be_certified_is_refused(pair):
    target, reference, drafters = pair
    with pytest.raises(InputError, match="of its own"):
        certify(target, target.model, drafters, PROMPTS)
    with pytest.raises(InputError, match="at least 1 prompt"):
        certify(target, reference, drafters, PROMPTS, batch=0)
    with pytest.raises(InputError, match="residual"):
        certify(target, reference, drafters, PROMPTS, SamplingParams(1.0, sampling="residual"))
    with pytest.raises(InputError, match="leave all other"):
        certify(target, reference, drafters, PROMPTS, SamplingParams(1.0, top_k=5))


def run(capfd, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["glidecape", *map(str, words)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    out, err = capfd.readouterr()
    return code, out, err


def test_the_table_names_the_dtype_and_explains_itself_where_outputs_differ(capsys):
    tie = Finding("glide+cape+svip", 3, NEAR_TIE, "transformers", 5, 66, 1599, 0.01, 0.02, 0.06, 0.07, 0.37)
    print_table([Finding("plain", 3), tie], "bfloat16")
    told = capsys.readouterr().out
    assert "prompts by verdict, in bfloat16" in told
    assert all(f"{word}:" in told for word in ("index", "gap", "error", "rounding", "near-tie", "verdict"))
    assert "how far bfloat16 may move" in " ".join(told.split())
    assert "--dtype float32 has fewer" in told
    assert max(map(len, told.splitlines())) <= 110
    print_table([Finding("plain", 3)], "float32")
    told = capsys.readouterr().out
    assert "in float32" in told
    assert "gap" not in told
    assert "fewer" not in told
    print_table([tie], "float32")
    assert "fewer" not in capsys.readouterr().out


def test_the_command(world, capfd, monkeypatch, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "def save_"}\n')
    drafts = ["--draft", f"glide={world['glide']}", "--draft", f"small={world['lm']}"]
    words = ["certify", "--target", world["target"], *drafts, "--dtype", "float32", "--max-new-tokens", "16"]
    one = [*words, "--prompts", tmp_path / "p.jsonl"]
    code, out, _ = run(capfd, monkeypatch, *one, "--json")
    assert code == 0
    result = json.loads(out)
    methods = {f["method"] for f in result["findings"]}
    assert {"plain", "lookup", "glide+cape+svip"} <= methods
    assert result["verdict"] == EQUAL
    code, out, _ = run(capfd, monkeypatch, *one, "--methods", "glide,glide+cape")
    assert (code, "verdict: equal" in out) == (0, True)
    code, out, _ = run(capfd, monkeypatch, *words, "--methods", "glide+cape", "--batch", "5", "--json")
    assert (code, json.loads(out)["batch"]) == (0, 5)
    monkeypatch.setattr(verify_module, "verify_points", broken_points)
    code, out, _ = run(capfd, monkeypatch, *words, "--methods", "glide", "--temperature", "1")
    assert (code, "verdict: bug" in out) == (1, True)
    code, _, err = run(capfd, monkeypatch, *words, "--methods", "vanilla")
    assert (code, "needs a draft named 'vanilla'" in err) == (2, True)
