"""The processed law: as transformers makes it, and the properties each option promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from glidecape.core.params import SamplingParams
from glidecape.core.sampling import log_law, widen
from glidecape.errors import InputError

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)


def logits_of(seed: int, shape: tuple[int, ...], sharpness: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sharpness * torch.randn(*shape, dtype=torch.float64, generator=generator)


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """Distinct logits, far enough apart that rounding orders nothing anew."""
    steps = draw(st.lists(st.integers(-400, 400), min_size=2, max_size=20, unique=True))
    return torch.tensor(steps, dtype=torch.float64) / 40


temperatures = st.floats(0.05, 5)
top_ps = st.floats(0.01, 1)


def test_the_most_probable_token_stays_however_small_top_p_is() -> None:
    raw = logits_of(1, (3, 64)).float()
    for top_p in (5e-324, 1e-40, 1e-9):
        assert torch.equal(log_law(raw, SamplingParams(1.0, top_p=top_p)).exp().argmax(-1), raw.argmax(-1))


# --- against transformers


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 64, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_law_is_that_of_the_transformers_warpers(temperature: float, top_k: int, top_p: float) -> None:
    raw = logits_of(round(1000 * temperature + top_k + 10 * top_p), (50, 64))
    expected = TemperatureLogitsWarper(temperature)(None, raw)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = log_law(raw, SamplingParams(temperature, top_k, top_p))
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert torch.allclose(found.exp(), expected.softmax(-1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("min_p", [0.01, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}], ids=str)
def test_min_p_is_that_of_transformers_after_the_other_warpers(options: dict, min_p: float) -> None:
    raw = logits_of(7, (50, 64))
    expected = MinPLogitsWarper(min_p)(None, log_law(raw, SamplingParams(0.8, **options)))
    found = log_law(raw, SamplingParams(0.8, min_p=min_p, **options))
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert torch.allclose(found.exp(), expected.softmax(-1), rtol=0, atol=1e-14)


# --- properties


@PROPERTY
@given(logits(), temperatures, st.integers(0, 25), top_ps)
def test_law_sums_to_one_and_keeps_the_order_of_tokens(z: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    law = log_law(z, SamplingParams(temperature, top_k, top_p))
    p = law.exp()
    assert abs(float(p.sum()) - 1) < 1e-12
    assert p[z.argmax()] == p.max() > 0
    kept = law.isfinite()
    assert not (~kept).any() or z[kept].min() > z[~kept].max()
    ordered = p[z.argsort(descending=True)]
    assert (ordered.diff() <= 0).all()


@PROPERTY
@given(logits(), temperatures, st.integers(1, 25))
def test_top_k_keeps_k_tokens(z: Tensor, temperature: float, top_k: int) -> None:
    law = log_law(z, SamplingParams(temperature, top_k=top_k))
    assert int(law.isfinite().sum()) == min(top_k, len(z))


@PROPERTY
@given(logits(), temperatures, st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_that_reaches_its_mass(z: Tensor, temperature: float, top_p: float) -> None:
    p = (z / temperature).softmax(-1)
    mass = p.sort(descending=True).values.cumsum(0)
    assume(float((mass - top_p).abs().min()) > 1e-9)
    kept = log_law(z, SamplingParams(temperature, top_p=top_p)).isfinite()
    assert float(p[kept].sum()) >= top_p
    assert float(p[kept].sum() - p[kept].min()) < top_p


@PROPERTY
@given(logits(), temperatures, st.integers(0, 25), top_ps)
def test_kept_tokens_keep_their_ratios(z: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    law = log_law(z, SamplingParams(temperature, top_k, top_p))
    kept = law.isfinite()
    difference = law[kept] - (z / temperature).log_softmax(-1)[kept]
    assert torch.allclose(difference, difference[:1], rtol=0, atol=1e-10)


@PROPERTY
@given(logits(), temperatures, st.floats(-50, 50))
def test_a_constant_added_to_the_logits_changes_nothing(z: Tensor, temperature: float, shift: float) -> None:
    params = SamplingParams(temperature)
    assert torch.allclose(log_law(z, params), log_law(z + shift, params), rtol=0, atol=1e-9)


@PROPERTY
@given(logits())
def test_greedy_is_a_point_mass_and_the_limit_of_low_temperatures(z: Tensor) -> None:
    greedy = log_law(z, SamplingParams())
    assert greedy.exp().tolist() == [float(token == z.argmax()) for token in range(len(z))]
    assert torch.allclose(log_law(z, SamplingParams(temperature=1e-4)).exp(), greedy.exp(), rtol=0, atol=1e-12)
    assert torch.equal(log_law(z, SamplingParams(temperature=1.0, top_k=1)), greedy)


@PROPERTY
@given(logits(), temperatures, st.integers(0, 25), top_ps)
def test_a_law_does_not_depend_on_other_nodes(z: Tensor, temperature: float, top_k: int, top_p: float) -> None:
    params = SamplingParams(temperature, top_k, top_p)
    both = torch.stack([z, z.flip(0)])[None]
    assert torch.equal(log_law(both, params)[0, 0], log_law(z, params))


def test_tokens_that_the_model_excludes_stay_excluded() -> None:
    z = torch.tensor([0.0, float("-inf"), 1.0])
    for params in (
        SamplingParams(1.0),
        SamplingParams(1.0, top_k=2),
        SamplingParams(1.0, top_p=0.99),
        SamplingParams(),
    ):
        assert log_law(z, params).exp()[1] == 0


def test_half_precision_is_widened_and_float64_is_kept() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert widen(torch.zeros(2, dtype=dtype)).dtype == torch.float32
    assert widen(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("temperature", [1e-5, 1e-3])
def test_the_lowest_temperatures_still_give_a_law_in_float32(temperature: float) -> None:
    p = log_law(torch.tensor([-100.0, 99.0, 100.0]), SamplingParams(temperature, top_k=2, top_p=0.9)).exp()
    assert p.tolist() == [0, 0, 1]


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, r"temperature must be 0 \(greedy\) or .*, not -0.5"),
        ({"temperature": float("nan")}, r"temperature must be .*, not nan"),
        ({"temperature": float("inf")}, r"temperature must be .*, not inf"),
        ({"temperature": 1e-40}, r"temperature must be 0 \(greedy\) or .*, not 1e-40"),
        ({"top_k": -1}, r"top_k must be 0 \(off\) or positive, not -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], not 1.1"),
        ({"top_p": float("nan")}, r"top_p must be in \(0, 1\], not nan"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be at least 1, not 0"),
        ({"sampling": "beam"}, r"sampling must be 'noise' or 'residual', not 'beam'"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\], not 1.5"),
        ({"min_p": float("nan")}, r"min_p must be in .*, not nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be positive \(1 is off\), not 0.0"),
        ({"repetition_penalty": float("inf")}, r"repetition_penalty must be positive .*, not inf"),
        ({"presence_penalty": float("nan")}, r"presence_penalty must be a number \(0 is off\), not nan"),
        ({"frequency_penalty": float("inf")}, r"frequency_penalty must be a number \(0 is off\), not inf"),
        ({"logit_bias": {3: float("-inf")}}, r"logit_bias takes token ids and finite numbers, not 3: -inf"),
        ({"logit_bias": {"7": 1.0}}, r"logit_bias takes token ids and finite numbers, not '7': 1.0"),
        ({"logit_bias": {3: -1e300}}, r"logit_bias takes numbers from -100 to 100, not 3: -1e\+300"),
        ({"logit_bias": {-1: 2.0}}, r"logit_bias takes token ids and finite numbers, not -1: 2.0"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, r"logit_bias names a token id twice: \[3, 3\]"),
        ({"stop": ("a", "")}, r"stop takes strings of at least one character, not \['a', ''\]"),
        ({"stop": (5,)}, r"stop takes strings of at least one character, not \[5\]"),
        ({"min_new_tokens": -1}, r"min_new_tokens must be from 0 to max_new_tokens 128, not -1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, r"min_new_tokens must be from 0 to max_new_tokens 8, not 9"),
        ({"seed": 2**63}, r"seed must fit in 64 bits .*, but is 9223372036854775808"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_with_the_value(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplingParams(**options)


def test_stop_and_bias_are_stored_in_one_form() -> None:
    one = SamplingParams(stop="END", logit_bias={9: 1.0, 3: -2.0})
    assert (one.stop, one.logit_bias) == (("END",), ((3, -2.0), (9, 1.0)))
    assert one == SamplingParams(stop=["END"], logit_bias=((3, -2.0), (9, 1.0)))  # type: ignore[arg-type]
    assert hash(one) == hash(SamplingParams(stop=("END",), logit_bias={3: -2.0, 9: 1.0}))


def test_the_edges_are_accepted() -> None:
    for options in ({"top_p": 1.0}, {"max_new_tokens": 1}, {"seed": -(2**63)}, {"seed": 2**63 - 1}, {"top_k": 10**9}):
        SamplingParams(temperature=1.0, **options)
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=1e-5).greedy
