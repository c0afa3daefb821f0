"""Every method against its recursion in NumPy; what is promised of it, seen; and what a worker's privacy costs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from groupsearch import ClipPlan, Grouping, GroupSearchError, trace_model
from groupsearch.distributed.clip21 import METHODS, Crew, Setup, groups_of, message, noise_of, simulate, spent
from groupsearch.privacy.accounting import noise_multiplier_for
from tests.distributed import recursion
from tests.distributed.recursion import GROUPS, quadratics

CONSTANTS = {"worker_momentum": 0.3, "server_momentum": 0.7, "alpha": 0.05}
START = np.full(5, 2.0)


def functions(problem: list[tuple[np.ndarray, np.ndarray]]) -> list:
    pairs = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in problem]
    return [lambda x, a=a, b=b: a @ (x - b) for a, b in pairs]


@pytest.mark.parametrize("sizes", [(), GROUPS], ids=["whole", "groups"])
@pytest.mark.parametrize(
    ("method", "noise"),
    [(m, noise) for m, traits in METHODS.items() for noise in (0.0, 0.5) if noise or not traits.noisy],
)
def test_every_method_is_its_recursion(method: str, noise: float, sizes: tuple[int, ...]) -> None:
    problem, thresholds = quadratics(4, 5), (0.4, 0.2) if sizes else (0.4,)
    drawn = [noise_of(7, i) for i in range(4)]
    table = torch.stack(
        [torch.stack([torch.randn(5, generator=g, dtype=torch.float64) for g in drawn]) for _ in range(60)]
    )
    scale = noise * math.sqrt(sum(r * r for r in thresholds))
    expected = recursion.run(
        method,
        [lambda x, a=a, b=b: a @ (x - b) for a, b in problem],
        START,
        steps=60,
        gamma=0.1,
        thresholds=thresholds,
        sizes=sizes or (5,),
        noise=lambda k, i: scale * table[k, i].numpy(),
        beta1=0.3,
        beta2=0.7,
        alpha=0.05,
    )
    found = simulate(
        method,
        functions(problem),
        torch.from_numpy(START),
        steps=60,
        step_size=0.1,
        threshold=thresholds,
        noise_multiplier=noise,
        seed=7,
        sizes=sizes,
        **CONSTANTS,
    )
    assert found.points.shape == (61, 5)
    assert np.abs(found.points.numpy() - np.stack(expected)).max() < 1e-10


def test_several_settings_at_once_are_each_alone() -> None:
    problem = functions(quadratics(3, 5))
    bounds, gammas = [0.1, 1.0, 10.0], [0.3, 0.1, 0.05]
    setup = Setup("dp-clip21-gd", 1.0, noise_multiplier=0.2)
    start = torch.from_numpy(START)
    thresholds = torch.tensor(bounds, dtype=torch.float64)[:, None, None]
    crew = Crew(setup, start.repeat(3, 1), 3, torch.tensor(gammas, dtype=torch.float64)[:, None], thresholds, seed=3)
    for _ in range(40):
        crew.step(torch.stack([torch.stack([each(x) for each in problem]) for x in crew.points]))
    for k in range(3):
        alone = simulate(
            "dp-clip21-gd",
            problem,
            start,
            steps=40,
            step_size=gammas[k],
            threshold=bounds[k],
            noise_multiplier=0.2,
            seed=3,
        )
        torch.testing.assert_close(crew.points[k], alone.points[-1], rtol=1e-12, atol=1e-12)


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=5, max_size=5),
    st.sampled_from(sorted(METHODS)),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(1e-6, 1e6),
)
def test_no_message_is_longer_than_its_bound(
    numbers: list[float], method: str, dtype: torch.dtype, bound: float
) -> None:
    setup = Setup(method, (bound, 2 * bound), GROUPS, noise_multiplier=1.0)
    gradient = torch.tensor(numbers, dtype=dtype)
    state = setup.state(5, like=gradient)
    for _ in range(3):
        sent, _ = message(setup, state, gradient)
        assert sent.isfinite().all()
        for part, most in zip(sent.double().split(GROUPS), setup.thresholds, strict=True):
            assert part.norm() <= torch.tensor(most, dtype=dtype).double()
        assert all(each.isfinite().all() for each in state.values())


# -- What is promised, seen on workers that do not agree


def test_clip_gd_stalls_where_clipped_gradients_cancel() -> None:
    # three workers, of which two pull gently one way and one hard the other: clipped they are as strong as each other
    crowd = [lambda x: x - 1.0, lambda x: x - 1.0, lambda x: x + 8.0]
    start = torch.full((1,), 1.5, dtype=torch.float64)
    found = simulate("clip-gd", crowd, start, steps=1500, step_size=0.05, threshold=0.1)
    norms = found.gradient_norms.numpy()
    fit = stats.linregress(np.log(np.arange(750, 1501)), np.log(norms[750:]))
    assert abs(fit.slope) < 1e-3
    assert norms[-1] > 1.5
    mended = simulate("clip21-gd", crowd, start, steps=1500, step_size=0.05, threshold=0.1)
    assert mended.gradient_norms[-1] < 1e-8
    assert mended.inactive_from is not None
    assert not mended.clipped[mended.inactive_from :].any()


def test_clipping_of_clip21_is_inactive_after_about_one_over_tau_steps() -> None:
    problem = quadratics(5, 5)
    matrices, centres = (torch.from_numpy(np.stack(each)) for each in zip(*problem, strict=True))
    bounds = torch.tensor([0.4, 0.2, 0.1, 0.05], dtype=torch.float64)
    crew = Crew(Setup("clip21-gd", 1.0), torch.from_numpy(START).repeat(4, 1), 5, 0.02, bounds[:, None, None])
    last = torch.zeros(4)
    for k in range(1500):
        differences = crew.points[:, None] - centres
        clipped = crew.step(torch.einsum("nij,snj->sni", matrices, differences)).any(dim=(-1, -2))
        last[clipped] = k + 1
    assert last.max() < 1500
    slope = stats.linregress(bounds.log(), last.log()).slope
    assert -1.5 < slope < -0.7


def test_clip21_gd_falls_as_one_over_k_where_gradient_descent_does() -> None:
    # x^4-like valleys: gradient descent itself is slower than any geometric rate there
    def valley(b: float):
        return lambda x: 4 * x**3 / (1 + x**2) + b

    workers = [valley(b) for b in (-3.0, 1.0, 2.0)]
    start = torch.full((4,), 3.0, dtype=torch.float64)
    found = simulate("clip21-gd", workers, start, steps=4000, step_size=0.05, threshold=0.2)
    squared = found.gradient_norms.numpy() ** 2
    means = np.cumsum(squared) / np.arange(1, len(squared) + 1)
    at = np.unique(np.geomspace(400, len(means), 60).astype(int)) - 1
    fit = stats.linregress(np.log(at + 1), np.log(means[at]))
    assert fit.slope == pytest.approx(-1.0, abs=0.05)


TRIANGLE = torch.tensor([[3.0, 0.0], [0.0, 4.0], [-3.0, -4.0]], dtype=torch.float64)
"""Noise of mean zero whose clipped messages have another mean."""


def _stochastic(method: str, gammas: list[float], **constants: float) -> Tensor:
    """The gradient norm at the mean point of the last half, of f = |x|^2 / 2 with that noise, for each step size."""
    steps, rows = 4000, torch.Generator().manual_seed(1)
    drawn = TRIANGLE[torch.randint(3, (steps, 10), generator=rows)]
    start = torch.ones(len(gammas), 2, dtype=torch.float64)
    crew = Crew(Setup(method, 0.05, **constants), start, 10, torch.tensor(gammas, dtype=torch.float64)[:, None])
    total = torch.zeros_like(start)
    for k in range(steps):
        crew.step(crew.points[:, None] + drawn[k])
        total += crew.points * (k >= steps // 2)
    return (total / (steps - steps // 2)).norm(dim=-1)


def test_clip21_fails_under_stochastic_gradients_at_any_step_size_and_momentum_cures_it() -> None:
    failed = _stochastic("clip21-sgd", [2e-2, 1e-2, 5e-3])
    cured = _stochastic("clip21-sgd2m", [1e-2], worker_momentum=0.01)

    assert failed.min() > 0.5
    assert failed.max() < 1.25 * failed.min()  # a smaller step does not help
    assert cured.max() < 0.1 * failed.min()


def test_the_noise_of_dp_clip21_adds_up_in_the_aggregate_and_momentum_keeps_it_small() -> None:
    setup = {"noise_multiplier": 1.0, "threshold": 0.1, "step_size": 3e-3, "steps": 2000}
    problem, start = functions(quadratics(4, 5)), torch.from_numpy(START)
    loud = simulate("dp-clip21-gd", problem, start, **setup).gradient_norms[-300:].mean()
    calm = simulate("dp-clip21-sgd2m", problem, start, server_momentum=0.05, worker_momentum=1.0, **setup)
    assert calm.gradient_norms[-300:].mean() < 0.5 * loud


# -- Groups by the project's plans


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))


def _loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def _grouping(model: torch.nn.Module) -> Grouping:
    batch = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)
    return Grouping.layer_wise(trace_model(model, batch, _loss))


@pytest.mark.parametrize(("allocation", "expected"), [("uniform", (0.5, 0.5)), ("dimension", (15 / 23, 8 / 23))])
def test_groups_and_thresholds_are_those_of_a_plan(allocation: str, expected: tuple[float, float]) -> None:
    model = _model()
    plan = ClipPlan(_grouping(model), 2.0, allocation=allocation)
    names, thresholds = groups_of(plan, {name: p.numel() for name, p in model.named_parameters()})
    assert [set(group) for group in names] == [{"0.weight", "0.bias"}, {"2.weight", "2.bias"}]
    assert thresholds == pytest.approx([2 * math.sqrt(share) for share in expected])
    assert Setup("clip21-gd", thresholds, (15, 8)).bound == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (lambda g: ClipPlan(g, rule="auto-s"), "rule abadi"),
        (lambda g: ClipPlan(dataclasses.replace(g, sites=(*g.sites[:1], g.sites[0]))), "one group"),
        (lambda g: ClipPlan(dataclasses.replace(g, boundaries=(), sites=g.sites[:1])), r"2\.bias, 2\.weight"),
    ],
)
def test_plans_that_cannot_be_followed_are_refused(plan, said: str) -> None:
    model = _model()
    with pytest.raises(GroupSearchError, match=said):
        groups_of(plan(_grouping(model)), {name: p.numel() for name, p in model.named_parameters()})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": "clip22"}, "clip21-gd"),
        ({"threshold": 0.0}, "thresholds > 0"),
        ({"threshold": (1.0, 1.0)}, "2 thresholds"),
        ({"sizes": (3, 2)}, "1 thresholds"),
        ({"noise_multiplier": -1.0}, "noise_multiplier >= 0"),
        ({"method": "dp-sgd"}, "protects nobody"),
        ({"worker_momentum": 0.0}, "worker_momentum"),
        ({"alpha": math.inf}, "alpha"),
    ],
)
def test_values_outside_their_range_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(GroupSearchError, match=said):
        Setup(**{"method": "clip21-gd", "threshold": 1.0} | wrong)


def test_groups_that_do_not_fit_the_point_and_no_workers_are_refused() -> None:
    with pytest.raises(GroupSearchError, match="5 coordinates"):
        simulate("clip-gd", [lambda x: x], torch.zeros(5), steps=1, step_size=1, threshold=(1.0, 1.0), sizes=(2, 2))
    with pytest.raises(GroupSearchError, match="0 and 1"):
        simulate("clip-gd", [], torch.zeros(5), steps=1, step_size=1, threshold=1.0)


# -- Privacy


def test_a_workers_epsilon_is_that_of_composed_gaussian_releases() -> None:
    steps, delta = 50, 1e-4
    sigma = 2 * noise_multiplier_for(8.0, delta, 1.0, steps)
    found = spent(Setup("dp-clip21-gd", 1.0, noise_multiplier=sigma), workers=100, steps=steps, delta=delta)
    assert found.of_messages == pytest.approx(8.0, rel=0.01)
    assert found.of_messages <= 8.0
    # the exact epsilon of a Gaussian mechanism of this mu, by its own definition of delta (arXiv 1905.02383, cor. 1)
    mu = math.sqrt(steps) / (sigma * 10 / 2)
    e, phi = found.of_weights, stats.norm.cdf
    assert phi(-e / mu + mu / 2) - math.exp(e) * phi(-e / mu - mu / 2) == pytest.approx(delta, rel=0.02)
    assert found.absent_of_weights < found.of_weights < found.absent_of_messages < found.of_messages
    assert "no amplification" in found.sentences[-1]
    loud = spent(Setup("dp-clip21-gd", 1.0, noise_multiplier=0.5), workers=100, steps=200, delta=delta)
    assert 200 / (2 * 0.25**2) < loud.of_messages < 3000, "a bound also where it protects nobody"
    assert spent(Setup("clip21-gd", 1.0), workers=2, steps=5, delta=delta).sentences[0].startswith("No privacy")


def test_one_workers_data_move_every_message_by_at_most_twice_the_bound_and_nobody_elses() -> None:
    """All of a worker's data replaced: its next message stays in the ball, and the others' do not change."""
    setup, rng = Setup("clip21-sgd2m", (0.3, 0.4), GROUPS), torch.Generator().manual_seed(0)
    like = torch.zeros(3, 5, dtype=torch.float64)
    one, two = (setup.state(3, 5, like=like) for _ in range(2))
    for _ in range(20):
        gradient = 5 * torch.randn(3, 5, generator=rng, dtype=torch.float64)
        other = gradient.clone()
        other[1] = -100 * torch.randn(5, generator=rng, dtype=torch.float64)
        moved = message(setup, one, gradient)[0] - message(setup, two, other)[0]
        assert moved[1].norm() <= 2 * setup.bound
        assert not moved[[0, 2]].any()


def test_the_memory_of_a_worker_is_what_its_state_takes() -> None:
    for method in METHODS:
        setup = Setup(method, 1.0, noise_multiplier=1.0)
        held = sum(each.nbytes for each in setup.state(100, like=torch.zeros(1)).values())
        aggregate = 400 if setup.traits.feedback else 0
        assert setup.state_bytes(100) == held + aggregate + 400
