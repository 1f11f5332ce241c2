"""EAGLE and Medusa as networks: training's forward is serving's, they train, save, load and decode losslessly."""

from __future__ import annotations

import pytest
import torch

from glidecape.core.params import SamplingParams
from glidecape.drafting.methods import METHODS, make_drafter
from glidecape.drafts.checkpoint import load_draft, read_card, save_network
from glidecape.drafts.eagle.adapter import EagleDraft
from glidecape.drafts.eagle.config import EagleConfig
from glidecape.drafts.eagle.network import EagleModel
from glidecape.drafts.medusa.adapter import MedusaDraft
from glidecape.drafts.medusa.config import MedusaConfig
from glidecape.drafts.medusa.network import MedusaModel
from glidecape.engine.decode import generate, start
from glidecape.engine.round import run_round
from glidecape.errors import CheckpointError, InputError
from glidecape.target.target import Target
from glidecape.train.data import load_streams
from glidecape.train.draft import DraftLoss, make_draft, train_draft
from glidecape.train.figures import figures_by_lag
from glidecape.train.kinds.eagle import eagle_loss, noisy
from glidecape.train.kinds.medusa import MedusaTraining, medusa_loss
from glidecape.train.loop import Budget
from glidecape.train.losses import distillation_loss
from glidecape.train.recipe import DraftRecipe
from glidecape.train.teacher import Teacher, previous
from states import weights_in
from test_against_transformers import build

PROMPTS = [[(i * 5) % 90 + 3 for i in range(20)], [7, 8, 9], [11]]


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def target(request):
    return build(request.param)[0]


def random_eagle(target):
    """Large random weights, so that every input matters to the output."""
    torch.manual_seed(1)
    module = EagleModel.new(EagleConfig.for_target(target), target)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim < 2 else 0.15)
    return module


# --- training's forward and serving's


def test_a_root_has_the_logits_of_training_and_a_deeper_node_those_of_guessed_features(target):
    """Every round of a ragged batch: the first step's logits at the root, and each chain node's from its own guesses."""
    module = random_eagle(target)
    draft = EagleDraft(module)
    steps = []
    plain_step = draft.step

    def recording(*args, **more):
        logits = plain_step(*args, **more)
        steps.append(logits.clone())
        return logits

    draft.step = recording
    drafter = make_drafter("eagle+chain", draft, length=3)
    state = start(target, drafter, PROMPTS, SamplingParams(temperature=1.5, seed=3, max_new_tokens=12, ignore_eos=True))
    compared = 0
    for _ in range(3):
        known, trusted = [list(row.tokens) for row in state.rows], list(state.draft.own.host_lengths)
        steps.clear()
        proposed = []
        propose = drafter.propose
        drafter.propose = lambda state, propose=propose, proposed=proposed: (
            proposed.append(propose(state)) or proposed[0]
        )
        run_round(target, drafter, state)
        drafter.propose = propose
        for row, tokens in enumerate(known):
            teacher = Teacher(target, 1, len(tokens), hidden=True)
            ids = torch.tensor([tokens])
            teacher(ids)
            features = previous(teacher.features(ids))
            with torch.no_grad():
                for depth in range(3):
                    positions = torch.arange(ids.shape[1])[None]
                    hidden = module.hidden(ids, positions, features)
                    column = len(tokens) - 1 - trusted[row] if depth == 0 else 0
                    wanted = module.logits(hidden)[0, -1]
                    torch.testing.assert_close(steps[depth][row, column], wanted, atol=2e-4, rtol=1e-3)
                    ids = torch.cat([ids, proposed[0].tokens[row, depth + 1].view(1, 1)], 1)
                    features = torch.cat([features, hidden[:, -1:]], 1)
                    compared += 1
    assert compared == 27


def test_a_tree_s_nodes_read_the_guess_of_their_own_parent(target):
    """Each node that was run, against a forward over its own path alone."""
    module = random_eagle(target)
    draft = EagleDraft(module)
    found = []
    plain_step = draft.step

    def recording(queries, own, target_cache):
        logits = plain_step(queries, own, target_cache)
        if queries.parents is not None:
            found.append((queries.tokens.clone(), logits.detach().clone()))
        return logits

    draft.step = recording
    prompt = PROMPTS[0]
    drafter = make_drafter("eagle", draft, length=4, top=3, total=40)
    tree = drafter.propose(start(target, drafter, [prompt], SamplingParams(max_new_tokens=12)))
    teacher = Teacher(target, 1, len(prompt), hidden=True)
    teacher(torch.tensor([prompt]))
    features = previous(teacher.features(torch.tensor([prompt])))
    by_path = {}
    with torch.no_grad():
        for node in range(tree.nodes):
            path, at = [], node
            while at > 0:
                path, at = [int(tree.tokens[0, at]), *path], int(tree.parents[0, at])
            ids, read = torch.tensor([prompt]), features
            for token in path:
                hidden = module.hidden(ids, torch.arange(ids.shape[1])[None], read)
                ids, read = torch.cat([ids, torch.tensor([[token]])], 1), torch.cat([read, hidden[:, -1:]], 1)
            by_path[tuple(path)] = module.logits(module.hidden(ids, torch.arange(ids.shape[1])[None], read))[0, -1]
    matched = 0
    for depth, (tokens, logits) in enumerate(found, 1):
        expected = [wanted for path, wanted in by_path.items() if len(path) == depth]
        for column in range(tokens.shape[1]):
            gaps = [float((logits[0, column] - wanted).abs().max()) for wanted in expected]
            matched += min(gaps) < 2e-3
    assert len(found) == 3
    assert matched >= 7  # those of the 9 that were run and kept


