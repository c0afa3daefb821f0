"""The checks of a CUDA device under pytest, skipped where there is none; ``tests/gpu/run.sh`` needs no pytest."""

from __future__ import annotations

import pytest

from tests.gpu.checks import CHECKS, outcome_of


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_device(name: str) -> None:
    outcome = outcome_of(CHECKS[name], "cuda")
    if "skipped" in outcome:
        pytest.skip(outcome["skipped"])
    assert "failed" not in outcome, outcome["failed"]
