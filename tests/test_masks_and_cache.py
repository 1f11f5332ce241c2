"""Masks as literal pictures, and compaction against recomputation."""

import pytest
import torch

from glidecape.core.cache import KVCache, cache_bytes
from glidecape.core.masks import block_visible, tree_mask, visible_mask
from glidecape.core.tree import TokenTree
from glidecape.errors import InputError, UnsupportedError
from glidecape.target.attention import positional_rule
from glidecape.target.target import Target
from test_against_transformers import build


def picture(mask):
    return ["".join("x" if cell else "." for cell in row) for row in mask.tolist()]


def comb():
    """Root 0, chain 1 and 3, siblings 2 (of 1) and 4 (of 3)."""
    tree = TokenTree(torch.tensor([9]))
    for parent in (0, 0, 1, 1):
        tree.add(torch.tensor([[parent]]), torch.tensor([[5]]), torch.zeros(1, 1))
    return tree


def rows(*lengths, scratch=0):
    """A cache in which so many tokens of each row are committed, and so many scratch slots in use."""
    cache = KVCache([(1, 1)], len(lengths), 16)
    cache.commit(lengths)
    cache.scratch = scratch
    return cache


def test_a_comb_sees_the_prefix_its_ancestors_and_itself():
    mask = tree_mask(rows(3), comb().ancestors, 5)
    assert picture(mask[0, 0]) == [
        "xxxx....",
        "xxxxx...",
        "xxxx.x..",
        "xxxxx.x.",
        "xxxxx..x",
    ]


def test_ragged_rows_begin_their_scratch_at_their_own_length():
    mask = tree_mask(rows(1, 3), comb().ancestors.expand(2, -1, -1)[:, :3, :3], 3)
    assert picture(mask[0, 0]) == ["xx....", "xxx...", "xx.x.."]
    assert picture(mask[1, 0]) == ["xxxx..", "xxxxx.", "xxxx.x"]


def test_a_chain_needs_no_mask_for_one_query_and_a_causal_one_for_several():
    assert tree_mask(rows(4, 4, scratch=1), None, 1) is None
    assert picture(tree_mask(rows(2, scratch=1), None, 2)[0, 0]) == ["xxxx.", "xxxxx"]
    assert picture(tree_mask(rows(1, 2), None, 1)[0, 0]) == ["xx."]


def test_blocks_see_what_was_committed_at_their_root_and_every_lag_is_equally_frequent():
    visible = block_visible(torch.tensor([1]), 8, 3)
    assert visible.tolist() == [[0, 1, 1, 1, 4, 4, 4, 7]]
    assert picture(visible_mask(visible[:, 4:], 8)[0, 0]) == ["xxxx....", "xxxx....", "xxxx....", "xxxxxxx."]
    every = block_visible(torch.arange(5), 205, 5)[:, 5:]  # all phases, past the first block
    lag = torch.arange(5, 205) - every + 1
    assert lag.unique(return_counts=True)[0].tolist() == [1, 2, 3, 4, 5]
    assert lag.unique(return_counts=True)[1].unique().tolist() == [200]


