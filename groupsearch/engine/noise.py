"""Gaussian noise on a clipped sum: what it is drawn from, how far it reaches, and how it is rounded.

Why not ``normal_`` in float32: it makes two Gaussians of two uniforms of 24 bits. None exceeds 5.77, the largest are
few and far between, and an example that pushes one of many coordinates beyond shows. Here the radius comes from 83
bits and the noise reaches :data:`REACH`; :func:`added_delta` has what that end costs.

Why not add in float32: the last digits of a sum tell what noise cannot have been added to which number. Noise is
added in float64 and the result rounded to a grid of 2^-20 deviations, which only the deviation decides, before
anybody sees it. A cell of the grid holds 2^29 float64 numbers or more as far as noise reaches, so that no cell can be
told to be out of reach. This is no proof for floating point: the probability of a cell is right to about 2^-29 of
itself, and the sums that noise is added to are rounded like all floating point sums, with their examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from groupsearch.errors import GroupSearchError
from groupsearch.randomness import Source, draw_words

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
