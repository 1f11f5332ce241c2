"""Between host and device: the only two ways in which numbers cross during a round.

`to_host` waits for the device. A round calls it once for its outcome, and a stop policy that depends on the draft's law
once a depth. Everything else runs without waiting, which tests/test_fake_cuda.py counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(numbers: Any, device: torch.device) -> Tensor:
    """A tensor of host numbers on a device, without waiting for it."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Any:
    """The numbers of a tensor as (nested) lists: waits until the device has made them."""
    return tensor.tolist()
