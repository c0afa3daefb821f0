"""The mechanism: what clips an example's gradient and what hides the sum, apart from any model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import AdaptiveQuantile, ClipPlan, clip_factors, gradient_noise_multiplier
from groupsearch.randomness import SecureStream, Source, draw_words, make_secret

# -- Gaussian noise on a clipped sum: what it is drawn from, how far it reaches, and how it is rounded
#
# Why not ``normal_`` in float32: it makes two Gaussians of two uniforms of 24 bits. None exceeds 5.77, the largest are
# few and far between, and an example that pushes one of many coordinates beyond shows. Here the radius comes from 83
# bits and the noise reaches :data:`REACH`; :func:`added_delta` has what that end costs.
#
# Why not add in float32: the last digits of a sum tell what noise cannot have been added to which number. Noise is
# added in float64 and the result rounded to a grid of 2^-20 deviations, which only the deviation decides, before
# anybody sees it. A cell of the grid holds 2^29 float64 numbers or more as far as noise reaches, so that no cell can be
# told to be out of reach. This is no proof for floating point: the probability of a cell is right to about 2^-29 of
# itself, and the sums that noise is added to are rounded like all floating point sums, with their examples.

CHUNK = 2**15
"""Numbers drawn at a time on the CPU, where they stay in its cache."""
CUDA_CHUNK = 2**21
POOL = 2**12
"""Numbers of which tensors of fewer take what they need, as drawing takes as long for 10 as for 1,000."""
CUDA_POOL = 2**18
"""The same on a GPU, where it takes as long for 100,000."""

_SIGNLESS = 2**63 - 1
_FINISHING_BITS = 20
REACH = math.sqrt(2 * (63 + _FINISHING_BITS + 1) * math.log(2))
"""The largest number there is, in standard deviations: 10.79, where float32's is 5.77."""
_GRID_BITS = 20


