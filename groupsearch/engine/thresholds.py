"""How many examples of a logical batch lie within each group's threshold, and the next thresholds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groupsearch.clipping import AdaptiveQuantile
from groupsearch.engine.noise import Gaussians, add_noise_

Counts = tuple[list[int], list[int]]


class QuantileCounts:
    """Counts for adaptive thresholds over one logical batch, however many micro-batches it has.

    An example moves a group's count by 1/2 up (within) or down (beyond), and by nothing where its
    backward pass did not reach the group. A norm that is not a number is beyond.
    """

    def __init__(self, allocation: AdaptiveQuantile, groups: int, expected_batch_size: float) -> None:
        self._allocation = allocation
        self._groups = groups
        self._expected = expected_batch_size
        self.forget()

    def add(self, group: int, norm_B: Tensor, threshold: float) -> None:
        """Count the examples with these norms in a group; nothing leaves the device."""
        within, before = (norm_B.detach() <= threshold).sum(), self._within[group]
        self._within[group] = within if before is None else before + within
        self._seen[group] += norm_B.numel()

    def forget(self) -> None:
        """Nothing has been counted."""
        self._within: list[Tensor | None] = [None] * self._groups
        self._seen = [0] * self._groups

    @property
    def counts(self) -> Counts:
        """Examples within their group's threshold, and all examples, by group; not private."""
        return [0 if within is None else int(within) for within in self._within], list(self._seen)

    @counts.setter
    def counts(self, counts: Counts) -> None:
        within, self._seen = counts[0], list(counts[1])
        self._within = [torch.tensor(count) for count in within]

    def next_thresholds(self, thresholds: Sequence[float], gaussians: Gaussians) -> tuple[float, ...]:
        """The thresholds of the next logical batch, from the noisy counts of this one.

        Draws one number per group, also where the batch is empty.
        """
        device = gaussians.source.device
        none = torch.zeros((), dtype=torch.long, device=device)
        within = torch.stack([none if count is None else count.to(device) for count in self._within])
        noisy = within - torch.tensor(self._seen, dtype=torch.float64).to(device, non_blocking=True) / 2
        add_noise_(noisy, self._allocation.count_noise_for(self._expected), gaussians)
        return self._allocation.updated(thresholds, [count / self._expected + 0.5 for count in _read(noisy)])


def _read(noisy: Tensor) -> list[float]:
    """What a step of adaptive thresholds reads of a device: once, at its end."""
    numbers: list[float] = noisy.tolist()
    return numbers
