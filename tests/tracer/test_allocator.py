"""Rounding as the allocator does it: one rule, and everything that is counted agrees with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from groupsearch.measure import private_peak, simulate_peak
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peak_memory
from groupsearch.plan.trace import StaticBytes, Trace
from groupsearch.tracer import allocator as workspaces
from groupsearch.tracer import trace_model
from groupsearch.tracer.allocator import CUDA_GRANULARITY_BYTES, Allocator, allocated_peak
from groupsearch.tracer.live import LiveBytes
from groupsearch.tracer.record import record_step
from groupsearch.tracer.step import StepSettings, fake_stage, make_stage, real_copy
from tests.support.cases import EVERY_CASE

ROUNDED = Allocator(CUDA_GRANULARITY_BYTES)
CASES = ("linear-3d", "conv2d-groups", "tied-embedding-head", "reused-linear-3d", "checkpoint-non-reentrant", "gpt2")


def rounded(size_bytes: int) -> int:
    return (size_bytes + 511) // 512 * 512


def traced(name: str, allocator: Allocator | None, settings: StepSettings | None = None) -> Trace:
    case, settings = EVERY_CASE[name], settings or StepSettings()
    model, batch = case.model(torch.float32), case.batch(torch.float32)
    fake, stage = fake_stage(model, batch, case.loss, settings, allocator=allocator)
    with fake:
        return record_step(stage, settings, 4, {})


def test_a_size_is_rounded_up_to_whole_blocks() -> None:
    assert [ROUNDED.rounded(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert [Allocator().rounded(size) for size in (0, 1, 513)] == [0, 1, 513]


def test_live_bytes_are_those_of_rounded_storages() -> None:
    live = LiveBytes(allocator=ROUNDED)
    assert live.ignore([torch.zeros(3), torch.zeros(129)]) == 512 + 1024
    with live:
        one = torch.zeros(100)
        other = one.double()[10:]
        assert live.live_bytes == 512 + 1024
        assert live.sizes == [512, 1024]
        del one
    assert live.log == [512, 1536, 1024]
    del other
    assert live.live_bytes == 0


def test_tensors_elsewhere_are_no_business_of_a_device() -> None:
    live = LiveBytes(allocator=replace(ROUNDED, device_type="meta"))
    there = torch.empty(10, device="meta")
    assert live.ignore([torch.zeros(5), there]) == 512
    with live:
        here, another = torch.zeros(1000), torch.empty(200, device="meta")
        torch.get_rng_state()
    assert live.log == [1024]
    assert live.number(here) is None
    assert live.number(another) == 0


def test_what_an_operation_takes_inside_is_a_peak_of_its_own() -> None:
    def watch(work: Callable[[], Any]) -> tuple[Any, int]:
        return work(), 5000

    live = LiveBytes(allocator=replace(ROUNDED, watch=watch))
    with live:
        one = torch.ones(25)
    assert live.log == [rounded(5000), 512]
    assert len(one) == 25


def test_the_peak_inside_is_what_was_asked_for_above_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device here: the statistics are those that a caching allocator would keep of these sizes."""
    held, peak = [1000], [9999]

    def take(size_bytes: int) -> None:
        held[0] += size_bytes
        peak[0] = max(peak[0], held[0])

    def work() -> str:
        take(300)
        take(-200)
        return "done"

    begun: list[bool] = []

    def reset(device: torch.device) -> None:
        assert begun, "torch raises where CUDA has not been initialised"
        peak[0] = held[0]

    monkeypatch.setattr(torch.cuda, "init", lambda: begun.append(True))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    statistics = lambda device: {"requested_bytes": {"all": {"current": held[0], "peak": peak[0]}}}  # noqa: E731
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", statistics)
    assert allocated_peak(work, torch.device("cuda")) == ("done", 300)
    assert Allocator.of(torch.device("cuda")).watch is not None
    assert Allocator.of(torch.device("cpu")) == Allocator()


@pytest.mark.parametrize("name", CASES)
def test_everything_in_a_trace_is_rounded(name: str) -> None:
    trace = traced(name, ROUNDED)
    static = trace.static
    sizes = [static.total, trace.step_bytes, trace.nonprivate_peak_bytes, trace.carried_bytes]
    sizes += [size for i in trace.instants for size in (i.live_bytes, i.forward_bytes)]
    sizes += [booked.size_bytes for booked in trace.booked]
    sizes += [size for s in trace.sites for size in (s.close_bytes, s.gradient_bytes, s.close_live_bytes)]
    sizes += [term.transient_bytes for term in trace.cross_terms]
    assert {size % 512 for size in sizes} == {0}
    parameters = {id(p): p for p in EVERY_CASE[name].model(torch.float32).parameters()}.values()
    assert static.weights == sum(rounded(p.nbytes) for p in parameters)
    trainable = sum(rounded(p.nbytes) for p in parameters if p.requires_grad)
    assert sum(site.gradient_bytes for site in trace.sites) == trainable


