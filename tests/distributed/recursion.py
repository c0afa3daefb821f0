"""The methods once more, as loops over workers in NumPy; nothing here is taken from the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Vector = np.ndarray
GROUPS = (3, 2)


def quadratics(workers: int, dimension: int, seed: int = 0) -> list[tuple[Vector, Vector]]:
    """A matrix and a shift for each worker; its gradient at x is A (x - b), and the workers do not agree."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(workers):
        factor = rng.normal(size=(dimension, dimension)) / np.sqrt(dimension)
        found.append((factor @ factor.T + 0.1 * np.eye(dimension), 3 * rng.normal(size=dimension)))
    return found


def clip(vector: Vector, thresholds: Sequence[float], sizes: Sequence[int]) -> Vector:
    parts, at = [], 0
    for bound, size in zip(thresholds, sizes, strict=True):
        part = vector[at : at + size]
        norm = np.sqrt(np.dot(part, part))
        parts.append(part if norm <= bound else part * (bound / norm))
        at += size
    return np.concatenate(parts)


def smooth(vector: Vector, thresholds: Sequence[float], sizes: Sequence[int], alpha: float) -> Vector:
    parts, at = [], 0
    for bound, size in zip(thresholds, sizes, strict=True):
        part = vector[at : at + size]
        parts.append(bound * part / (alpha + np.sqrt(np.dot(part, part))))
        at += size
    return np.concatenate(parts)


def run(
    method: str,
    gradients: Sequence[Callable[[Vector], Vector]],
    start: Vector,
    *,
    steps: int,
    gamma: float,
    thresholds: Sequence[float],
    sizes: Sequence[int],
    noise: Callable[[int, int], Vector],
    beta1: float,
    beta2: float,
    alpha: float,
) -> list[Vector]:
    """The points; ``noise(k, i)`` is what worker i adds in step k."""
    n, d, x, points = len(gradients), len(start), start.copy(), [start.copy()]
    shifts, momenta, aggregate = [np.zeros(d) for _ in range(n)], [np.zeros(d) for _ in range(n)], np.zeros(d)
    for k in range(steps):
        sums = np.zeros(d)
        for i in range(n):
            g = gradients[i](x)
            if method in ("clip-gd", "clip-sgd", "dp-sgd"):
                sums += clip(g, thresholds, sizes) + noise(k, i)
            elif method in ("clip21-gd", "clip21-sgd", "dp-clip21-gd"):
                c = clip(g - shifts[i], thresholds, sizes)
                shifts[i] = shifts[i] + c
                sums += c + noise(k, i)
            elif method in ("clip21-sgd2m", "dp-clip21-sgd2m"):
                momenta[i] = (1 - beta1) * momenta[i] + beta1 * g
                c = clip(momenta[i] - shifts[i], thresholds, sizes)
                shifts[i] = shifts[i] + beta2 * c
                sums += beta2 * (c + noise(k, i))
            elif method in ("alpha-normec", "dp-alpha-normec"):
                c = smooth(g - shifts[i], thresholds, sizes, alpha)
                shifts[i] = shifts[i] + c
                sums += c + noise(k, i)
            else:
                raise AssertionError(method)
        if method in ("clip-gd", "clip-sgd", "dp-sgd"):
            x = x - gamma * sums / n
        else:
            aggregate = aggregate + sums / n
            step = aggregate / np.linalg.norm(aggregate) if "normec" in method else aggregate
            x = x - gamma * step
        points.append(x.copy())
    return points
