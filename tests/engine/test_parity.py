"""The engine's clipped sums against one-example-at-a-time autograd, for every case of the catalogue."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.errors import GroupSearchError
from groupsearch.options import NORM_METHODS, EngineOptions
from groupsearch.plan.clipping import RULES, ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import Site
from groupsearch.tracer.sites import observe_sites
from tests.support.cases import BATCH_SIZE, EXACT_OR_REFUSED, LAYER_CASES, Case, plain
from tests.support.reference import (
    SiteGradients,
    combine,
    group_norms,
    magnitudes,
    per_example_gradients,
    per_site_gradients,
    trainable,
)

DTYPES = (torch.float32, torch.float64)
DTYPES_AND_RULES = [(DTYPES[number % 2], RULES[number % 3]) for number in range(6)]
"""All products, of which any three in a row have every rule and both dtypes."""
METHODS = [(method,) for method in NORM_METHODS if method != "mixed"]
FLOOR = {torch.float32: 1e-1, torch.float64: 1e-4}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def by_name(
    cases: dict[str, Case],
    quick: int = 1,
    names: Sequence[str] = (),
    settings: Sequence[tuple[Any, ...]] = ((),),
    each: int | None = None,
) -> pytest.MarkDecorator:
    """One test per case and setting, of which all but every ``quick``-th case's are slow.

    Of its settings so many as ``each`` says are not, which go round from case to case: together the cases meet all.
    """
    marked = []
    for place, (name, case) in enumerate(cases.items()):
        turn = place // quick * (each or 0)
        for number, setting in enumerate(settings):
            now = place % quick == 0 and (each is None or (number - turn) % len(settings) < each)
            label = "-".join(map(str, (name, *setting)))
            marked.append(pytest.param(case, *setting, id=label, marks=() if now else pytest.mark.slow))
    return pytest.mark.parametrize(("case", *names), marked)


@cache
def sites_of(case: Case, dtype: torch.dtype = torch.float64, batch_size: int = BATCH_SIZE) -> tuple[Site, ...]:
    """The sites that the engine observes: once for all tests of a process, for it takes longer than their steps."""
    return tuple(observe_sites(case.model(dtype), case.batch(dtype, batch_size), case.loss))


@cache
def truth(case: Case, dtype: torch.dtype, batch_size: int = BATCH_SIZE) -> tuple[tuple[Site, ...], SiteGradients]:
    """The sites of the case, which are those of any dtype, and the reference's gradients at each of them."""
    sites = sites_of(case, batch_size=batch_size)
    return sites, per_site_gradients(plain(case.model(dtype)), case.batch(dtype, batch_size), case.loss, sites)


def groupings(case: Case, sites: Sequence[Site], split_whole: bool = False) -> dict[str, Grouping]:
    """All-layer, layer-wise, and three random groupings that are the same in every run.

    Cuts between sites that the reference cannot tell apart are made only with ``split_whole``.
    """
    whole = () if split_whole else case.whole
    spans = [[i for i, site in enumerate(sites) if name in site.parameters] for name in whole]
    cuts = [b for b in range(1, len(sites)) if not any(span[0] < b <= span[-1] for span in spans)]
    chosen = {"all-layer": (), "layer-wise": tuple(b for b in cuts if sites[b].layer != sites[b - 1].layer)}
    for number in range(3):
        draw = random.Random(case.seed + number)
        chosen[f"random {number}"] = tuple(sorted(draw.sample(cuts, draw.randint(min(1, len(cuts)), len(cuts)))))
    return {name: Grouping(tuple(boundaries), tuple(sites)) for name, boundaries in chosen.items()}


def typical_norm(gradients: SiteGradients) -> float:
    """A threshold that some examples exceed and others do not: the median norm of whole gradients."""
    totals = [sum(float(g.double().square().sum()) for g in example.values()) ** 0.5 for example in gradients]
    return max(float(torch.tensor(totals).median()), 1e-3)