@pytest.mark.parametrize("name", CASES[:-1])
def test_booked_storages_are_those_of_the_plain_trace_rounded(name: str) -> None:
    plain, coarse = traced(name, None), traced(name, ROUNDED)
    assert [rounded(b.size_bytes) for b in plain.booked] == [b.size_bytes for b in coarse.booked]
    assert [b.sites for b in plain.booked] == [b.sites for b in coarse.booked]


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [
        *((name, "none") for name in CASES[:-1]),
        pytest.param("gpt2", "none", marks=pytest.mark.slow),
        pytest.param("gpt2", "blocks", marks=pytest.mark.slow),
    ],
)
def test_a_rounded_estimate_is_the_rounded_simulation(name: str, checkpoint: str) -> None:
    """But for the norms of closed groups, which the engine keeps until its step: a block for each."""
    settings, case = StepSettings(checkpoint=checkpoint), EVERY_CASE[name]
    trace = traced(name, ROUNDED, settings)
    model, batch = case.model(torch.float32), case.batch(torch.float32)
    fake, stage = fake_stage(model, batch, case.loss, settings, allocator=ROUNDED)
    middle = Grouping.from_boundaries(trace, {trace.length // 2} - {0})
    for grouping in (Grouping.all_layer(trace), Grouping.layer_wise(trace), middle):
        with fake:
            simulated = private_peak(stage, settings, grouping, 4)
        assert simulated % 512 == 0
        assert 0 <= simulated - peak_memory(trace, grouping).peak_bytes <= 512 * grouping.groups
    with fake:
        assert stage.counted_step() == trace.nonprivate_peak_bytes


def test_the_engine_on_real_tensors_peaks_where_the_trace_of_them_says() -> None:
    case = EVERY_CASE["linear-3d"]
    model, batch = case.model(torch.float32), case.batch(torch.float32)
    trace = trace_model(model, batch, case.loss, device="cpu")
    for grouping in (Grouping.all_layer(trace), Grouping.layer_wise(trace)):
        simulated = simulate_peak(model, batch, case.loss, grouping, device="cpu")
        assert peak_memory(trace, grouping).peak_bytes == pytest.approx(simulated, rel=1e-2)


def test_workspaces_are_static_and_none_on_the_cpu() -> None:
    assert workspaces.workspace_bytes(torch.device("cpu")) == 0
    case = EVERY_CASE["linear-3d"]
    moved = real_copy(case.model(torch.float32), case.batch(torch.float32), torch.device("cpu"))
    stages = [make_stage(*moved, case.loss, StepSettings(), workspaces=size) for size in (0, 4096)]
    traces = [record_step(stage, StepSettings(), 4, {}) for stage in stages]
    assert [trace.static.workspaces for trace in traces] == [0, 4096]
    whole = [peak_memory(trace, ()) for trace in traces]
    assert whole[1].peak_bytes - whole[0].peak_bytes == 4096
    assert whole[1].breakdown.transients - whole[0].breakdown.transients == 4096
    assert "workspaces" not in traces[0].to_json()["static"]
    assert Trace.from_json(traces[1].to_json()).static == traces[1].static


def test_workspaces_that_are_there_already_are_given_up_and_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device here: what its libraries would keep is counted in their place."""
    kept = [64]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100 + kept[0])
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: kept.__setitem__(0, 0), raising=False)
    monkeypatch.setattr(workspaces, "_take_products", lambda device: kept.__setitem__(0, kept[0] + 32))
    monkeypatch.setattr(workspaces, "_in_both_threads", lambda device, work: (work(), work()))
    assert workspaces.workspace_bytes.__wrapped__(torch.device("cuda")) == 64


def test_products_are_taken_on_the_device_given() -> None:
    with LiveBytes() as live:
        workspaces._take_products(torch.device("cpu"))
    assert live.live_bytes == 0
    assert max(live.sizes) == 4 * 2 * 128 * 128


def test_work_is_done_here_and_in_the_backward_pass() -> None:
    tasks: list[int] = []
    workspaces._in_both_threads(torch.device("cpu"), lambda: tasks.append(torch._C._current_graph_task_id()))
    assert tasks[0] == -1
    assert tasks[1] >= 0


def test_static_bytes_add_up() -> None:
    static = StaticBytes(weights=1, buffers=20, optimizer=300, batch=4000, workspaces=50000)
    assert static.total == 54321
    assert StaticBytes(**static.to_json()) == static


def test_a_loss_of_a_rounded_step_is_the_same() -> None:
    """Counting changes nothing of what is computed."""
    case = EVERY_CASE["linear-3d"]
    found: list[Tensor] = []
    for allocator in (None, ROUNDED):
        model = case.model(torch.float32)
        with LiveBytes(allocator=allocator):
            found.append(case.loss(model, case.batch(torch.float32)).detach())
    assert torch.equal(found[0], found[1])
