from __future__ import annotations

from groupsearch.search import Candidate, Choice
from groupsearch.search.verdict import recommend


def candidate(boundaries: tuple[int, ...], peak_bytes: int, *values: float, source: str = "search") -> Candidate:
    return Candidate(Choice(boundaries), peak_bytes, source, dict(enumerate(values)), step_seconds=0.01)


BEST = candidate((), 2000, 0.93, 0.95, 0.94, source="all-layer")


def test_the_least_peak_within_the_noise() -> None:
    near = candidate((3, 9), 1500, 0.94, 0.93, 0.94)
    far = candidate((1, 2, 3, 4), 1000, 0.90, 0.92, 0.91)
    chosen = recommend([BEST, near, far], "accuracy")
    assert chosen.boundaries == (3, 9)
    assert "accuracy 0.9367" in chosen.reason
    assert "0.0033 below the best mean (1 group (all-layer), 0.94)" in chosen.reason
    assert "not significant" in chosen.reason
    assert "1.46 KiB where 1 group (all-layer) needs 1.95 KiB" in chosen.reason


def test_a_sure_loss_however_small_is_not_recommended() -> None:
    below = candidate((3,), 1500, 0.929, 0.949, 0.939)
    chosen = recommend([BEST, below], "accuracy")
    assert chosen.boundaries == ()
    assert "no grouping reached a higher mean" in chosen.reason


def test_equal_peaks_are_decided_by_fewer_groups() -> None:
    many = candidate((1, 2, 3, 4), 1000, 0.93, 0.96, 0.94)
    few = candidate((2,), 1000, 0.94, 0.95, 0.93)
    assert recommend([BEST, many, few], "accuracy").boundaries == (2,)


def test_one_lucky_seed_is_not_the_best() -> None:
    lucky = candidate((5,), 1800, 0.99)
    assert recommend([BEST, lucky], "accuracy").boundaries == ()


def test_with_one_seed_each_the_best_is_taken_and_the_reason_says_so() -> None:
    chosen = recommend([candidate((), 2000, 0.9), candidate((2,), 1000, 0.89)], "accuracy")
    assert chosen.boundaries == ()
    assert "one seed: the noise is not known" in chosen.reason
    assert recommend([candidate((), 2000, 0.9), candidate((2,), 1000, 0.9)], "accuracy").boundaries == (2,)
