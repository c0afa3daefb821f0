"""The mechanism: adaptive thresholds, their counts and noise, and its state; alone, and in the engine."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.engine.mechanism import Gaussians, Mechanism, add_noise_
from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import AdaptiveQuantile, ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer import observe_sites
from tests.plan.test_clipping import largest_sum, tied_plans
from tests.support.strategies import random_trace

SITES = tuple(
    replace(random_trace(1).sites[0], name=f"s{i}", layer=f"s{i}", parameters=(f"w{i}",), parameter_count=2)
    for i in range(4)
)
QUIET = 1e-9  # a count noise that hides nothing, so that the counts can be read off the thresholds


def plan(groups: int = 2, allocation: Any = "uniform", **fields: Any) -> ClipPlan:
    return ClipPlan(Grouping(tuple(range(1, groups)), SITES[:groups]), allocation=allocation, **fields)


def mechanism(chosen: ClipPlan, noise: float = 0.0, seed: int = 0, expected: float | None = 8.0) -> Mechanism:
    return Mechanism(chosen, noise, torch.Generator().manual_seed(seed), expected)


def counts(found: Mechanism, before: tuple[float, ...]) -> list[float]:
    """The noisy centred counts that moved the thresholds, by the published update rule turned round."""
    allocation = found.plan.adaptive
    assert allocation is not None
    moved = [math.log(b / a) / allocation.learning_rate for a, b in zip(found.thresholds, before, strict=True)]
    return [8.0 * (share + allocation.quantile - 0.5) for share in moved]


def reseeded(chosen: ClipPlan, noise: float, seed: int, norms: Tensor, pieces: int = 1) -> Mechanism:
    """A mechanism after one logical batch of the norms (B, M), in so many micro-batches."""
    found = mechanism(chosen, noise, seed)
    for piece in norms.chunk(pieces) if len(norms) else ():
        for group in range(norms.shape[1]):
            found.clip(group, piece[:, group])
    for name in found.plan.noise_scales:
        found.add_noise_(name, torch.zeros(2))
    found.end_step()
    return found


class TestCounts:
    def test_a_step_moves_each_threshold_by_its_own_share(self) -> None:
        chosen = plan(2, AdaptiveQuantile(0.5, 0.3, QUIET, initial=(1.0, 2.0)))
        norms = torch.tensor([[0.5, 3.0], [1.0, 3.0], [2.0, 1.0], [0.1, 9.0]])
        # Group 0 has three of four within (1.0 is), group 1 one of four; of 8 expected that is 1/2 +- 1/8.
        found = reseeded(chosen, 0.0, 0, norms)
        assert found.thresholds == pytest.approx((math.exp(-0.3 / 8), 2 * math.exp(0.3 / 8)))

    def test_counts_are_of_the_logical_batch(self) -> None:
        chosen = plan(3, AdaptiveQuantile())
        norms = torch.rand(12, 3, generator=torch.Generator().manual_seed(1))
        whole, *others = (reseeded(chosen, 1e-3, 4, norms, pieces) for pieces in (1, 2, 5, 12))
        assert all(other.thresholds == whole.thresholds for other in others)
        assert whole.thresholds != chosen.thresholds

    def test_a_threshold_finds_its_quantile(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for quantile in (0.3, 0.5, 0.8):
            found = mechanism(plan(1, AdaptiveQuantile(quantile, count_noise=5.0)), 1.0, expected=200.0)
            for _ in range(100):
                found.clip(0, torch.randn(200, generator=generator).mul(0.5).exp().mul(20))
                found.end_step()
            asked = 20 * math.exp(0.5 * float(torch.special.ndtri(torch.tensor(quantile))))
            assert found.thresholds[0] == pytest.approx(asked, rel=0.15)

    @pytest.mark.parametrize("groups", [1, 2, 3])
    def test_one_example_changes_the_counts_by_half_the_root_of_the_groups(self, groups: int) -> None:
        """Exhaustively: every position of an example, added to every pair of examples."""
        chosen = plan(groups, AdaptiveQuantile(count_noise=QUIET))
        positions = [torch.tensor(p) for p in itertools.product((0.0, 9.0), repeat=groups)]

        def counted(rows: list[Tensor]) -> list[float]:
            norms = torch.stack(rows) if rows else torch.zeros(0, groups)
            return counts(reseeded(chosen, 0.0, 0, norms), chosen.thresholds)

        changes = [
            math.dist(counted([*others, added]), counted([*others]))
            for others in itertools.product(positions, repeat=2)
            for added in positions
        ]
        assert changes == pytest.approx([math.sqrt(groups) / 2] * len(changes), abs=1e-6)

    def test_norms_that_are_no_numbers_leave_finite_thresholds(self) -> None:
        chosen = plan(2, AdaptiveQuantile(learning_rate=1000.0))
        found = mechanism(chosen, 1e-3)
        for norm in (math.nan, math.inf, 0.0, 1e38):
            for _ in range(3):
                for group in range(2):
                    found.clip(group, torch.full((8,), norm))
                found.end_step()
                assert all(1e-6 <= r <= 1e6 for r in found.thresholds)
        assert counts(
            reseeded(plan(1, AdaptiveQuantile(count_noise=QUIET)), 0.0, 0, torch.tensor([[math.nan]])), (1.0,)
        ) == (pytest.approx([-0.5], abs=1e-6))

    def test_an_abandoned_batch_is_not_counted(self) -> None:
        chosen = plan(2, AdaptiveQuantile())
        again = mechanism(chosen, 1e-3, seed=5)
        again.clip(1, torch.zeros(3))
        again.abandon()
        fresh = mechanism(chosen, 1e-3, seed=5)
        for found in (again, fresh):
            found.clip(0, torch.ones(4))
            found.end_step()
        assert again.thresholds == fresh.thresholds


class TestNoise:
    def test_fixed_thresholds_draw_the_gradients_noise_and_nothing_else(self) -> None:
        chosen = plan(2, (3.0, 4.0))
        found = mechanism(chosen, 0.7, expected=None)
        gaussians = Gaussians(torch.Generator().manual_seed(0))
        for _ in range(3):
            for name in ("w0", "w1"):
                noisy = found.add_noise_(name, torch.ones(5))
                assert torch.equal(noisy, add_noise_(torch.ones(5), 0.7 * 5.0, gaussians))
            found.end_step()
            gaussians.forget()
        assert found.thresholds == (3.0, 4.0)

    @pytest.mark.parametrize("allocation", ["global", "equal", (1.0, 3.0)])
    def test_noise_follows_the_thresholds_that_the_sums_were_clipped_by(self, allocation: Any) -> None:
        quantile = AdaptiveQuantile(count_noise=4.0, initial=(3.0, 4.0))
        found = mechanism(plan(2, quantile, noise_allocation=allocation), 2.0)
        multiplier = (2.0**-2 - 2 / (2 * 4.0) ** 2) ** -0.5
        seen = []
        for _ in range(3):
            first, second = found.thresholds
            weights = {"global": (1.0, 1.0), "equal": (first, second)}.get(str(allocation), allocation)
            unit = math.hypot(first / weights[0], second / weights[1])
            found.clip(0, torch.full((8,), 0.1))
            found.clip(1, torch.full((8,), 99.0))
            for name, weight in zip(("w0", "w1"), weights, strict=True):
                deviation = float(found.add_noise_(name, torch.zeros(50_000)).std())
                # A sample deviation is within 4 / sqrt(2 n) of its own.
                assert deviation == pytest.approx(multiplier * weight * unit, rel=4 / math.sqrt(100_000))
            seen.append((first, second))
            found.end_step()
        assert seen[0] == (3.0, 4.0)
        assert len(set(seen)) == 3

    def test_counts_get_the_noise_they_are_accounted_with_once_per_step(self) -> None:
        chosen = plan(3, AdaptiveQuantile(count_noise=2.0))
        found = mechanism(chosen, 1e-3)
        drawn = []
        for step in range(1000):  # every other batch is empty
            before = found.thresholds
            if step % 2:
                for group in range(3):
                    found.clip(group, torch.zeros(2))
            found.end_step()
            drawn.append([count - step % 2 for count in counts(found, before)])
            found.in_force = chosen.with_thresholds(chosen.thresholds)
        noise = torch.tensor(drawn)
        for group in range(3):
            assert kstest(noise[:, group].numpy(), "norm", args=(0.0, 2.0)).pvalue > 0.01
        # Independent over groups and steps: 4 standard deviations of a correlation of 1000 pairs.
        assert torch.corrcoef(noise.T).triu(1).abs().max() < 4 / math.sqrt(1000)
        assert torch.corrcoef(torch.stack([noise[:-1, 0], noise[1:, 0]]))[0, 1].abs() < 4 / math.sqrt(1000)

    def test_the_seed_decides_the_thresholds(self) -> None:
        chosen = plan(2, AdaptiveQuantile())
        first, same, other = (reseeded(chosen, 1e-3, seed, torch.ones(4, 2)) for seed in (1, 1, 2))
        assert first.thresholds == same.thresholds != other.thresholds

    @settings(max_examples=30, deadline=None)
    @given(chosen=tied_plans(), noise=st.floats(0.3, 4), loudness=st.floats(0.51, 5))
    def test_one_example_moves_sums_and_counts_together_by_one_over_the_multiplier(
        self, chosen: ClipPlan, noise: float, loudness: float
    ) -> None:
        """Also where groups share parameters: the worst found over the noise that is really added."""
        root = math.sqrt(chosen.grouping.groups)
        allocation = AdaptiveQuantile(count_noise=loudness * noise * root, initial=chosen.thresholds)
        found = Mechanism(replace(chosen, allocation=allocation), noise, torch.Generator(), 8.0)
        sums = largest_sum(found.in_force, scaled=True) / found.gradient_noise_multiplier
        together = math.hypot(sums, root / 2 / (loudness * noise * root))
        assert 0.999 / noise <= together <= (1 + 1e-9) / noise

    def test_the_accounted_multiplier_is_the_one_given(self) -> None:
        found = mechanism(plan(2, AdaptiveQuantile(count_noise=4.0)), 2.0)
        assert found.noise_multiplier == 2.0
        assert 1 / found.gradient_noise_multiplier**2 + 2 / (2 * 4.0) ** 2 == pytest.approx(1 / 2.0**2)
        assert mechanism(plan(2), 2.0).gradient_noise_multiplier == 2.0


def stepped(found: Mechanism, norms: Tensor, begun: bool = False) -> list[Tensor]:
    """The noise of one logical batch whose first half may already be clipped; it always sees the same norms."""
    for group in range(norms.shape[1]):
        if not begun:
            found.clip(group, norms[:3, group])
        found.clip(group, norms[3:, group])
    noise = [found.add_noise_(name, torch.zeros(4)) for name in ("w0", "w1")]
    found.end_step()
    return noise


class TestState:
    @pytest.mark.parametrize("allocation", ["uniform", AdaptiveQuantile()], ids=["fixed", "adaptive"])
    @settings(max_examples=10, deadline=None)
    @given(before=st.integers(0, 3), begun=st.booleans())
    def test_a_resumed_run_goes_on_bit_for_bit(self, allocation: Any, before: int, begun: bool) -> None:
        norms = torch.rand(6, 2, generator=torch.Generator().manual_seed(7))
        first = mechanism(plan(2, allocation), 0.1)
        for _ in range(before):
            stepped(first, norms)
        if begun:
            for group in range(2):
                first.clip(group, norms[:3, group])
        saved = io.BytesIO()
        torch.save(first.state_dict(exact=True), saved)
        saved.seek(0)
        resumed = mechanism(plan(2, allocation), 0.1, seed=99)
        resumed.load_state_dict(torch.load(saved, weights_only=True), exact=True)
        for step in range(3):
            pairs = zip(
                stepped(first, norms, begun and not step), stepped(resumed, norms, begun and not step), strict=True
            )
            assert all(torch.equal(a, b) for a, b in pairs)
            assert first.thresholds == resumed.thresholds

    @pytest.mark.parametrize(
        ("writer", "reader", "message"),
        [
            (plan(2), plan(2, AdaptiveQuantile()), "2 adaptive thresholds, found one with 0"),
            (plan(2, AdaptiveQuantile()), plan(2), "2 fixed thresholds, found one with 2"),
            (plan(3, AdaptiveQuantile()), plan(2, AdaptiveQuantile()), "2 adaptive thresholds, found one with 3"),
        ],
    )
    def test_a_foreign_state_is_refused_and_nothing_changes(
        self, writer: ClipPlan, reader: ClipPlan, message: str
    ) -> None:
        foreign, found = mechanism(writer, 0.1, seed=1), mechanism(reader, 0.1, seed=2)
        before = found.state_dict(exact=True)
        with pytest.raises(GroupSearchError, match=message):
            found.load_state_dict(foreign.state_dict())
        after = found.state_dict(exact=True)
        assert torch.equal(before.pop("generator"), after.pop("generator"))
        assert before == after

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"generator": None}, "Expected a generator in the state"),
            ({"generator": torch.zeros(3, dtype=torch.uint8)}, "refuses"),
            ({"thresholds": [1.0, math.nan]}, "2 positive thresholds"),
            ({"within": [1]}, "2 adaptive thresholds"),
        ],
    )
    def test_a_garbled_state_is_refused(self, change: dict[str, Any], message: str) -> None:
        found = mechanism(plan(2, AdaptiveQuantile()), 0.1)
        with pytest.raises(GroupSearchError, match=message):
            found.load_state_dict(found.state_dict(exact=True) | change, exact=True)


class TestRefusals:
    @pytest.mark.parametrize("expected", [None, 0.0, -1.0, math.inf, math.nan])
    def test_adaptive_thresholds_need_the_expected_batch_size(self, expected: float | None) -> None:
        with pytest.raises(GroupSearchError, match="expected_batch_size > 0 for adaptive thresholds"):
            mechanism(plan(2, AdaptiveQuantile()), 1.0, expected=expected)

    def test_counts_that_cost_more_than_the_multiplier_allows(self) -> None:
        with pytest.raises(GroupSearchError, match="the counts alone would spend the whole budget"):
            mechanism(plan(2, AdaptiveQuantile()), 1.0, expected=8.0)

    def test_a_parameter_that_the_plan_does_not_have(self) -> None:
        with pytest.raises(GroupSearchError, match="parameter of the clip plan to add noise to, found 'w9'"):
            mechanism(plan(2), 1.0).add_noise_("w9", torch.zeros(2))


class TestEngine:
    """Adaptive thresholds of a real model against gradients taken one example at a time."""

    @staticmethod
    def made(**fields: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer, PrivateEngine]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        sites = observe_sites(model, {"x": torch.ones(2, 3)}, TestEngine.losses)
        optimizer = torch.optim.SGD(model.parameters(), 1e-9)  # the model stays where it is
        chosen = ClipPlan(Grouping((1,), sites), allocation=AdaptiveQuantile(count_noise=QUIET, initial=(1.5, 2.5)))
        engine = make_private(
            model,
            optimizer,
            chosen,
            noise_multiplier=0.0,
            expected_batch_size=8,
            loss_reduction="sum",
            generator=torch.Generator().manual_seed(0),
            **fields,
        )
        return model, optimizer, engine

    @staticmethod
    def losses(model: torch.nn.Module, batch: Any) -> Tensor:
        return model(batch["x"]).square().sum(1)

    @staticmethod
    def expected(model: torch.nn.Module, x: Tensor, thresholds: tuple[float, ...]) -> list[float]:
        """Centred counts of a batch by plain autograd on copies of the model's parameters."""
        found = [0.0, 0.0]
        for row in x:
            values = [p.detach().clone().requires_grad_() for p in model.parameters()]
            hidden = torch.tanh(row @ values[0].T + values[1])
            grads = torch.autograd.grad((hidden @ values[2].T + values[3]).square().sum(), values)
            for group in range(2):
                norm = math.hypot(*(float(g.norm()) for g in grads[2 * group : 2 * group + 2]))
                found[group] += 0.5 if norm <= thresholds[group] else -0.5
        return found

    @pytest.mark.parametrize("pieces", [(7,), (3, 4), (1, 1, 5), ()], ids=str)
    def test_counts_are_those_of_every_example_once(self, pieces: tuple[int, ...]) -> None:
        model, optimizer, engine = self.made()
        x = 3 * torch.randn(sum(pieces), 3, generator=torch.Generator().manual_seed(3))
        for _ in range(2):  # the second step has other thresholds
            before = engine.mechanism.thresholds
            for piece in x.split(list(pieces)) if pieces else ():
                self.losses(model, {"x": piece}).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            wanted = self.expected(model, x, before)
            assert counts(engine.mechanism, before) == pytest.approx(wanted, abs=1e-6)
            assert not pieces or len(set(wanted)) == 2  # the two groups differ, or a mix-up would pass

    def test_a_backward_that_raised_is_not_counted(self) -> None:
        model, optimizer, engine = self.made()
        x = 3 * torch.randn(5, 3, generator=torch.Generator().manual_seed(3))

        def fail(grad: Tensor) -> None:
            raise RuntimeError("half-way")

        hook = model[1].register_forward_hook(lambda module, args, hidden: hidden.register_hook(fail) and None)
        with pytest.raises(RuntimeError, match="half-way"):
            self.losses(model, {"x": x}).sum().backward()
        hook.remove()
        before = engine.mechanism.thresholds
        self.losses(model, {"x": x}).sum().backward()
        optimizer.step()
        assert counts(engine.mechanism, before) == pytest.approx(self.expected(model, x, before), abs=1e-6)

    def test_the_engines_noise_is_inflated_by_what_the_counts_cost(self) -> None:
        torch.manual_seed(0)
        model = torch.nn.Linear(200, 300)
        sites = observe_sites(model, {"x": torch.ones(2, 200)}, self.losses)
        chosen = ClipPlan(Grouping((), sites), 3.0, allocation=AdaptiveQuantile(count_noise=2.0))
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        start = model.weight.detach().clone()
        generator = torch.Generator().manual_seed(0)
        engine = make_private(
            model, optimizer, chosen, noise_multiplier=2.0, expected_batch_size=5, generator=generator
        )
        optimizer.step()
        # 1 / sigma^2 = 1 / 4 = 1 / gradient^2 + 1 / (2 * 2)^2; a sample deviation is within 4 / sqrt(2 n).
        deviation = (1 / 4 - 1 / 16) ** -0.5 * 3.0 / 5
        assert float((model.weight.detach() - start).std()) == pytest.approx(deviation, rel=4 / math.sqrt(120_000))
        assert engine.noise_multiplier == 2.0
