from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, kstest, norm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import groupsearch.engine.mechanism as noise_module
from groupsearch.engine.mechanism import CHUNK, POOL, REACH, Gaussians, add_noise_, add_noises_, added_delta
from groupsearch.errors import GroupSearchError


def gaussians(seed: int = 0) -> Gaussians:
    return Gaussians(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_normal_with_the_given_deviation(dtype):
    noise = add_noise_(torch.zeros(200, 100, dtype=dtype), 2.5, gaussians()).flatten().numpy()
    assert kstest(noise / 2.5, "norm").pvalue > 0.01


def test_elements_and_successive_draws_are_independent():
    source = gaussians()
    first, second = (add_noise_(torch.zeros(20_000), 1.0, source).numpy() for _ in range(2))
    bound = 3 / np.sqrt(20_000)
    assert abs(np.corrcoef(first, second)[0, 1]) < bound
    assert all(abs(np.corrcoef(first[lag:], first[:-lag])[0, 1]) < bound for lag in (1, 2, 8, 16))


def test_it_is_added_in_place():
    tensor = torch.full((50,), 100.0)
    result = add_noise_(tensor, 1.0, gaussians())
    assert result is tensor
    assert torch.equal(tensor, 100 + add_noise_(torch.zeros(50), 1.0, gaussians()))


def test_the_generator_decides_and_the_global_one_is_not_touched():
    state = torch.get_rng_state()
    same = [add_noise_(torch.zeros(30), 1.0, gaussians(s)) for s in (7, 7, 8)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])
    assert torch.equal(state, torch.get_rng_state())


