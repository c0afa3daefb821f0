"""What operations take that no tensor shows: estimates of a step with one in its middle, against measurements."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from benchmarks.accuracy import Subject
from groupsearch.plan.grouping import Grouping
from tests.support.operations import BY_VALUES, NEEDING_VALUES, OPERATIONS, workload

TOLERANCE = 0.01
# Its formula adds what it made, for an operand that it was given twice: that sum is taken for the gradients' meeting.
ROUGH = {"least squares": 0.03}


@dataclass(frozen=True, eq=False)
class Real(Subject):
    """Traced with its weights, as a model is whose path depends on values."""

    def _empty_model(self) -> nn.Module:
        return self.workload.build()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def errors(name: str) -> dict[str, float]:
    """Of the estimate, without privacy and all-layer."""
    subject = (Real if name in NEEDING_VALUES else Subject)(workload(name))
    whole = Grouping.all_layer(subject.trace)
    return {
        "non-private": subject.trace.nonprivate_peak_bytes / subject.measure(None) - 1,
        "all-layer": subject.estimate(whole) / subject.measure(whole) - 1,
    }


@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - BY_VALUES))
def test_a_step_with_the_operation_is_estimated_within_a_hundredth(name: str) -> None:
    found = errors(name)
    assert max(map(abs, found.values())) < ROUGH.get(name, TOLERANCE), found


@pytest.mark.parametrize("name", sorted(BY_VALUES))
def test_what_depends_on_values_is_named(name: str) -> None:
    """Autograd takes another formula for their gradient where operations are watched."""
    subject = Subject(workload(name))
    assert len(subject.trace.unprobed) == 1
    assert subject.trace.unprobed[0] in ("aten::prod", "aten::cumprod")
    assert max(errors(name).values()) > TOLERANCE


def test_operations_are_known_to_the_last() -> None:
    """What is known of all others is known of all they do."""
    assert not Subject(workload("rfft and irfft")).trace.unprobed
