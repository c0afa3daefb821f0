"""Grams against brute force: random per-example gradients of made-up sites, clipped one example at a time."""

from __future__ import annotations

import math
import random
from itertools import product

import numpy as np
import pytest
import torch

from groupsearch.errors import GroupSearchError
from groupsearch.gram import Grams, sharing_pairs
from groupsearch.plan.clipping import RULES, AdaptiveQuantile, ClipPlan, clip_factors
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import Site
from tests.support.reference import SiteGradients, clip_factor, combine

SIZES = {"a": 3, "b": 2, "c": 5, "d": 1, "e": 4}
PLAIN = (("a",), ("b", "c"), ("d",), ("e",))
SHARED = (("a",), ("b", "c"), ("a", "d"), ("c",), ("e",), ("a",))


def make_sites(parameters: tuple[tuple[str, ...], ...]) -> tuple[Site, ...]:
    return tuple(
        Site(f"s{i}", f"s{i}", "b", "linear", "ghost", 1, 1, 1, names, sum(SIZES[n] for n in names))
        for i, names in enumerate(parameters)
    )


def random_gradients(sites: tuple[Site, ...], examples: int, seed: int) -> SiteGradients:
    """Gradients with a mean, whose size differs from site to site and from example to example."""
    draw = torch.Generator().manual_seed(seed)
    keys = [(i, name) for i, site in enumerate(sites) for name in site.parameters]
    means = {key: torch.randn(SIZES[key[1]], generator=draw, dtype=torch.float64) for key in keys}
    result = []
    for _ in range(examples):
        size = float(torch.rand((), generator=draw)) * 3
        noise = {k: torch.randn(SIZES[k[1]], generator=draw, dtype=torch.float64) for k in keys}
        result.append({k: size * 2.0 ** (k[0] - 2) * (means[k] + noise[k]) for k in keys})
    return result


def gram_of(one: SiteGradients, early: int, late: int) -> np.ndarray:
    result = np.zeros((len(one), len(one)))
    for i, j in product(range(len(one)), repeat=2):
        shared = [n for (site, n) in one[i] if site == early and (late, n) in one[j]]
        result[i, j] = sum(float(one[i][early, n] @ one[j][late, n]) for n in shared)
    return result


def grams_of(sites: tuple[Site, ...], batches: list[SiteGradients], steps: tuple[int, ...] | None = None) -> Grams:
    pairs, size = sharing_pairs(sites), len(batches[0])
    crosses = [[gram_of(batch, *pair) for pair in pairs] for batch in batches]
    return Grams(
        sites,
        {name: SIZES[name] for site in sites for name in site.parameters},
        steps or (0,) * len(batches),
        np.array([[gram_of(batch, site, site) for site in range(len(sites))] for batch in batches]),
        pairs,
        np.array(crosses).reshape(len(batches), len(pairs), size, size),
    )


def inner(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name] * other[name]).sum()) for name in one)


def unclipped(gradients: SiteGradients) -> dict[str, torch.Tensor]:
    sums: dict[str, torch.Tensor] = {}
    for example in gradients:
        for (_, name), gradient in example.items():
            sums[name] = sums.get(name, torch.zeros(())) + gradient
    return sums


def random_plans(sites: tuple[Site, ...], rule: str, count: int) -> list[ClipPlan]:
    draw = random.Random(rule)
    plans = []
    for number in range(count):
        cuts = tuple(b for b in range(1, len(sites)) if draw.random() < (0, 0.3, 0.6, 1)[number % 4])
        thresholds = [draw.uniform(0.1, 5) for _ in range(len(cuts) + 1)]
        allocation = ("uniform", "dimension", thresholds)[number % 3]
        plans.append(ClipPlan(Grouping(cuts, sites), draw.uniform(0.1, 10), rule, allocation))
    return plans


@pytest.mark.parametrize("parameters", [PLAIN, SHARED], ids=["plain", "shared"])
@pytest.mark.parametrize("rule", RULES)
def test_moments_equal_brute_force(parameters: tuple[tuple[str, ...], ...], rule: str) -> None:
    sites = make_sites(parameters)
    batches = [random_gradients(sites, 5, seed) for seed in (0, 1)]
    grams = grams_of(sites, batches)
    for plan in random_plans(sites, rule, 12):
        found = grams.moments(plan)
        for number, batch in enumerate(batches):
            clipped, whole = combine(batch, plan), unclipped(batch)
            alone = [(combine([example], plan), unclipped([example])) for example in batch]
            expected = {
                "gradient": inner(whole, whole),
                "inner": inner(clipped, whole),
                "clipped": inner(clipped, clipped),
                "own_gradient": sum(inner(g, g) for _, g in alone),
                "own_inner": sum(inner(c, g) for c, g in alone),
                "own_clipped": sum(inner(c, c) for c, _ in alone),
            }
            assert {name: getattr(found, name)[number] for name in expected} == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("parameters", [PLAIN, SHARED], ids=["plain", "shared"])
