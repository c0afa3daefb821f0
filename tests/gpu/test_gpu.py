"""What only a CUDA device can show; skipped where there is none."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest
import torch

from groupsearch.clipping import ClipPlan
from groupsearch.engine import PrivateEngine, make_private
from groupsearch.grouping import Grouping
from groupsearch.measure import CUDA_METRIC, measure_peak
from groupsearch.memory import peak_memory
from groupsearch.options import NORM_METHODS, EngineOptions
from groupsearch.simulate import simulate_peak
from groupsearch.tracer import observe_sites, trace_model
from groupsearch.tracer.allocator import CUDA_GRANULARITY_BYTES, Allocator
from groupsearch.tracer.live import LiveBytes
from groupsearch.tracer.step import StepSettings, real_stage
from groupsearch.tracer.workspaces import workspace_bytes
from groupsearch.training import TrainSettings, train
from groupsearch.workloads import load_workload
from tests.benchmarks.accuracy import small_workload
from tests.cases import EVERY_CASE, Case, plain
from tests.reference import clipped_sums

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CASES = (
    *("linear-3d", "conv2d-groups", "conv2d-circular", "embedding-padding", "layernorm", "groupnorm", "class-token"),
    *("reused-linear-3d", "tied-embedding-head", "attention", "bilinear", "checkpoint-reentrant"),
    *("checkpoint-non-reentrant", "gpt2", "vit", "t5"),
)
TOLERANCE = 1.5e-2
# Large enough that tensors weigh more than the workspaces of CUDA's libraries.
WORKLOADS = {
    "digits-vit": {"batch_size": 65536},
    "stdlib-gpt": {"batch_size": 2048},
    "gpt2": {"batch_size": 4096, "sequence_length": 64},
}


def plans(case: Case) -> list[ClipPlan]:
    """All-layer and a random grouping, with a threshold that clips some examples and not others."""
    sites = observe_sites(case.model(), case.batch(), case.loss)
    spans = [[i for i, site in enumerate(sites) if name in site.parameters] for name in case.whole]
    cuts = [b for b in range(1, len(sites)) if not any(span[0] < b <= span[-1] for span in spans)]
    drawn = random.Random(case.seed).sample(cuts, len(cuts) // 2)
    return [ClipPlan(Grouping(tuple(sorted(chosen)), sites), max_grad_norm=0.5) for chosen in ([], drawn)]


def attach(
    case: Case, plan: ClipPlan, options: EngineOptions, seed: int = 0
) -> tuple[PrivateEngine, torch.nn.Module, torch.optim.Optimizer]:
    """A model of the case on the device with an engine and an optimizer, and one backward pass done."""
    model = case.model().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = make_private(
        model,
        optimizer,
        plan,
        noise_multiplier=2.0,
        expected_batch_size=4,
        options=options,
        generator=torch.Generator(DEVICE).manual_seed(seed),
    )
    case.loss(model, {key: tensor.to(DEVICE) for key, tensor in case.batch().items()}).mean().backward()
    return engine, model, optimizer


@pytest.mark.parametrize("norm_method", NORM_METHODS)
@pytest.mark.parametrize("name", CASES)
def test_clipped_sums_on_the_device_equal_the_reference_on_the_cpu(name: str, norm_method: str) -> None:
    case = EVERY_CASE[name]
    tolerance = max(1e-8, case.tolerance[torch.float64])
    for plan in plans(case):
        engine, *_ = attach(case, plan, EngineOptions(norm_method))
        expected = clipped_sums(plain(case.model()), case.batch(), case.loss, plan)
        for parameter, found in engine.clipped_sums().items():
            assert found.device.type == DEVICE
            scale = float(expected[parameter].abs().max())
            torch.testing.assert_close(
                found.cpu(), expected[parameter], rtol=tolerance, atol=tolerance * max(scale, 1.0), msg=parameter
            )


def test_noise_is_drawn_on_the_device_from_the_generator_given() -> None:
    case = EVERY_CASE["linear-3d-long"]
    plan = plans(case)[0]
    noise = []
    for seed in (1, 1, 2):
        engine, model, optimizer = attach(case, plan, EngineOptions(), seed)
        sums = {key: value.clone() for key, value in engine.clipped_sums().items()}
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        optimizer.step()
        moved = {key: (before[key] - value.detach()) * 4 - sums[key] for key, value in model.named_parameters()}
        noise.append(torch.cat([value.flatten() for value in moved.values()]))
    assert noise[0].device.type == DEVICE
    torch.testing.assert_close(noise[0], noise[1], rtol=0, atol=0)
    assert not torch.allclose(noise[0], noise[2])


def test_noise_has_the_standard_deviation_of_the_plan() -> None:
    case = Case("wide", lambda: torch.nn.Linear(300, 300), (300,))
    model = case.model().to(DEVICE)
    sites = observe_sites(case.model(), case.batch(), case.loss)
    plan = ClipPlan(Grouping((), sites), max_grad_norm=0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    make_private(model, optimizer, plan, noise_multiplier=3.0, expected_batch_size=2)
    before = model.weight.detach().clone()
    optimizer.step()  # an empty batch: noise alone
    assert float((before - model.weight.detach()).std()) == pytest.approx(3.0 * plan.sensitivity / 2, rel=0.02)


def test_storages_are_rounded_as_the_allocator_does() -> None:
    live, before = LiveBytes(allocator=Allocator.of(torch.device(DEVICE))), torch.cuda.memory_allocated()
    with live:
        kept = [torch.empty(size, dtype=torch.uint8, device=DEVICE) for size in (1, 511, 513, 100_000)]
        elsewhere = torch.empty(1000)
        assert live.live_bytes == torch.cuda.memory_allocated() - before
    assert len(kept) == 4
    assert live.number(elsewhere) is None


def test_what_an_operation_asks_for_inside_is_seen() -> None:
    """A sort needs room besides its results."""
    live = LiveBytes(allocator=Allocator.of(torch.device(DEVICE)))
    numbers = torch.randn(100_000, device=DEVICE)
    live.ignore([numbers])
    with live:
        numbers.sort()
    assert max(live.log) > sum(live.sizes)


def test_static_bytes_are_what_is_held_between_steps() -> None:
    case, device = EVERY_CASE["linear-3d"], torch.device(DEVICE)
    workspaces = workspace_bytes(device)
    assert workspace_bytes.__wrapped__(device) == workspaces
    gc.collect()
    before = torch.cuda.memory_allocated()
    stage = real_stage(case.model(torch.float32), case.batch(torch.float32), case.loss, StepSettings(), device)
    gc.collect()
    assert stage.static.workspaces == workspaces
    assert torch.cuda.memory_allocated() - before == stage.static.total - workspaces


def test_a_trace_on_the_device_is_rounded_and_agrees_with_the_engine_there() -> None:
    case = EVERY_CASE["gpt2"]
    model, batch = case.model(torch.float32), case.batch(torch.float32)
    trace = trace_model(model, batch, case.loss, device=DEVICE)
    assert trace.settings["granularity_bytes"] == CUDA_GRANULARITY_BYTES
    assert {instant.live_bytes % CUDA_GRANULARITY_BYTES for instant in trace.instants} == {0}
    for grouping in (Grouping.all_layer(trace), Grouping.layer_wise(trace)):
        simulated = simulate_peak(model, batch, case.loss, grouping, device=DEVICE)
        assert peak_memory(trace, grouping).peak_bytes == pytest.approx(simulated, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "checkpoint"), [*((name, "none") for name in WORKLOADS), ("stdlib-gpt", "blocks")])
def test_estimates_from_a_trace_on_the_device_are_what_is_measured(name: str, checkpoint: str, tmp_path: Path) -> None:
    text = small_workload(name, tmp_path).name
    workload = load_workload(text, **WORKLOADS[name])
    batch = workload.make_batch(workload.batch_size)
    trace = trace_model(workload.build(), batch, workload.loss, checkpoint=checkpoint, device=DEVICE)
    gc.collect()
    torch.cuda.empty_cache()  # the measuring process needs the memory
    shared = {"settings": WORKLOADS[name], "checkpoint": checkpoint, "device": DEVICE, "steps": 2}
    nonprivate = measure_peak(text, None, **shared)
    assert nonprivate.metric == CUDA_METRIC
    assert nonprivate.reserved_bytes is not None
    assert nonprivate.requested_bytes is not None
    assert nonprivate.reserved_bytes >= nonprivate.peak_bytes >= nonprivate.requested_bytes
    found = {"non-private": trace.nonprivate_peak_bytes / nonprivate.peak_bytes - 1}
    groupings = {"all-layer": Grouping.all_layer(trace)}
    if checkpoint == "blocks":
        groupings["layer-wise"] = Grouping.layer_wise(trace)
    for label, grouping in groupings.items():
        measured = measure_peak(text, grouping, **shared)
        found[label] = peak_memory(trace, grouping).peak_bytes / measured.peak_bytes - 1
    print(name, checkpoint, {label: f"{error:+.3%}" for label, error in found.items()})
    assert max(map(abs, found.values())) < TOLERANCE, found


@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
def test_one_step_of_training_runs_on_the_device(checkpoint: str) -> None:
    workload = load_workload("digits-vit", blocks=2)
    sites = observe_sites(workload.model, workload.make_batch(4), workload.loss)
    settings = TrainSettings.of(workload, steps=1, noise_multiplier=1.0, device=DEVICE, checkpoint=checkpoint)
    result = train(workload, Grouping((len(sites) // 2,), sites), settings)
    assert result.steps == 1
    assert 0 <= result.metric <= 1
    assert result.epsilon < float("inf")