def test_a_draw_does_not_depend_on_strides():
    straight, turned = torch.zeros(17, 19), torch.zeros(19, 17).t()
    assert torch.equal(add_noise_(straight, 1.0, gaussians()), add_noise_(turned, 1.0, gaussians()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_sum_is_formed_in_float64_and_rounded_once(dtype):
    tensor = torch.linspace(-4, 4, 1000).to(dtype)
    expected = (tensor.double() + add_noise_(torch.zeros(1000, dtype=torch.float64), 0.25, gaussians())).to(dtype)
    found = add_noise_(tensor.clone(), 0.25, gaussians())
    torch.testing.assert_close(found.double(), expected.double(), rtol=torch.finfo(dtype).eps, atol=2.0**-21)


@pytest.mark.parametrize("std", [0.3, 1.0, 7e-5])
def test_what_comes_out_is_on_a_grid_that_the_deviation_decides(std):
    """Whatever digits the sum had below it, two sums that differ there give numbers of the same kind."""
    grid = 2.0 ** (math.floor(math.log2(std)) - 20)
    for start in (0.0, math.pi * std, -std / 3):
        noisy = add_noise_(torch.full((5000,), start, dtype=torch.float64), std, gaussians())
        assert torch.equal((noisy / grid).round() * grid, noisy)
        assert (noisy / grid % 2 == 1).double().mean() == pytest.approx(0.5, abs=0.04), "no coarser one"


def test_zero_deviation_draws_nothing():
    source = gaussians()
    state = source.source.get_state()
    tensor = torch.arange(4.0)
    assert torch.equal(add_noise_(tensor, 0.0, source), torch.arange(4.0))
    assert torch.equal(state, source.source.get_state())


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_a_deviation_out_of_range_is_refused(std):
    with pytest.raises(GroupSearchError, match="standard deviation"):
        add_noise_(torch.zeros(3), std, gaussians())


def test_integers_are_refused():
    with pytest.raises(GroupSearchError, match=r"floating point.*int64"):
        add_noise_(torch.zeros(3, dtype=torch.int64), 1.0, gaussians())


def test_parameters_that_ask_for_gradients_take_noise():
    parameter = torch.nn.Parameter(torch.zeros(5))
    add_noise_(parameter, 1.0, gaussians())
    assert parameter.abs().sum() > 0
    assert parameter.requires_grad
    assert parameter.grad_fn is None


def test_it_runs_on_fake_tensors():
    with FakeTensorMode():
        tensor = torch.zeros(5)
        assert add_noise_(tensor, 1.0, gaussians()).shape == (5,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("numel", [10, POOL, CHUNK, 2**18])
def test_transient_memory_is_as_promised(dtype, numel):
    tensor, source = torch.zeros(numel, dtype=dtype), gaussians()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        add_noise_(tensor, 1.0, source)
        source.forget()
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert live == 0
    draw_bytes = 20 * min(max(numel, POOL), CHUNK)
    assert draw_bytes <= peak <= draw_bytes + 4096


@pytest.mark.parametrize("shape", [(CHUNK + 3,), (3, CHUNK // 2 + 1), (2, 2, CHUNK + 1), (5, 3, 2), (1,), (), (0, 4)])
def test_every_element_gets_one_number_whatever_the_shape(shape):
    """No number twice, none left out, as many as there are elements."""
    noise = add_noise_(torch.zeros(shape, dtype=torch.float64), 1.0, gaussians())
    assert (noise != 0).all()
    assert len(noise.unique()) >= 0.97 * noise.numel()
    turned = torch.zeros(shape[::-1], dtype=torch.float64).permute(tuple(range(len(shape)))[::-1])
    assert torch.equal(add_noise_(turned, 1.0, gaussians()), noise)


def test_small_tensors_share_a_draw_and_no_number():
    source = gaussians()
    parts = [add_noise_(torch.zeros(300, dtype=torch.float64), 1.0, source) for _ in range(40)]
    together = torch.cat(parts)
    assert len(together.unique()) > 0.98 * len(together)
    assert kstest(together.numpy(), "norm").pvalue > 0.01
    source.forget()
    assert not set(add_noise_(torch.zeros(50, dtype=torch.float64), 1.0, source).tolist()) & set(together.tolist())


DRAWS = 2**24


@pytest.fixture(scope="module")
def many():
    return add_noise_(torch.zeros(DRAWS, dtype=torch.float64), 1.0, gaussians(4))


@pytest.mark.parametrize("beyond", [2.0, 3.0, 4.0, 4.5, 5.0, 5.25])
def test_tails_of_many_draws_are_a_gaussians(many, beyond):
    """Both tails, by exact binomial bounds that one run in a hundred thousand is outside of."""
    for tail in (many > beyond, many < -beyond):
        low, high = binom.ppf([5e-6, 1 - 5e-6], DRAWS, norm.sf(beyond))
        assert low <= int(tail.sum()) <= high


@pytest.mark.parametrize("beyond", [6.0, 7.0, 8.0, 9.0, 10.0])
def test_the_tail_goes_on_where_hardly_any_draw_comes(beyond, monkeypatch):
    """Draws of which the first bits of the radius are given, so that it is beyond this: by chance they are rare.

    A radius beyond x comes with probability exp(-x^2 / 2), given which it is beyond y with exp((x^2 - y^2) / 2).
    """
    bits = min(62, math.floor(beyond**2 / 2 / math.log(2)))  # the uniform is below 2^-bits
    real = noise_module.draw_words

    def rare(source, count):
        words = real(source, count)
        words[: count // 2] &= 2 ** (63 - bits) - 1
        return words

    monkeypatch.setattr(noise_module, "draw_words", rare)
    pairs = noise_module._draw(2**18, torch.Generator().manual_seed(1)).view(2, -1)
    radius = pairs.square().sum(0).sqrt()
    least = math.sqrt(2 * bits * math.log(2))
    assert radius.min() >= least - 1e-12
    assert radius.max() <= REACH
    assert kstest((radius.square() - least**2).numpy() / 2, "expon").pvalue > 1e-3
    assert kstest(torch.atan2(*pairs).numpy() / (2 * math.pi) + 0.5, "uniform").pvalue > 1e-3
    assert len(radius.unique()) > 0.9 * 2**17, "no atoms"


def test_the_largest_numbers_are_no_atoms(many):
    """Of 2^24 draws in float32 the largest come from three radii: 5.76811, 5.64666 and 5.57439."""
    old = torch.empty(DRAWS).normal_(generator=torch.Generator().manual_seed(4))
    assert old.abs().max() < 5.7682 < REACH
    largest = many.abs().topk(2**12).values
    assert len(largest.unique()) > 0.99 * len(largest)
    assert (largest.diff().abs() > 0).float().mean() > 0.99


def test_what_one_example_pushes_beyond_reach_is_below_any_delta():
    """The review's experiment, by its exact probability: float32 lost 3.5e-4 (d = 10^6) to 1.1e-2 (10^8) a step."""

    def beyond_edge(numbers, bits):
        reach = math.sqrt(2 * bits * math.log(2))
        return numbers * 2.0**-bits * math.acos(1 - 1 / math.sqrt(numbers) / reach) / math.pi

    assert beyond_edge(10**6, 24) == pytest.approx(3.5e-4, rel=0.02)
    assert beyond_edge(10**8, 24) == pytest.approx(1.1e-2, rel=0.02)
    assert beyond_edge(10**8, 53) == pytest.approx(1.7e-11, rel=0.1)
    for numbers in (10**6, 10**8):
        assert 2 * beyond_edge(numbers, 84) <= added_delta(numbers, 1.0) <= 5 * beyond_edge(numbers, 83)
    assert added_delta(10**8, 1.0, 10_000) < 1e-15


@pytest.mark.parametrize("sigma", [0.3, 1.0, 8.0])
@pytest.mark.parametrize("numbers", [1, 1000, 10**7])
def test_the_bound_holds_for_every_way_to_spread_an_example(numbers, sigma):
    """Against the exact probability of the sampler's edge, summed over its outermost radii, of unequal spreads, too."""
    cells = np.arange(1, 4001, dtype=np.float64)
    radii = np.sqrt(-2 * (np.log(cells) - 84 * math.log(2)))

    def passed(push):
        inside = np.clip((radii[0] - push) / radii, -1, 1)
        return float((np.arccos(inside)[radii > radii[0] - push] / math.pi).sum() * 2.0**-84)

    bound = added_delta(numbers, sigma)
    for spread in {1, 2, min(numbers, 37), numbers}:
        for share in (1.0, 0.5, 0.01):  # of the squared push is spread evenly, the rest is in one coordinate
            even = spread * passed(math.sqrt(share / spread) / sigma)
            assert even + (passed(math.sqrt(1 - share) / sigma) if share < 1 else 0.0) <= bound
    assert added_delta(numbers, sigma, 7) == pytest.approx(min(1.0, 7 * bound))
    assert added_delta(numbers, sigma) >= added_delta(max(1, numbers // 3), sigma)


def test_many_tensors_get_the_noise_that_each_would_get_in_a_few_launches() -> None:
    """Bits are those of one after the other; what is launched does not grow with how many there are."""
    shapes = [(3,), (), (70, 70), (5000,), (2, 3, 4), (300, 200), (7,)] * 4
    stds = [0.5 + k for k in range(len(shapes))]
    stds[4] = 0.0
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k, shape in enumerate(shapes)]
    one, other = gaussians(), gaussians()
    expected = [add_noise_(x.clone(), std, one) for x, std in zip(start, stds, strict=True)]
    found = [x.clone() for x in start]
    add_noises_(found, stds, other)
    assert all(map(torch.equal, found, expected))
    assert torch.equal(found[4], start[4])
    small = [torch.zeros(8) for _ in range(200)]
    add_noises_(small[:1], [1.0], other)  # what is drawn together is there
    with Launched() as launched:
        add_noises_(small, [1.0] * 200, other)
    assert sum(name.startswith("_foreach") for name in launched.names) == 5
    assert {name for name in launched.names if not name.startswith("_foreach")} <= {"slice", "view", "detach"}


class Launched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
