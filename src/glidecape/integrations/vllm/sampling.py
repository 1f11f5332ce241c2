"""Two faults of vLLM 0.32.0's verification on CPUs, which make its output another than the target's, mended while we are in it.

Both concern any batch with a sampled row under any speculative method, vLLM's own too:

- `expand_batch_to_tokens` gives each drafted token its row's temperature, top-k and top-p. On CPUs its kernel fills a copy
  (`cpu_triton_utils._expand_kernel_impl`), and what comes back was never written: greedy rows beside a sampled one then emit
  anything.
- `apply_sampling_constraints` fails where nothing was drafted and a row has a top-k: the whole engine ends.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def expand(values: Tensor, ends: Tensor, count: int, replace_from: float = 0, replace_to: float = 0) -> Tensor:
    """Each row's value once for each of its tokens, `(count,)`.

    Args:
        values: `(rows,)`.
        ends: `(rows,)` int, the number of tokens of all rows up to and with each.
        count: of all tokens.
        replace_from, replace_to: a value that becomes another.

    >>> expand(torch.tensor([0.5, 0.0, 2.0]), torch.tensor([2, 3, 3]), 3, 0, 1)
    tensor([0.5000, 0.5000, 1.0000])
    """
    chosen = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
    return chosen.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)), output_size=count)


def mend_sampling() -> None:
    """Put right functions in the place of vLLM's two, for this process."""
    from vllm.v1.sample import rejection_sampler

    original = rejection_sampler.apply_sampling_constraints
    if rejection_sampler.expand_batch_to_tokens is expand:
        return

    @functools.wraps(original)
    def apply_sampling_constraints(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return original(logits, *args, **kwargs) if len(logits) else logits

    rejection_sampler.expand_batch_to_tokens = expand
    rejection_sampler.apply_sampling_constraints = apply_sampling_constraints
