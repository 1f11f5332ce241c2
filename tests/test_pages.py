"""Memory in huge pages."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from glidecape.core import pages
from glidecape.core.cache import KVCache
from glidecape.target.operators import panels_of

LARGE = pages.WORTH // 4  # numbers in float32
SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def in_huge_pages(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's mapping that lie in huge pages."""
    found = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(one, 16) for one in area.groups())
            inside = first < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < last
        elif inside and line.startswith("AnonHugePages"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", [1, LARGE * 4 + 12])
def test_memory_is_zeros_and_stays_while_a_view_of_it_does(dtype, size):
    found = pages.zeros(size, 2, dtype=dtype)
    assert (found.shape, found.dtype, found.is_contiguous()) == ((size, 2), dtype, True)
    assert not found.any()
    part = found.fill_(3)[size // 2 :, 1]
    del found
    assert (part == 3).all()
    assert torch.equal(part.clone(), part)


@pytest.mark.skipif(not SYSTEM.exists() or "[never]" in SYSTEM.read_text(), reason="this system has no huge pages")
def test_weights_and_caches_lie_in_huge_pages():
    panels = panels_of(torch.randn(2048, 2048))
    assert panels.data_ptr() % pages.HUGE == 0
    assert in_huge_pages(panels) >= panels.nbytes
    cache = KVCache([(8, 64)], 2, 4096, hidden=4)
    cache.keys[0].fill_(1)
    assert in_huge_pages(cache.keys[0]) >= cache.keys[0].nbytes


@pytest.mark.skipif(not SYSTEM.exists() or "[never]" in SYSTEM.read_text(), reason="this system has no huge pages")
def test_small_weights_lie_together_in_huge_pages_and_stay_what_they_are():
    weights = [
        torch.randn(n, 300, 64).to(dtype) for n, dtype in ((50, torch.float32), (30, torch.bfloat16), (1, torch.int8))
    ]
    before, held = [one.clone() for one in weights], [one[-1:] for one in weights]
    pages.together(weights)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(weights, before, strict=True))
    assert all(
        torch.equal(one, other[-1:]) for one, other in zip(held, before, strict=True)
    )  # a view keeps the old memory
    starts = [one.data_ptr() for one in weights]
    assert starts == sorted(starts)
    assert starts[0] % pages.HUGE == 0
    assert starts[-1] - starts[0] < sum(one.nbytes for one in weights)
    assert in_huge_pages(weights[0]) >= sum(one.nbytes for one in weights)


def test_a_kernel_or_a_system_without_them_gives_ordinary_memory(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert not pages.zeros(LARGE, 2, dtype=torch.float32).any()
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    monkeypatch.setattr(mmap, "mmap", None)
    assert not pages.zeros(LARGE, 2, dtype=torch.float32).any()
    assert pages.zeros(LARGE, 2, dtype=torch.float32, device="meta").device.type == "meta"


def test_panels_are_the_weight_s_rows_side_by_side():
    weight = torch.randn(100, 1 << 16)  # large enough for huge pages; the last panel is filled up
    panels = panels_of(weight)
    assert torch.equal(panels.transpose(1, 2).reshape(-1, weight.shape[1])[:100], weight)
    assert not panels[1, :, 36:].any()
