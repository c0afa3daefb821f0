"""Empirical privacy: how well an adversary tells from what the optimizer sees whether a canary was trained on.

Many runs of the real engine with the real sampler, with or without one canary, whose noisy gradients are
seen at every step (white-box, Nasr et al. 2023, arXiv 2302.07956). What comes out is a lower bound on
epsilon that holds with the confidence asked for; a bound above the claim is a refutation.

Shapes: T steps, P parameters, D numbers in all parameters together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from groupsearch.engine import make_private
from groupsearch.engine.loading import PoissonSampler
from groupsearch.engine.mechanism import Gaussians, add_noise_
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer.sites import observe_sites
from tests.privacy.bounds import CONFIDENCE, Claim, distinguishing_bound, family_bound
from tests.privacy.broken import KNOWN_SEED, Damage, none
from tests.support.case import Batch, Case, Wrap
from tests.support.reference import trainable

USES = 64
RATIOS = tuple(math.log(ratio) for ratio in (3, 10, 30, 100, 300))
Scores = dict[str, list[float]]


@dataclass(frozen=True)
class Verdict:
    """What an audit found.

    Attributes:
        claimed: epsilon by the accountant.
        lower: a lower bound on epsilon that takes nothing for granted about the mechanism.
        lower_of_family: a tighter one that takes it for a subsampled Gaussian of some noise multiplier, which
            a broken engine need not be.
        attack: the statistic that told best, on runs other than those that ``lower`` rests on.
        true_positives: of the attack, on these.
        false_positives: likewise.
        trials: how many these are, with the canary and without.
    """

    claimed: float
    lower: float
    lower_of_family: float
    attack: str
    true_positives: float
    false_positives: float
    trials: int


def two_groups() -> tuple[Case, ClipPlan]:
    """Two layers, a group each; the canary is clipped in both."""
    case = Case("audited-layers", lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), (4,))
    return case, _plan(case, (1,))


def many_uses(uses: int = USES) -> tuple[Case, ClipPlan]:
    """One layer whose output is added up so many times; the gradients of its uses are equal."""
    case = Case(
        f"audited-{uses}-uses", lambda: Wrap(lambda m, x: sum(m.a(x) for _ in range(uses)), a=nn.Linear(3, 2)), (3,)
    )
    return case, _plan(case, ())


def _plan(case: Case, boundaries: tuple[int, ...]) -> ClipPlan:
    return ClipPlan(Grouping(boundaries, tuple(observe_sites(case.model(), case.batch(), case.loss))))


class CanaryAudit:
    """Runs of the real engine on some examples, with or without one more.

    The adversary chose the weights' start, the learning rate, every example and the canary, and knows
    which of the others each batch drew: what they add is subtracted from what is seen. The canary's own
    clipped gradient comes from a twin engine without noise, so it is what this engine makes of it.

    Args:
        case: model and loss; the canary's loss is ``loudness`` times as loud as the others'.
        plan: groups and thresholds.
        claim: noise, sampling and steps.
        damage: what is broken about the engine.
        others: how many examples there are besides the canary.
        learning_rate: 0 keeps the weights where they are.
        seed: of noise and sampling.
    """

    def __init__(
        self,
        case: Case,
        plan: ClipPlan,
        claim: Claim,
        damage: Damage = none,
        others: int = 4,
        learning_rate: float = 0.0,
        loudness: float = 1e4,
        seed: int = 0,
    ) -> None:
        self.case = case
        self.claim = claim
        self.learning_rate = learning_rate
        self._data = case.batch(batch_size=others + 1)
        self._data["scale"][-1] *= loudness
        self._expected = claim.sampling_rate * others
        noise, sampling = np.random.SeedSequence(seed).generate_state(2)
        self._sampling = torch.Generator().manual_seed(int(sampling))
        self._model, self._optimizer, _ = self._attached(plan, claim.noise_multiplier, damage, int(noise))
        self._twin, self._twin_optimizer, self._noiseless = self._attached(plan, 0.0, damage, 0)
        self._start = [p.detach().clone() for p in trainable(self._model).values()]
        self._seen: dict[str, Tensor] = {}
        self._optimizer.register_step_pre_hook(self._look)
        self._names = list(trainable(self._model))
        self._deviation = {name: claim.noise_multiplier * plan.noise_scales[name] for name in self._names}
        self._known: dict[int, Tensor] = {}
        self._guess = Gaussians(torch.Generator().manual_seed(KNOWN_SEED))

    def run(self, trials: int) -> Verdict:
        """This many training runs with the canary and as many without, and the verdict on them."""
        scores: dict[bool, Scores] = {True: {}, False: {}}
        for _ in range(trials):
            for present in (True, False):
                for attack, score in self.trial(present).items():
                    scores[present].setdefault(attack, []).append(score)
        return judge(scores[True], scores[False], self.claim)

    def trial(self, present: bool) -> dict[str, float]:
        """One training run, and the score of every attack: higher speaks for the canary's presence."""
        claim, size = self.claim, len(self._data["scale"]) - (not present)
        with torch.no_grad():
            for parameter, start in zip(trainable(self._model).values(), self._start, strict=True):
                parameter.copy_(start)
        canary, residues = len(self._data["scale"]) - 1, []
        signals, guesses = [], []
        for batch in PoissonSampler(size, claim.sampling_rate, claim.steps, self._sampling):
            signals.append(self._sum_of([canary]))
            expected = self._sum_of([i for i in batch.tolist() if i != canary])
            self._optimizer.zero_grad()
            if len(batch):
                self.case.loss(self._model, self._rows(batch)).sum().backward()
            self._optimizer.step()
            residues.append(self._whitened(self._seen) * self._expected - expected)
            guesses.append(self._guessed_noise())
        return self._scores(torch.stack(residues), torch.stack(signals), torch.stack(guesses))

    def _scores(self, residues_TD: Tensor, signals_TD: Tensor, guesses_TD: Tensor) -> dict[str, float]:
        """Log-likelihood ratios over all and over single parameters, what differs of two steps, or from a guess."""
        dots_TP, squares_TP = self._by_parameter(residues_TD * signals_TD), self._by_parameter(signals_TD.square())
        scores = {"all": self._log_ratio(dots_TP.sum(1), squares_TP.sum(1))}
        for index, name in enumerate(self._names):
            scores[name] = self._log_ratio(dots_TP[:, index], squares_TP[:, index])
        left_TD = residues_TD - guesses_TD
        scores["known seed"] = float(((left_TD * signals_TD).sum(1) / signals_TD.square().sum(1)).max())
        if len(residues_TD) > 1:
            scores["steps apart"] = float((residues_TD.diff(dim=0) * signals_TD[1:]).sum(1).abs().max())
        return scores

    def _guessed_noise(self) -> Tensor:
        """The noise of this step if it came from the seed that everybody tries first, in deviations, (D,)."""
        drawn = {n: add_noise_(torch.zeros_like(g), self._deviation[n], self._guess) for n, g in self._seen.items()}
        self._guess.forget()
        return self._whitened(drawn)

    def _log_ratio(self, dots_T: Tensor, squares_T: Tensor) -> float:
        """Of a canary sampled with the claimed rate into noise of deviation one, against noise alone."""
        rate = self.claim.sampling_rate
        inside = dots_T - squares_T / 2 + math.log(rate)
        outside = torch.full_like(inside, math.log1p(-rate) if rate < 1 else -math.inf)
        return float(torch.logaddexp(inside, outside).sum())

    def _by_parameter(self, values_TD: Tensor) -> Tensor:
        sizes = [self._seen[name].numel() for name in self._names]
        return torch.stack([part.sum(1) for part in values_TD.split(sizes, dim=1)], dim=1)

    def _sum_of(self, indices: Sequence[int]) -> Tensor:
        """What these examples add to the clipped sums at the present weights, in deviations of the noise, (D,)."""
        if self.learning_rate:
            self._twin.load_state_dict(self._model.state_dict())
            return self._noiseless_sum(indices)
        for index in indices:
            if index not in self._known:
                self._known[index] = self._noiseless_sum([index])
        return sum((self._known[index] for index in indices), self._noiseless_sum([]))

    def _noiseless_sum(self, indices: Sequence[int]) -> Tensor:
        if indices:
            self.case.loss(self._twin, self._rows(torch.tensor(indices))).sum().backward()
        found = self._whitened(self._noiseless.clipped_sums())
        self._twin_optimizer.step()
        return found

    def _whitened(self, gradients: dict[str, Tensor]) -> Tensor:
        return torch.cat([gradients[name].flatten().double() / self._deviation[name] for name in self._names])

    def _rows(self, indices: Tensor) -> Batch:
        return {name: value[indices] for name, value in self._data.items()}

    def _attached(self, plan: ClipPlan, noise_multiplier: float, damage: Damage, seed: int) -> tuple:  # type: ignore[type-arg]
        model: nn.Module = self.case.model()
        optimizer = torch.optim.SGD(trainable(model).values(), lr=self.learning_rate if noise_multiplier else 0.0)
        engine = make_private(
            model,
            optimizer,
            plan,
            noise_multiplier=noise_multiplier,
            expected_batch_size=self._expected,
            loss_reduction="sum",
            generator=torch.Generator().manual_seed(seed),
        )
        damage(engine)
        return model, optimizer, engine

    def _look(self, *_: object) -> None:
        self._seen = {name: p.grad.detach().clone() for name, p in trainable(self._model).items()}  # type: ignore[union-attr]