def test_heads_in_serving_are_heads_in_training(target):
    torch.manual_seed(1)
    module = MedusaModel.new(MedusaConfig.for_target(target, 3), target)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    drafter = make_drafter("medusa", MedusaDraft(module))
    state = start(target, drafter, PROMPTS, SamplingParams(max_new_tokens=12))
    with torch.no_grad():
        served = module.logits(module(state.cache.hidden_at(state.cache.lengths[:, None] - 1)[:, 0]))
        drafter.propose(state)
        assert torch.equal(state.draft.logits, served)
        for row, prompt in enumerate(PROMPTS):
            ids = torch.tensor([prompt])
            teacher = Teacher(target, 1, len(prompt), hidden=True)
            teacher(ids)
            for lag, logits in enumerate(MedusaTraining(module).logits_by_lag(ids, teacher), 1):
                if len(prompt) > 1 and lag == 1:
                    # At lag 1 the last position is the root, which the first head answers.
                    torch.testing.assert_close(served[row, 0], logits[0, -1], atol=2e-4, rtol=1e-3)
                if len(prompt) > lag:
                    features = teacher.features(ids)
                    torch.testing.assert_close(logits[0, lag], module.head_logits(lag - 1, features)[0, 0])


# --- losses


def output_of(target, rows=2, length=12, learned=None):
    teacher = Teacher(target, rows, length, hidden=True)
    tokens = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(2))
    return teacher.run(tokens, 5, learned)


def test_eagle_s_loss_is_the_formula(target):
    module, output = random_eagle(target), output_of(target)
    loss = eagle_loss(module, output, "feature", 0.0, 0).item()
    features = output.teacher.features(output.tokens).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = module.hidden(output.tokens, output.teacher.positions, previous(features))
        logits = module.logits(hidden)
    gap = (hidden.float() - features)[:, 1:].abs()
    smooth = torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
    p, q = output.logits[:, 1:].float().log_softmax(-1), logits[:, 1:].float().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    assert loss == pytest.approx(float(smooth + 0.1 * divergence), rel=1e-3)
    assert eagle_loss(module, output, "kl", 0.0, 0).item() == pytest.approx(float(divergence), rel=1e-3)


def test_medusa_s_loss_is_the_weighted_mean_of_its_heads(target):
    output = output_of(target)
    torch.manual_seed(1)
    module = MedusaModel.new(MedusaConfig.for_target(target, 2), target)
    total = 0.0
    for k, weight in ((1, 0.8 / 1.44), (2, 0.64 / 1.44)):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            drafted = module.head_logits(k - 1, output.teacher.features(output.tokens))
        p, q = output.logits[:, k:].float().log_softmax(-1), drafted[:, :-k].float().log_softmax(-1)
        total += weight * float((p.exp() * (p - q)).sum(-1).mean())
    assert medusa_loss(module, output, "kl").item() == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("kind", ["eagle", "medusa"])
def test_a_token_that_is_not_to_be_learned_changes_no_loss(target, kind):
    learned = torch.zeros(2, 12, dtype=torch.bool)
    learned[:, 5:8] = True
    recipe = DraftRecipe(kind=kind, length=12, rows=2, noise=0.0, max_lag=2)
    module = make_draft(target, recipe)
    draft_loss = DraftLoss(target, module, recipe, 12)
    losses = [float(draft_loss(tokens_changed_at(at), 0, learned).detach()) for at in (None, 9, 6)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # after all that is learned
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def tokens_changed_at(at):
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(2))
    if at is not None:
        tokens[:, at] = 91
    return tokens


def test_noise_is_bounded_and_a_function_of_seed_and_batch():
    features = torch.zeros(2, 64, 8)
    shaken = noisy(features, 0.1, 3, 7)
    assert torch.equal(shaken, noisy(features, 0.1, 3, 7))
    assert not torch.equal(shaken, noisy(features, 0.1, 3, 8))
    assert not torch.equal(shaken, noisy(features, 0.1, 4, 7))
    assert 0.75 < float(shaken.abs().max()) <= 0.1 * 512 / 64
    assert noisy(features, 0.0, 3, 7) is features


