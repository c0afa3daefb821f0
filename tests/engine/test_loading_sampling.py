from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, chisquare, kstest

from groupsearch.engine.loading import PoissonSampler, batch_quantile, physical_chunks
from groupsearch.errors import GroupSearchError


def sampler(size: int, rate: float, steps: int, seed: int = 0) -> PoissonSampler:
    return PoissonSampler(size, rate, steps, torch.Generator().manual_seed(seed))


def test_batches_are_ascending_indices_without_repeats():
    batches = list(sampler(100, 0.3, 50))
    assert len(batches) == 50
    for batch in batches:
        assert batch.dtype == torch.int64
        assert batch.dim() == 1
        assert (batch.diff() > 0).all()
        assert ((batch >= 0) & (batch < 100)).all()


def test_batch_sizes_are_binomial():
    sizes = np.array([len(batch) for batch in sampler(40, 0.1, 4000)])
    kinds = 10
    observed = np.bincount(np.minimum(sizes, kinds - 1), minlength=kinds)
    expected = binom.pmf(np.arange(kinds), 40, 0.1)
    expected[-1] += binom.sf(kinds - 1, 40, 0.1)
    assert observed[0] > 0  # empty batches do occur
    assert chisquare(observed, 4000 * expected).pvalue > 0.01


def test_every_example_and_every_pair_is_taken_at_its_rate():
    taken = torch.zeros(4000, 30)
    for row, batch in zip(taken, sampler(30, 0.25, 4000, seed=1), strict=True):
        row[batch] = 1
    counts = taken.sum(0).numpy()
    # Standardised counts of 30 examples are standard normal; the pairs' correlations are N(0, 1/4000).
    assert kstest((counts - 1000) / np.sqrt(4000 * 0.25 * 0.75), "norm").pvalue > 0.01
    correlations = np.corrcoef(taken.numpy().T)[np.triu_indices(30, 1)]
    assert kstest(correlations * np.sqrt(4000), "norm").pvalue > 0.01


def test_consecutive_batches_are_independent():
    sizes = np.array([len(batch) for batch in sampler(50, 0.2, 4000, seed=2)])
    assert abs(np.corrcoef(sizes[1:], sizes[:-1])[0, 1]) < 3 / np.sqrt(4000)


def test_the_seed_decides_and_iterating_again_goes_on():
    first, second = sampler(50, 0.3, 5), sampler(50, 0.3, 5)
    once, again = list(first), list(first)
    assert all(torch.equal(a, b) for a, b in zip(once, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(again, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(once, sampler(50, 0.3, 5, seed=1), strict=True))


def test_rate_one_takes_everything():
    assert all(torch.equal(batch, torch.arange(7)) for batch in sampler(7, 1.0, 3))


@pytest.mark.parametrize(
    ("size", "rate", "steps"), [(0, 0.1, 1), (5, 0.0, 1), (5, 1.5, 1), (5, float("nan"), 1), (5, 0.1, -1)]
)
def test_out_of_range_is_refused(size, rate, steps):
    with pytest.raises(GroupSearchError, match="Expected"):
        sampler(size, rate, steps)


@given(st.integers(0, 50), st.integers(1, 20) | st.none())
def test_chunks_are_the_batch_in_pieces_within_the_limit(size, limit):
    indices = torch.arange(size) * 3
    chunks = physical_chunks(indices, limit)
    assert torch.equal(torch.cat(chunks) if chunks else indices[:0], indices)
    assert all(0 < len(chunk) <= (limit or size) for chunk in chunks)
    assert len(chunks) == -(-size // (limit or max(size, 1)))


def test_a_limit_below_one_is_refused():
    with pytest.raises(GroupSearchError, match="at least 1, found 0"):
        physical_chunks(torch.arange(3), 0)


@given(st.integers(1, 10**7), st.floats(1e-6, 1.0), st.sampled_from([0.01, 0.5, 0.99, 0.999, 0.999999]))
def test_the_quantile_is_the_binomial_one(size, rate, q):
    found = batch_quantile(size, rate, q)
    assert binom.cdf(found, size, rate) >= q - 1e-9
    assert found == 0 or binom.cdf(found - 1, size, rate) < q + 1e-9


@pytest.mark.parametrize(("size", "rate", "q"), [(0, 0.1, 0.5), (5, 0.0, 0.5), (5, 0.1, 0.0), (5, 0.1, 1.0)])
def test_the_quantile_refuses_what_is_out_of_range(size, rate, q):
    with pytest.raises(GroupSearchError, match="Expected"):
        batch_quantile(size, rate, q)
