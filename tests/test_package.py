"""What a user imports: lazily, completely, with examples that run and types that a strict checker accepts."""

from __future__ import annotations

import json
import subprocess
import sys

import glidecape

SCRIPT = """
import json, sys, time
began = time.perf_counter()
import glidecape
seconds = time.perf_counter() - began
print(json.dumps([seconds, dir(glidecape), [name for name in ("torch", "transformers") if name in sys.modules]]))
"""


def test_importing_is_quick_and_lists_everything_without_torch() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    seconds, names, heavy = json.loads(found.stdout)
    assert heavy == []
    assert names == sorted(glidecape.__all__)  # what a user can use, and nothing of ours
    assert seconds < 0.3  # it takes 0.01; 0.3 is what a user may be made to wait


def test_every_exported_name_is_there() -> None:
    for name in glidecape.__all__:
        assert getattr(glidecape, name) is not None
    assert glidecape.__version__.count(".") >= 2
