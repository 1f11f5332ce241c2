"""GliDe inside vLLM, as far as it needs no vLLM: the paged cache, rows by request, and a runner of our own making."""

import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from glidecape.core.params import SamplingParams
from glidecape.core.transfer import to_host
from glidecape.drafting.drafter import DrafterWrapper
from glidecape.drafting.methods import make_drafter
from glidecape.drafts.checkpoint import load_draft, read_unbound
from glidecape.drafts.glide.adapter import GlideDraft
from glidecape.drafts.glide.config import GlideConfig
from glidecape.drafts.glide.network import GlideModel
from glidecape.engine.decode import start
from glidecape.engine.round import run_round
from glidecape.errors import InputError, MismatchError, UnsupportedError
from glidecape.integrations.vllm.paged import gather, views
from glidecape.integrations.vllm.rows import DraftRow, RowDrafter
from glidecape.target.target import Target
from test_against_transformers import build

PROMPTS = [list(range(2, 2 + n)) for n in (1, 5, 12, 40)]


def write(cache, block, slot, keys, values):
    """Keys and values `(kv_heads, head_dim)` of one token, where CPU_ATTN's kernel stores them."""
    heads, size, double = cache.shape[1:]
    dims, flat = torch.arange(double // 2), cache[block].view(heads, -1)
    flat[:, dims * size + slot] = keys
    flat[:, (size + slot) * (double // 2) + dims] = values


def paged(rows, size=4, spare=3):
    """A paged cache of rows `(kv_heads, tokens, head_dim)` in shuffled blocks, everything else NaN, and the block tables."""
    chosen = random.Random(0)
    counts = [-(-keys.shape[1] // size) for keys, _ in rows]
    heads, _, head_dim = rows[0][0].shape
    cache = torch.full((sum(counts) + spare, heads, size, 2 * head_dim), float("nan"))
    free = list(range(1, len(cache)))  # block 0 belongs to nobody
    chosen.shuffle(free)
    tables = torch.zeros(len(rows), max(counts) + 1, dtype=torch.int32)
    for row, (keys, values) in enumerate(rows):
        for number in range(counts[row]):
            tables[row, number] = free.pop()
        for token in range(keys.shape[1]):
            block = int(tables[row, token // size])
            write(cache, block, token % size, keys[:, token], values[:, token])
    return cache, tables


@pytest.mark.parametrize("size", [1, 4, 16])
def test_keys_and_values_are_read_through_block_tables(size):
    rows = [(torch.randn(2, n, 6), torch.randn(2, n, 6)) for n in (1, 4, 9, 16)]
    cache, tables = paged(rows, size)
    for length in (1, 9, 16):
        keys, values = gather("CPU_ATTN", cache, tables, length)
        assert keys.shape == values.shape == (4, 2, length, 6)
        for row, (wanted_keys, wanted_values) in enumerate(rows):
            known = min(length, wanted_keys.shape[1])
            assert torch.equal(keys[row, :, :known], wanted_keys[:, :known])
            assert torch.equal(values[row, :, :known], wanted_values[:, :known])


def test_a_cache_of_another_backend_is_refused():
    with pytest.raises(UnsupportedError, match=r"CPU_ATTN, and this one is FLASH_ATTN"):
        views("FLASH_ATTN", torch.zeros(1, 1, 4, 8))


class Beside(DrafterWrapper):
    """Lets a `RowDrafter` draft beside our own drafter, its rows in any order, and compares the two in every round."""

    def __init__(self, inner, drafter, present=lambda round, row: True):
        super().__init__(inner)
        self.drafter, self.present, self.rounds, self.compared = drafter, present, 0, 0
        self.made, own = [], drafter._catch_up  # tokens of each row whose keys were made afresh, by round

        def catch_up(pieces, *rest):
            self.made.append((self.rounds, max(map(len, pieces))))
            own(pieces, *rest)

        drafter._catch_up = catch_up

    def propose(self, batch):
        tree = self.inner.propose(batch)
        wanted = [
            [token for token, valid in zip(tokens[1:], valid[1:], strict=True) if valid]
            for tokens, valid in zip(to_host(tree.tokens), to_host(tree.valid), strict=True)
        ]
        order = [row for row in range(len(batch.rows)) if self.present(self.rounds, batch.rows[row].index)]
        random.Random(self.rounds).shuffle(order)
        self.rounds += 1
        if order:
            longest = max(len(batch.rows[row].tokens) for row in order) - 1
            cross = {}
            for number in self.inner.model.config.layers_read:
                keys, values = batch.cache.committed(number)
                rows = [
                    (keys[row, :, : len(batch.rows[row].tokens) - 1], values[row, :, : len(batch.rows[row].tokens) - 1])
                    for row in order
                ]
                cache, tables = paged(rows)
                cross[number] = [one.nan_to_num(7.0) for one in gather("CPU_ATTN", cache, tables, longest)]
            asked = [
                DraftRow(str(row.index), np.array(row.tokens, dtype=np.int32), max(1, row.budget - 1))
                for row in (batch.rows[row] for row in order)
            ]
            found = self.drafter.draft(asked, cross)
            assert found == [wanted[row] for row in order]
            self.compared += len(order)
        return tree


def decode_beside(target, network, method, present=lambda round, row: True, **options):
    inner = make_drafter(method, GlideDraft(network), **options)
    beside = Beside(inner, RowDrafter(network, inner.stop, inner.cap), present)
    batch = start(target, beside, PROMPTS, SamplingParams(max_new_tokens=70, ignore_eos=True))
    while all(row.finish is None for row in batch.rows):
        run_round(target, beside, batch)
    assert beside.compared > 20
    return beside


def trained(world):
    target = Target.from_pretrained(world["target"], dtype=torch.float32)
    return target, load_draft(world["glide"], target).module


@pytest.mark.parametrize("method", ["glide", "glide+svip"])
def test_it_drafts_what_our_own_loop_drafts(method, world):
    beside = decode_beside(*trained(world), method)
    assert max(len(kept.tokens) - kept.first for kept in beside.drafter.kept.values()) <= 64 + 8
    # After a prompt, the only token that the draft did not run is the last one of a draft that was accepted whole.
    assert {count for round, count in beside.made if round > 1} <= {1}


@pytest.mark.parametrize(
    "changes",
    [{"window": 6}, {"window": 1}, {"preset": "paper"}, {"layers": 2, "window": 5}, {"layers": 2, "preset": "paper"}],
    ids=str,
)
def test_so_do_drafts_of_other_shapes(changes):
    target = build("llama")[0]
    torch.manual_seed(1)
    network = GlideModel.new(GlideConfig.for_target(target, max_lag=4, **changes), target).serve()
    decode_beside(target, network, "glide", length=4)


@pytest.mark.parametrize("changes", [{}, {"window": 6}, {"preset": "paper"}], ids=str)
def test_rows_that_are_away_for_some_rounds_are_drafted_for_as_if_they_had_stayed(changes):
    """As in a batch from which rows are preempted and to which they come back, in other places."""
    target = build("llama")[0]
    torch.manual_seed(1)
    network = GlideModel.new(GlideConfig.for_target(target, max_lag=4, **changes), target).serve()
    decode_beside(target, network, "glide", lambda round, row: (round // 3 + row) % 3 > 0, length=4)


def test_a_request_s_keys_count_for_the_tokens_that_they_were_made_of_alone(world):
    """Under an id that was used before, other tokens get the draft that they get under a new one."""
    network = trained(world)[1]
    heads, size = network.config.target_kv_heads, network.config.target_head_dim
    torch.manual_seed(2)
    cross = {n: (torch.randn(1, heads, 30, size), torch.randn(1, heads, 30, size)) for n in network.config.layers_read}
    inner = make_drafter("glide", GlideDraft(network), length=5)
    used = RowDrafter(network, inner.stop, inner.cap)
    tokens = np.arange(31, dtype=np.int32)
    others = [np.concatenate([tokens[:n], tokens[n:] + 40]) for n in (0, 12, 30)]
    with torch.no_grad():
        drafts = [used.draft([DraftRow("a", other, 5)], cross) for other in (tokens, *others)]
        fresh = [
            RowDrafter(network, inner.stop, inner.cap).draft([DraftRow("a", other, 5)], cross)
            for other in (tokens, *others)
        ]
    assert drafts == fresh
    assert len({str(draft) for draft in drafts}) > 1
    used.forget({"b"})
    assert not used.kept


# --- the proposer with vLLM's objects of our own making


class Layer:
    """vLLM's `Attention`, as far as it is used: a cache, and the backend's own function that writes it."""

    sliding_window = None

    def __init__(self, shape, blocks=40, size=4, name="CPU_ATTN"):
        self.num_kv_heads, self.head_size = shape
        self.kv_cache = torch.zeros(blocks, shape[0], size, 2 * shape[1])
        self.attn_backend = SimpleNamespace(get_name=lambda: name)
        self.impl = self

    def do_kv_cache_update(self, layer, keys, values, cache, slots):
        for slot, key, value in zip(slots.tolist(), keys, values, strict=True):
            write(cache, slot // cache.shape[2], slot % cache.shape[2], key, value)


class Model(torch.nn.Module):
    """vLLM's model, as far as it is used, made of a transformers model."""

    def __init__(self, target):
        super().__init__()
        self.own = target
        self.model = torch.nn.Module()
        cos, sin = target.model.get_decoder().rotary_emb(torch.zeros(1), torch.arange(target.context)[None])
        half = cos.shape[-1] // 2
        rotary = SimpleNamespace(cos_sin_cache=torch.cat([cos[0, :, :half], sin[0, :, :half]], -1), is_neox_style=True)
        layers = []
        for _ in target.shapes:
            layers.append(torch.nn.Module())
            layers[-1].self_attn = torch.nn.Module()
            layers[-1].self_attn.rotary_emb = rotary
        self.model.layers = torch.nn.ModuleList(layers)

    def embed_input_ids(self, tokens):
        assert tokens.ndim == 1
        return self.own.model.get_input_embeddings()(tokens)

    def compute_logits(self, hidden):
        assert hidden.ndim == 2
        return self.own.model.get_output_embeddings()(hidden)


@pytest.fixture
def vllm(monkeypatch):
    """A package of that name: its model runner makes its cache and nothing else, its sampler has the two faults."""

    class GPUModelRunner:
        def initialize_kv_cache(self, kv_cache_config):
            self.kv_cache_config = kv_cache_config
            return "made"

    runner = ModuleType("vllm.v1.worker.gpu_model_runner")
    runner.GPUModelRunner = GPUModelRunner
    sampler = ModuleType("vllm.v1.sample.rejection_sampler")
    sampler.expand_batch_to_tokens = lambda values, ends, count, *_: torch.full((count,), float("nan"))
    sampler.apply_sampling_constraints = lambda logits, ends, k: (
        logits + sampler.expand_batch_to_tokens(k, ends, len(logits)).amax()
    )
    samplers = ModuleType("vllm.v1.sample")
    samplers.rejection_sampler = sampler
    package = ModuleType("vllm")
    package.__version__ = "0.32.0+cpu"
    for name, module in (
        ("vllm", package),
        ("vllm.v1", ModuleType("vllm.v1")),
        (samplers.__name__, samplers),
        (sampler.__name__, sampler),
        ("vllm.v1.worker", ModuleType("vllm.v1.worker")),
        (runner.__name__, runner),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    package.runner, package.sampler = GPUModelRunner, sampler
    return package


def config_of(world, target, **changes):
    """vLLM's configuration for a target; `changes` by their names in it."""
    layers = {f"model.layers.{number}.self_attn.attn": Layer(shape) for number, shape in enumerate(target.shapes)}
    config = {
        "additional_config": {"glide": {"draft": str(world["glide"]), "method": "glide"}},
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "is_multimodal_model": False,
        "cache_dtype": "auto",
        "num_speculative_tokens": 5,
        "num_speculative_tokens_per_batch_size": None,
        "layers": layers,
    } | changes
    model = SimpleNamespace(
        model=str(world["target"]),
        tokenizer=str(world["target"]),
        revision=None,
        trust_remote_code=False,
        skip_tokenizer_init=False,
        dtype=torch.float32,
        max_model_len=100,
        is_multimodal_model=config["is_multimodal_model"],
    )
    return SimpleNamespace(
        additional_config=config["additional_config"],
        model_config=model,
        parallel_config=SimpleNamespace(**config),
        cache_config=SimpleNamespace(cache_dtype=config["cache_dtype"]),
        speculative_config=SimpleNamespace(**config),
        device_config=SimpleNamespace(device=torch.device("cpu")),
        compilation_config=SimpleNamespace(static_forward_context=config["layers"]),
    )


def runner_of(vllm, proposer, config):
    runner = vllm.runner()
    runner.drafter = proposer
    groups = [SimpleNamespace(layer_names=list(config.compilation_config.static_forward_context))]
    assert runner.initialize_kv_cache(SimpleNamespace(kv_cache_groups=groups)) == "made"
    return runner


def proposer_of(vllm, config, target):
    from glidecape.integrations.vllm import GlideProposer

    proposer = GlideProposer(config)
    proposer.load_model(Model(target))
    return proposer, runner_of(vllm, proposer, config)


@torch.no_grad()
def test_the_proposer_drafts_what_our_own_loop_drafts_of_the_same_rows(vllm, world):
    target = trained(world)[0]
    config = config_of(world, target)
    proposer, runner = proposer_of(vllm, config, target)
    # On what vLLM lends: the head's products round otherwise than in a draft that packed it.
    inner = make_drafter("glide", GlideDraft(proposer.drafter.network), length=5)
    batch = start(target, inner, PROMPTS, SamplingParams(max_new_tokens=90, ignore_eos=True))
    tree = inner.propose(batch)
    lengths = [len(row.tokens) for row in batch.rows]
    # Row 1 still reads its prompt, and row 3 may emit 3 more tokens, of which the last needs no draft.
    wanted = [tokens[1:6] for tokens in to_host(tree.tokens)]
    wanted[1], wanted[3] = [], wanted[3][:2]
    for number, layer in enumerate(config.compilation_config.static_forward_context.values()):
        keys, values = batch.cache.committed(number)
        rows = [(keys[row, :, : n - 1], values[row, :, : n - 1]) for row, n in enumerate(lengths) if n > 1]
        layer.kv_cache, tables = paged(rows, spare=30)
        layer.kv_cache.nan_to_num_(7.0)
    tables = torch.cat([torch.zeros_like(tables[:1]), tables])  # the first row has one token, and no key yet
    runner.input_batch = SimpleNamespace(
        req_ids=list("abcd"), num_reqs=4, block_table=[SimpleNamespace(get_device_tensor=lambda n: tables[:n])]
    )
    runner.requests = {
        name: SimpleNamespace(
            prompt_embeds=None,
            output_token_ids=[1] * 7,
            sampling_params=SimpleNamespace(max_tokens=10 if name == "d" else None),
        )
        for name in "abcd"
    }
    known = np.zeros((4, 100), dtype=np.int32)
    for row, one in enumerate(batch.rows):
        known[row, : lengths[row]] = one.tokens
    proposer.drafter.kept["gone"] = next(iter(proposer.drafter.kept.values()), None)
    assert proposer.propose([[1], [], [1, 2], [1]], np.array(lengths), known, slot_mappings=None) == wanted
    assert proposer.drafter.kept.keys() == {"a", "c", "d"}
    assert proposer.propose([[]] * 4, np.array(lengths), known) == [[]] * 4


@torch.no_grad()
def test_what_vllm_lends_is_what_a_draft_takes_of_a_target(vllm, world):
    target, network = trained(world)
    lent = proposer_of(vllm, config_of(world, target), target)[0].drafter.network
    tokens, positions = torch.tensor([[3, 1, 4], [1, 5, 9]]), torch.tensor([[0, 1, 2], [7, 90, 500]])
    torch.testing.assert_close(lent.embeddings(tokens), network.embeddings(tokens))
    for found, wanted in zip(
        lent.rotary(positions), network.rotary(positions.clamp(max=target.context - 1)), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    hidden = torch.randn(2, 3, target.hidden_size)
    torch.testing.assert_close(lent.logits(hidden), network.logits(hidden), atol=0.05, rtol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size must be 1, not 2"),
        ({"cache_dtype": "fp8"}, "kv_cache_dtype must be auto, not fp8"),
        ({"is_multimodal_model": True}, "not for models that read pictures"),
        ({"num_speculative_tokens_per_batch_size": [(1, 4, 3)]}, "leave num_speculative_tokens_per_batch_size out"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(changes, message, vllm, world):
    from glidecape.integrations.vllm import GlideProposer

    with pytest.raises(UnsupportedError, match=message):
        GlideProposer(config_of(world, trained(world)[0], **changes))


def test_other_versions_are_refused(vllm, world):
    from glidecape.integrations.vllm import GlideProposer

    vllm.__version__ = "0.99.0"
    with pytest.raises(UnsupportedError, match=r"tried inside vLLM 0\.32\.0, and this is 0\.99\.0"):
        GlideProposer(config_of(world, trained(world)[0]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (None, InputError, "needs a draft"),
        ({"draft": "eagle"}, UnsupportedError, "takes a GliDe draft, and this is eagle"),
        ({"draft": "glide", "method": "glide+cape"}, UnsupportedError, r"'glide\+cape' is more than that"),
        ({"draft": "glide", "method": "glide+heuristic"}, UnsupportedError, "verifies chains"),
        ({"draft": "glide", "method": "glide+auto"}, UnsupportedError, "verifies chains"),
        ({"draft": "glide", "size": 3}, InputError, "unknown option 'size'"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used_are_refused(options, error, message, vllm, world):
    target = trained(world)[0]
    given = {} if options is None else {"glide": options | {"draft": str(world[options["draft"]])}}
    with pytest.raises(error, match=message):
        proposer_of(vllm, config_of(world, target, additional_config=given), target)


def test_vllm_s_sampler_is_mended_where_it_is_wrong(vllm, world):
    """Each drafted token gets its row's number, and nothing is asked of no tokens, at which vLLM stops."""
    ends, rows = torch.tensor([2, 2, 5]), torch.tensor([7, 1, 9])
    with pytest.raises(RuntimeError, match="numel"):
        vllm.sampler.apply_sampling_constraints(torch.zeros(0), ends * 0, rows)
    for _ in range(2):  # once is enough, and twice no harm
        proposer_of(vllm, config_of(world, trained(world)[0]), trained(world)[0])
    assert vllm.sampler.expand_batch_to_tokens(rows, ends, 5).tolist() == [7, 7, 9, 9, 9]
    assert vllm.sampler.expand_batch_to_tokens(rows / 2, ends, 5, 3.5, 1).tolist() == [1, 1, 4.5, 4.5, 4.5]
    assert vllm.sampler.apply_sampling_constraints(torch.zeros(5), ends, rows).tolist() == [9] * 5
    assert len(vllm.sampler.apply_sampling_constraints(torch.zeros(0), ends * 0, rows)) == 0


def test_a_draft_of_another_target_is_refused(vllm, world):
    target = trained(world)[0]
    config = config_of(world, target)
    config.model_config.model = str(world["lm"])
    with pytest.raises(MismatchError, match="a target of another shape"):
        proposer_of(vllm, config, target)


def test_a_layer_that_keeps_a_window_is_refused(vllm, world):
    target = trained(world)[0]
    config = config_of(world, target)
    for layer in config.compilation_config.static_forward_context.values():
        layer.sliding_window = 8
    with pytest.raises(UnsupportedError, match="keeps a window of the context alone"):
        proposer_of(vllm, config, target)


def test_a_cache_that_its_backend_lays_out_otherwise_is_refused_when_it_is_made(vllm, world):
    """As on CPUs with matrix units, where the backend of the same name packs bfloat16 in pairs."""
    target = trained(world)[0]
    config = config_of(world, target)
    proposer, _ = proposer_of(vllm, config, target)
    for layer in config.compilation_config.static_forward_context.values():
        own = layer.do_kv_cache_update
        layer.impl = SimpleNamespace(
            do_kv_cache_update=lambda layer, keys, *rest, own=own: own(layer, keys.roll(1, -1), *rest)
        )
    with pytest.raises(UnsupportedError, match=r"lays torch\.float32 keys and values out otherwise"):
        runner_of(vllm, proposer, config)


def test_rotary_embeddings_of_other_kinds_are_refused(vllm, world):
    target = trained(world)[0]
    model = Model(target)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb.is_neox_style = False
    from glidecape.integrations.vllm import GlideProposer

    proposer = GlideProposer(config_of(world, target))
    with pytest.raises(UnsupportedError, match="half and half"):
        proposer.load_model(model)


def test_a_draft_can_be_read_without_a_target(world):
    """What another engine knows of its model is enough, and nothing is bound."""
    target, bound = trained(world)
    facts = SimpleNamespace(
        text_config=target.text_config,
        tokenizer=None,
        weights_digest=None,
        shapes=target.shapes,
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        embed_width=target.embed_width,
    )
    network = read_unbound(world["glide"], facts)
    assert isinstance(network, GlideModel)
    assert network.config == bound.config
    with pytest.raises(InputError, match=r"call bind\(target\) first"):
        network.embeddings(torch.tensor([[1]]))
