"""The mechanism: what clips an example's gradient and what hides the sum, apart from any model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from groupsearch.clipping import AUTO_S_GAMMA, ClipPlan, gradient_noise_multiplier
from groupsearch.engine.noise import Gaussians, add_noises_
from groupsearch.engine.thresholds import QuantileCounts
from groupsearch.errors import GroupSearchError
from groupsearch.randomness import SecureStream, Source, make_secret

# The square of a shorter float32 norm has lost digits, or all, to underflow.
LEAST_NORM = 1e-15


def clip_factors(rule: str, norm_B: Tensor, threshold: float) -> Tensor:
    """Clipping factor of every example (B,), by the rule as :class:`~groupsearch.clipping.ClipPlan` states it."""
    if rule == "abadi":
        return (threshold / norm_B).clamp(max=1.0)  # a norm of zero gives inf, clamped to one
    if rule == "auto-s":
        return threshold / (norm_B + AUTO_S_GAMMA)
    return torch.where(norm_B > LEAST_NORM, threshold / norm_B, 0.0)


class Mechanism:
    """Clips by a plan and adds the noise its sensitivity asks for.

    What a logical batch releases, noisy sums and (with adaptive thresholds) noisy counts, is
    together one Gaussian release of multiplier ``noise_multiplier``. Thresholds change between
    logical batches only, so noise always fits the thresholds that the sums were clipped by.

    Args:
        plan: groups, thresholds, clip rule and noise allocation.
        noise_multiplier: sigma >= 0, what is accounted.
        source: of all noise.
        expected_batch_size: of a logical batch; only adaptive thresholds need it.

    Attributes:
        plan: as given.
        in_force: the plan with the thresholds of the present logical batch; ``plan`` where they are fixed.
        noise_multiplier: as given.
        gradient_noise_multiplier: of the sums alone: larger where counts are released with them.

    Raises:
        GroupSearchError: for adaptive thresholds without an expected batch size, or whose counts
            would cost more than the noise multiplier allows.
    """

    def __init__(
        self,
        plan: ClipPlan,
        noise_multiplier: float,
        source: Source,
        expected_batch_size: float | None = None,
    ) -> None:
        self.plan = self.in_force = plan
        self.noise_multiplier = self.gradient_noise_multiplier = noise_multiplier
        self._source = source
        self._gaussians = Gaussians(source)
        self._counts: QuantileCounts | None = None
        if plan.adaptive is not None:
            if expected_batch_size is None or not 0 < expected_batch_size < math.inf:
                raise GroupSearchError(
                    f"Expected a finite expected_batch_size > 0 for adaptive thresholds, whose counts are shares of "
                    f"it, found {expected_batch_size}. Give the sampling rate times the size of the data set."
                )
            groups = plan.grouping.groups
            self.in_force = plan.with_thresholds(plan.thresholds)
            self._counts = QuantileCounts(plan.adaptive, groups, expected_batch_size)
            self.gradient_noise_multiplier = gradient_noise_multiplier(
                noise_multiplier, groups, plan.adaptive.count_noise_for(expected_batch_size)
            )

    @property
    def thresholds(self) -> tuple[float, ...]:
        """R_m of every group in the present logical batch."""
        return self.in_force.thresholds

    def clip(self, group: int, norm_B: Tensor) -> Tensor:
        """Clipping factors (B,) of the examples whose gradients have these norms in a group.

        Adaptive thresholds count these examples: every example comes once per group and logical batch.
        """
        threshold = self.in_force.thresholds[group]
        if self._counts is not None:
            self._counts.add(group, norm_B, threshold)
        return clip_factors(self.plan.rule, norm_B, threshold)

    def add_noises_(self, sums: Mapping[str, Tensor]) -> None:
        """Add to the clipped sums of parameters, by name, the noise of one logical batch, in place.

        Raises:
            GroupSearchError: when the plan has no such parameter; nothing has been added then.
        """
        scales = self.in_force.noise_scales
        for name in sums:
            if name not in scales:
                raise GroupSearchError(f"Expected a parameter of the clip plan to add noise to, found {name!r}.")
        add_noises_(list(sums.values()), [self.gradient_noise_multiplier * scales[n] for n in sums], self._gaussians)

    def add_noise_(self, name: str, total: Tensor) -> Tensor:
        """Add its noise to one parameter's clipped sum, in place, and return it; see :meth:`add_noises_`."""
        self.add_noises_({name: total})
        return total

    def abandon(self) -> None:
        """The clipped sums of the logical batch so far were dropped, and so are its counts."""
        if self._counts is not None:
            self._counts.forget()

    def end_step(self) -> None:
        """The noise of a logical batch is drawn; the next one begins, with new thresholds if they are adaptive."""
        if self._counts is not None:
            self.in_force = self.plan.with_thresholds(self._counts.next_thresholds(self.thresholds, self._gaussians))
            self._counts.forget()
        self._gaussians.forget()

    def state_dict(self, *, exact: bool = False) -> dict[str, Any]:
        """What a resumed run needs to go on, as plain types and a tensor.

        With adaptive thresholds ``thresholds``, ``within`` and ``seen``: the counts of a logical batch that
        is not finished. These are exact and thus not private: keep the state as safe as the data. ``exact`` adds
        ``generator``, its state, from which all noise to come is had, and all that was added before.

        Raises:
            GroupSearchError: when the state of a secure stream is asked for, which has none.
        """
        state: dict[str, Any] = {}
        if exact:
            if isinstance(self._source, SecureStream):
                raise GroupSearchError(
                    "Expected a generator to save the state of, found a secure stream, whose numbers cannot be drawn "
                    "again. Save without exact=True, or train without secure=True."
                )
            state["generator"] = self._source.get_state()
        if self._counts is not None:
            within, seen = self._counts.counts
            state |= {"thresholds": list(self.thresholds), "within": within, "seen": seen}
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = False) -> None:
        """Go on where the mechanism that wrote the state stood, with noise that is drawn anew unless ``exact``.

        Raises:
            GroupSearchError: when the state is not of a mechanism with as many groups and the same kind
                of thresholds, or has no generator that fits here where it is to go on; nothing has changed then.
        """
        in_force, counts = self._read_thresholds(state)
        if exact:
            self._go_on_with(state.get("generator"))
        elif not isinstance(self._source, SecureStream):
            make_secret(self._source)
        self._gaussians.forget()
        self.in_force = in_force
        if self._counts is not None and counts is not None:
            self._counts.counts = counts

    def _go_on_with(self, stream: Any) -> None:
        if stream is None or isinstance(self._source, SecureStream):
            raise GroupSearchError(
                "Expected a generator in the state and one here to go on with the same noise, found "
                f"{'a secure stream here' if stream is not None else 'none in the state'}. Save with exact=True and "
                "resume without secure=True, or load without exact=True: noise is then drawn anew."
            )
        try:
            self._source.set_state(stream)
        except (RuntimeError, TypeError) as error:
            raise GroupSearchError(
                f"Expected the state of a generator on {self._source.device}, found one that it refuses "
                f"({error}). Resume on the kind of device that the state comes from."
            ) from error

    def _read_thresholds(self, state: Mapping[str, Any]) -> tuple[ClipPlan, tuple[list[int], list[int]] | None]:
        if self.plan.adaptive is None and "thresholds" not in state:
            return self.plan, None
        groups = self.plan.grouping.groups
        found = [state.get(key, ()) for key in ("thresholds", "within", "seen")]
        if self.plan.adaptive is None or any(len(values) != groups for values in found):
            kind = "fixed" if self.plan.adaptive is None else "adaptive"
            raise GroupSearchError(
                f"Expected the state of a mechanism with {groups} {kind} thresholds, found one with "
                f"{len(found[0])} adaptive ones. Resume with the plan that the state was written with."
            )
        return self.plan.with_thresholds(found[0]), (list(found[1]), list(found[2]))