def test_a_window_is_measured_in_positions_not_in_slots():
    from transformers.masking_utils import sliding_window_causal_mask_function

    positions = 4 + comb().depth
    rule = positional_rule(sliding_window_causal_mask_function(3), torch.tensor([4]), positions, positions, 9)[0, 0]
    # Slots 0..3 are positions 0..3; slots 4..8 are positions 4, 5, 5, 6, 6. A window of 3 reaches two positions back.
    assert picture(rule) == [
        "..xxx....",
        "...xxxx..",
        "...xxxx..",
        "....xxxxx",
        "....xxxxx",
    ]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_decoding_from_a_compacted_cache_equals_decoding_from_a_recomputed_one(kind):
    target = build(kind)[0]
    prompts = [[5, 6, 7, 8, 9], [11, 12]]
    tree = TokenTree(torch.tensor([9, 12]))
    for parent, token in ((0, 21), (0, 22), (2, 23), (2, 24), (4, 25)):
        tree.add(torch.full((2, 1), parent), torch.full((2, 1), token), torch.zeros(2, 1))
    cache = target.new_cache(2, 40)
    with torch.no_grad():
        target.prefill(prompts, cache)
        target.forward(tree.tokens, tree.positions(cache.lengths), cache, tree.ancestors)
        cache.keep([[0, 2, 4, 5], [0, 1]])
        known = [[5, 6, 7, 8, 9, 22, 24, 25], [11, 12, 21]]
        assert cache.host_lengths == cache.lengths.tolist() == [8, 3]
        fresh = target.new_cache(2, 40)
        target.prefill([[*k, 0] for k in known], fresh)
        for layer in range(len(target.shapes)):
            for row, length in enumerate(cache.host_lengths):
                for ours, again in zip(cache.committed(layer), fresh.committed(layer), strict=True):
                    torch.testing.assert_close(ours[row, :, :length], again[row, :, :length], atol=1e-5, rtol=1e-4)


def test_committed_is_a_view_and_memory_follows_the_formula():
    cache = KVCache([(2, 4), (1, 8)], batch=3, capacity=10)
    cache.commit([4, 2, 3])
    assert cache.committed(0)[0].data_ptr() == cache.keys[0].data_ptr()
    assert cache.nbytes == cache_bytes(1, 3, 2, 10, 4, torch.float32) + cache_bytes(1, 3, 1, 10, 8, torch.float32)
    with pytest.raises(InputError, match="MiB"):
        KVCache([(8, 64)], batch=4, capacity=100_000, limit_bytes=10**6)
    with pytest.raises(InputError, match="holds 10 tokens"):
        cache.write(0, torch.zeros(3, 2, 7, 4), torch.zeros(3, 2, 7, 4))


def test_prefill_in_pieces_equals_prefill_at_once(monkeypatch):
    target = build("mistral")[0]
    prompts = [[(i * 7) % 90 + 3 for i in range(50)], [4, 5, 6]]
    caches = [target.new_cache(2, 60), target.new_cache(2, 60)]
    with torch.no_grad():
        target.prefill(prompts, caches[0])
        monkeypatch.setattr(target, "chunk", 7)
        target.prefill(prompts, caches[1])
    assert caches[0].host_lengths == caches[1].host_lengths == [49, 2]
    for a, b in zip(caches[0].keys, caches[1].keys, strict=True):
        torch.testing.assert_close(a[0, :, :49], b[0, :, :49], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(a[1, :, :2], b[1, :, :2], atol=1e-5, rtol=1e-4)


TINY = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
REFUSED = {
    "bloom": {"n_layer": 2, "n_head": 2},
    "mamba": {"state_size": 4, "num_hidden_layers": 2},
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2},
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_architectures_that_cannot_hold_a_tree_are_refused_with_the_reason(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(TINY | REFUSED[kind])))
    with pytest.raises(UnsupportedError, match=r"ALiBi|recurrent"):
        Target(model)


def test_the_probe_refuses_a_target_whose_mask_ignores_the_tree(monkeypatch):
    from glidecape.target import target as module

    real = module.tree_mask

    def blind(cache, ancestors, queries):
        return real(cache, None if ancestors is None else torch.ones_like(ancestors).tril(), queries)

    monkeypatch.setattr(module, "tree_mask", blind)
    with pytest.raises(UnsupportedError, match="unlike its branches"):
        build("llama")


def test_the_probe_refuses_a_target_with_wrong_positions(monkeypatch):
    real = TokenTree.positions
    monkeypatch.setattr(TokenTree, "positions", lambda tree, roots: real(tree, roots) + (tree.depth > 1) * 7)
    with pytest.raises(UnsupportedError, match="unlike its branches"):
        build("llama")
