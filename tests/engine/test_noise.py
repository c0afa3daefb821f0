from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from groupsearch.engine.noise import add_noise_
from groupsearch.errors import GroupSearchError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_normal_with_the_given_deviation(dtype):
    noise = add_noise_(torch.zeros(200, 100, dtype=dtype), 2.5, generator()).flatten().numpy()
    assert kstest(noise / 2.5, "norm").pvalue > 0.01


def test_elements_and_successive_draws_are_independent():
    source = generator()
    first, second = (add_noise_(torch.zeros(20_000), 1.0, source).numpy() for _ in range(2))
    bound = 3 / np.sqrt(20_000)
    assert abs(np.corrcoef(first, second)[0, 1]) < bound
    assert all(abs(np.corrcoef(first[lag:], first[:-lag])[0, 1]) < bound for lag in (1, 2, 8, 16))


def test_it_is_added_in_place():
    tensor = torch.full((50,), 100.0)
    result = add_noise_(tensor, 1.0, generator())
    assert result is tensor
    assert torch.equal(tensor, 100 + add_noise_(torch.zeros(50), 1.0, generator()))


def test_the_generator_decides_and_the_global_one_is_not_touched():
    state = torch.get_rng_state()
    same = [add_noise_(torch.zeros(30), 1.0, generator(s)) for s in (7, 7, 8)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])
    assert torch.equal(state, torch.get_rng_state())


def test_a_draw_does_not_depend_on_strides():
    straight, turned = torch.zeros(17, 19), torch.zeros(19, 17).t()
    assert torch.equal(add_noise_(straight, 1.0, generator()), add_noise_(turned, 1.0, generator()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_gets_float32_noise_rounded_once(dtype):
    tensor = torch.linspace(-4, 4, 1000).to(dtype)
    expected = (tensor.float() + add_noise_(torch.zeros(1000), 0.3, generator())).to(dtype)
    assert torch.equal(add_noise_(tensor, 0.3, generator()), expected)


def test_zero_deviation_draws_nothing():
    source = generator()
    state = source.get_state()
    tensor = torch.arange(4.0)
    assert torch.equal(add_noise_(tensor, 0.0, source), torch.arange(4.0))
    assert torch.equal(state, source.get_state())


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_a_deviation_out_of_range_is_refused(std):
    with pytest.raises(GroupSearchError, match="standard deviation"):
        add_noise_(torch.zeros(3), std, generator())


def test_integers_are_refused():
    with pytest.raises(GroupSearchError, match=r"floating point.*int64"):
        add_noise_(torch.zeros(3, dtype=torch.int64), 1.0, generator())


def test_parameters_that_ask_for_gradients_take_noise():
    parameter = torch.nn.Parameter(torch.zeros(5))
    add_noise_(parameter, 1.0, generator())
    assert parameter.abs().sum() > 0
    assert parameter.requires_grad
    assert parameter.grad_fn is None


def test_it_runs_on_fake_tensors():
    with FakeTensorMode():
        tensor = torch.zeros(5)
        assert add_noise_(tensor, 1.0, generator()).shape == (5,)


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 1), (torch.float64, 1), (torch.bfloat16, 2)])
def test_transient_memory_is_as_promised(dtype, copies):
    numel = 2**18
    tensor = torch.zeros(numel, dtype=dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        add_noise_(tensor, 1.0, generator())
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    draw_bytes = numel * torch.promote_types(dtype, torch.float32).itemsize
    assert copies * draw_bytes <= peak <= copies * draw_bytes + 4096
