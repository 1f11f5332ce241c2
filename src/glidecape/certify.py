"""Certify: for one's own target, drafts and dtype, is every method's output the target's?

Each method is compared, token by token, with plain decoding and with an independent reference: a second copy of the model
in transformers' own attention and cache, which shares neither mask, positions, cache nor verify with us. Greedy, that is
`generate`; at temperature > 0 it is the argmax of its law plus the shared noise along plain's output.

Where two outputs part, the logits there are made again in several shapes: by the reference (whole text at once; one token
after a cache), by the target with one node, and by the target with a tree. They differ by rounding alone if all is well.
A token that rounding can have turned is a near-tie; anything else is a bug.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .batch.grammar import new_grammar
from .batch.laws import forbid
from .compat import cache_argument, cache_of
from .core.cache import KVCache
from .core.noise import gumbel
from .core.params import NOISE, SamplingParams
from .core.sampling import log_law, widen
from .core.tree import TokenTree
from .drafting.drafter import Drafter, NoDraft
from .engine.decode import generate
from .errors import InputError
from .target.target import Target

EQUAL, NEAR_TIE, BUG = "equal", "near-tie", "bug"
SPAN = 6  # tokens that the many-node forward runs as a tree
# Rounding may be so many times what the reference's own two shapes, or the dtype's steps, show. Measured on the shipped pair:
# at most 1.6 times in half precision and 3.3 times in float32, where the target's packed products are another library's.
SLACK, SLACK_FLOAT32 = 4.0, 8.0

PROMPTS = (
    "def read_lines(path):\n    ",
    "Once upon a time there was a mill by the river, and",
    "The three most important things to know about volcanoes are:\n1.",
    '{"name": "Ada", "born": 1815, "field": "mathematics"}\n{"name": "Emmy", "born":',
    "one two three one two three one two three one two",
)


@dataclass(frozen=True)
class Finding:
    """One method on one prompt.

    Attributes:
        verdict: "equal", "near-tie" or "bug".
        against: "plain" or "transformers": the output it parts from (the worse one); "" where equal.
        index: number of the first differing new token; -1 where equal.
        expected, got: the two tokens there; -1 for an output that ended before.
        margin: between the reference's two highest scores there (logits; with temperature, noisy log-probabilities).
        gap: how far the lower of the two tokens lies below the reference's highest score.
        shapes: largest difference of scores between the target's one-node and many-node forwards.
        error: largest difference of scores of either of them from the reference.
        rounding: the most that rounding is held to explain, for gap and error.
    """

    method: str
    prompt: int
    verdict: str = EQUAL
    against: str = ""
    index: int = -1
    expected: int = -1
    got: int = -1
    margin: float = 0.0
    gap: float = 0.0
    shapes: float = 0.0
    error: float = 0.0
    rounding: float = 0.0

    @property
    def explained(self) -> bool:
        """Rounding of the two kernel shapes explains the difference."""
        return self.verdict == NEAR_TIE

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"explained": self.explained}


@torch.no_grad()
def certify(
    target: Target,
    reference: Any,
    drafters: Mapping[str, Drafter],
    prompts: Sequence[str | Sequence[int]],
    params: SamplingParams | None = None,
    batch: int = 1,
    done: Callable[[float], None] = lambda _: None,
) -> list[Finding]:
    """Compare every method with plain decoding and with `reference`, prompt by prompt.

    End-of-text is ignored, so that every output has `max_new_tokens` tokens, or ends where nothing may follow under the
    constraint. Prompt i uses seed + i.

    Args:
        reference: a transformers causal LM with the target's weights, dtype and device, but not the target's own module.
        drafters: by the name of the method; plain is added.
        batch: prompts that each method decodes side by side. What they are compared with is made alone, so that rows of
            unequal length must not disturb each other either.
        done: is told how many findings there are by now.

    Returns:
        A finding for each method and prompt, "plain" first.

    Raises:
        InputError: the reference is the target's module, options that don't determine the text, an unusable prompt, or a
            batch below 1.
    """
    params = params or SamplingParams(max_new_tokens=64)
    if reference is target.model:
        raise InputError("the reference must be a model of its own: load the target's weights a second time")
    if batch < 1:
        raise InputError(f"a batch has at least 1 prompt, not {batch}")
    _refuse_other_options(params)
    found: list[Finding] = []
    ids = [target.encode(p) if isinstance(p, str) else list(p) for p in prompts]
    each = [replace(params, seed=params.seed + i, ignore_eos=True) for i in range(len(ids))]
    alone = [generate(target, [own], None, p)[0].tokens for own, p in zip(ids, each, strict=True)]
    judges = [Judge(target, reference, own, p) for own, p in zip(ids, each, strict=True)]
    if batch > 1:
        for i, judge in enumerate(judges):
            judge.beside = ids[i - 1]
    truths = [judge.reference_tokens(plain) for judge, plain in zip(judges, alone, strict=True)]
    for name, drafter in {"plain": NoDraft(), **drafters}.items():
        for first in range(0, len(ids), batch):
            rows = range(first, min(first + batch, len(ids)))
            is_plain_alone = name == "plain" and batch == 1
            outputs = [alone[first]]
            if not is_plain_alone:
                made = generate(target, [ids[i] for i in rows], drafter, [each[i] for i in rows])
                outputs = [one.tokens for one in made]
            for i, tokens in zip(rows, outputs, strict=True):
                against = (
                    {"transformers": truths[i]} if is_plain_alone else {"plain": alone[i], "transformers": truths[i]}
                )
                verdicts = [judges[i].compare(Finding(name, i, against=a), b, tokens) for a, b in against.items()]
                found.append(max(verdicts, key=lambda f: (EQUAL, NEAR_TIE, BUG).index(f.verdict)))
            done(len(found))
    return found


def _refuse_other_options(params: SamplingParams) -> None:
    if not params.greedy and params.sampling != NOISE:
        raise InputError("the residual rule draws other tokens with every method: certify with sampling='noise'")
    bare = SamplingParams(params.temperature, seed=params.seed, max_new_tokens=params.max_new_tokens)
    if replace(params, ignore_eos=False, constraint=None) != bare:
        raise InputError(
            "certify compares the law at a temperature, with or without a constraint: leave all other options out"
        )


class Judge:
    """Holds one prompt, and says of two outputs that part whether rounding can have parted them."""

    def __init__(self, target: Target, reference: Any, prompt: list[int], params: SamplingParams) -> None:
        self.target, self.reference, self.prompt, self.params = target, reference, prompt, params
        self.beside: list[int] | None = None  # another row's prompt, where outputs come from batches

    def reference_tokens(self, plain: list[int]) -> list[int]:
        """The reference's own output; with temperature or a constraint, along plain's output: its choice after each of plain's
        tokens, and after the last one, where it ended too early."""
        if not plain:
            return []
        if not self.params.greedy or self.params.constraint is not None:
            known = [*self.prompt, *plain]
            scores = self._scores(self._full(known)[len(self.prompt) - 1 :], known)
            most = next((n for n in range(len(plain) + 1) if self._is_complete(plain[:n])), self.params.max_new_tokens)
            return scores.argmax(-1).tolist()[:most]
        from transformers import GenerationConfig

        ids = torch.tensor([self.prompt], device=self.reference.device)
        # Nothing of the model's own generation settings: the output's law is that of the logits.
        saved, self.reference.generation_config = self.reference.generation_config, GenerationConfig()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = self.reference.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=len(plain),
                    pad_token_id=0,
                    eos_token_id=None,
                )
        finally:
            self.reference.generation_config = saved
        return out[0, len(self.prompt) :].tolist()

    def compare(self, finding: Finding, right: list[int], tokens: list[int]) -> Finding:
        """The finding with its verdict."""
        longest = max(len(right), len(tokens))
        at = next((k for k in range(longest) if right[k : k + 1] != tokens[k : k + 1]), None)
        if at is None:
            return replace(finding, against="")
        expected, got = ((side[at] if at < len(side) else -1) for side in (right, tokens))
        finding = replace(finding, verdict=BUG, index=at, expected=expected, got=got)
        if expected < 0 or got < 0:
            return finding  # one output is shorter: rounding cannot do that
        known = [*self.prompt, *tokens[:at]]
        logits = self._full(known)[-1]
        truth = self._scores(logits[None], known)[0]
        stepped = self._scores(self._after_a_cache(known)[None], known)[0]
        one = self._scores(self._one_node(known)[None], known)[0]
        many = self._scores(self._many_nodes(known)[None], known)[0]
        best = truth.topk(2).values
        step = torch.finfo(self.target.dtype).eps * _largest(logits)
        if not self.params.greedy:
            step /= self.params.temperature
        slack = SLACK_FLOAT32 if self.target.dtype == torch.float32 else SLACK
        rounding = slack * max(_difference(truth, stepped), step)
        error = max(_difference(truth, one), _difference(truth, many))
        gap = float(best[0] - torch.minimum(truth[expected], truth[got]))
        # Written so that a score that is not a number is a bug.
        tie = math.isfinite(rounding) and gap <= 2 * rounding and error <= rounding
        return replace(
            finding,
            verdict=NEAR_TIE if tie else BUG,
            margin=float(best[0] - best[1]),
            gap=gap,
            shapes=_difference(one, many),
            error=error,
            rounding=rounding,
        )

    def _allowed(self, new: list[int]) -> bytes | None:
        """What may follow these emitted tokens, see `Grammar.allowed`; asked of a grammar that begins afresh."""
        grammar = new_grammar(self.params, (), self.target)
        assert grammar is not None
        return grammar.allowed(tuple(new))

    def _is_complete(self, new: list[int]) -> bool:
        return self.params.constraint is not None and self._allowed(new) == b""

    def _scores(self, logits: Tensor, known: list[int]) -> Tensor:
        """What the argmax is taken of, `(count, vocab)`, for the tokens that follow `known` and its beginnings, the longest
        last."""
        first = len(known) - len(logits) + 1
        if self.params.constraint is not None:
            masks = [self._allowed(known[len(self.prompt) : first + n]) for n in range(len(logits))]
            logits = forbid(logits[None], [((0, n), mask) for n, mask in enumerate(masks) if mask])[0]
        if self.params.greedy:
            return widen(logits)
        positions = torch.arange(first, first + len(logits), device=logits.device)[None]
        seed = torch.tensor([self.params.seed], device=logits.device)
        return log_law(widen(logits), self.params) + gumbel(seed, positions, logits.shape[-1])[0]

    def _full(self, tokens: list[int]) -> Tensor:
        """The reference on the whole text at once, without a cache; `(tokens, vocab)`."""
        ids = torch.tensor([tokens], device=self.reference.device)
        return self.reference(input_ids=ids, use_cache=False).logits[0].to(self.target.device)

    def _after_a_cache(self, tokens: list[int]) -> Tensor:
        """The reference on the last token, after a cache of its own: the other shape of its kernels."""
        ids = torch.tensor([tokens], device=self.reference.device)
        if len(tokens) == 1:
            return self._full(tokens)[-1]
        past = cache_of(self.reference(input_ids=ids[:, :-1], use_cache=True))
        out = self.reference(input_ids=ids[:, -1:], use_cache=True, **{cache_argument(self.reference): past})
        return out.logits[0, -1].to(self.target.device)

    def _one_node(self, tokens: list[int]) -> Tensor:
        cache = self.target.new_cache(1, len(tokens) + 1)
        self.target.prefill([tokens], cache)
        tree = TokenTree(torch.tensor([tokens[-1]], device=self.target.device))
        return self._run(tree, cache)[0]

    def _many_nodes(self, tokens: list[int]) -> Tensor:
        """The target on the last tokens as a tree, with a wrong sibling beside each, as a round would run them.

        Where outputs come from batches, the row beside it has a prompt of another length and the same tree.
        """
        prefix = tokens[: max(1, len(tokens) - SPAN + 1)]
        rows = [prefix] if self.beside is None else [prefix, self.beside]
        device = self.target.device
        cache = self.target.new_cache(len(rows), max(map(len, rows)) + 2 * SPAN)
        self.target.prefill(rows, cache)
        tree, node = TokenTree(torch.tensor([row[-1] for row in rows], device=device)), 0
        for token in tokens[len(prefix) :]:
            parents = torch.tensor([[node, node]] * len(rows), device=device)
            node = tree.nodes
            both = torch.tensor([[token, (token + 1) % self.target.vocab_size]] * len(rows), device=device)
            tree.add(parents, both, torch.zeros(both.shape, device=device))
        return self._run(tree, cache)[node]

    def _run(self, tree: TokenTree, cache: KVCache) -> Tensor:
        return self.target.forward(tree.tokens, tree.positions(cache.lengths), cache, tree.ancestors).logits[0]


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of two score vectors; infinite where one holds a value that is not a number. What is forbidden in
    both differs by nothing."""
    largest = float((one - other).masked_fill(one.isneginf() & other.isneginf(), 0.0).abs().max())
    return largest if math.isfinite(largest) else math.inf


def _largest(logits: Tensor) -> float:
    return float(widen(logits).abs().max())