def test_expectations_are_those_of_the_population(parameters: tuple[tuple[str, ...], ...]) -> None:
    """Over all samples of three from a population, drawn with replacement, the estimates average to the truth."""
    sites = make_sites(parameters)
    population = random_gradients(sites, 4, 7)
    samples = [[population[i] for i in chosen] for chosen in product(range(4), repeat=3)]
    grams = grams_of(sites, samples)
    for plan in random_plans(sites, "auto-s", 4):
        found = grams.expectations(plan)
        clipped, whole = combine(population, plan), unclipped(population)
        assert found.gradient == pytest.approx(inner(whole, whole) / 16)
        assert found.inner == pytest.approx(inner(clipped, whole) / 16)
        assert found.clipped == pytest.approx(inner(clipped, clipped) / 16)
        alone = [combine([example], plan) for example in population]
        assert found.own_clipped == pytest.approx(sum(inner(c, c) for c in alone) / 4)


def test_batches_are_averaged_within_an_instant_only() -> None:
    sites = make_sites(PLAIN)
    batches = [random_gradients(sites, 4, seed) for seed in range(3)]
    together, plan = grams_of(sites, batches, (0, 0, 9)), ClipPlan(Grouping((2,), sites))
    first = grams_of(sites, batches[:2]).expectations(plan).inner
    last = grams_of(sites, batches[2:]).expectations(plan).inner
    assert together.expectations(plan).inner == pytest.approx([*first, *last])
    parts = [grams_of(sites, part) for part in (batches[:2], batches[2:])]
    values = [part.score_plan(plan, 1.0, 8.0).value for part in parts]
    norms = [math.sqrt(part.expectations(plan).gradient[0]) for part in parts]
    expected = sum(v * n for v, n in zip(values, norms, strict=True)) / sum(norms)
    assert together.score_plan(plan, 1.0, 8.0).value == pytest.approx(expected)


def test_an_instant_without_a_direction_counts_nothing() -> None:
    sites = make_sites((("a",),))
    ones = torch.ones(3, dtype=torch.float64)
    steady, opposite = [{(0, "a"): ones}] * 2, [{(0, "a"): ones}, {(0, "a"): -ones}]
    plan = ClipPlan(Grouping((), sites))
    alone, both = grams_of(sites, [steady]), grams_of(sites, [steady, opposite], (0, 1))
    assert both.score_plan(plan, 1.0, 8.0).value == alone.score_plan(plan, 1.0, 8.0).value > 0


@pytest.mark.parametrize("parameters", [PLAIN, SHARED], ids=["plain", "shared"])
@pytest.mark.parametrize("noise_allocation", ["global", "equal"])
def test_scores_are_what_they_say(parameters: tuple[tuple[str, ...], ...], noise_allocation: str) -> None:
    sites = make_sites(parameters)
    grams = grams_of(sites, [random_gradients(sites, 12, 3)])
    plan = ClipPlan(Grouping((1, 3), sites), 2.0, "auto-s", "dimension", noise_allocation)
    mean = grams.expectations(plan)
    scales = plan.noise_scales
    if noise_allocation == "global":
        scales = dict.fromkeys(scales, plan.sensitivity)
    noise = sum((1.5 * scale / 20) ** 2 * SIZES[name] for name, scale in scales.items())
    variance = mean.own_clipped[0] / 20 + noise
    found = grams.score(
        (1, 3),
        allocation="dimension",
        max_grad_norm=2.0,
        noise_allocation=noise_allocation,
        noise_multiplier=1.5,
        expected_batch_size=20.0,
    )
    gradient, product_, clipped = mean.gradient[0], mean.inner[0], mean.clipped[0]
    assert min(gradient, clipped) > 0
    assert found.cosine == pytest.approx(product_ / math.sqrt(gradient * clipped))
    assert found.norm_kept == pytest.approx(math.sqrt(clipped / gradient))
    assert found.snr == pytest.approx(clipped / variance)
    assert found.value == pytest.approx(product_ / math.sqrt(gradient * (clipped + variance)))


def test_without_clipping_nothing_is_turned_or_lost() -> None:
    sites = make_sites(SHARED)
    grams = grams_of(sites, [random_gradients(sites, 12, 3)])
    found = grams.score((2, 4), rule="abadi", max_grad_norm=1e9, noise_multiplier=0.0, expected_batch_size=1e15)
    assert (found.cosine, found.norm_kept, found.value) == pytest.approx((1.0, 1.0, 1.0))