def step(
    case: Case,
    dtype: torch.dtype,
    plan: ClipPlan,
    batch_size: int = BATCH_SIZE,
    norm_method: str = "mixed",
    batch: dict[str, Tensor] | None = None,
) -> tuple[PrivateEngine, dict[str, Tensor]]:
    """One forward and backward pass of the engine, without noise; the engine and its clipped sums."""
    model, batch = case.model(dtype), batch or case.batch(dtype, batch_size)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    engine = make_private(
        model,
        optimizer,
        plan,
        noise_multiplier=0.0,
        expected_batch_size=batch_size,
        options=EngineOptions(norm_method=norm_method),
    )
    case.loss(model, batch).mean().backward()
    return engine, engine.clipped_sums()


def assert_agree(
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    tolerance: float,
    magnitudes_: dict[str, float] | None = None,
) -> None:
    """Every parameter's largest difference is within the tolerance of its largest number.

    Where examples cancel in the sum, the largest number that any of them added counts instead
    (``magnitudes_``); where a gradient is zero but for rounding (an attention key's bias), a
    part of the largest number of all parameters.
    """
    assert set(found) == set(expected)
    overall = max(float(e.abs().max()) for e in expected.values())
    for name, truth_ in expected.items():
        assert found[name].shape == truth_.shape, name
        floor = FLOOR[truth_.dtype] * overall
        scale = max(float(truth_.abs().max()), (magnitudes_ or {}).get(name, 0.0), floor)
        error = float((found[name] - truth_).abs().max())
        assert error <= tolerance * scale, f"{name}: error {error:.2e} at {scale:.2e}, over {tolerance:.0e}"


def assert_case_agrees(
    case: Case, found: dict[str, Tensor], gradients: SiteGradients, plan: ClipPlan, dtype: torch.dtype = torch.float64
) -> None:
    """The clipped sums are those of the reference, within the case's tolerance."""
    assert_agree(found, combine(gradients, plan), case.tolerance[dtype], magnitudes(gradients, plan))


def check_case(case: Case, dtype: torch.dtype, rule: str) -> None:
    """Clipped sums and norms of every grouping equal the reference's."""
    sites, gradients = truth(case, dtype)
    for name, grouping in groupings(case, sites).items():
        plan = ClipPlan(grouping, max_grad_norm=typical_norm(gradients), rule=rule)
        engine, sums = step(case, dtype, plan)
        try:
            assert_case_agrees(case, sums, gradients, plan, dtype)
            expected = group_norms(gradients, plan)
            assert engine.norms.shape == expected.shape
            allowed = 10 * case.tolerance[dtype]
            torch.testing.assert_close(
                engine.norms.double(), expected, rtol=allowed, atol=allowed * float(expected.max())
            )
        except AssertionError as error:
            raise AssertionError(f"{name} {grouping}: {error}") from error


def check_sensitivity(case: Case) -> None:
    """The clipped sum of one example is never longer than R_m in a group, or than the sensitivity in all."""
    sites, gradients = truth(case, torch.float64, 1)
    for grouping in groupings(case, sites, split_whole=True).values():
        plan = ClipPlan(grouping, max_grad_norm=0.3 * typical_norm(gradients))
        _, sums = step(case, torch.float64, plan, batch_size=1)
        assert _length(sums, sums) <= plan.sensitivity * (1 + 1e-6)
        users = {name: {grouping.group_of(i) for i, s in enumerate(sites) if name in s.parameters} for name in sums}
        for group, threshold in enumerate(plan.thresholds):
            alone = [name for name, groups in users.items() if groups == {group}]
            assert _length(sums, alone) <= threshold * (1 + 1e-6)


def _length(sums: dict[str, Tensor], names: Iterable[str]) -> float:
    return sum(float(sums[name].square().sum()) for name in names) ** 0.5


