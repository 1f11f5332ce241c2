"""The probe at load: does this model decode trees as it decodes their branches one by one?

An architecture that takes positions from cache slots, keeps a recurrent state, or ignores our mask would be decoded
wrongly in silence. So a small tree is compared with each of its branches; the error must be a small fraction of the
error of a deliberately wrong mask. Errors are root mean squares over all nodes and logits: in bfloat16 a few logits
differ by one rounding step on some CPUs, and the largest difference would show nothing else. A short probe cannot see a
window or a chunk, so the mask function is compared with the literal rule at positions beyond any of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..compat import chunked_causal_mask_function, sliding_window_causal_mask_function
from ..core.tree import TokenTree
from ..errors import UnsupportedError

if TYPE_CHECKING:
    from .target import Target

PREFIX = 6
MAX_SHARE = 0.1


def _probe_tree(vocab: int, device: torch.device) -> TokenTree:
    """Root 0 with children 1 and 2; 1 has child 3, 2 has child 4, 3 has child 5."""
    tree = TokenTree(torch.tensor([3 % vocab], device=device), capacity=6)
    for at, token in ((0, 11), (0, 17), (1, 23), (2, 5), (3, 29)):
        one = torch.tensor([[at]], device=device)
        tree.add(one, torch.tensor([[token % vocab]], device=device), torch.zeros(1, 1, device=device))
    return tree


def _tree_logits(target: Target, prefix: list[int], tree: TokenTree, ancestors: Tensor) -> Tensor:
    cache = target.new_cache(1, PREFIX + tree.nodes + 1)
    target.prefill([[*prefix, 0]], cache)
    root = torch.tensor([PREFIX], device=target.device)
    return target.forward(tree.tokens, tree.positions(root), cache, ancestors).logits[0].float()


def _rms(differences: Tensor) -> float:
    return float(differences.pow(2).mean().sqrt())


@torch.no_grad()
def probe_target(target: Target) -> None:
    """Compare a tree with its branches, and the mask with the literal rule beyond any window.

    Raises:
        UnsupportedError: they differ.
    """
    vocab, device = target.vocab_size, target.device
    prefix = [(7 * i + 1) % vocab for i in range(PREFIX)]
    tree = _probe_tree(vocab, device)
    wrong = torch.ones_like(tree.ancestors).tril()
    ours = _tree_logits(target, prefix, tree, tree.ancestors)
    misled = _tree_logits(target, prefix, tree, wrong)
    branches = []
    for node in range(tree.nodes):
        path = tree.ancestors[0, node].nonzero().flatten().tolist()
        cache = target.new_cache(1, PREFIX + len(path) + 1)
        target.prefill([[*prefix, 0]], cache)
        for step, token in enumerate(tree.path_tokens(0, path)):
            at = torch.tensor([[PREFIX + step]], device=device)
            branch = target.forward(torch.tensor([[token]], device=device), at, cache).logits[0, -1].float()
            cache.commit([1])
        branches.append(branch)
    truth = torch.stack(branches)
    if not bool(torch.isfinite(truth).all()):
        raise UnsupportedError("the target gives logits that are not finite: its weights or dtype are broken")
    error, scale = _rms(ours - truth), _rms(misled - truth)
    # An all-zero or one-layer-blind model shows no difference under any mask; then the error itself must be tiny.
    floor = max(1e-4, torch.finfo(target.dtype).eps / 8) * float(ours.abs().max()) + 1e-6
    if not error <= max(MAX_SHARE * scale, floor):
        raise UnsupportedError(
            f"{target.config.model_type} decodes a tree unlike its branches (difference {error:.2g}, a wrong mask gives "
            f"{scale:.2g}): it cannot be used losslessly here"
        )
    _check_rule(target)


def _check_rule(target: Target) -> None:
    """Our mask for windowed and chunked layers against the literal rule, at positions beyond any of them."""
    from .attention import positional_rule

    config, device = target.text_config, target.device
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    for size, is_chunk in ((window, False), (chunk, True)):
        if not size or size > 65_536:
            continue
        length = 2 * size + 3
        positions = torch.tensor([[length, length + 1, length + 1, length + 2]], device=device)
        if is_chunk:
            rule = chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long, device=device))
        else:
            rule = sliding_window_causal_mask_function(size)
        ours = positional_rule(rule, torch.tensor([length], device=device), positions, positions, length + 4)[0, 0]
        for query, position in enumerate(positions[0].tolist()):
            slots = [*range(length), *positions[0].tolist()]
            for slot in (
                0,
                size - 1,
                size,
                size + 3,
                length - size,
                length - size + 1,
                length - 1,
                *range(length, length + 4),
            ):
                at = slots[slot]
                within = at // size == position // size if is_chunk else at > position - size
                if bool(ours[query, slot]) != (at <= position and within):
                    raise UnsupportedError(
                        f"{config.model_type}: this transformers version masks a window of {size} unlike its own rule"
                    )
