"""Logical batches that come in physical ones: what a training loop iterates.

A logical batch is one Poisson sample: the unit of an optimizer step and of accounting. A physical
batch is a piece of it that fits into memory: the unit of a backward pass.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from groupsearch.engine.ranks import Ranks, generator_of
from groupsearch.errors import GroupSearchError
from groupsearch.randomness import (
    SecureStream,
    Source,
    draw_words,
    make_secret,
    secret_generator,
    seeded_generator,
    source_of,
)
from groupsearch.workloads.batches import group_views

# -- Poisson sampling of logical batches, and their division into physical ones --------------------
#
# Poisson sampling is what :mod:`groupsearch.privacy.accounting` counts: every example enters a
# batch independently with the same probability, so batches vary in size and may be empty.

Drawn = tuple[tuple[int, ...], Tensor | None]  # sizes of the physical batches, generator's state afterwards


class PoissonSampler(Sampler[Tensor]):
    """Batches of indices in which every example appears independently with probability ``rate``.

    Iterating yields ``steps`` int64 tensors of ascending indices without repeats, possibly empty, on the
    generator's device. It serves as the ``batch_sampler`` of a ``torch.utils.data.DataLoader`` whose
    ``collate_fn`` takes no examples, too. Iterating again goes on with fresh batches; the same generator seed gives the
    same batches.

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

    Attributes:
        sampler: as given.
        mine: which of a logical batch's indices are handed out here.

    Raises:
        GroupSearchError: when the limit is less than one.
    """

    def __init__(self, sampler: PoissonSampler, limit: int | None) -> None:
        physical_chunks(torch.empty(0), limit)  # refuses a limit below one
        self.sampler = sampler
        self.limit = limit
        self.mine: Callable[[Tensor], Tensor] = lambda indices: indices
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
        chunks = physical_chunks(self.mine(self.sampler.draw().cpu()), self.limit)
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


# -- loading ---------------------------------------------------------------------------------------

Examples = Mapping[str, Tensor] | Dataset[Any] | Sequence[Any]


class LogicalBatch:
    """One Poisson sample; iterating it yields its physical batches, none where no example was taken.

    Attributes:
        examples: how many examples it has, possibly 0; a private number.
        handed_out: how many of them are in the physical batches so far; likewise.
        stage: ``new``; ``begun`` from its first physical batch on; ``finished`` when it was iterated
            to its end; ``stepped`` after :meth:`PoissonBatches.check_step`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        pieces: Iterator[Any],
        on_end: Callable[[LogicalBatch], None],
        on_piece: Callable[[Any], None] = lambda piece: None,
    ) -> None:
        self.examples = sum(sizes)
        self.handed_out = 0
        self.stage = "new"
        self._sizes = tuple(sizes)
        self._left = len(sizes)
        self._pieces = pieces
        self._on_end = on_end
        self._on_piece = on_piece

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, item: object) -> bool:
        return False  # it is no mapping; without this method `"labels" in batch` would load it and lose it

    def __iter__(self) -> Iterator[Any]:
        if self.stage in ("finished", "stepped") and self.examples:
            raise GroupSearchError(
                "A logical batch was iterated a second time; its examples have been handed out. Take the next one, or "
                "keep this one's physical batches in a list."
            )
        while self._left:
            self.handed_out += self._sizes[-self._left]
            self._left -= 1
            self.stage = "begun"
            piece = next(self._pieces)
            self._on_piece(piece)
            yield piece
        if self.stage in ("new", "begun"):
            self.stage = "finished"
            self._on_end(self)


