"""One-run auditing: many canaries, each in or out by a coin, in one run (Steinke et al. 2023, arXiv 2305.08846).

Shapes: m canaries, T steps, d numbers per row of a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from groupsearch.engine import make_private
from groupsearch.engine.loading import PoissonSampler
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer.sites import observe_sites
from tests.privacy.bounds import Claim, one_run_bound
from tests.privacy.broken import Damage, none
from tests.support.case import Batch, Wrap

WIDTH = 4
TABLES = ("a.weight", "b.weight")


@dataclass(frozen=True)
class OneRun:
    """What one run told: the claim, the lower bound, and the guesses it rests on."""

    claimed: float
    lower: float
    guesses: int
    correct: int
    canaries: int


def audit_one_run(
    claim: Claim,
    canaries: int,
    guesses: int,
    damage: Damage = none,
    tables: Sequence[str] = TABLES,
    seed: int = 0,
) -> OneRun:
    """Train two embedding tables, one clipping group each, on a random half of the canaries, and guess which half.

    Canary i is token i, loud enough to be clipped in both groups, so that its clipped gradient is as
    long as the sensitivity and lies in rows of its own. Half of the guesses go to the canaries that look most
    like members, half to those that look least so, judged by the rows of some ``tables``.
    """
    seeds = [int(s) for s in np.random.SeedSequence(seed).generate_state(4)]
    draws = [torch.Generator().manual_seed(s) for s in seeds[:3]]
    torch.manual_seed(seeds[3])
    model = Wrap(
        lambda m, x: m.b(x) * m.a(x).square().sum(1, keepdim=True).cos(), a=_table(canaries), b=_table(canaries)
    )
    everyone = torch.arange(canaries)
    sites = tuple(observe_sites(model, {"x": everyone[:3]}, loud_loss))
    plan = ClipPlan(Grouping((1,), sites))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    signals = _clipped_gradients(model, plan, everyone)
    expected = claim.sampling_rate * canaries / 2
    engine = make_private(
        model,
        optimizer,
        plan,
        noise_multiplier=claim.noise_multiplier,
        expected_batch_size=expected,
        loss_reduction="sum",
        generator=draws[0],
    )
    damage(engine)
    included = torch.rand(canaries, generator=draws[1]) < 0.5
    members = everyone[included]
    scores = torch.zeros(canaries, dtype=torch.float64)
    for batch in PoissonSampler(len(members), claim.sampling_rate, claim.steps, draws[2]):
        if len(batch):
            loud_loss(model, {"x": members[batch]}).sum().backward()
        optimizer.step()
        scores += _log_ratios(model, signals, claim, expected, plan, tables)
    order = scores.argsort()
    half = guesses // 2
    correct = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
    bound = one_run_bound(2 * half, correct, canaries, claim.delta)
    return OneRun(claim.epsilon, bound, 2 * half, correct, canaries)


def loud_loss(model: nn.Module, batch: Batch) -> Tensor:
    """(B,): beyond every threshold."""
    return 1e6 * model(batch["x"]).sum(1)


def _looked_up(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + m.b(x)


def _table(rows: int) -> nn.Embedding:
    return nn.Embedding(rows, WIDTH, dtype=torch.float64)


def _clipped_gradients(model: nn.Module, plan: ClipPlan, everyone: Tensor) -> dict[str, Tensor]:
    """Row i of each table: the clipped gradient of canary i, by the engine itself without noise."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    engine = make_private(model, optimizer, plan, noise_multiplier=0.0, expected_batch_size=1, loss_reduction="sum")
    loud_loss(model, {"x": everyone}).sum().backward()
    sums = {name: total.clone() for name, total in engine.clipped_sums().items()}
    engine.detach()
    return sums


def _log_ratios(
    model: nn.Module,
    signals: dict[str, Tensor],
    claim: Claim,
    expected: float,
    plan: ClipPlan,
    tables: Sequence[str],
) -> Tensor:
    """Log-likelihood ratio of every canary's presence in this step, (m,)."""
    rate = claim.sampling_rate
    inside = torch.full((len(next(iter(signals.values()))),), math.log(rate), dtype=torch.float64)
    for name in tables:
        seen, deviation = model.get_parameter(name).grad, claim.noise_multiplier * plan.noise_scales[name]
        assert seen is not None
        row = signals[name] / deviation
        inside += (seen * expected / deviation * row).sum(1) - row.square().sum(1) / 2
    return torch.logaddexp(inside, torch.full_like(inside, math.log1p(-rate) if rate < 1 else -math.inf))