def test_more_noise_lowers_the_value_and_larger_batches_raise_it() -> None:
    sites = make_sites(SHARED)
    grams = grams_of(sites, [random_gradients(sites, 12, 3)])

    def value(sigma: float, size: float) -> float:
        return grams.score((2,), noise_multiplier=sigma, expected_batch_size=size).value

    assert value(0.0, 8.0) > value(1.0, 8.0) > value(2.0, 8.0) > 0
    assert value(1.0, 4.0) < value(1.0, 8.0)


def test_gradients_without_a_direction_score_nothing() -> None:
    sites = make_sites((("a",),))
    opposite = {(0, "a"): torch.ones(3, dtype=torch.float64)}, {(0, "a"): -torch.ones(3, dtype=torch.float64)}
    zero = [{(0, "a"): torch.zeros(3, dtype=torch.float64)}] * 2
    for batch in (list(opposite), zero):
        found = grams_of(sites, [batch]).score((), noise_multiplier=0.0, expected_batch_size=4.0)
        assert (found.value, found.cosine, found.norm_kept, found.snr) == (0, 0, 0, 0)


@pytest.mark.parametrize("rule", RULES)
def test_clip_factors_are_those_of_the_rule_for_arrays_and_tensors(rule: str) -> None:
    norms = [0.0, 1e-300, 1e-16, 1e-15, 2e-15, 0.3, 0.7, 1.0, 50.0, math.inf]
    expected = [0.0 if rule == "auto-v" and norm <= 1e-15 else clip_factor(rule, norm, 0.7) for norm in norms]
    found = clip_factors(rule, np.array(norms), np.array(0.7), np.where)
    np.testing.assert_allclose(found, expected, rtol=1e-15)
    tensor = clip_factors(rule, torch.tensor(norms, dtype=torch.float64), 0.7, torch.where)
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-15)


def test_a_norm_that_is_no_number_is_no_factor_to_rely_on() -> None:
    for rule in RULES:
        factor = clip_factors(rule, torch.tensor([math.nan]), 0.7, torch.where)
        assert rule == "auto-v" or factor.isnan().all()


def test_a_quiet_group_beside_a_loud_one_keeps_its_digits() -> None:
    sites = make_sites((("a",), ("b",)))
    batch = [
        {(0, "a"): torch.full((3,), 1e6 * i, dtype=torch.float64), (1, "b"): torch.full((2,), 1e-6 * i).double()}
        for i in (1.0, 2.0)
    ]
    plan = ClipPlan(Grouping((1,), sites), rule="auto-v")
    found = grams_of(sites, [batch]).moments(plan).clipped[0]
    assert found == pytest.approx(4.0, rel=1e-9)  # both groups at their threshold in both examples


def test_incomplete_grams_are_refused() -> None:
    sites = make_sites(SHARED)
    good = grams_of(sites, [random_gradients(sites, 3, 0)])
    with pytest.raises(GroupSearchError, match="each pair of sites that share a parameter"):
        Grams(sites, SIZES, (0,), good.grams, (), good.crosses[:, :0])
    with pytest.raises(GroupSearchError, match="at least two examples"):
        Grams(sites, SIZES, (0,), good.grams[..., :1, :1], good.pairs, good.crosses[..., :1, :1])
    with pytest.raises(GroupSearchError, match="at least two examples"):
        Grams(sites, SIZES, (0, 1), good.grams, good.pairs, good.crosses)
    with pytest.raises(GroupSearchError, match="a size for each parameter"):
        Grams(sites, {"a": 3}, (0,), good.grams, good.pairs, good.crosses)
    infinite = good.grams.copy()
    infinite[0, 0, 0, 0] = math.inf
    with pytest.raises(GroupSearchError, match="finite gradients"):
        Grams(sites, SIZES, (0,), infinite, good.pairs, good.crosses)


def test_plans_that_cannot_be_scored_are_refused() -> None:
    sites = make_sites(PLAIN)
    grams = grams_of(sites, [random_gradients(sites, 3, 0)])
    with pytest.raises(GroupSearchError, match="fixed thresholds"):
        grams.moments(ClipPlan(Grouping((), sites), allocation=AdaptiveQuantile()))
    with pytest.raises(GroupSearchError, match="of the sites that the Grams"):
        grams.moments(ClipPlan(Grouping((), make_sites(SHARED))))
    for sigma, size in ((-1.0, 8.0), (math.nan, 8.0), (1.0, 0.0)):
        with pytest.raises(GroupSearchError, match="noise_multiplier >= 0"):
            grams.score((), noise_multiplier=sigma, expected_batch_size=size)
