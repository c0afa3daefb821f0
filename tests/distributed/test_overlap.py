"""Groups hide communication between two real processes, and the model of it says how much."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.overlap import in_two, throttled
from groupsearch.plan.communication import Link
from tests.support.world import in_world

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed part")


def sums_over_a_link() -> tuple[list[float], float]:
    """What is added up of rank and one, and how long the link took for it at the least."""
    group = throttled(Link(2, 4e5, 0.05))
    tensor = torch.full((10_000,), float(torch.distributed.get_rank() + 1))
    begin = time.monotonic()
    work = torch.distributed.all_reduce(tensor, group=group, async_op=True)
    work.wait()
    return tensor[:2].tolist(), time.monotonic() - begin


def test_the_link_adds_up_and_takes_its_time() -> None:
    for found, seconds in in_world(2, sums_over_a_link):
        assert found == [3.0, 3.0]
        assert 0.2 <= seconds < 5


@pytest.mark.slow
def test_predicted_steps_are_measured_and_groups_hide_half_of_the_communication() -> None:
    found = in_two("waiting", repeats=9)
    for text, (seconds, predicted) in found.items():
        assert seconds == pytest.approx(predicted.step_seconds, rel=0.15), text
    whole, _ = found["all-layer"]
    for text in ("layer-wise", "best 4 groups"):
        seconds, predicted = found[text]
        assert predicted.hidden > 0.5
        assert whole - seconds > 0.5 * predicted.link_seconds
