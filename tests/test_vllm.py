"""GliDe inside vLLM for real: the shipped pair in float32, on a CPU. `make test-vllm` runs this."""

import importlib.util
import json
import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: `make test-vllm` has an environment for it", allow_module_level=True)

# In this process, so that tests look inside; before vLLM is imported, which reads them once.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams

from glidecape.core import params
from glidecape.core.stats import Stats
from glidecape.drafting.methods import make_drafter
from glidecape.drafts.checkpoint import load_draft
from glidecape.engine.decode import generate
from glidecape.integrations.vllm.rows import RowDrafter

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models" / "pysource"
LENGTHS = (1, 3, 17, 40, 90, 127, 150, 300)  # blocks hold 128 tokens
NEW = 64
METHODS = ("glide+svip", "glide")
MOST = 5


@pytest.fixture(scope="module")
def prompts(target):
    """Eight prompts of very different lengths, as token ids."""
    lines = (ROOT / "evaluation" / "prompts" / "python.jsonl").read_text().splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    ids = [target.encode(text + "\n" + texts[0]) for text in texts[1 : 1 + len(LENGTHS)]]
    return [one[:length] for one, length in zip(ids, LENGTHS, strict=True)]


def served(method=None, draft=MODELS / "glide", **settings):
    """vLLM with the shipped target, and with the shipped draft if a method is named."""
    if method is not None:
        proposer = "glidecape.integrations.vllm.GlideProposer"
        settings |= {
            "speculative_config": {"method": "custom_class", "model": proposer, "num_speculative_tokens": MOST},
            "additional_config": {"glide": {"draft": str(draft), "method": method}},
        }
    common = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": True}
    return LLM(str(MODELS / "target"), disable_log_stats=False, **(common | settings))


