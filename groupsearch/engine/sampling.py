"""Poisson sampling of logical batches, and their division into physical ones.

Poisson sampling is what :mod:`groupsearch.engine.accounting` counts: every example enters a
batch independently with the same probability, so batches vary in size and may be empty.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler, default_collate

from groupsearch.errors import GroupSearchError
from groupsearch.randomness import SecureStream, Source, draw_words, make_secret

Drawn = tuple[tuple[int, ...], Tensor | None]  # sizes of the physical batches, generator's state afterwards


class PoissonSampler(Sampler[Tensor]):
    """Batches of indices in which every example appears independently with probability ``rate``.

    Iterating yields ``steps`` int64 tensors of ascending indices without repeats, possibly empty, on the
    generator's device. It serves as the ``batch_sampler`` of a ``torch.utils.data.DataLoader``, together
    with :class:`PoissonCollate`. Iterating again goes on with fresh batches; the same generator seed
    gives the same batches.

    Args:
        size: number of examples.
        rate: sampling probability, 0 < rate <= 1.
        steps: batches per iteration.
        generator: source of all randomness.

    Raises:
        GroupSearchError: when an argument is outside its range.
    """

    def __init__(self, size: int, rate: float, steps: int, generator: Source) -> None:
        _check_population(size, rate)
        if steps < 0:
            raise GroupSearchError(f"Expected steps >= 0, found {steps}.")
        self.size = size
        self.rate = rate
        self.steps = steps
        self.generator = generator

    def draw(self) -> Tensor:
        """The indices of one more batch."""
        # Uniforms of 53 bits: float32's come in steps of 2^-24, too coarse for the rates of large data sets.
        words = draw_words(self.generator, self.size).bitwise_and_(2**53 - 1)
        return (words.to(torch.float64) < self.rate * 2.0**53).nonzero().squeeze(1)

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.steps):
            yield self.draw()

    def __len__(self) -> int:
        return self.steps


class PoissonCollate:
    """Torch's default collation, with a batch of no rows where Poisson sampling took no example.

    The first dimension of every tensor is 0; the others, the dtype and the structure are those of
    ``example``, one element of the data set.
    """

    def __init__(self, example: Any) -> None:
        self._empty = _no_rows(default_collate([example]))

    def __call__(self, examples: Sequence[Any]) -> Any:
        """The batch of these examples."""
        return default_collate(list(examples)) if len(examples) else self._empty


def physical_chunks(indices: Tensor, limit: int | None) -> tuple[Tensor, ...]:
    """The logical batch in consecutive pieces of at most ``limit`` examples; none where it is empty.

    Raises:
        GroupSearchError: when the limit is less than one.
    """
    if limit is not None and limit < 1:
        raise GroupSearchError(f"Expected a physical batch limit of at least 1, found {limit}.")
    if len(indices) == 0:
        return ()
    return torch.split(indices, limit or len(indices))


class PhysicalDraws:
    """Logical batches in physical chunks, in the order drawn; workers that load ahead have them drawn ahead.

    Args:
        sampler: draws a logical batch's indices.
        limit: the most examples in a chunk; None for no limit.

    Raises:
        GroupSearchError: when the limit is less than one.
    """

    def __init__(self, sampler: PoissonSampler, limit: int | None) -> None:
        physical_chunks(torch.empty(0), limit)  # refuses a limit below one
        self.sampler = sampler
        self._limit = limit
        self._expected = self.state()
        self._left = 0
        self._kept: deque[tuple[Drawn, tuple[Tensor, ...]]] = deque()  # drawn and not finished, the eldest first
        self._drawn: deque[Drawn] = deque()
        self._unfed: deque[Tensor] = deque()

    def begin(self, count: int) -> None:
        """Hand out ``count`` logical batches, beginning with those that were drawn before and not finished.

        Raises:
            GroupSearchError: when somebody else drew from the generator since the last logical batch.
        """
        self._check_generator()
        self._left = count - len(self._kept)
        self._drawn = deque(drawn for drawn, _ in self._kept)
        self._unfed = deque(chunk for _, chunks in self._kept for chunk in chunks)

    def finish(self) -> None:
        """The eldest logical batch is not needed again."""
        self._kept.popleft()

    def restart(self, state: Tensor | None) -> Tensor | None:
        """Forget what was drawn, and draw from a generator in this state, or filled anew by the system; its state."""
        generator = self.sampler.generator
        if not isinstance(generator, SecureStream):
            make_secret(generator) if state is None else generator.set_state(state)
        self._kept.clear()
        self._expected = self.state()
        return self._expected

    def next(self) -> Drawn:
        """Sizes of the next logical batch's chunks, and the generator's state after it, for the loop."""
        if not self._drawn:
            self._draw()
        return self._drawn.popleft()

    def fed(self) -> Iterator[list[int]]:
        """The indices of one chunk after the other, for the loader; ends with the last logical batch."""
        while self._unfed or self._left:
            if self._unfed:
                yield self._unfed.popleft().tolist()
            else:
                self._draw()

    def _draw(self) -> None:
        self._check_generator()
        chunks = physical_chunks(self.sampler.draw().cpu(), self._limit)
        self._left -= 1
        self._expected = self.state()
        drawn = tuple(len(chunk) for chunk in chunks), self._expected
        self._kept.append((drawn, chunks))
        self._drawn.append(drawn)
        self._unfed.extend(chunks)

    def state(self) -> Tensor | None:
        """Of the generator now; None where it has none."""
        generator = self.sampler.generator
        return None if isinstance(generator, SecureStream) else generator.get_state()

    def _check_generator(self) -> None:
        state = self.state()
        if state is not None and self._expected is not None and not torch.equal(state, self._expected):
            raise GroupSearchError(
                "The generator of the batches was used elsewhere. Sampling must be independent of the noise and of "
                "everything else: give it a generator of its own."
            )


def batch_quantile(size: int, rate: float, q: float) -> int:
    """The least batch size that a Poisson batch stays within with probability ``q``.

    Args:
        size: number of examples.
        rate: sampling probability, 0 < rate <= 1.
        q: probability, 0 < q < 1.

    Raises:
        GroupSearchError: when an argument is outside its range.

    >>> batch_quantile(50_000, 0.02, 0.999)
    1098
    """
    _check_population(size, rate)
    if not 0 < q < 1:
        raise GroupSearchError(f"Expected a probability q between 0 and 1, found {q}.")
    # Nothing that counts lies beyond 12 standard deviations, or 40 examples where there are few.
    reach = 12 * math.sqrt(size * rate * (1 - rate)) + 40
    low, high = max(0, int(size * rate - reach)), min(size, int(size * rate + reach))
    taken = torch.arange(low, high + 1, dtype=torch.float64, device="cpu")
    left = size - taken
    log_weights = torch.xlogy(taken, torch.tensor(rate, dtype=torch.float64, device="cpu"))
    log_weights += torch.special.xlog1py(left, torch.tensor(-rate, dtype=torch.float64, device="cpu"))
    log_weights -= torch.lgamma(taken + 1) + torch.lgamma(left + 1)
    return low + int(torch.searchsorted(log_weights.softmax(0).cumsum(0), q))


def _check_population(size: int, rate: float) -> None:
    if size < 1:
        raise GroupSearchError(f"Expected at least one example to sample from, found {size}.")
    if not 0 < rate <= 1:
        raise GroupSearchError(
            f"Expected a sampling rate in (0, 1], found {rate}. It is the expected batch size over the number of "
            f"examples."
        )


def _no_rows(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch[:0]
    if isinstance(batch, Mapping):
        return {key: _no_rows(value) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return [_no_rows(value) for value in batch]
    return batch