class PoissonBatches:
    """Poisson samples of a data set, each cut into physical batches that fit into memory.

    ``for logical in batches: for batch in logical: ...`` takes one optimizer step per ``logical`` and
    one backward per ``batch``. Every example enters a logical batch independently with the same
    probability, and the physical batches of a logical one are together exactly its examples, each once,
    whatever the number of workers. Iterating again after a break goes on with the first logical batch
    that was not finished; iterating again after the end goes on with fresh ones.

    Where an engine has them (``make_private(..., batches=...)``) every logical batch that was drawn and handed out
    must be stepped on before the next one: which batches are left out could tell of the data, and no noise hides it.

    In a training on several processes each has the whole data set, and is handed out its part of every logical batch,
    from ``make_private`` on: what is said of a logical batch below is then said of that part.

    Args:
        dataset: a mapping of tensors that lead with the examples, or a map-style data set.
        expected_batch_size: sampling rate times number of examples; a logical batch's mean size.
        steps: logical batches per iteration.
        physical_batch: the most examples in a physical batch; None for no limit.
        generator: draws the batches and nothing else, for experiments alone: epsilon holds for nobody who knows its
            seed. Seed it apart from the noise's: sampling and noise must be independent. By default one that
            the operating system's entropy fills, see :mod:`groupsearch.randomness`.
        secure: draw the batches from a cipher, see :class:`groupsearch.randomness.SecureStream`.
        collate_fn: makes a physical batch of a list of elements; torch's default if None.
        views: K, how many times every example of a batch is loaded: tensors (B, ...) come as (B, K, ...). An example
            is clipped once, whatever its views (:func:`groupsearch.workloads.batches.mean_over_views`).
        augment: is given every physical batch as it was collated, with K rows of an example side by side, and
            changes row by row; None where the data set itself gives another view at every look.
        num_workers: processes that load; 0 for none.
        pin_memory: whether to load into page-locked memory.

    Attributes:
        taken: logical batches finished so far, over all iterations.
        on_piece: is shown every physical batch before it is handed out.
        private: whether an engine steps on them.
        seeded: whether the generator was given, so that somebody may know its seed.

    Raises:
        GroupSearchError: for a number outside its range, a data set without length and elements, or a
            generator where batches are to be secure.
    """

    def __init__(  # noqa: PLR0913 - what a loader may be told, by name
        self,
        dataset: Examples,
        *,
        expected_batch_size: float,
        steps: int,
        physical_batch: int | None = None,
        generator: torch.Generator | None = None,
        secure: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        views: int = 1,
        augment: Callable[[Any], Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset, self._collate = _map_style(dataset, collate_fn)
        size = len(self.dataset)
        if steps < 1:
            raise GroupSearchError(f"Expected at least one step, found {steps}.")
        if views < 1:
            raise GroupSearchError(f"Expected at least one view of every example, found {views}.")
        self.seeded = generator is not None
        self.expected_batch_size = float(expected_batch_size)
        self.steps = steps
        self.taken = 0
        self.on_piece: Callable[[Any], None] = lambda piece: None
        self.private = False
        self._size = size
        self._ranks: Ranks | None = None
        rate, source = expected_batch_size / max(size, 1), source_of("cpu", generator, secure)
        self._draws = PhysicalDraws(PoissonSampler(size, rate, steps, source), physical_batch)
        self._views = views
        if views > 1 or augment is not None:
            self._collate = _Views(self._collate, views, augment)
        self._next_state = self._draws.state()
        self._loading: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        self._current: LogicalBatch | None = None

    @property
    def sampling_rate(self) -> float:
        """Probability with which each example enters a logical batch."""
        return self._draws.sampler.rate

    @property
    def physical_batch(self) -> int | None:
        """The most examples in a physical batch; None for no limit."""
        return self._draws.limit

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[LogicalBatch]:
        self._check_stepped()
        left = self.steps - self.taken % self.steps
        self._draws.begin(left)
        pieces = self._load()
        for _ in range(left):
            sizes, state = self._draws.next()
            self._current = batch = LogicalBatch(sizes, pieces, partial(self._end, state), self._see)
            yield batch
            self._check_handed_out(batch)
        next(pieces, None)  # there is none; asking lets the workers end

    def spread(self, ranks: Ranks) -> None:
        """Hand out one rank's part of every logical batch from now on; to be called on all ranks.

        All draw the same logical batch and take every size-th example of it. From a cipher, which no two processes
        share, each draws from every size-th example of the data: the parts make up a Poisson sample as well, but
        differ more in size.
        """
        self._ranks = ranks
        draws, size = self._draws, len(range(ranks.rank, self._size, ranks.size))
        if not isinstance(draws.sampler.generator, SecureStream):
            draws.mine = lambda indices: indices[ranks.rank :: ranks.size]
            self._share()
        elif draws.sampler.size == self._size:
            if not size:
                raise GroupSearchError(f"Expected an example for every rank, found {self._size} for {ranks.size}.")
            draws.sampler.size = size
            draws.mine = lambda indices: indices * ranks.size + ranks.rank

    def described(self) -> dict[str, object]:
        """What must be the same on all ranks."""
        told = {**self._population(), "steps": self.steps, "views": self._views, "taken": self.taken}
        source = self._draws.sampler.generator
        shown = source if self.seeded and isinstance(source, torch.Generator) else None
        return {
            "data": told,
            "batches' generator": generator_of(shown),
            "secure batches": isinstance(source, SecureStream),
        }

    def _share(self) -> None:
        if self._ranks is not None and not isinstance(self._draws.sampler.generator, SecureStream):
            self._ranks.share(self._draws.sampler.generator)
            self._next_state = self._draws.restart(self._draws.sampler.generator.get_state())

    def first(self, count: int) -> Any:
        """The first examples of the data as a physical batch; nothing is drawn."""
        numbers = [i for i in range(min(count, len(self.dataset))) for _ in range(self._views)]
        fetch = getattr(self.dataset, "__getitems__", None)
        return self._collate(fetch(numbers) if fetch else [self.dataset[i] for i in numbers])

    def check_step(self, examples: int) -> None:
        """Check that an optimizer step is on one whole logical batch, for the first time.

        Args:
            examples: how many examples were clipped since the last step.

        Raises:
            GroupSearchError: when the logical batch at hand is not finished, has another number of
                examples, or was stepped on already.
        """
        current = self._current
        if current is not None and not current.examples:
            list(current)  # one that nobody iterated is finished too
        if current is None or current.stage != "finished" or examples != current.examples:
            found = "none yet" if current is None else f"one that is {current.stage}"
            if current is not None and current.stage == "finished":
                found = "a step on other examples than those of the one at hand, that is finished"
            raise GroupSearchError(
                f"Expected an optimizer step on the examples of one finished logical batch, found {found}. Epsilon is "
                "counted for Poisson samples, each used whole and once: call backward on every physical batch, and "
                "step once after the last."
            )
        current.stage = "stepped"

    def is_whole(self, examples: int) -> bool:
        """Whether so many examples are all of the logical batch at hand."""
        return self._current is not None and examples == self._current.examples

    def check_handed_out(self, examples: int) -> None:
        """Check that what was backpropagated is of the logical batch at hand, and no example of it twice.

        Args:
            examples: how many examples were clipped since the last step.

        Raises:
            GroupSearchError: when that is more than were handed out.
        """
        if self._current is None or self._current.stage == "stepped" or examples > self._current.handed_out:
            raise GroupSearchError(
                "Found backward on more examples than were handed out of the logical batch at hand: one of them would "
                "be clipped twice, or is no part of the Poisson sample. Call backward once on every physical batch; "
                "to begin anew after an accident, call optimizer.zero_grad() first."
            )

    def state_dict(self, *, exact: bool = False) -> dict[str, Any]:
        """How many logical batches were finished, between two of them.

        Args:
            exact: whether to save the generator as well, where the next logical batch begins: what was loaded ahead
                is drawn again. Whoever reads such a state knows who is in which batch: it is for experiments.

        Raises:
            GroupSearchError: in the middle of a logical batch, or before the step on it.
        """
        self._check_stepped()
        if self._current is not None and self._current.stage == "begun":
            raise GroupSearchError(
                "Expected to save between two logical batches, found one that is handed out in part. Save after the "
                "optimizer step."
            )
        state = {**self._population(), "taken": self.taken}
        if not exact:
            return state
        if self._next_state is None:
            raise GroupSearchError(
                "Expected a generator to save the state of, found a secure stream, whose batches cannot be drawn "
                "again. Save without exact=True, or sample without secure=True."
            )
        return {**state, "generator": self._next_state.clone()}

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = False) -> None:
        """Go on where :meth:`state_dict` was called, also in the middle of an iteration, with fresh batches.

        The generator, also one that was given, is filled anew from the operating system.

        Args:
            state: what :meth:`state_dict` returned.
            exact: whether the batches to come are to be those of the run that saved. Epsilon holds for one
                continuation alone.

        Raises:
            GroupSearchError: when the state is of other data or another expected batch size, or holds no
                generator to go on with.
        """
        own = self._population()
        found = {key: state.get(key) for key in own}
        if found != own or "taken" not in state:
            raise GroupSearchError(
                f"Expected what state_dict() returned of batches with {own}, found {found}. Resume with the same data "
                "and the same expected batch size."
            )
        if exact and (self._next_state is None or "generator" not in state):
            raise GroupSearchError(
                "Expected a generator in the state and one here to go on with the same batches, found none. Save with "
                "exact=True and resume without secure=True, or load without exact=True: batches are then drawn anew."
            )
        self.taken = int(state["taken"])
        self._next_state = self._draws.restart(state["generator"] if exact else None)
        self._share()
        self._current = None

    def _see(self, piece: Any) -> None:
        self.on_piece(piece)

    def _end(self, state: Tensor | None, batch: LogicalBatch) -> None:
        if batch is self._current:
            self.taken, self._next_state = self.taken + 1, state
            self._draws.finish()

    def _population(self) -> dict[str, Any]:
        return {"size": self._size, "expected_batch_size": self.expected_batch_size}

    def _load(self) -> Iterator[Any]:
        # With a generator of its own: a loader draws its workers' seed from torch's global one otherwise, and
        # a resumed run, which makes one loader more, would differ from then on.
        own, views = self._workers_generator(), self._views
        draws: Any = ([i for i in chunk for _ in range(views)] for chunk in self._draws.fed())
        return iter(
            DataLoader(self.dataset, batch_sampler=draws, collate_fn=self._collate, generator=own, **self._loading)
        )

    def _workers_generator(self) -> torch.Generator:
        """Apart from the batches' own: a worker's seed, which a data set may show, must foretell none of them."""
        source = self._draws.sampler.generator
        if isinstance(source, SecureStream):
            return secret_generator()
        place = () if self._ranks is None or not self._ranks.rank else (self._ranks.rank,)
        seed = source.initial_seed() % 2**64, self.taken, *place
        return seeded_generator(seed, "workers")  # another one every time

    def _check_handed_out(self, batch: LogicalBatch) -> None:
        if batch is not self._current:
            raise GroupSearchError(
                "Found two iterations over the same batches at once. Let one end before the other begins."
            )
        if batch.stage in ("new", "begun") and batch.examples:
            raise GroupSearchError(
                "The next logical batch was asked for while one was not finished: two would go into one step, or "
                "examples be lost. Iterate every logical batch to its end, one per optimizer step (with transformers' "
                "Trainer: gradient_accumulation_steps=1)."
            )
        if not batch.examples:
            list(batch)  # one that nobody iterated is finished too
        self._check_stepped()

    def _check_stepped(self) -> None:
        if self.private and self._current is not None and self._current.stage == "finished":
            raise GroupSearchError(
                "A logical batch was drawn and finished but not stepped on. None may be left out, whatever its losses "
                "are: which ones are would tell of the data, and no noise hides it. An example whose gradient is not "
                "finite adds nothing, and an empty batch takes a step of noise alone. Call backward on all of its "
                "physical batches (again, if their sums were given up: keep them in a list), then optimizer.step()."
            )


class _Rows(Dataset[Any]):
    """A mapping of tensors as a map-style data set that yields whole batches at once."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __len__(self) -> int:
        return len(next(iter(self._tensors.values())))

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {name: tensor[indices] for name, tensor in self._tensors.items()}


class _Views:
    """Collates what was loaded several times, side by side; a class, so that workers can be sent it."""

    def __init__(self, collate: Callable[..., Any], views: int, augment: Callable[[Any], Any] | None) -> None:
        self._collate, self._views, self._augment = collate, views, augment

    def __call__(self, elements: Any) -> Any:
        rows = self._collate(elements)
        rows = rows if self._augment is None else self._augment(rows)
        return rows if self._views == 1 else group_views(rows, self._views)


def _as_it_is(batch: Any) -> Any:
    return batch


def _map_style(examples: Examples, collate_fn: Callable[[list[Any]], Any] | None) -> tuple[Any, Callable[..., Any]]:
    if isinstance(examples, Mapping):
        lengths = {len(t) if isinstance(t, Tensor) and t.dim() else None for t in examples.values()}
        if len(lengths) != 1 or None in lengths:
            raise GroupSearchError(
                f"Expected a mapping of tensors with the same number of examples, found lengths {lengths}. Let the "
                "first dimension of every tensor be the examples."
            )
        return _Rows(examples), collate_fn or _as_it_is
    sized = hasattr(examples, "__len__") and hasattr(examples, "__getitem__")
    if isinstance(examples, (IterableDataset, tuple)) or not sized:
        raise GroupSearchError(
            f"Expected a mapping of tensors or a map-style data set, with a length and elements by number, found "
            f"{type(examples).__name__}. Poisson sampling chooses among all examples; wrap tensors in a TensorDataset."
        )
    return examples, collate_fn or default_collate