class Gaussians:
    """Independent standard normal numbers in float64, by Box and Muller's method from two 64-bit words each two.

    Numbers for small tensors are drawn together and kept until :meth:`forget`; never given out twice.

    Transient memory of a draw: 20 bytes per number, of at most :data:`CHUNK` (:data:`CUDA_CHUNK` on a GPU).

    Args:
        source: of all randomness.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        on_cpu = source.device.type == "cpu"
        self.chunk = CHUNK if on_cpu else CUDA_CHUNK
        self._pool_size = POOL if on_cpu else CUDA_POOL
        self._pool = self._empty = torch.empty(0, dtype=torch.float64, device=source.device)

    def pieces(self, tensor: Tensor) -> Iterator[Tensor]:
        """A tensor in pieces of no more than ``chunk`` numbers; how it is cut depends on its shape alone."""
        if tensor.numel() > self.chunk:
            rows = self.chunk // tensor[0].numel()
            for piece in tensor.split(rows) if rows else tensor:
                yield from self.pieces(piece)
        elif tensor.numel():
            yield tensor

    def must_draw(self, piece: Tensor) -> bool:
        """Whether there are not as many numbers as a piece has."""
        return piece.numel() >= self._pool_size or piece.numel() > len(self._pool)

    def like(self, piece: Tensor) -> Tensor:
        """Numbers in the shape of a piece, which the caller may overwrite; not its strides decide which goes where."""
        return self._take(piece.numel()).view(piece.shape)

    def forget(self) -> None:
        """Let go of what was drawn and not used."""
        self._pool = self._empty

    def _take(self, count: int) -> Tensor:
        if count >= self._pool_size:
            return _draw(count, self.source)
        if count > len(self._pool):
            self._pool = _draw(self._pool_size, self.source)
        taken, self._pool = self._pool[:count], self._pool[count:]
        return taken


def _draw(count: int, source: Source) -> Tensor:
    """Standard normal numbers, float64 (count,)."""
    half = (count + 1) // 2
    words = draw_words(source, 2 * half)
    numbers = torch.empty(2 * half, dtype=torch.float64, device=words.device)
    (radius_words, angle_words), (radius, angle) = words.split(half), numbers.split(half)
    angle.copy_(angle_words).mul_(math.pi * 2.0**-63)  # from -pi to pi, 53 bits of the word
    # The uniform of the radius, in (0, 1]: 63 bits, and the last of the other word to finish where those are few.
    rest = angle_words.bitwise_and_(2**_FINISHING_BITS - 1).to(torch.float64).add_(0.5).mul_(2.0**-_FINISHING_BITS)
    radius.copy_(radius_words.bitwise_and_(_SIGNLESS)).add_(rest).mul_(2.0**-63)
    radius.log_().mul_(-2.0).sqrt_()
    torch.cos(angle, out=rest)
    angle.sin_().mul_(radius)
    radius.mul_(rest)
    return numbers[:count]


def add_noise_(tensor: Tensor, std: float, gaussians: Gaussians) -> Tensor:
    """Adds noise to one tensor, in place, and returns it; see :func:`add_noises_`."""
    add_noises_([tensor], [std], gaussians)
    return tensor


@torch.no_grad()
def add_noises_(tensors: Sequence[Tensor], stds: Sequence[float], gaussians: Gaussians) -> None:
    """Adds independent N(0, std^2) noise to every element of every tensor, in place.

    Drawn and added in float64, then rounded to a multiple of 2^-20 deviations or less, and once to the
    tensor's dtype. A standard deviation of 0 draws nothing and leaves the source where it was. Numbers are drawn
    for one tensor after the other, and added to all tensors that one draw has numbers for at a time.

    Transient memory: that of a draw, see :class:`Gaussians`; it does not grow with the tensors.

    Args:
        tensors: floating point, any shapes, on the source's device.
        stds: standard deviation of each, finite and not negative.
        gaussians: source of the noise.

    Raises:
        GroupSearchError: when a standard deviation is negative or not finite, or a tensor is not floating
            point; nothing has been added then.
    """
    for tensor, std in zip(tensors, stds, strict=True):
        if not (math.isfinite(std) and std >= 0):
            raise GroupSearchError(f"Expected a finite standard deviation >= 0 of the noise, found {std}.")
        if not tensor.is_floating_point():
            raise GroupSearchError(f"Expected a floating point tensor to add noise to, found {tensor.dtype}.")
    together: list[tuple[Tensor, Tensor, float]] = []
    for tensor, std in zip(tensors, stds, strict=True):
        for piece in gaussians.pieces(tensor) if std else ():
            if gaussians.must_draw(piece):  # what was drawn before is let go of first
                _add(together)
                together = []
            together.append((piece, gaussians.like(piece), std))
    _add(together)


def _add(together: Sequence[tuple[Tensor, Tensor, float]]) -> None:
    """Adds (piece, standard normal numbers, deviation) of several tensors in a few launches."""
    if not together:
        return
    pieces, noises, stds = (list(each) for each in zip(*together, strict=True))
    # Adding and subtracting it leaves a multiple of the grid; a power of two, so that nothing else is rounded.
    shifts = [1.5 * 2.0 ** (52 + math.frexp(std)[1] - 1 - _GRID_BITS) for std in stds]
    torch._foreach_mul_(noises, stds)
    torch._foreach_add_(noises, pieces)
    torch._foreach_add_(noises, shifts)
    torch._foreach_sub_(noises, shifts)
    torch._foreach_copy_(pieces, noises)


def added_delta(numbers: int, noise_multiplier: float, steps: int = 1) -> float:
    """What it adds to delta that noise ends at :data:`REACH` deviations: a bound for any example.

    An example moves the sum by 1 / ``noise_multiplier`` deviations at most, in a direction of its choice. What shows
    is a coordinate beyond the reach of noise alone. That a coordinate comes within e of the end has at most the
    probability that the radius does, exp(-(REACH - e)^2 / 2) + 2^-83, times that the angle allows it then,
    arccos(1 - e / REACH) / pi. The example may spread itself evenly over any number of coordinates; the worst is taken.

    Args:
        numbers: d, of all trainable parameters together (and of the counts of adaptive thresholds).
        noise_multiplier: sigma > 0.
        steps: over which it adds up.

    >>> f"{added_delta(10**8, 1.0, 10_000):.0e}"
    '2e-16'
    """
    worst, spread = 0.0, 1.0
    while spread <= numbers:
        near = min(1 / (noise_multiplier * math.sqrt(spread)), REACH)
        radius = math.exp(-((REACH - near) ** 2) / 2) + 2.0 ** -(63 + _FINISHING_BITS)
        # Rounded up to the next number of coordinates looked at, so that none between is missed.
        worst = max(worst, min(1.1 * spread, numbers) * radius * math.acos(1 - near / REACH) / math.pi)
        spread *= 1.1
    return min(1.0, steps * worst)


# -- How many examples of a logical batch lie within each group's threshold, and the next thresholds

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


# -- mechanism -------------------------------------------------------------------------------------


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
        source: as given.
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
        self.source = source
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

    @property
    def counts(self) -> Counts | None:
        """Of this logical batch, see :class:`QuantileCounts`; None where thresholds are fixed."""
        return None if self._counts is None else self._counts.counts

    @counts.setter
    def counts(self, counts: Counts) -> None:
        assert self._counts is not None
        self._counts.counts = counts

    def clip(self, group: int, norm_B: Tensor) -> Tensor:
        """Clipping factors (B,) of the examples whose gradients have these norms in a group.

        Adaptive thresholds count these examples: every example comes once per group and logical batch.
        """
        threshold = self.in_force.thresholds[group]
        if self._counts is not None:
            self._counts.add(group, norm_B, threshold)
        return clip_factors(self.plan.rule, norm_B, threshold, torch.where)

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
            if isinstance(self.source, SecureStream):
                raise GroupSearchError(
                    "Expected a generator to save the state of, found a secure stream, whose numbers cannot be drawn "
                    "again. Save without exact=True, or train without secure=True."
                )
            state["generator"] = self.source.get_state()
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
        elif not isinstance(self.source, SecureStream):
            make_secret(self.source)
        self._gaussians.forget()
        self.in_force = in_force
        if self._counts is not None and counts is not None:
            self._counts.counts = counts

    def _go_on_with(self, stream: Any) -> None:
        if stream is None or isinstance(self.source, SecureStream):
            raise GroupSearchError(
                "Expected a generator in the state and one here to go on with the same noise, found "
                f"{'a secure stream here' if stream is not None else 'none in the state'}. Save with exact=True and "
                "resume without secure=True, or load without exact=True: noise is then drawn anew."
            )
        try:
            self.source.set_state(stream)
        except (RuntimeError, TypeError) as error:
            raise GroupSearchError(
                f"Expected the state of a generator on {self.source.device}, found one that it refuses "
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
