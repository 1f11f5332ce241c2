"""Training: data, resuming, parity with decoding, checkpoints."""

import gzip
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import zoo
from glidecape.core.masks import block_visible
from glidecape.core.params import SamplingParams
from glidecape.core.stats import Stats
from glidecape.drafting.methods import make_drafter
from glidecape.drafts import checkpoint
from glidecape.drafts.base import Queries
from glidecape.drafts.checkpoint import load_draft
from glidecape.drafts.glide.adapter import GlideDraft
from glidecape.drafts.glide.config import GlideConfig
from glidecape.drafts.glide.network import GlideModel
from glidecape.engine.decode import decode, generate
from glidecape.errors import CheckpointError, DataError, InputError, MismatchError, UnsupportedError
from glidecape.target.target import Target
from glidecape.train import loop
from glidecape.train.data import load_streams
from glidecape.train.draft import Teacher, train_draft
from glidecape.train.kinds.glide import draft_hidden, draft_logits
from glidecape.train.loop import Budget
from glidecape.train.losses import distillation_loss
from glidecape.train.recipe import DraftRecipe
from glidecape.train.stream import Stream, Windows
from states import BEFORE, RUN, STATE, clock_in, weights_in
from test_against_transformers import build


def load(world):
    return Target.from_pretrained(world["target"], dtype=torch.float32)


def test_windows_depend_on_the_step_alone_and_visit_everything_once_an_epoch():
    windows = Windows(Stream(np.arange(100, dtype=np.uint16)), seed=1)
    epoch = torch.cat([windows.batch(step, 2, 10) for step in range(5)])
    assert sorted(epoch[:, 0].tolist()) == list(range(0, 100, 10))
    assert torch.equal(
        windows.batch(3, 2, 10), Windows(Stream(np.arange(100, dtype=np.uint16)), seed=1).batch(3, 2, 10)
    )
    assert not torch.equal(windows.batch(0, 10, 10), windows.batch(1, 10, 10))  # the next epoch has another order