@by_name(LAYER_CASES, names=("dtype", "rule"), settings=DTYPES_AND_RULES, each=3)
def test_clipped_sums_equal_the_reference(case: Case, dtype: torch.dtype, rule: str) -> None:
    check_case(case, dtype, rule)


@by_name(LAYER_CASES, names=["method"], settings=METHODS)
def test_norm_methods_change_nothing(case: Case, method: str) -> None:
    sites, gradients = truth(case, torch.float64)
    for grouping in list(groupings(case, sites).values())[:3]:
        plan = ClipPlan(grouping, max_grad_norm=typical_norm(gradients))
        _, sums = step(case, torch.float64, plan, norm_method=method)
        assert_case_agrees(case, sums, gradients, plan)


@by_name(LAYER_CASES)
def test_one_example_moves_the_sum_by_no_more_than_the_sensitivity(case: Case) -> None:
    check_sensitivity(case)


@by_name(LAYER_CASES)
def test_a_batch_of_one_equals_the_reference(case: Case) -> None:
    sites, gradients = truth(case, torch.float64, 1)
    for grouping in groupings(case, sites).values():
        plan = ClipPlan(grouping, max_grad_norm=0.3 * typical_norm(gradients))
        _, sums = step(case, torch.float64, plan, batch_size=1)
        assert_case_agrees(case, sums, gradients, plan)


@by_name(LAYER_CASES, quick=2, names=("size", "dtype"), settings=[*product((1, 3), DTYPES)], each=1)
def test_sites_do_not_depend_on_the_batch_size_or_the_dtype(case: Case, size: int, dtype: torch.dtype) -> None:
    assert sites_of(case, dtype, size) == sites_of(case)


@by_name(
    {name: LAYER_CASES[name] for name in ("linear-3d", "conv2d-groups", "embedding-padding", "tied-embedding-head")}
)
@pytest.mark.parametrize("allocation", ["uniform", "dimension", "given"])
def test_thresholds_follow_the_allocation(case: Case, allocation: str) -> None:
    sites, gradients = truth(case, torch.float64)
    grouping = Grouping(tuple(range(1, len(sites))), sites)
    given = [0.1 * (m + 1) for m in range(len(sites))]
    plan = ClipPlan(grouping, max_grad_norm=0.5, allocation=given if allocation == "given" else allocation)
    _, sums = step(case, torch.float64, plan)
    assert_case_agrees(case, sums, gradients, plan)


@pytest.mark.parametrize("rule", RULES)
def test_an_example_without_gradient_adds_nothing(rule: str) -> None:
    case = LAYER_CASES["linear-3d"]
    model, batch = case.model(), case.batch()
    batch["scale"][1] = 0.0
    sites = tuple(observe_sites(model, batch, case.loss))
    plan = ClipPlan(Grouping((1,), sites), rule=rule)
    engine = make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        plan,
        noise_multiplier=0.0,
        expected_batch_size=BATCH_SIZE,
    )
    case.loss(model, batch).mean().backward()
    gradients = per_site_gradients(case.model(), batch, case.loss, sites)
    assert_case_agrees(case, engine.clipped_sums(), gradients, plan)


@by_name(EXACT_OR_REFUSED)
def test_what_no_rule_covers_is_exact_or_refused(case: Case) -> None:
    """Never a wrong sum in silence: a parameter used in a way the engine cannot follow is named in a refusal."""
    expected = per_example_gradients(plain(case.model()), case.batch(), case.loss)
    norms = [sum(float(g.square().sum()) for g in example.values()) ** 0.5 for example in expected]
    threshold = sorted(norms)[1]
    sums = {
        name: sum(example[name] * min(1.0, threshold / norm) for example, norm in zip(expected, norms, strict=True))
        for name in expected[0]
    }
    try:
        sites = tuple(observe_sites(case.model(), case.batch(), case.loss))
        _, found = step(case, torch.float64, ClipPlan(Grouping((), sites), max_grad_norm=threshold))
    except GroupSearchError:
        return
    assert_agree(found, sums, case.tolerance[torch.float64])
