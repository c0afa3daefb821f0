"""Models of transformers, built from configuration and left as they are, against the reference."""

from __future__ import annotations

import pytest
import torch

from groupsearch.clipping import RULES, ClipPlan
from groupsearch.options import NORM_METHODS
from groupsearch.tracer.sites import observe_sites
from tests.cases import MODEL_CASES, Case
from tests.engine.test_parity import (
    DTYPES,
    assert_case_agrees,
    by_name,
    check_case,
    check_sensitivity,
    groupings,
    step,
    truth,
    typical_norm,
)
from tests.reference import trainable


@by_name(MODEL_CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_clipped_sums_equal_the_reference(case: Case, dtype: torch.dtype, rule: str) -> None:
    check_case(case, dtype, rule)


@by_name(MODEL_CASES)
@pytest.mark.parametrize("method", NORM_METHODS)
def test_norm_methods_change_nothing(case: Case, method: str) -> None:
    sites, gradients = truth(case, torch.float64)
    for name in ("all-layer", "random 0"):
        plan = ClipPlan(groupings(case, sites)[name], max_grad_norm=typical_norm(gradients))
        _, sums = step(case, torch.float64, plan, norm_method=method)
        assert_case_agrees(case, sums, gradients, plan)


@by_name(MODEL_CASES)
def test_one_example_moves_the_sum_by_no_more_than_the_sensitivity(case: Case) -> None:
    check_sensitivity(case)


@by_name(MODEL_CASES)
def test_every_trainable_parameter_has_a_site(case: Case) -> None:
    model = case.model()
    sites = observe_sites(model, case.batch(), case.loss)
    assert {name for site in sites for name in site.parameters} == set(trainable(model))
    assert len({site.name for site in sites}) == len(sites)


def test_a_tied_head_is_a_second_site_of_the_embedding() -> None:
    case = MODEL_CASES["gpt2"]
    users = [
        site.layer
        for site in observe_sites(case.model(), case.batch(), case.loss)
        if "transformer.wte.weight" in site.parameters
    ]
    assert sorted(users) == ["lm_head", "transformer.wte"]
