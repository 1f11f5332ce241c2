"""The server with compiled programs, on the shipped pair: its answers are eager decoding's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from glidecape import Target, load_draft, make_drafter
from glidecape.core.constraint import Constraint
from glidecape.costmodel import Prices
from glidecape.drafting.priced import PricedDrafter
from glidecape.target import packages
from serving import MODELS, PROMPTS, Running, alone

CALL = r"[a-z]{3,9}\([a-z]{1,8}\)"


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.mark.slow
@pytest.mark.skipif(not packages.have_compiler(), reason="no C++ compiler on this machine")
@pytest.mark.parametrize("method", ["glide", "glide+auto"])
def test_answers_of_a_compiled_server_are_eager_decoding_s(target, programs, monkeypatch, method) -> None:
    """Ragged rows that join and leave, greedy and with seeds, with a constraint, with prefixes taken from each other, and
    with drafts that are whole, shortened and left out."""
    monkeypatch.setenv(packages.FOLDER, str(programs))
    compiled = Target.from_pretrained(MODELS / "target", dtype=torch.float32)
    drafter = make_drafter(
        method, load_draft(MODELS / "glide", compiled), **({"length": 4} if method == "glide" else {})
    )
    assert compiled.compile("on")
    assert drafter.compile("on")
    # A node costs nothing for one row, a fifth of a plain round for two, and more than it brings for four.
    prices = Prices(
        (1, 2, 4), (1,), (1, 11), (((1.0, 1.0),), ((1.0, 3.0),), ((1.0, 21.0),)), ((0.1,),) * 3, ((0.0,),) * 3
    )
    weighed = PricedDrafter(drafter) if method == "glide" else drafter
    weighed.set_prices([prices, prices])
    one = Running(compiled, weighed, max_batch=4)
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
    assert one.metric("spec_decode_num_drafts_total") > 0
    assert one.metric("spec_decode_num_skipped_drafts_total") > 0
    one.close()