def judge(present: Scores, absent: Scores, claim: Claim, confidence: float = CONFIDENCE) -> Verdict:
    """The verdict on these scores. Each of its two bounds holds with the confidence given.

    For ``lower`` a third of the runs choose attack and threshold, and the others judge them. For
    ``lower_of_family`` both are fixed beforehand: the likelihood ratio of everything seen, above one.
    """
    runs = len(present["all"])
    third = runs // 3

    def counts(attack: str, threshold: float, first: int, last: int) -> tuple[int, int]:
        inside, outside = np.array(present[attack][first:last]), np.array(absent[attack][first:last])
        return int((inside >= threshold).sum()), int((outside >= threshold).sum())

    options = []
    for attack in present:
        # Noise alone exceeds a likelihood ratio of r once in r runs, if noise is what it should be.
        for threshold in RATIOS if attack == "all" else sorted({*present[attack][:third], *absent[attack][:third]}):
            bound = distinguishing_bound(*counts(attack, threshold, 0, third), third, claim.delta, confidence)
            options.append((bound, attack, float(threshold)))
    _, attack, threshold = max(options, key=lambda option: option[0])
    hits, alarms = counts(attack, threshold, third, runs)
    return Verdict(
        claimed=claim.epsilon,
        lower=distinguishing_bound(hits, alarms, runs - third, claim.delta, confidence),
        lower_of_family=family_bound(*counts("all", 0.0, 0, runs), runs, claim, confidence),
        attack=attack,
        true_positives=hits / (runs - third),
        false_positives=alarms / (runs - third),
        trials=runs - third,
    )
