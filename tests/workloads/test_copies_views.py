"""Weights and buffers that are views of one storage are counted as that storage, by estimate and engine alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from groupsearch.measure import measure_step, simulate_peak
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peak_memory
from groupsearch.tracer import trace_model
from groupsearch.tracer.step import StepSettings, made_private, make_stage, real_copy
from groupsearch.workloads.copies import shapes_of

WIDTH = 128


def _two(first: Tensor, second: Tensor, **buffers: Tensor) -> nn.Module:
    layers = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    for layer, weight in zip(layers, (first, second), strict=True):
        layer.weight = nn.Parameter(weight)
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    return model


def _halves() -> tuple[Tensor, Tensor, Tensor]:
    flat = torch.randn(2 * WIDTH * WIDTH) / WIDTH**0.5
    return (flat, *flat.view(2, WIDTH, WIDTH).unbind())


def flat_buffer() -> nn.Module:
    flat, first, second = _halves()
    return _two(first, second, flat=flat)


def views_alone() -> nn.Module:
    _, first, second = _halves()
    return _two(first, second)


def part_of_more() -> nn.Module:
    _, first, _ = _halves()
    return _two(first, torch.randn(WIDTH, WIDTH).t(), rows=first[:5])


def other_type() -> nn.Module:
    _, first, second = _halves()
    return _two(first, second.clone(), bits=torch.zeros(WIDTH, dtype=torch.int64))


def bytes_held(model: nn.Module) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return sum(storages.values())


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("build", [flat_buffer, views_alone, part_of_more, other_type])
def test_storages_are_counted_once_and_whole(build: Callable[[], nn.Module]) -> None:
    model, batch = build(), (torch.randn(16, WIDTH), torch.randint(0, WIDTH, (16,)))
    trace = trace_model(shapes_of(model), batch, loss)
    assert trace.static.weights + trace.static.buffers == bytes_held(model)
    grouping, settings = Grouping.all_layer(trace), StepSettings()
    estimate = peak_memory(trace, grouping).peak_bytes
    assert estimate == pytest.approx(simulate_peak(model, batch, loss, grouping), rel=1e-3)
    device = torch.device("cpu")
    stage = make_stage(*real_copy(model, batch, device), loss, settings)
    with made_private(stage, settings, grouping, 16):
        assert estimate == pytest.approx(measure_step(stage, device, steps=1).peak_bytes, rel=1e-3)


def test_on_another_device_each_has_its_own() -> None:
    """``Module.to`` copies every tensor."""
    model, batch = flat_buffer(), (torch.randn(16, WIDTH), torch.randint(0, WIDTH, (16,)))
    trace = trace_model(shapes_of(model), batch, loss, device="cuda:h100")
    assert trace.static.weights + trace.static.buffers == 2 * bytes_held(model)