BROKEN = {
    "missing.jsonl": (None, "no data at"),
    "empty.txt": (b"", "holds no text"),
    "latin.txt": ("h\xe4".encode("latin-1"), "not readable"),
    "bad.jsonl": (b'{"text": "a b c d e f"}\n{"text": \n', "not readable"),
    "column.jsonl": (b'{"text": "a b c d e f"}\n{"body": "x"}\n', r"row 2 .*body"),
    "torn.jsonl.gz": (gzip.compress(b'{"text": "abc"}\n' * 500)[:40], "not readable"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_broken_data_is_refused_with_the_place(name, world, tmp_path):
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_streams(tmp_path / name, load(world).tokenizer)


def test_whole_packages_are_held_out(world):
    import json

    table = json.loads((world["corpus"] / "sources.json").read_text())
    assert {p["package"] for p in table["packages"] if p["held_out"]} >= {"package1"}
    assert table["counts"]["train_tokens"] > table["counts"]["valid_tokens"] > 0


class KilledError(Exception):
    pass


def test_a_run_that_was_killed_and_resumed_gives_the_same_weights(world, tmp_path, monkeypatch):
    target, recipe = load(world), DraftRecipe(length=32, rows=4, rate=1e-2)
    budget = Budget(tokens=12 * 4 * 32)

    def train(out):
        # Every step is saved, so the run can die anywhere.
        train_draft(target, world["corpus"], out, recipe, budget, prompts=0, save_every_s=0)
        return checkpoint.load_network(out, target).module.state_dict()

    whole = train(tmp_path / "whole")
    real = loop.torch.nn.utils.clip_grad_norm_
    calls = []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise KilledError
        return real(*args, **kwargs)

    monkeypatch.setattr(loop.torch.nn.utils, "clip_grad_norm_", dies)
    with pytest.raises(KilledError):
        train(tmp_path / "killed")
    monkeypatch.setattr(loop.torch.nn.utils, "clip_grad_norm_", real)
    resumed = train(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_torn_training_state_is_refused(world, tmp_path):
    (tmp_path / STATE).mkdir()
    (tmp_path / STATE / RUN).write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot resume"):
        train_draft(load(world), world["corpus"], tmp_path, DraftRecipe(), Budget(tokens=1), prompts=0)


def cut(state):
    file = next(state.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(state):
    file = next(state.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def lose_a_file(state):
    next(state.glob("*.safetensors")).unlink()


def cut_the_clock(state):
    (state / RUN).write_text((state / RUN).read_text()[:40])


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lose_a_file, cut_the_clock])
def test_a_state_that_the_disk_damaged_is_left_for_the_save_before_it(world, tmp_path, capfd, monkeypatch, damage):
    """After the last step: the run goes on from the save before, to the same weights."""
    recipe, budget = DraftRecipe(length=32, rows=2), Budget(tokens=4 * 64)
    with monkeypatch.context() as patch:
        patch.setattr("glidecape.train.draft.finish_draft", killed)
        with pytest.raises(KilledError):
            train_draft(load(world), world["corpus"], tmp_path, recipe, budget, prompts=0, save_every_s=0)
    losses, weights = clock_in(tmp_path)["losses"], weights_in(tmp_path)
    damage(tmp_path / STATE)
    train_draft(load(world), world["corpus"], tmp_path, recipe, budget, prompts=0, save_every_s=0)
    assert "Error): resuming from the save before it, step" in capfd.readouterr().err
    assert clock_in(tmp_path)["losses"] == losses
    assert all(torch.equal(weights_in(tmp_path)[name], weight) for name, weight in weights.items())
    assert not (tmp_path / BEFORE).exists()  # nothing is left of a run that has ended but its last state


def killed(*_, **__):
    raise KilledError


SEES = {"glimpse": True}
VARIANTS = {
    "one layer": {},
    "two layers": {"layers": 2},
    "glimpse": SEES,
    "two layers, glimpse": SEES | {"layers": 2},
    "glimpse alone": SEES | {"cross_attention": False},
    "window": {"window": 7},
    "window, glimpse": SEES | {"window": 7},
    "two layers, window": {"layers": 2, "window": 5},
    "narrow": SEES | {"width": 16, "heads": 2, "ffn": 24},
    "wide, own embedding": SEES | {"width": 80, "share_embedding": False, "cross_norm": False},
    "two target layers": {"read": "0+1"},
    "mix": {"read": "mix"},
    "reduced vocabulary": {"draft_vocab": 60},
}


@pytest.mark.parametrize(
    ("kind", "variant"),
    [*(("llama", name) for name in VARIANTS), ("gemma3_text", "one layer"), ("gemma3_text", "two layers, glimpse")],
)
def test_training_and_decoding_give_the_same_draft_logits(kind, variant):
    """Ragged rows, rounds of different lengths, accepted siblings: a teacher-forced forward whose `visible` is the
    history of a decode gives the logits of that decode."""
    torch.manual_seed(0)
    target = build(kind)[0]
    kept = torch.randperm(96)[:60].sort().values if variant == "reduced vocabulary" else None
    module = GlideModel.new(GlideConfig.for_target(target, **VARIANTS[variant]), target, kept)
    with torch.no_grad():  # untrained weights are small: every part should be heard
        for p in module.parameters():
            if p.ndim == 2:
                p.normal_(std=0.12)
    draft = GlideDraft(module)
    runs: dict[int, dict[int, list]] = {0: {}, 1: {}}  # row -> position -> its runs: visible, token, logits
    step = draft.step

    def recording(queries, own, target_cache, **more):
        logits = step(queries, own, target_cache, **more)
        tokens, positions = queries.tokens, queries.positions
        first = own.scratch == 0
        for row in range(2 if len(tokens) == 2 and not more else 0):  # while both rows run, row numbers are theirs
            length = target_cache.host_lengths[row]
            for column, position in enumerate(positions[row].tolist()):
                if first or position > length:  # else a dummy: a row that stopped runs its root once more
                    visible = min(position, length)
                    used = position >= length  # nobody looks at the logits of a token that is only caught up with
                    run = visible, int(tokens[row, column]), logits[row, column].clone() if used else None
                    runs[row].setdefault(position, []).append(run)
        return logits

    draft.step = recording
    prompts = [[7, 8, 9], [(i * 5) % 90 + 3 for i in range(20)]]  # the engine lets the shorter one join first
    params = SamplingParams(max_new_tokens=28, ignore_eos=True, temperature=2.0, seed=5)
    text = {i: list(p) for i, p in enumerate(prompts)}
    siblings = 0
    for event in decode(target, make_drafter("glide+cape", draft, length=4, bins=(40,)), prompts, params):
        text[event.row] += event.tokens
        siblings += "sibling" in event.origins
    compared, deepest = 0, 0
    for row in range(2):
        ids = torch.tensor([text[row]])
        positions = torch.arange(ids.shape[1])[None]
        visible = positions.clone()  # lag 1, unless an accepted node was trusted at the lag it was drafted at
        last = {p: own[-1] for p, own in runs[row].items() if p < ids.shape[1] and own[-1][1] == text[row][p]}
        for p, (seen, _, _) in last.items():
            visible[0, p] = seen
        teacher = Teacher(target, 1, ids.shape[1], hidden=module.config.glimpse)
        teacher(ids)
        with torch.no_grad():
            hidden = draft_hidden(module, ids, positions, teacher.cache, visible, passes=len(text[row]))
            forced = module.logits(hidden)[0]
        for p, (seen, _, logits) in last.items():
            if logits is not None and p < max(runs[row]) - 4:  # the last round's nodes were committed by none
                torch.testing.assert_close(
                    logits, forced[p], atol=3e-4, rtol=2e-3, msg=lambda m, p=p: f"position {p}: {m}"
                )
                compared += 1
                deepest = max(deepest, p - seen + 1)
    assert compared > 10
    assert siblings
    assert deepest >= 2


def test_a_prompt_read_token_by_token_leaves_the_keys_of_one_read_at_once():
    """With two layers: the second one's keys and values depend on what the first one saw of the target."""
    target = build("llama")[0]
    torch.manual_seed(0)
    draft = GlideDraft(GlideModel.new(GlideConfig.for_target(target, layers=2), target))
    for p in draft.module.parameters():
        torch.nn.init.normal_(p, std=0.12)
    ids, positions = torch.tensor([[7, 11, 13, 17, 19, 23]]), torch.arange(6)[None]
    cache = target.new_cache(1, 8, hidden=True)
    found = []
    with torch.no_grad():
        target.forward(ids, positions, cache)
        cache.commit([6])
        for width in (6, 1):
            own = draft.new_cache(1, 8)
            for at in range(0, 6, width):
                draft.catch_up(ids[:, at : at + width], positions[:, at : at + width], own, cache)
                own.commit([width])
            found.append(own.keys[1][:, :, :6].clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_window_over_one_text_is_read_as_its_newest_slots(layers):
    """What one query sees without a mask it sees with the window's mask, too."""
    target = build("llama")[0]
    torch.manual_seed(0)
    draft = GlideDraft(GlideModel.new(GlideConfig.for_target(target, layers=layers, window=5), target))
    for p in draft.module.parameters():
        torch.nn.init.normal_(p, std=0.12)
    ids, positions = torch.arange(3, 15)[None], torch.arange(12)[None]
    found = []
    with torch.no_grad():
        for window, masked in ((5, False), (5, True), (0, False)):
            draft.config = replace(draft.config, window=window)
            cache, own = target.new_cache(1, 16, hidden=True), draft.new_cache(1, 16)
            target.forward(ids[:, :11], positions[:, :11], cache)
            cache.commit([11])
            draft.catch_up(ids[:, :11], positions[:, :11], own, cache)
            own.commit([11])
            itself = torch.ones(1, 1, 1, dtype=torch.bool) if masked else None
            found.append(draft.step(Queries(ids[:, 11:], positions[:, 11:], positions[:, 11:], itself), own, cache))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_the_upper_layer_is_three_quarters_of_the_way_up():
    of, target = GlideConfig.for_target, Target(zoo.build("llama", num_hidden_layers=8), probe=False)
    assert of(target).reads == of(target, read="upper").reads == ((5,),)
    assert of(target, layers=2).reads == ((4,), (5,))
    assert of(target, "paper").reads == of(target, read="last").reads == ((7,),)
    windowed = build("gemma3_text")[0]
    assert windowed.layer_kinds[of(windowed).reads[0][0]] == "full_attention"


def test_layers_that_cannot_be_read_are_refused():
    target = build("gemma3_text")[0]
    for read, message in {
        "0+3": "layers of one kind",
        "9": "no layer 9",
        "first": "last, upper, mix, or numbers",
    }.items():
        with pytest.raises(UnsupportedError, match=message):
            GlideConfig.for_target(target, read=read)
    with pytest.raises(UnsupportedError, match="1 or 2 layers"):
        GlideConfig.for_target(target, layers=3)


def test_block_visible_is_a_history_of_rounds():
    """Training's `visible` is what decoding would have had, were every block's tokens accepted."""
    visible = block_visible(torch.tensor([2]), 12, 4)[0].tolist()
    roots = sorted({v for v in visible if v})
    assert roots == [2, 6, 10]
    assert all(v == max((r for r in roots if r <= p), default=0) for p, v in enumerate(visible))


def test_a_draft_overfitted_to_one_sample_reaches_the_acceptance_length_that_implies(tmp_path):
    """Target and draft both learn one sequence by heart; a chain of 5 must then emit nearly 6 tokens a round."""
    torch.manual_seed(0)
    target = build("llama")[0]
    ids = torch.randperm(94)[None, :64] + 3
    optimizer = torch.optim.AdamW(target.model.parameters(), lr=3e-3)
    target.model.train().requires_grad_(True)
    cache = target.new_cache(1, 64)
    for _ in range(80):
        cache = target.new_cache(1, 64)
        logits = target.forward(ids, torch.arange(64)[None], cache).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    target.model.eval().requires_grad_(False)
    module = GlideModel.new(GlideConfig.for_target(target), target)
    teacher = Teacher(target, 1, 64, hidden=True)
    taught = teacher(ids)
    made = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for step in range(120):
        visible = block_visible(torch.tensor([step % 8]), 64, 8)
        logits = draft_logits(module, ids, teacher.positions, teacher.cache, visible)
        loss = distillation_loss(logits, taught, ids, visible > 0, "kl")
        made.zero_grad()
        loss.backward()
        made.step()
    stats = Stats()
    params = SamplingParams(max_new_tokens=48, ignore_eos=True)
    out = []
    for event in decode(
        target, make_drafter("glide", GlideDraft(module), length=5), [ids[0, :16].tolist()], params, stats
    ):
        out += event.tokens
    assert out == ids[0, 16:].tolist()
    assert stats.acceptance_length >= 5.5, stats.as_dict()


def test_every_kind_of_draft_trains_loads_and_decodes_losslessly(world, tmp_path):
    target = load(world)
    prompts = ["def load_table(", "def count_page(page, size=3):\n    for"]
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    plain = [o.tokens for o in generate(target, prompts, None, params)]
    recipes = {
        "glide": DraftRecipe(length=32, rows=2),
        "no-cross": DraftRecipe(kind="glide-no-cross", length=32, rows=2),
        "paper": DraftRecipe(preset="paper", loss="ce", length=32, rows=2, muon=True),
        "lm": DraftRecipe(kind="lm", loss="kl+ce", length=32, rows=2),
    }
    for name, recipe in recipes.items():
        figures = train_draft(target, world["corpus"], tmp_path / name, recipe, Budget(tokens=3 * 64), "cmd", prompts=1)
        assert figures["steps"] == 3
        draft = load_draft(tmp_path / name, target)
        assert (name == "lm") != isinstance(draft, GlideDraft)
        method = "vanilla" if name == "lm" else "glide+cape"
        assert [o.tokens for o in generate(target, prompts, make_drafter(method, draft), params)] == plain
        if name == "paper":
            assert draft.max_lag == 5
            assert not draft.module.config.share_embedding


def test_a_full_disk_keeps_the_last_good_checkpoint(world, tmp_path, monkeypatch):
    target = load(world)
    draft = load_draft(world["glide"], target)
    checkpoint.save_network(tmp_path, draft.module, target, "first", {}, torch.float32)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glidecape.files.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save_network(tmp_path, draft.module, target, "second", {}, torch.float32)
    assert checkpoint.read_card(tmp_path).command == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card.json", "draft.safetensors"]


@pytest.mark.parametrize("keep", [0, 5, 100, -10])
def test_a_torn_draft_is_refused(keep, world, tmp_path):
    whole = (world["glide"] / "draft.safetensors").read_bytes()
    (tmp_path / "draft.safetensors").write_bytes(whole[:keep])
    with pytest.raises(CheckpointError):
        load_draft(tmp_path, load(world))


def test_a_draft_of_another_target_is_refused_and_other_weights_are_noted(world):
    target, other = load(world), build("llama")[0]
    with pytest.raises(MismatchError, match="another shape"):
        load_draft(world["glide"], other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_draft(world["glide"], target)
        load_draft(world["glide"], Target.from_pretrained(world["target"], dtype=torch.bfloat16))
    target.unpack()
    with torch.no_grad():
        for p in target.model.parameters():
            p.mul_(1.5)
    with pytest.warns(UserWarning, match="other weights"):
        load_draft(world["glide"], target)


def test_a_draft_network_knows_neither_target_nor_cache() -> None:
    """Unbound, from tensors of another engine's making, it gives what it gives when bound."""
    target = build("llama")[0]
    bound = GlideModel.new(GlideConfig.for_target(target), target)
    free = GlideModel(bound.config)
    free.load_state_dict(bound.state_dict())
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    positions = torch.arange(8)[None]
    heads, size = bound.config.target_kv_heads, bound.config.target_head_dim
    generator = torch.Generator().manual_seed(1)
    cross = {n: tuple(torch.randn(2, 1, heads, 8, size, generator=generator)) for n in bound.config.layers_read}
    visible = positions - 1
    stored = {}

    def attention(layer, q, k, v, scale):
        stored[layer] = k, v
        weights = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale).masked_fill(
            torch.ones(8, 8, dtype=torch.bool).triu(1), float("-inf")
        )
        return (weights.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)).transpose(1, 2).flatten(2)

    with torch.no_grad():
        found = free(bound.embeddings(tokens), bound.rotary(positions), cross, visible, attention)
        wanted = bound.hidden(tokens, positions, cross, visible)
    torch.testing.assert_close(found, wanted)
    assert list(stored) == [0]
    with pytest.raises(InputError, match=r"call bind\(target\) first"):
        free.logits(found)
