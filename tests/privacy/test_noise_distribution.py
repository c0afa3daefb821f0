"""The noise that the optimizer sees: its distribution in every group, and what it must not depend on."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from groupsearch.engine import make_private
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer.sites import observe_sites
from groupsearch.training import TrainSettings, train
from groupsearch.workloads.workload import Data, TrainingDefaults, Workload, seeded
from tests.support.case import Batch, Wrap, readout

SIGMA, EXPECTED, WIDTH, ROWS = 1.7, 7.0, 40, 60
BATCH = {"x": torch.randint(ROWS, (6, 3), generator=torch.Generator().manual_seed(0)), "scale": torch.ones(6)}


def language_model(tied: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    mid, head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, ROWS, bias=False)
    model: Any = Wrap(
        lambda m, x: m.head(m.mid(m.embed(x)).tanh()), embed=nn.Embedding(ROWS, WIDTH), mid=mid, head=head
    )
    if tied:
        head.weight = model.embed.weight
    return model.to(dtype)


def plan_for(model: nn.Module, boundaries: tuple[int, ...], **settings: Any) -> ClipPlan:
    sites = tuple(observe_sites(model, BATCH, readout))
    return ClipPlan(Grouping(boundaries, sites), 0.8, **settings)


def noises(
    plan: ClipPlan, steps: int, tied: bool = True, cuts: tuple[int, ...] = (), seed: int = 0
) -> list[dict[str, Tensor]]:
    """What is added to the gradient in each step, whatever the batch: empty, or cut into micro-batches."""
    model = language_model(tied)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = make_private(
        model,
        optimizer,
        plan,
        noise_multiplier=SIGMA,
        expected_batch_size=EXPECTED,
        loss_reduction="sum",
        generator=torch.Generator().manual_seed(seed),
    )
    seen = []
    for _ in range(steps):
        for start, stop in pairwise(cuts):
            readout(model, {name: value[start:stop] for name, value in BATCH.items()}).sum().backward()
        sums = {name: total.clone() for name, total in engine.clipped_sums().items()}
        optimizer.step()
        named = dict(model.named_parameters())
        seen.append({name: named[name].grad - sums[name] / EXPECTED for name in named})  # type: ignore[operator]
    return seen


def groups_of(plan: ClipPlan) -> list[set[str]]:
    return [{n for s in plan.grouping.sites[lo:hi] for n in s.parameters} for lo, hi in plan.grouping.spans]


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
@pytest.mark.parametrize("boundaries", [(), (1,), (1, 2)], ids=str)
@pytest.mark.parametrize("cuts", [(), (0, 6), (0, 1, 2, 3, 4, 5, 6)], ids=["empty", "whole", "micro-batches"])
def test_every_group_gets_the_noise_of_the_sensitivity(
    cuts: tuple[int, ...], boundaries: tuple[int, ...], tied: bool
) -> None:
    """Kolmogorov-Smirnov against N(0, (sigma sensitivity / expected batch)^2), group by group."""
    plan = plan_for(language_model(tied), boundaries, allocation="dimension")
    if boundaries == (1, 2) and tied:  # the table is in groups 0 and 2: they add up before they are squared
        first, second, third = plan.thresholds
        assert plan.sensitivity == pytest.approx(math.hypot(first + third, second))
    seen = noises(plan, 3, tied, cuts)
    for names in groups_of(plan):
        sample = torch.cat([step[name].flatten() for step in seen for name in sorted(names)]).double()
        scaled = (sample * EXPECTED / (SIGMA * plan.sensitivity)).numpy()
        assert len(scaled) > 4000
        assert kstest(scaled, "norm").pvalue > 1e-3
        assert abs(scaled.std() - 1) < 4 / math.sqrt(2 * len(scaled))


@pytest.mark.parametrize("boundaries", [(1, 2)], ids=str)
def test_noise_divided_among_groups_keeps_its_word(boundaries: tuple[int, ...]) -> None:
    plan = plan_for(language_model(False), boundaries, allocation=(0.2, 0.5, 0.9), noise_allocation="equal")
    assert len({round(scale, 9) for scale in plan.noise_scales.values()}) == 3
    seen = noises(plan, 2, tied=False)
    for name, scale in plan.noise_scales.items():
        sample = torch.cat([step[name].flatten() for step in seen]).double() * EXPECTED / (SIGMA * scale)
        assert kstest(sample.numpy(), "norm").pvalue > 1e-3


def test_steps_groups_and_parameters_are_independent() -> None:
    """Every pair of draws, at every small shift: correlations no larger than chance allows."""
    seen = noises(plan_for(language_model(False), (1, 2)), 4, tied=False, cuts=(0, 2, 6))
    draws = {(number, name): value.flatten() for number, step in enumerate(seen) for name, value in step.items()}
    assert len(draws) == 16
    for (one, a), (other, b) in combinations(draws.items(), 2):
        size = min(len(a), len(b))
        for shift in (0, 1, 7):
            x, y = a[: size - shift], b[shift:size]
            bound = 4.5 / math.sqrt(size - shift)
            assert abs(float(torch.corrcoef(torch.stack([x, y]))[0, 1])) < bound, (one, other, shift)
        assert len(torch.cat([a, b]).unique()) > 0.98 * (len(a) + len(b)), "numbers come back"


def test_the_seed_decides_the_noise() -> None:
    plan = plan_for(language_model(), (1,))
    one, same, other = (noises(plan, 2, seed=seed) for seed in (5, 5, 6))
    for number in range(2):
        for name, value in one[number].items():
            assert torch.equal(value, same[number][name])
            assert not torch.equal(value, other[number][name])


SCRIPT = """
import json, torch
from torch import nn
from groupsearch.plan.clipping import ClipPlan
from groupsearch.engine import make_private
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer.sites import observe_sites
torch.manual_seed(0)
model = nn.Linear(4, 3)
batch = {"x": torch.randn(3, 4)}
sites = tuple(observe_sites(model, batch, lambda m, b: m(b["x"]).sum(1)))
found = []
for generator in (None, torch.Generator().manual_seed(3)):
    torch.manual_seed(0)  # the same global seed in both processes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = make_private(model, optimizer, ClipPlan(Grouping((), sites)), noise_multiplier=1.0,
                          expected_batch_size=1, generator=generator)
    optimizer.step()
    found.append(model.weight.grad.flatten().tolist())
    engine.detach()
    optimizer.zero_grad()
