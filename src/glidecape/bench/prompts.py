"""Prompts that no model of this project was trained on, made where the benchmark runs: cuts of Python's own library.

Training corpora come from site-packages; the standard library lies elsewhere and is never in them.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path


def stdlib_prompts(count: int, length: int = 900) -> list[str]:
    """`count` cuts of `length` characters, each from another file of the running Python's library, at a line's begin.

    Files and places follow from hashes of the file's name, so one Python version gives one list.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        (hashlib.sha256(str(p.relative_to(root)).encode()).hexdigest(), p)
        for p in root.rglob("*.py")
        if "site-packages" not in p.parts and "idlelib" not in p.parts
    )
    prompts: list[str] = []
    for digest, path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        room = len(text) - length
        if room < 1000:
            continue
        start = text.find("\n", int(digest[:8], 16) % room) + 1
        prompts.append(text[start : start + length])
        if len(prompts) == count:
            break
    return prompts
