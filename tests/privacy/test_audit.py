"""What an adversary can tell stays below the epsilon claimed, and is above it where the engine is broken."""

from __future__ import annotations

import math

import pytest
from scipy.stats import binom, norm

from groupsearch.plan.clipping import ClipPlan
from tests.privacy import broken
from tests.privacy.audit import CanaryAudit, many_uses, two_groups
from tests.privacy.bounds import (
    Claim,
    distinguishing_bound,
    family_bound,
    one_run_bound,
    one_run_p_value,
    rates,
)
from tests.privacy.one_run import audit_one_run
from tests.support.case import Case

ONE_STEP = Claim(noise_multiplier=1.0, sampling_rate=1.0, steps=1)
TWO_STEPS = Claim(noise_multiplier=2.5, sampling_rate=0.5, steps=2)


def test_white_box_audit_of_one_step_comes_close_to_the_claim() -> None:
    verdict = CanaryAudit(*two_groups(), ONE_STEP).run(500)
    assert 0 < verdict.lower <= verdict.claimed
    assert 0.6 * verdict.claimed <= verdict.lower_of_family <= verdict.claimed


@pytest.mark.parametrize("learning_rate", [0.0, 0.05])
def test_white_box_audit_of_sampled_steps_stays_below_the_claim(learning_rate: float) -> None:
    verdict = CanaryAudit(*two_groups(), Claim(0.7, 0.5, 3), learning_rate=learning_rate).run(100)
    assert verdict.lower <= verdict.claimed
    assert 0.1 * verdict.claimed <= verdict.lower_of_family <= verdict.claimed


def test_white_box_audit_of_a_reused_layer_stays_below_the_claim() -> None:
    verdict = CanaryAudit(*many_uses(8), ONE_STEP).run(150)
    assert verdict.lower <= verdict.claimed
    assert 0.3 * verdict.claimed <= verdict.lower_of_family <= verdict.claimed


BROKEN = {
    "noise missing in one group": (two_groups, broken.silent(["0.weight", "0.bias"])),
    "parameter unclipped": (two_groups, broken.unclipped("2.bias")),
    "tied term dropped": (many_uses, broken.tied_term_dropped),
    "noise drawn once for two steps": (two_groups, broken.noise_kept_for_two_steps),
    "noise from a known seed": (two_groups, broken.noise_from_a_known_seed),
    "noise used twice": (two_groups, broken.noise_used_twice),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_audit_catches_a_broken_engine(name: str) -> None:
    subject, damage = BROKEN[name]
    verdict = CanaryAudit(*subject(), TWO_STEPS, damage).run(80)
    assert verdict.lower > verdict.claimed


def test_damage_is_what_the_audit_sees() -> None:
    """The same runs of the same subject without the damage are no refutation."""
    verdict = CanaryAudit(*two_groups(), TWO_STEPS).run(80)
    assert verdict.lower <= verdict.claimed


@pytest.mark.parametrize("claim", [ONE_STEP, Claim(2.0, 0.5, 4)], ids=str)
def test_one_run_with_many_canaries(claim: Claim) -> None:
    for tables in (("a.weight", "b.weight"), ("a.weight",)):
        found = audit_one_run(claim, canaries=2000, guesses=200, tables=tables)
        assert found.lower <= found.claimed
        if claim == ONE_STEP and len(tables) == 2:
            assert found.lower >= 0.35 * found.claimed


@pytest.mark.parametrize(
    ("damage", "tables"),
    [
        (broken.silent(["a.weight"]), ("a.weight",)),
        (broken.unclipped("b.weight"), ("a.weight", "b.weight")),
    ],
    ids=["noise missing in one group", "parameter unclipped"],
)
def test_one_run_catches_a_broken_engine(damage: broken.Damage, tables: tuple[str, ...]) -> None:
    found = audit_one_run(Claim(2.0, 1.0, 1), 1000, 200, damage, tables)
    assert found.lower > found.claimed


def test_rates_are_clopper_pearson() -> None:
    for hits in (0, 1, 17, 60):
        least, most = rates(hits, hits, 60, 0.9)
        assert hits == 0 or binom.sf(hits - 1, 60, least) == pytest.approx(0.05)
        assert hits == 60 or binom.cdf(hits, 60, most) == pytest.approx(0.05)


def test_bounds_hold_with_their_confidence_on_a_gaussian() -> None:
    """Every outcome of 40 runs, weighted by its probability: one fixed threshold on a Gaussian of known epsilon."""
    claim, trials = Claim(1.0, 1.0, 1), 40
    hit, alarm = float(norm.sf(-0.5)), float(norm.sf(0.5))
    outcomes = [(h, a, binom.pmf(h, trials, hit) * binom.pmf(a, trials, alarm)) for h in range(41) for a in range(41)]
    wrong = sum(p for h, a, p in outcomes if distinguishing_bound(h, a, trials, claim.delta, 0.95) > claim.epsilon)
    assert wrong <= 0.05
    likely = [(h, a) for h, a, p in outcomes if p > 2e-3]
    found = {pair: family_bound(*pair, trials, claim, 0.95) for pair in likely[::7]}
    assert sum(bound > claim.epsilon for bound in found.values()) <= 0.05 * len(found)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 2.0])
def test_one_run_bound_is_right_about_randomised_response(epsilon: float) -> None:
    """Canaries answered by randomised response: guesses are right with e^eps / (1 + e^eps), nothing is tighter."""
    guesses, rate = 60, 1 / (1 + math.exp(-epsilon))
    bounds = [one_run_bound(guesses, correct, guesses, 0.0) for correct in range(guesses + 1)]
    assert bounds == sorted(bounds)
    wrong = sum(binom.pmf(c, guesses, rate) for c in range(guesses + 1) if bounds[c] > epsilon + 1e-6)
    assert 0.005 < wrong <= 0.05


def test_one_run_p_value_by_hand() -> None:
    # delta 0: a binomial tail; delta moves at most 2 m delta alpha of it, alpha = max_i P[v > W >= v - i] / i
    assert one_run_p_value(4, 4, 4, 0.0, 0.0) == pytest.approx(1 / 16)
    alpha = max(4 / 16, (4 + 6) / 16 / 2, (4 + 6 + 4) / 16 / 3, 15 / 16 / 4)
    assert one_run_p_value(4, 4, 4, 0.0, 1e-3) == pytest.approx(1 / 16 + alpha * 1e-3 * 2 * 4)


def test_a_subject_is_clipped_to_its_sensitivity() -> None:
    """The canary is as strong as the claim allows: its clipped gradient is as long as the sensitivity."""
    subjects: list[tuple[Case, ClipPlan]] = [two_groups(), many_uses(8)]
    for case, plan in subjects:
        audit = CanaryAudit(case, plan, ONE_STEP)
        canary = audit._sum_of([len(audit._data["scale"]) - 1])
        assert float(canary.norm()) == pytest.approx(1.0, rel=1e-6)
