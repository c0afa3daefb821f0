from __future__ import annotations

import numpy as np
import pytest

from groupsearch.search.candidates import hypervolume, pareto, share_dominated


def test_hypervolume_is_the_area_counted_cell_by_cell() -> None:
    rng = np.random.default_rng(0)
    values, sizes = np.arange(20)[:, None], np.arange(30)[None, :]
    for _ in range(50):
        points = [(int(v), int(s)) for v, s in zip(rng.integers(0, 20, 6), rng.integers(0, 30, 6), strict=True)]
        # A cell [v, v+1] x [s, s+1] is dominated where a point is at least v + 1 in value and at most s in size.
        cells = np.zeros((20, 30), bool)
        for value, size in points:
            cells |= (values + 1 <= value) & (sizes >= size)
        assert hypervolume(points, reference=(0, 30)) == cells.sum()


def test_points_beyond_the_reference_add_nothing() -> None:
    assert hypervolume([(0.4, 5), (0.9, 11)], reference=(0.5, 10)) == 0


def test_pareto_is_what_no_point_dominates() -> None:
    rng = np.random.default_rng(1)
    points = [(int(v), int(s)) for v, s in rng.integers(0, 8, (40, 2))]
    volume = hypervolume(points, (-1, 9))
    front = [point for point, on in zip(points, pareto(points), strict=True) if on]
    assert hypervolume(front, (-1, 9)) == volume
    for point in set(front):
        assert hypervolume([p for p in front if p != point], (-1, 9)) < volume


def test_share_of_the_rectangle() -> None:
    box = [(0.5, 10), (0.9, 20)]
    assert share_dominated([(0.7, 15)], box) == pytest.approx(0.25)
    assert share_dominated([(0.9, 10)], box) == pytest.approx(1)
    assert share_dominated([(0.9, 10)], [(0.9, 10)]) == 0
