"""Random small models: the engine's sums are exact, or it refuses; of right models it refuses few."""

from __future__ import annotations

import pytest

from tests.engine.fuzz_table import share_refused, table
from tests.engine.fuzzing import verdict_of
from tests.engine.programs import recipe

SEEDS, QUICK, CHUNK = 2000, 500, 250


def test_every_ingredient_is_in_the_seeds_that_are_always_run() -> None:
    assert _ingredients(QUICK) == _ingredients(SEEDS)


def _ingredients(seeds: int) -> set[str]:
    return {name for seed in range(seeds) for name in recipe(seed).ingredients}


@pytest.mark.parametrize(
    "start",
    [pytest.param(start, marks=() if start < QUICK else pytest.mark.slow) for start in range(0, SEEDS, CHUNK)],
)
def test_random_models_are_exact_or_refused(start: int) -> None:
    found = {seed: verdict_of(seed) for seed in range(start, start + CHUNK)}
    assert not any(outcome.fault for outcome in found.values()), table(found)
    assert sum(outcome.verdict == "unusable" for outcome in found.values()) < 0.03 * CHUNK, table(found)
    refused, right = share_refused(found)
    assert right > 0.5 * CHUNK, table(found)
    assert refused < 0.07 * right, table(found)  # 3 % of all seeds, 5 % of the worst chunk
