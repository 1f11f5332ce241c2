"""Between host and device: the only ways in which numbers cross during a round.

`to_host` waits for the device. A round calls it once for its outcome, and a stop policy that depends on the draft's law
once a depth. Everything else runs without waiting, which tests/test_fake_cuda.py counts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(numbers: Any, device: torch.device) -> Tensor:
    """A tensor of host numbers on a device, without waiting for it."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Any:
    """The numbers of a tensor as (nested) lists: waits until the device has made them."""
    return tensor.tolist()


def to_host_arrays(*tensors: Tensor) -> list[NDArray[np.float64]]:
    """The numbers of several tensors `(batch, …)` as arrays: one wait."""
    if tensors[0].device.type == "cpu":
        return [one.double().numpy() for one in tensors]
    rows = [one.double().flatten(1) for one in tensors]
    found = np.array(to_host(torch.cat(rows, 1)))
    parts = np.split(found, np.cumsum([one.shape[1] for one in rows])[:-1], axis=1)
    return [part.reshape(one.shape) for part, one in zip(parts, tensors, strict=True)]
