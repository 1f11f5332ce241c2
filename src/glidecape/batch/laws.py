"""The laws of a batch: which token follows each node, all sampling options applied, target's and draft's alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.noise import Noise, NoiseAhead, gumbel
from ..core.params import NOISE
from ..core.penalties import History, adjust
from ..core.sampling import Warp, log_law, widen
from ..core.transfer import to_device, to_host
from ..core.tree import TokenTree
from ..core.verify import DenseLaw, Law, PointLaw
from ..errors import UnsupportedError
from .row import Row


class Laws:
    """The sampling options of the rows of a batch, as tensors; made anew when a row joins or leaves.

    Attributes:
        points: rows whose law, given the shared noise, is one token: greedy or shared noise, without a processor. All other
            rows are verified one by one.
        residual: rows under the residual rule.
        constrained: rows with a constraint.
        bare: is every row greedy, or sampled with shared noise at a temperature and nothing else?
    """

    def __init__(self, rows: Sequence[Row], device: torch.device, noise: Noise = gumbel) -> None:
        self.rows, self.device = rows, device
        params = [row.params for row in rows]
        noisy = [not p.greedy and p.sampling == NOISE for p in params]
        self.residual = [i for i, p in enumerate(params) if not p.greedy and p.sampling != NOISE]
        one_by_one = [p.processor is not None or (not p.greedy and p.sampling != NOISE) for p in params]
        self.points = [i for i, alone in enumerate(one_by_one) if not alone]
        self.one_by_one = [i for i, alone in enumerate(one_by_one) if alone]
        self.all_greedy = all(p.greedy for p in params)
        self.adjustable = any(row.adjusts_logits for row in rows)
        self.constrained = [i for i, row in enumerate(rows) if row.grammar is not None]
        self.bare = not self.one_by_one and not self.adjustable and not self.constrained
        self.bare &= all(p.greedy or not p.truncates for p in params)
        self.ahead = NoiseAhead([p.seed for p in params], device, noise) if any(noisy) else None
        if not self.all_greedy:
            self.warp = Warp(params, device)
            self.greedy = self._mask([p.greedy for p in params])
            self.noisy = None if all(noisy) else self._mask(noisy)  # None: all rows are
            self.sharpness = to_device([1 / (p.temperature or 1.0) for p in params], device)

    def ranking(
        self, roots: list[int], positions: Tensor, depth: int, depths: int, vocab: int
    ) -> tuple[Tensor, Tensor] | None:
        """How a draft ranks tokens, for `bare` laws: by logits x sharpness `(batch,)` + noise `(batch, depths, vocab)`.

        None: by the logits, since all rows are greedy. Else the temperature's inverse, and the noise of the tokens that follow
        nodes of `depths` depths from `depth` on; arguments as in `scores`.
        """
        if self.ahead is None:
            return None
        below = torch.arange(depth, depth + depths, device=self.device)[None]
        return self.sharpness, self._noise(roots, positions, below, depth + depths - 1, vocab)

    def _noise(self, roots: list[int], positions: Tensor, depth: Tensor, deepest: int, vocab: int) -> Tensor:
        """Noise `(batch, nodes, vocab)`, see `NoiseAhead.at`; 0 in rows that want none."""
        assert self.ahead is not None
        noise = self.ahead.at(roots, positions, depth, deepest, vocab)
        return noise if self.noisy is None else noise.masked_fill(~self.noisy, 0.0)

    def _mask(self, rows: list[bool]) -> Tensor | None:
        """`(rows, 1, 1)`; None where it would be all False."""
        return to_device(rows, self.device)[:, None, None] if any(rows) else None

    def scores(self, logits: Tensor, roots: list[int], positions: Tensor, depth: Tensor, deepest: int) -> Tensor:
        """What each node's token is the argmax of, `(batch, nodes, vocab)`, from adjusted logits.

        Greedy: the logits. Shared noise: the processed log-law plus the noise of the next position. Residual rule: the
        processed log-law, which ranks a draft's tokens.

        Args:
            roots: absolute positions of the roots, on the host; `positions (batch,)` are the same on the device.
            depth: `(batch, nodes)` of the nodes, `deepest` at most.
        """
        if self.all_greedy:
            return logits
        wide = widen(logits)
        if self.bare:
            # Where only a temperature counts, the law's logarithm is this and a constant, which changes no argmax.
            sharpness, noise = self.sharpness, self._noise(roots, positions, depth, deepest, logits.shape[-1])
            return torch.addcmul(noise, wide, sharpness[:, None, None])
        scores = self.warp(wide)
        if self.ahead is not None:
            scores = scores + self._noise(roots, positions, depth, deepest, logits.shape[-1])
        return scores if self.greedy is None else torch.where(self.greedy, wide, scores)

    def masked(self, tree: TokenTree, logits: Tensor, nodes: Tensor | None = None) -> Tensor:
        """Logits of tokens that a row's constraint forbids after a node's path become -inf; arguments as in `adjusted`.

        A node that is padding, breaks the constraint or is past the end keeps its logits: no row gets there.
        """
        if not self.constrained:
            return logits
        count, known = tree.nodes, [tree.tokens, tree.parents, tree.valid if nodes is None else nodes]
        host = to_host(torch.cat([one[self.constrained] for one in known], 1))
        masks: list[tuple[tuple[int, int], bytes]] = []
        for i, numbers in zip(self.constrained, host, strict=True):
            row = self.rows[i]
            assert row.grammar is not None
            row.grammar.update(row.new_tokens)
            tokens, parents, asked = numbers[:count], numbers[count : 2 * count], numbers[2 * count :]
            paths: list[tuple[int, ...]] = [()]
            for token, parent in zip(tokens[1:], parents[1:], strict=True):
                paths.append((*paths[parent], token))
            if nodes is None:
                asked = [node if valid else -1 for node, valid in enumerate(asked)]
            # In this order the matcher goes through the tree depth first.
            for path, k in sorted((paths[node], k) for k, node in enumerate(asked) if node >= 0):
                if mask := row.grammar.allowed(path):
                    masks.append(((i, k), mask))
        return forbid(logits, masks)

    def adjusted(self, tree: TokenTree, logits: Tensor, nodes: Tensor | None = None) -> Tensor:
        """Logits after bias, penalties, min_new_tokens and processor, each node with its own path; `(batch, count, vocab)`.

        `nodes (batch, count)` are the tree nodes that the logits are of, padding (-1) anything; None: all of the tree,
        without the processors, which `law_at` asks about the nodes that it reaches.
        """
        changed = [i for i, row in enumerate(self.rows) if row.adjusts_logits] if self.adjustable else []
        if not changed:
            return logits
        logits = widen(logits).clone()
        for i in changed:
            row = self.rows[i]
            if row.params.counts_tokens:
                row.history = row.history or History(logits.shape[-1], logits.device)
                row.history.update(row.tokens, row.prompt_length)
            at = slice(None) if nodes is None else nodes[i].clamp(min=0)
            above = tree.ancestors[i, at].clone()
            above[:, 0] = False  # the root is one of the row's tokens
            emitted = row.emitted + tree.depth[i, at]
            logits[i] = adjust(logits[i], row.params, row.history, tree.tokens[i], above, emitted, row.stop_ids)
            if nodes is not None and row.params.processor is not None:
                for k, node in enumerate(nodes[i].tolist()):
                    if node >= 0:
                        logits[i, k] = self._processed(i, tree, node, logits[i, k])
        return logits

    def _processed(self, i: int, tree: TokenTree, node: int, logits: Tensor) -> Tensor:
        """What the processor of row `i` makes of a node's logits, `(vocab,)`."""
        row = self.rows[i]
        assert row.params.processor is not None
        above = tree.ancestors[i, node].clone()
        above[0] = False
        known = torch.tensor(row.tokens, device=logits.device)
        # Nodes are numbered from the root down.
        return row.params.processor(torch.cat([known, tree.tokens[i, above]]), logits)

    def law_at(self, i: int, tree: TokenTree, logits: Tensor, noise: Tensor | None) -> Callable[[int], Law]:
        """The law of row `i` at a node, made when it is asked for, for `verify_row`.

        Args:
            logits: `(nodes, vocab)` of this row, adjusted.
            noise: `(nodes, vocab)` of this row; None where it needs none.

        Raises:
            UnsupportedError: the law holds values that are not numbers (when it is asked for).
        """
        params = self.rows[i].params

        def at(node: int) -> Law:
            own = logits[node]
            if params.processor is not None:
                own = self._processed(i, tree, node, widen(own))
            if params.greedy or params.sampling == NOISE:
                scores = own if params.greedy else log_law(widen(own), params) + noise[node]  # type: ignore[index]
                best = scores.max(-1)
                return refuse_no_number() if math.isnan(float(best.values)) else PointLaw(int(best.indices))
            p = log_law(own.double(), params).exp()
            return DenseLaw(p) if math.isfinite(float(p.sum())) else refuse_no_number()

        return at


def forbid(logits: Tensor, masks: list[tuple[tuple[int, int], bytes]]) -> Tensor:
    """`logits (batch, count, vocab)`, -inf for tokens whose bits are 0 in the masks (`Grammar.allowed`), each with its place
    (row, column)."""
    if not masks:
        return logits
    device, vocab = logits.device, logits.shape[-1]
    packed = torch.frombuffer(bytearray(b"".join(mask for _, mask in masks)), dtype=torch.uint8).view(len(masks), -1)
    packed = packed.to(device, non_blocking=True)
    bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    rows, columns = to_device([at for at, _ in masks], device).unbind(1)
    logits = logits.clone()
    logits[rows, columns] = logits[rows, columns].masked_fill(bits.flatten(1)[:, :vocab] == 0, float("-inf"))
    return logits


def refuse_no_number() -> Law:
    raise UnsupportedError(
        "the target gave logits that are not numbers: its weights are damaged, or the dtype is too narrow for them "
        "(try float32)"
    )