@pytest.mark.parametrize("kind", ["eagle", "medusa"])
def test_a_run_killed_and_resumed_ends_with_the_weights_of_one_never_killed(world, tmp_path, kind):
    target = Target.from_pretrained(world["target"], dtype=torch.float32)
    recipe = DraftRecipe(kind=kind, length=32, rows=2)
    for name, steps in (("whole", (4,)), ("resumed", (2, 4))):
        for count in steps:  # a budget that is prolonged goes on from the state of the shorter one
            budget = Budget(tokens=count * 64, warmup=0, decay=1e-9)
            train_draft(target, world["corpus"], tmp_path / name, recipe, budget, prompts=0)
    whole, resumed = (weights_in(tmp_path / name) for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_kl_on_the_shifted_law_is_what_a_medusa_head_learns(world):
    """Untrained heads are the target's own law one token early; training must bring each nearer to the law it stands for."""
    target = Target.from_pretrained(world["target"], dtype=torch.float32, pack=False)
    trained = load_draft(world["medusa"], target).module
    raw = MedusaModel.new(trained.config, target)
    text = load_streams(world["corpus"], target.tokenizer, target.vocab_size, "all")["valid"].tokens
    tokens = torch.from_numpy(text[: 4 * 48].astype("int64")).view(4, 48)
    output = Teacher(target, 4, 48, hidden=True).run(tokens, 0)
    before, after = [], []
    for k in range(1, trained.config.heads + 1):
        for module, losses in ((raw, before), (trained, after)):
            with torch.no_grad():
                drafted = module.head_logits(k - 1, output.teacher.features(output.tokens)[:, :-k])
            everywhere = torch.ones_like(output.tokens[:, k:], dtype=torch.bool)
            losses.append(
                float(distillation_loss(drafted, output.logits[:, k:], output.tokens[:, k:], everywhere, "kl"))
            )
    assert all(a < 0.9 * b for a, b in zip(after, before, strict=True)), (before, after)


# --- the whole way


@pytest.mark.parametrize("base", ["eagle", "medusa"])
def test_a_trained_draft_decodes_losslessly_and_is_worth_something(world, base):
    target = Target.from_pretrained(world["target"], dtype=torch.float32)
    draft = load_draft(world[base], target)
    prompts = ["def load_table(", "def count_page(page, size=3):\n    for"]
    for params in (
        SamplingParams(max_new_tokens=24, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=2, max_new_tokens=24, ignore_eos=True, repetition_penalty=1.2),
    ):
        plain = [o.tokens for o in generate(target, prompts, None, params)]
        for method in (m for m in METHODS if m.split("+")[0] == base):
            assert [o.tokens for o in generate(target, prompts, make_drafter(method, draft), params)] == plain, method
    figures = read_card(world[base]).figures
    assert figures["acceptance_length_greedy"] > 1.1
    assert len(figures["overlap_by_lag"]) == (1 if base == "eagle" else 5)
    tokens = torch.randint(3, 90, (400,)).numpy()
    assert figures_by_lag(target, draft.module, tokens, 24, max_windows=1)["positions"] == 16


@pytest.mark.parametrize("base", ["eagle", "medusa"])
def test_what_is_saved_is_what_is_loaded_and_borrowed_parts_are_not_stored(target, tmp_path, base):
    module = random_eagle(target) if base == "eagle" else MedusaModel.new(MedusaConfig.for_target(target), target)
    save_network(tmp_path, module, target, "cmd", {"steps": 1}, torch.float32)
    loaded = load_draft(tmp_path, target)
    assert (loaded.kind, loaded.figures) == (base, {"steps": 1})
    assert loaded.module.config == module.config
    assert not any("embed" in name or "head" in name for name in module.state_dict())
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    plain = [o.tokens for o in generate(target, PROMPTS, None, params)]
    assert [o.tokens for o in generate(target, PROMPTS, make_drafter(base, loaded), params)] == plain


def test_a_checkpoint_of_an_unknown_kind_is_refused(target, tmp_path):
    module = random_eagle(target)
    module.kind = "hydra"
    save_network(tmp_path, module, target, "cmd", {}, torch.float32)
    with pytest.raises(CheckpointError, match="kind 'hydra', unknown here"):
        load_draft(tmp_path, target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "hydra"}, "unknown kind of draft 'hydra'"),
        ({"kind": "eagle", "glimpse": "on"}, "glimpse is an option of GliDe, not of a draft of kind eagle"),
        ({"kind": "medusa", "draft_vocab": 100}, "draft-vocab is an option of GliDe"),
        ({"kind": "glide", "loss": "feature"}, "the loss 'feature' is EAGLE's"),
        ({"kind": "eagle", "noise": -1.0}, "noise on features must not be negative"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DraftRecipe(**options)


def test_usual_losses():
    assert [DraftRecipe(kind=kind).loss for kind in ("glide", "eagle", "medusa", "lm")] == ["kl", "feature", "kl", "kl"]
