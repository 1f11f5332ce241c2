"""The server with compiled programs, on the shipped pair: its answers are eager decoding's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from glidecape import Target, load_draft, make_drafter
from glidecape.core.constraint import Constraint
from glidecape.target import packages
from serving import PROMPTS, Running, alone

MODELS = Path(__file__).parents[1] / "models" / "pysource"
CALL = r"[a-z]{3,9}\([a-z]{1,8}\)"


@pytest.mark.slow
@pytest.mark.skipif(not packages.have_compiler(), reason="no C++ compiler on this machine")
def test_answers_of_a_compiled_server_are_eager_decoding_s(target, tmp_path, monkeypatch) -> None:
    """Ragged rows that join and leave, greedy and with seeds, with a constraint, and with prefixes taken from each other."""
    monkeypatch.setenv(packages.FOLDER, str(tmp_path))
    compiled = Target.from_pretrained(MODELS / "target", dtype=torch.float32)
    drafter = make_drafter("glide", load_draft(MODELS / "glide", compiled), length=4)
    assert compiled.compile("on")
    assert drafter.compile("on")
    one = Running(compiled, drafter, max_batch=4)
    begin = "import os\nimport sys\n\n\ndef main(path):\n    with open(path) as file:\n        "
    asked = [(begin + "x = 1\n" * (i % 4) + prompt, float(i % 2), i) for i, prompt in enumerate(PROMPTS[:10])]
    pattern = {"structured_outputs": {"regex": CALL}}

    def ask(prompt: str, temperature: float, seed: int) -> str:
        extra = pattern if seed % 5 == 0 else {}
        return one.complete(prompt, max_tokens=12 + seed, temperature=temperature, seed=seed, **extra)

    for _ in range(2):  # the second time from the cache
        with ThreadPoolExecutor(10) as pool:
            texts = list(pool.map(lambda words: ask(*words), asked))
        for (prompt, temperature, seed), text in zip(asked, texts, strict=True):
            constraint = Constraint.regex(CALL) if seed % 5 == 0 else None
            options = {"temperature": temperature, "seed": seed, "constraint": constraint}
            assert text == alone(target, prompt, max_new_tokens=12 + seed, **options), seed
    assert one.metric("prefix_cache_hits_total") > 100
    assert one.metric("draft_failures_total") == 0
    one.close()