def greedy(tokens=NEW, **changes):
    return SamplingParams(**{"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False} | changes)


def tokens_of(llm, prompts, sampling=None):
    """What it emits after each prompt."""
    given = [{"prompt_token_ids": one} for one in prompts]
    outputs = llm.generate(given, sampling or greedy(), use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in outputs]


class Counts:
    """vLLM's own counters, as they are now: those of the vLLM that was made last are all there are."""

    def __init__(self, llm):
        found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        self.drafts, self.drafted, self.accepted = (
            found.get(f"vllm:spec_decode_num_{name}", 0) for name in ("drafts", "draft_tokens", "accepted_tokens")
        )
        self.preemptions, self.hits = (found[f"vllm:{name}"] for name in ("num_preemptions", "prefix_cache_hits"))

    @property
    def acceptance_length(self):
        """Emitted tokens a verified draft."""
        return 1 + self.accepted / self.drafts


def runner_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@pytest.fixture(scope="module")
def plain(prompts):
    """What vLLM emits without speculation."""
    return tokens_of(served(), prompts)


@pytest.fixture(scope="module", params=METHODS)
def spoken(request, prompts):
    """A method, what vLLM emitted with it, and its counters then."""
    llm = served(request.param)  # lives no longer than this: when one ends, it ends what others share with it
    tokens = tokens_of(llm, prompts)
    return SimpleNamespace(method=request.param, tokens=tokens, counts=Counts(llm))


@pytest.fixture(scope="module")
def ours(target, prompts):
    """The figures of our own loop on the same prompts, by method."""
    found = {}
    for method in METHODS:
        drafter = make_drafter(method, load_draft(MODELS / "glide", target), length=MOST, cap=MOST)
        found[method] = Stats()
        sampling = params.SamplingParams(max_new_tokens=NEW, ignore_eos=True)
        generate(target, prompts, drafter, sampling, found[method])
    return found


def test_greedy_output_is_vllm_s_without_speculation(spoken, plain):
    assert spoken.tokens == plain


def test_vllm_counts_what_was_drafted_and_accepted(spoken):
    counts = spoken.counts
    assert 0 < counts.accepted <= counts.drafted <= MOST * counts.drafts
    if spoken.method == "glide+svip":  # ragged
        assert counts.drafted < MOST * counts.drafts / 2
    # A step emits what it accepted and one token more; the prompt's step drafts nothing, nor does one for the last token.
    emitted = sum(len(one) - 1 for one in spoken.tokens)
    assert 0 <= emitted - counts.accepted - counts.drafts <= len(spoken.tokens)


def test_as_much_is_accepted_as_in_our_own_loop(spoken, ours):
    assert spoken.counts.acceptance_length == pytest.approx(ours[spoken.method].acceptance_length, rel=0.05)


def test_the_draft_reads_the_target_s_own_keys_and_values(prompts, target):
    """Each time it drafts, what was gathered is what our own forward makes of the same tokens."""
    llm, seen = served("glide"), []
    drafter = runner_of(llm).drafter.drafter
    own = drafter.draft

    def draft(rows, cross):
        for row, one in enumerate(rows):
            known = len(one.tokens) - 1
            if known and len(seen) < 200:
                cache = target.new_cache(1, known + 1)
                target.prefill([one.tokens.tolist()], cache)
                for layer, (keys, values) in cross.items():
                    for found, wanted in zip((keys, values), cache.committed(layer), strict=True):
                        torch.testing.assert_close(found[row, :, :known], wanted[0], atol=2e-4, rtol=1e-4)
                seen.append(known)
        return own(rows, cross)

    drafter.draft = draft
    tokens_of(llm, prompts)
    assert len(seen) > 50
    assert max(seen) > 300


def test_rows_that_are_preempted_and_come_back_are_drafted_for_as_before(prompts, plain, ours):
    """Too few blocks for eight rows: some lose theirs, wait, and are read again, in other places."""
    llm = served("glide", num_gpu_blocks_override=9, enable_prefix_caching=False)
    drafter, places, wrong, total = runner_of(llm).drafter.drafter, {}, [], 0
    own = drafter.draft

    def draft(rows, cross):
        nonlocal total
        found = own(rows, cross)
        fresh = RowDrafter(drafter.network, drafter.stop, drafter.cap).draft(rows, cross)
        total += len(rows)
        wrong.extend(one.request for one, a, b in zip(rows, found, fresh, strict=True) if a != b)
        for place, request in enumerate(runner_of(llm).input_batch.req_ids):
            places.setdefault(request, set()).add(place)
        return found

    drafter.draft = draft
    assert tokens_of(llm, prompts) == plain
    counts = Counts(llm)
    assert counts.preemptions > 0
    assert any(len(seen) > 1 for seen in places.values()), "no row has moved"
    # The keys kept and those made afresh are of products of other shapes: a near tie may go the other way.
    assert total > 80
    assert len(wrong) <= total // 50
    assert counts.acceptance_length == pytest.approx(ours["glide"].acceptance_length, rel=0.05)


def test_a_request_that_is_aborted_leaves_the_others_alone(prompts, plain):
    llm = served("glide")
    engine, ended = llm.llm_engine, {}
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, greedy())
    for step in range(400):
        if step == 4:
            engine.abort_request(["5"])
        for output in engine.step():
            if output.finished:
                ended[output.request_id] = list(output.outputs[0].token_ids)
        if step == 6:
            inside = runner_of(llm)
            assert len(inside.drafter.drafter.kept) == len(inside.requests) == len(prompts) - 1
        if not engine.has_unfinished_requests():
            break
    assert ended == {str(number): tokens for number, tokens in enumerate(plain) if number != 5}


def test_a_prompt_that_vllm_has_read_before_is_drafted_for_as_well(prompts, plain):
    """Its blocks are taken from vLLM's prefix cache, and no step of the target passes them."""
    llm = served("glide")
    assert tokens_of(llm, prompts) == plain
    first = Counts(llm)
    assert tokens_of(llm, prompts) == plain
    both = Counts(llm)
    assert both.hits > first.hits
    assert both.acceptance_length == pytest.approx(first.acceptance_length, rel=0.03)


def test_limits_end_a_row_as_without_speculation(prompts, plain):
    """At end-of-text tokens, stop tokens, and one token; and a context that is full."""
    llm = served("glide")
    ends = [one[20] for one in plain]
    wanted = [one[: one.index(end) + 1] for one, end in zip(plain, ends, strict=True)]
    found = [
        tokens_of(llm, [prompt], greedy(stop_token_ids=[end]))[0] for prompt, end in zip(prompts, ends, strict=True)
    ]
    assert found == wanted
    assert tokens_of(llm, prompts, greedy(1)) == [one[:1] for one in plain]
    long = (prompts[-1] * 4)[:1010]
    assert len(tokens_of(llm, [long], greedy(50))[0]) == 1024 - 1010


def test_sampled_rows_beside_greedy_ones(prompts, plain):
    """vLLM verifies them by its own rule; here, that greedy rows are untouched and sampled ones are what was asked for."""
    llm = served("glide+svip")
    sampling = [greedy() if n % 2 else greedy(temperature=1.0, top_p=1e-6, seed=n) for n in range(len(prompts))]
    given = [{"prompt_token_ids": one} for one in prompts]
    outputs = llm.generate(given, sampling, use_tqdm=False)
    assert [list(one.outputs[0].token_ids) for one in outputs] == plain  # the only token that top-p leaves


def test_sampling_follows_the_target_s_law(prompts):
    """First two tokens after one prompt, in a law of few: as often with GliDe's drafts as without any.

    Two samples of n = 3,000 from a law of 16 differ by 0.042 in total variation on average, at most, and by t more with
    probability exp(-n t^2) (McDiarmid): by 0.11 once in a million runs.
    """
    sampling, rows = greedy(3, temperature=1.3, top_k=4), 3000

    def law(method):
        seen = Counter(
            tuple(one[:2]) for one in tokens_of(served(method, max_num_seqs=64), [prompts[2]] * rows, sampling)
        )
        return {pair: times / rows for pair, times in seen.items()}

    without, speculative = law(None), law("glide")
    pairs = {*without, *speculative}
    assert 4 < len(pairs) <= 16
    assert sum(abs(without.get(pair, 0) - speculative.get(pair, 0)) for pair in pairs) / 2 < 0.11


def test_what_its_page_shows_runs(target, monkeypatch):
    """docs/vllm.md: the code there, as it is written."""
    monkeypatch.chdir(ROOT)
    code = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "vllm.md").read_text(), re.M | re.S)
    names = {}
    for block in code:
        exec(block, names)
    wanted = generate(target, "def read_lines(path):\n", None, params.SamplingParams(max_new_tokens=64))
    assert list(names["output"].token_ids) == wanted[0].tokens
    names.clear()


def test_what_cannot_be_used_is_refused_when_vllm_starts():
    with pytest.raises(Exception, match="it takes a GliDe draft, and this is eagle"):
        served("glide", MODELS / "eagle")
    with pytest.raises(Exception, match="vLLM verifies chains"):
        served("glide+cape")


def test_two_devices_are_refused_with_a_sentence(capfd):
    """Where vLLM has workers in processes of their own, they log the reason, and its own error is less."""
    with pytest.raises(Exception, match="initialization failed"):
        served("glide", tensor_parallel_size=2)
    assert "tensor_parallel_size must be 1, not 2" in "".join(capfd.readouterr())
