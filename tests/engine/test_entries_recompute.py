"""Norms from instances that are dropped, and methods chosen per weight: they change what a step costs only."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from torch import Tensor

from groupsearch.engine import arithmetic as habits
from groupsearch.engine import entries as grads
from groupsearch.engine import entries as norms
from groupsearch.engine import make_private
from groupsearch.engine.entries import sliced_sqnorm
from groupsearch.errors import GroupSearchError
from groupsearch.measure import measure_peak, simulate_peak
from groupsearch.options import SITE_METHODS, EngineOptions
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import weights_with_choice
from groupsearch.tracer import trace_model
from groupsearch.tracer.live import LiveBytes
from groupsearch.workloads import load_workload
from tests.engine.test_parity import assert_case_agrees, by_name, trainable, truth, typical_norm
from tests.support.case import Case
from tests.support.cases import EVERY_CASE, LAYER_CASES

BATCH_SIZE = 4
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
Shape = tuple[int, int, int, int, int]
"""B, G, T, d, p."""


def slices_of(size_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(habits, "_KNOWN", {"cpu": habits.Habits(size_bytes, looks=True)})


def operands(shape: Shape, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(B, G, T, d) and (B, G, T, p)."""
    B, G, T, d, p = shape
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(B, G, T, n, generator=generator, dtype=torch.float64).to(dtype) for n in (d, p))
    return a, g


def exact_sqnorm(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    a, g = a.double(), g.double()
    sqnorm = torch.einsum("bgtp,bgtd->bgpd", g, a).square().sum((1, 2, 3))
    return sqnorm + g.sum(2).square().sum((1, 2)) if bias else sqnorm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 1, 7, 6, 4), (3, 4, 5, 2, 3), (2, 1, 1, 8, 8), (1, 1, 30, 16, 9)])
@pytest.mark.parametrize("examples", [1, 2, 100])
def test_norms_are_those_of_the_gradients_in_slices_of_any_size(
    shape: tuple[int, int, int, int, int],
    bias: bool,
    dtype: torch.dtype,
    examples: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    B, G, _, d, p = shape
    itemsize = 8 if dtype == torch.float64 else 4
    slices_of(examples * G * d * p * itemsize, monkeypatch)
    a, g = operands(shape, dtype)
    found = sliced_sqnorm(a, g, bias)
    assert found.shape == (B,)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found.double(), exact_sqnorm(a, g, bias), rtol=tolerance, atol=0)


def test_where_positions_cancel_the_norm_is_no_shorter_than_the_sum_that_it_clips() -> None:
    """What is left is rounding, and the clipped sum's is not the instance's: unless rounded up, it may be shorter."""
    shorter = 0
    for seed in range(6):
        a, g = operands((8, 1, 150, 96, 32), torch.float32, seed)
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        a, g = torch.cat([a, -a], dim=2)[:, :, order], torch.cat([g, g], dim=2)[:, :, order]
        total_B = torch.stack([grads.matrix_clipped_sum(a, g, alone).norm() for alone in torch.eye(8)])
        assert (sliced_sqnorm(a, g, False).sqrt() >= total_B).all()
        shorter += int((norms.instance_sqnorm(grads.matrix_instance(a, g)).sqrt() < total_B).sum())
    assert shorter > 0


def test_no_more_instances_are_alive_than_a_slice_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    a, g = operands((32, 1, 4, 64, 64), torch.float32)
    instance_bytes, peaks = 64 * 64 * 4, {}
    for examples in (1, 8, 32):
        slices_of(examples * instance_bytes, monkeypatch)
        live = LiveBytes()
        live.ignore((a, g))
        with live:
            sliced_sqnorm(a, g, True)
        peaks[examples] = live.peak_since(0)
        assert examples * instance_bytes <= peaks[examples] < (examples + 1) * instance_bytes


@by_name(LAYER_CASES, quick=2)
def test_methods_per_weight_change_nothing(case: Case) -> None:
    sites, gradients = truth(case, torch.float64)
    weights = sorted(weights_with_choice(sites))
    for start in range(3 if weights else 0):
        methods = dict(zip(weights, cycle(SITE_METHODS[start:] + SITE_METHODS[:start]), strict=False))
        plan = ClipPlan(Grouping((), sites), max_grad_norm=typical_norm(gradients))
        model, batch = case.model(torch.float64), case.batch(torch.float64, BATCH_SIZE)
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        engine = make_private(
            model,
            optimizer,
            plan,
            noise_multiplier=0.0,
            expected_batch_size=BATCH_SIZE,
            options=EngineOptions("mixed", methods),
        )
        case.loss(model, batch).mean().backward()
        assert_case_agrees(case, engine.clipped_sums(), gradients, plan)


@pytest.mark.parametrize("name", ["tied-linears", "tied-embedding-head", "reused-linear-3d", "conv2d-depthwise"])
def test_a_trace_tells_the_methods_that_were_asked_for(name: str) -> None:
    case = EVERY_CASE[name]
    args = case.build().train(), case.batch(torch.float32, 5), case.loss
    weights = weights_with_choice(trace_model(*args).sites)
    assert weights
    for method in SITE_METHODS:
        sites = trace_model(*args, options=EngineOptions("mixed", dict.fromkeys(weights, method))).sites
        assert {site.method for site in sites if site.parameters[0] in weights and site.kind != "embedding"} == {method}


def test_methods_for_weights_that_are_not_there_are_refused_by_traces_and_simulations() -> None:
    workload = load_workload("digits-vit", blocks="1", batch_size=8)
    options = EngineOptions("mixed", {"nowhere.weight": "ghost"})
    model, batch = workload.build(), workload.make_batch(8)
    grouping = Grouping.all_layer(trace_model(model, batch, workload.loss))
    with pytest.raises(GroupSearchError, match=r"nowhere\.weight"):
        trace_model(model, batch, workload.loss, options=options)
    with pytest.raises(GroupSearchError, match=r"nowhere\.weight"):
        simulate_peak(model, batch, workload.loss, grouping, options=options)


def test_a_measurement_takes_the_methods_that_were_asked_for() -> None:
    """At 17 positions and a width of 64 the instances of every matrix weigh more than input and gradient."""
    workload = load_workload("digits-vit", blocks="2", batch_size=64)
    model, batch = workload.build(), workload.make_batch(64)
    trace = trace_model(model, batch, workload.loss)
    grouping, weights = Grouping.all_layer(trace), weights_with_choice(trace.sites)
    options = {m: EngineOptions("mixed", dict.fromkeys(weights, m)) for m in ("ghost", "instantiate")}
    simulated = {m: simulate_peak(model, batch, workload.loss, grouping, options=o) for m, o in options.items()}
    assert simulated["instantiate"] > 1.1 * simulated["ghost"]
    settings = {"blocks": "2", "batch_size": 64}
    measured = measure_peak("digits-vit", grouping, settings=settings, options=options["instantiate"], steps=1)
    assert measured.peak_bytes == pytest.approx(simulated["instantiate"], rel=1e-3)