print(json.dumps(found))
"""


def test_processes_without_a_seed_draw_differently_and_with_one_alike() -> None:
    running = [
        subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, env=_environment())
        for _ in range(2)
    ]
    (free, seeded_one), (other, seeded_other) = (json.loads(p.communicate(timeout=120)[0]) for p in running)
    assert not set(free) & set(other)
    assert seeded_one == seeded_other
    assert not set(free) & set(seeded_one)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_get_noise_that_was_fine_until_the_end(dtype: torch.dtype) -> None:
    """Rounded once, after division: equal to float32 noise rounded, and not a multiple of any coarse step."""
    single, half = _empty_step(torch.float32), _empty_step(dtype)
    for name, value in single.items():
        assert half[name].dtype == dtype
        assert torch.equal(half[name], value.to(dtype)), name
    drawn = torch.cat([value.flatten() for value in half.values()]).float()
    scaled = drawn.double() * EXPECTED / (SIGMA * 0.8)
    assert kstest(scaled.numpy(), "norm").pvalue > 1e-3
    near_zero = scaled[scaled.abs() < 0.02]
    assert len(near_zero.unique()) > 0.7 * len(near_zero), "half precision has its finest numbers near zero"


def _empty_step(dtype: torch.dtype) -> dict[str, Tensor]:
    model = language_model(dtype=dtype)
    plan = plan_for(language_model(), ())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    make_private(
        model,
        optimizer,
        plan,
        noise_multiplier=SIGMA,
        expected_batch_size=EXPECTED,
        generator=torch.Generator().manual_seed(11),
    )
    optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trained(dropout: float = 0.0, rate: float = 0.2, physical: int | None = None, seed: int = 0) -> list[Tensor]:
    """How far noise alone moves the weights: the loss is flat."""
    data = {"x": torch.randn(60, 4, generator=torch.Generator().manual_seed(0))}
    models: list[nn.Module] = []
    start = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 2)))

    def build(_seed: int = 0) -> nn.Module:
        models.append(start(0))
        return models[-1]

    made = Workload(
        name="flat",
        build=build,
        make_batch=lambda size: {"x": data["x"][:size]},
        loss=flat_loss,
        data=Data(data, data),
        batch_size=4,
        training=TrainingDefaults(steps=3, learning_rate=0.1),
    )
    settings = TrainSettings(3, 0.1 * rate, "sgd", rate, noise_multiplier=1.0, physical_batch=physical, seed=seed)
    sites = tuple(observe_sites(start(0), {"x": data["x"][:4]}, flat_loss))
    train(made, Grouping((1,), sites), settings)
    return [p.detach() - q.detach() for p, q in zip(models[0].parameters(), start(0).parameters(), strict=True)]


def flat_loss(model: nn.Module, batch: Batch) -> Tensor:
    return 1e-9 * model(batch["x"]).sum(1)  # noise alone, all but


@pytest.mark.parametrize("change", [{"dropout": 0.5}, {"rate": 0.05}, {"rate": 0.8}, {"physical": 3}], ids=str)
def test_noise_in_training_is_independent_of_sampling_and_dropout(change: dict[str, float]) -> None:
    """Drawing more or less for batches and dropout moves no noise; the learning rate makes up for the rate."""
    moved, same = trained(**change), trained()  # type: ignore[arg-type]
    for a, b in zip(moved, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert b.abs().max() > 1e-4
    assert all(not torch.allclose(a, b) for a, b in zip(trained(seed=1), same, strict=True))
