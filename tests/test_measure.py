"""Measuring in a fresh process: the same number as in this one, and a reason when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import Subject
from groupsearch.errors import GroupSearchError
from groupsearch.measure import CPU_METRIC, CUDA_METRIC, Measurement, measure_peak, measure_step
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer.allocator import profiled_peak
from groupsearch.workloads import load_workload

SETTINGS = {"batch_size": 16, "width": 8}


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(load_workload("digits-cnn", **SETTINGS))


@pytest.fixture(scope="module")
def measured(subject: Subject) -> Measurement:
    return measure_peak("digits-cnn", Grouping.all_layer(subject.trace), settings=SETTINGS, steps=2)


def test_a_fresh_process_measures_what_this_one_does(subject: Subject, measured: Measurement) -> None:
    here = subject.measure(Grouping.all_layer(subject.trace))
    # What oneDNN takes inside a convolution was seen to be a line of the cache more or less in a process with a past.
    assert measured.peak_bytes == pytest.approx(here, abs=64)


def test_a_measurement_says_how_it_was_taken(measured: Measurement) -> None:
    assert measured.metric == CPU_METRIC
    assert measured.reserved_bytes is None
    assert measured.requested_bytes is None
    assert measured.beside() == {}
    assert 0 < measured.step_seconds < 10


def test_the_grouping_reaches_the_process(subject: Subject, measured: Measurement) -> None:
    layer_wise = Grouping.layer_wise(subject.trace)
    found = measure_peak("digits-cnn", layer_wise, settings=SETTINGS, steps=1)
    assert found.peak_bytes == subject.measure(layer_wise)
    assert found.peak_bytes < measured.peak_bytes


def test_without_a_grouping_it_is_the_non_private_step(subject: Subject, measured: Measurement) -> None:
    found = measure_peak("digits-cnn", None, settings=SETTINGS, steps=1)
    assert found.peak_bytes == subject.measure(None)
    assert found.peak_bytes < measured.peak_bytes


def test_what_a_step_is_made_of_reaches_the_process() -> None:
    plain, lean, recomputed, two, cast = (
        measure_peak("digits-vit", None, settings={"batch_size": 32, "blocks": 2}, steps=1, **changes).peak_bytes
        for changes in (
            *({}, {"optimizer": "sgd"}, {"optimizer": "sgd", "checkpoint": "blocks"}),
            *({"micro_batches": 2}, {"autocast": "bfloat16"}),
        )
    )
    assert recomputed < lean < plain
    assert cast < plain < two


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_a_device_that_cannot_be_used_is_named_with_the_reason(device: str) -> None:
    with pytest.raises(GroupSearchError, match=f"digits-cnn with no groups on {device} failed: .*[Dd]evice") as caught:
        measure_peak("digits-cnn", None, settings=SETTINGS, device=device, steps=1)
    assert "Traceback" not in str(caught.value)


def test_a_workload_that_cannot_be_loaded_gives_its_reason(tmp_path: Path) -> None:
    with pytest.raises(GroupSearchError, match=r"no file .*missing\.py"):
        measure_peak(f"{tmp_path}/missing.py:make", None, steps=1)


def test_what_is_reserved_stands_beside_the_peak_and_fragmentation_is_the_rest() -> None:
    measured = Measurement(1000, 0.1, CUDA_METRIC, reserved_bytes=1500, requested_bytes=900)
    assert measured.fragmentation_bytes == 500
    assert measured.beside() == {"reserved_bytes": 1500, "fragmentation_bytes": 500, "requested_bytes": 900}


def test_on_a_gpu_the_peaks_are_those_of_a_step_that_is_not_the_first(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No device here: the statistics are those that a caching allocator would keep of these steps."""
    told = ["synchronize", "reset_peak_memory_stats"]
    events: list[str] = []
    for name in told:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: events.append(name))
    peaks = {"allocated_bytes.all.peak": 1000, "reserved_bytes.all.peak": 1500, "requested_bytes.all.peak": 900}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: events.append("read") or peaks)
    monkeypatch.setattr(type(subject.real), "step", lambda stage: events.append("step"))
    measured = measure_step(subject.real, torch.device("cuda"), steps=1)
    assert (measured.peak_bytes, measured.reserved_bytes, measured.requested_bytes) == (1000, 1500, 900)
    assert measured.metric == CUDA_METRIC
    assert events[: events.index("read")] == ["step", *told, "step", "synchronize"]


def test_a_profiled_peak_is_that_of_what_is_alive_together() -> None:
    def work() -> None:
        one = torch.zeros(1000)
        other = torch.zeros(2000)
        del one
        torch.zeros(1500)
        del other

    assert profiled_peak(work) == 4 * (2000 + 1500)


def test_a_profiled_peak_is_repeatable(subject: Subject) -> None:
    stage = subject.real
    assert len({profiled_peak(stage.step) for _ in range(3)}) == 1


def test_what_is_kept_from_the_first_run_is_not_counted() -> None:
    kept: dict[str, torch.Tensor] = {}

    def work() -> None:
        if "cache" not in kept:
            kept["cache"] = torch.zeros(100_000)
        torch.zeros(10)

    assert profiled_peak(work) == 40
