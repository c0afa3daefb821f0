"""What Gram matrices say of a clip plan: sums over examples, expectations, and the score made of them.

Shapes: n batches, of which some are of the same instant of training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ProxyScore:
    """How well a private step with a clip plan follows the gradient, where the Grams were taken.

    The true gradient is the mean of unclipped ones over the examples that the batches were drawn from; an
    update is a noisy clipped sum over a Poisson sample, divided by its expected size.

    Attributes:
        value: expected inner product of update and true gradient, over the norm of the one and the root mean
            square norm of the other. Higher is better: among updates of one length it is how fast the loss falls.
            Adam divides by nearly the same number in every coordinate as long as noise outweighs the gradient.
        cosine: of the mean clipped and the true gradient: 1 where clipping does not turn it.
        norm_kept: norm of the mean clipped gradient over that of the true one.
        snr: squared norm of the mean clipped gradient over the variance of the update (sampling and noise).
    """

    value: float
    cosine: float
    norm_kept: float
    snr: float


@dataclass(frozen=True)
class Moments:
    """Sums over the examples i, j of each batch, (n,) each; c is the clipped gradient, g the unclipped one.

    Attributes:
        gradient: sum over i, j of <g_i, g_j>, the squared norm of the sum of the gradients.
        inner: sum of <c_i, g_j>, the inner product of the clipped and the unclipped sum.
        clipped: sum of <c_i, c_j>, the squared norm of the clipped sum.
        own_gradient: the part of ``gradient`` with i = j.
        own_inner: the part of ``inner`` with i = j.
        own_clipped: the part of ``clipped`` with i = j.
    """

    gradient: Floats
    inner: Floats
    clipped: Floats
    own_gradient: Floats
    own_inner: Floats
    own_clipped: Floats


@dataclass(frozen=True)
class Expectations:
    """Expected products of a random example's clipped gradient c and unclipped one g, per instant of training.

    Estimated from pairs of distinct examples, without bias, so that a squared norm may come out negative.

    Attributes:
        gradient: |E g|^2, the squared norm of the true gradient.
        inner: <E c, E g>.
        clipped: |E c|^2.
        own_clipped: E |c|^2.
    """

    gradient: Floats
    inner: Floats
    clipped: Floats
    own_clipped: Floats
