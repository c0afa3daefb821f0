"""Random small models: the engine's sums are exact, or it refuses; of right models it refuses few."""

from __future__ import annotations

import pytest

from tests.engine.fuzz_table import share_refused, table
from tests.engine.fuzzing import verdict_of

SEEDS, CHUNK = 2000, 250


@pytest.mark.parametrize("start", range(0, SEEDS, CHUNK))
def test_random_models_are_exact_or_refused(start: int) -> None:
    found = {seed: verdict_of(seed) for seed in range(start, start + CHUNK)}
    assert not any(outcome.fault for outcome in found.values()), table(found)
    assert sum(outcome.verdict == "unusable" for outcome in found.values()) < 0.03 * CHUNK, table(found)
    refused, right = share_refused(found)
    assert right > 0.5 * CHUNK, table(found)
    assert refused < 0.07 * right, table(found)  # 3 % of all seeds, 5 % of the worst chunk
