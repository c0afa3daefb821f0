"""Batches that are visibly not drawn as it is said are told, and true Poisson samples practically never."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, repeat

import numpy as np
import pytest
from scipy import stats

from groupsearch.privacy import sizes
from groupsearch.privacy.sizes import SizesSeen


def told_after(seen: SizesSeen, stream: Iterator[int], limit: int = 2000) -> tuple[int, str] | None:
    """After how many batches something is told, and what."""
    for count, size in enumerate(stream, 1):
        if count > limit:
            return None
        if (wrong := seen.add(size)) is not None:
            return count, wrong
    return None


@pytest.mark.parametrize(("examples", "batch"), [(50_000, 512), (1437, 128), (1000, 8), (120, 24)])
def test_a_loader_of_one_size_is_told_within_a_few_batches(examples: int, batch: int) -> None:
    found = told_after(SizesSeen("poisson", examples, batch / examples), repeat(batch))
    assert found is not None
    count, wrong = found
    assert "same size" in wrong
    exact = stats.binom(examples, batch / examples).pmf(batch) ** (count - 1)
    assert exact < sizes.FALSE_ALARM
    assert 3 < count <= 25


@pytest.mark.parametrize(("examples", "batch"), [(1437, 128), (1000, 96), (40, 6)])
def test_so_is_one_whose_epochs_end_with_a_smaller_batch(examples: int, batch: int) -> None:
    epoch = [*repeat(batch, examples // batch), examples % batch]
    found = told_after(SizesSeen("poisson", examples, batch / examples), chain.from_iterable(repeat(epoch)))
    assert found is not None
    assert found[0] < 60


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 2.0])
def test_another_rate_than_was_given_is_told(factor: float) -> None:
    rng = np.random.default_rng(0)
    drawn = (int(rng.binomial(10_000, 0.02 * factor)) for _ in repeat(0))
    found = told_after(SizesSeen("poisson", 10_000, 0.02), drawn)
    assert found is not None
    assert "number of examples" in found[1]


@pytest.mark.parametrize(
    ("examples", "rate"), [(10_000, 0.02), (40, 0.15), (1437, 0.2), (100, 1.0), (60, 0.01), (1, 0.5)]
)
def test_poisson_samples_pass(examples: int, rate: float) -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        assert (
            told_after(SizesSeen("poisson", examples, rate), iter(rng.binomial(examples, rate, 3000).tolist()), 3000)
            is None
        )


@pytest.mark.parametrize(("examples", "rate"), [(4, 0.5), (20, 0.05), (50, 0.3)])
def test_the_stated_probability_of_a_false_alarm_is_an_upper_bound(
    examples: int, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a level that can be seen in a few thousand runs."""
    monkeypatch.setattr(sizes, "FALSE_ALARM", 0.2)
    rng = np.random.default_rng(2)
    alarms = sum(
        told_after(SizesSeen("poisson", examples, rate), iter(rng.binomial(examples, rate, 60).tolist())) is not None
        for _ in range(1500)
    )
    assert alarms / 1500 <= 0.2


def test_the_bound_on_equal_sizes_holds_exactly() -> None:
    """C(k, m) p^(m - 1) against the probability that some size comes at least m times, by enumeration."""
    law = stats.binom(5, 0.4).pmf(range(6))
    for batches, most in ((3, 2), (4, 3), (5, 5)):
        exact = 0.0
        for index in np.ndindex(*(6,) * batches):
            if np.bincount(index).max() >= most:
                exact += math.prod(law[size] for size in index)
        bound = math.comb(batches, most) * max(law) ** (most - 1)
        assert exact <= bound
        assert sizes._log_most_likely(5, 0.4) == pytest.approx(math.log(max(law)))


def test_fixed_sizes_and_shuffled_epochs_are_held_to_theirs() -> None:
    fixed, shuffled = (SizesSeen(sampling, 100, 0.08) for sampling in ("fixed-size", "shuffled"))
    assert [fixed.add(8), fixed.add(8), fixed.add(7)] == [None, None, "a batch of another size"]
    assert [shuffled.add(8), shuffled.add(4), shuffled.add(9)] == [None, None, "a larger batch"]
