"""A `TokenTree` as the tensors that SGLang verifies, and what SGLang accepted as paths. Never run inside SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.transfer import to_host
from ...core.tree import TokenTree
from ...errors import InputError


@dataclass(frozen=True)
class VerifyTensors:
    """What SGLang's `NgramVerifyInput` and `EagleVerifyInput` hold of a batch of trees, under their names.

    Attributes:
        draft_token: `(rows * nodes,)` int64; 0 for padding.
        positions: `(rows * nodes,)` int64.
        retrieve_index: `(rows, nodes)` int64, a node's place in the two above.
        retrieve_next_token, retrieve_next_sibling: `(rows, nodes)` int64, a node's first child and the sibling to try after
            it, as numbers within the row; -1: none.
        custom_mask: bool, flat, see `verify_tensors`.
    """

    draft_token: Tensor
    positions: Tensor
    retrieve_index: Tensor
    retrieve_next_token: Tensor
    retrieve_next_sibling: Tensor
    custom_mask: Tensor


def verify_tensors(
    tree: TokenTree, lengths: Tensor, nodes: int, host_lengths: Sequence[int] | None = None
) -> VerifyTensors:
    """The tensors of trees with `nodes` nodes in every row, of which the last ones are padding where a row has fewer.

    Padding is linked to no node, and sees the committed tokens and itself. The same becomes of a node whose token an earlier
    sibling has, and of all below it: verify never accepts it, and SGLang's rule for sampled rows would count its probability
    twice.

    Args:
        tree: its root is the row's newest token, which has no keys yet.
        lengths: `(rows,)` int64, committed tokens of each row (SGLang's `seq_lens`): the root's position.
        nodes: SGLang's `speculative_num_draft_tokens`, the root included.
        host_lengths: the same on the host. The mask is then `TreeMaskMode.FULL_MASK`: `(nodes, length + nodes)` of each row,
            the committed tokens first, one row behind the other. None: `TreeMaskMode.QLEN_ONLY`, `(rows, nodes, nodes)`.

    Raises:
        InputError: the tree has more nodes.

    Source: `build_tree_efficient` (eagle.cuh) and `reconstruct_indices_from_tree_mask` of SGLang 0.5.23.

    >>> tree = TokenTree.comb(torch.tensor([5]), torch.tensor([[[7, 8]]]), torch.zeros(1, 1, 2))
    >>> made = verify_tensors(tree, torch.tensor([1]), 4, [1])
    >>> made.retrieve_next_token.tolist(), made.retrieve_next_sibling.tolist(), made.positions.tolist()
    ([[1, -1, -1, -1]], [[-1, 2, -1, -1]], [1, 2, 2, 1])
    >>> made.custom_mask.view(4, 5).int().tolist()
    [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 0, 0, 1]]
    """
    spare, device = nodes - tree.nodes, tree.tokens.device
    if spare < 0:
        raise InputError(f"a tree of {tree.nodes} nodes does not fit into {nodes}: call tree.pack({nodes}) first")
    offered = _offered(tree)
    child, sibling = _links(tree, offered)
    seen = pad(tree.ancestors & offered[:, :, None], (0, spare, 0, spare))
    seen = seen | torch.eye(nodes, dtype=torch.bool, device=device)
    index = torch.arange(tree.batch * nodes, device=device).view(tree.batch, nodes)
    return VerifyTensors(
        pad(tree.tokens * offered, (0, spare)).flatten(),
        (lengths[:, None] + pad(tree.depth * offered, (0, spare))).flatten(),
        index,
        pad(child, (0, spare), value=-1),
        pad(sibling, (0, spare), value=-1),
        seen.flatten() if host_lengths is None else _after_prefix(seen, host_lengths),
    )


def accepted_paths(
    predict: Tensor, accept_lens: Tensor, accept_index: Tensor, nodes: int
) -> list[tuple[list[int], list[int]]]:
    """Of each row its accepted path, the root first, and its tokens, the bonus token last: `Outcome.path` and `.tokens`.

    Waits for the device once.

    Args:
        predict, accept_lens, accept_index: what SGLang's `eagle_sample` returns: `(rows * nodes,)` int, the token after each
            node of a path; `(rows,)` int, nodes of the path; `(rows, depths)` int, their places in `predict`, -1 past the end.
        nodes: as for `verify_tensors`.

    >>> accepted_paths(torch.tensor([7, 9]), torch.tensor([2]), torch.tensor([[0, 1, -1]]), 2)
    [([0, 1], [7, 9])]
    """
    places = accept_index.long()
    found = predict[places.clamp(min=0)]
    host = to_host(torch.cat([accept_lens[:, None].long(), places % nodes, found.long()], 1))
    depths = places.shape[1]
    return [(row[1 : 1 + row[0]], row[1 + depths : 1 + depths + row[0]]) for row in host]


def _offered(tree: TokenTree) -> Tensor:
    """`(rows, nodes)` bool: nodes that verify may accept. No padding, no second child of one token, nothing below either."""
    same_token = tree.tokens[:, :, None] == tree.tokens[:, None, :]
    first = tree.valid & ~(tree.earlier_siblings() & same_token).any(2)
    return ~(tree.ancestors & ~first[:, None, :]).any(2)


def _links(tree: TokenTree, offered: Tensor) -> tuple[Tensor, Tensor]:
    """First children and next siblings, `(rows, nodes)` each, among the nodes that are offered."""
    number = torch.arange(tree.nodes, device=offered.device)
    parents = tree.parents.masked_fill(~offered, -1)
    is_child = parents[:, None, :] == number[:, None]
    is_next = (parents[:, None, :] == parents[:, :, None]) & (number > number[:, None]) & (parents[:, :, None] >= 0)
    return _first(is_child), _first(is_next)


def _first(marked: Tensor) -> Tensor:
    """The smallest index that is True along the last dimension, -1 where none is."""
    count = marked.shape[-1]
    found = torch.where(marked, torch.arange(count, device=marked.device), count).amin(-1)
    return found.masked_fill(found == count, -1)


def _after_prefix(seen: Tensor, host_lengths: Sequence[int]) -> Tensor:
    """Who sees whom, flat, with each row's committed tokens in front of its nodes."""
    return torch.cat(
        [pad(row, (length, 0), value=True).flatten() for row, length in zip(seen, host_lengths, strict=True)]
    )
