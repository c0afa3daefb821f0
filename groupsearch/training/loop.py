"""Differentially private training of a workload with a grouping, over many steps.

Initial weights, sampling, noise and dropout draw from separate streams, which nobody can draw again unless
a seed is given. Two groupings trained with the same seed start from the same weights and see the same
batches, so their difference is the grouping's: an experiment, whose epsilon holds for nobody who knows the seed.
With that seed they also have the same noise, so what they publish together is not covered by adding their epsilons.

Apart from the package, which names its functions and nothing else.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.engine.loading import LogicalBatch, PoissonBatches, physical_chunks
from groupsearch.engine.optimizers import make_optimizer
from groupsearch.engine.ranks import Ranks
from groupsearch.engine.truth.watch import EngineReport
from groupsearch.errors import GroupSearchError
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import Site
from groupsearch.randomness import Streams
from groupsearch.tracer.sites import sites_of
from groupsearch.training.checkpoints import Checkpoints, agreement, frozen_digest, learned, restore
from groupsearch.training.settings import (
    QUANTILES,
    CurvePoint,
    DivergedError,
    StepRecord,
    TrainResult,
    TrainSettings,
)
from groupsearch.workloads.batches import repeat_views
from groupsearch.workloads.blocks import checkpoint_as
from groupsearch.workloads.workload import Batch, Workload

# -- Whether the model in training is the one that its grouping was made for -----------------------


def check_sites(grouping: Grouping, observed: Sequence[Site]) -> None:
    """Raise unless a model's sites are, by name, parameters and order, those of the grouping.

    A plan tells which parameters share a threshold by the sites of the trace: with other sites in
    the model its groups, and with them the sensitivity that the noise is scaled to, would be wrong.
    Numbers of positions may differ, as batches of text do.

    Args:
        grouping: what the model is to be trained with.
        observed: what :func:`groupsearch.tracer.observe_sites` found in the model.

    Raises:
        GroupSearchError: naming the first site that differs.
    """
    for number, (expected, found) in enumerate(zip_longest(grouping.sites, observed)):
        if _told(expected) != _told(found):
            raise GroupSearchError(
                f"Expected the model to have the {len(grouping.sites)} sites that the grouping was made for, found "
                f"{len(observed)}, and at site {number} {_told(found)} instead of {_told(expected)}. Profile the "
                f"model again with the settings that it is trained with, and make the grouping from that trace."
            )


def _told(site: Site | None) -> str:
    return "none" if site is None else f"{site.name} (parameters {', '.join(site.parameters)})"


# -- loop ------------------------------------------------------------------------------------------

# float16 takes small gradients for zero. A scale that adapts tells of overflows without noise, so it stays as it is.
_LOSS_SCALE = 2.0**10
_SHOWN = 16

OnStep = Callable[[int, CurvePoint | None], None]
OnEnd = Callable[[nn.Module], None]
Track = Callable[[StepRecord], None]


def train(  # noqa: PLR0913 - what is told while it runs is three functions, each of another moment
    workload: Workload,
    grouping: Grouping | None,
    settings: TrainSettings,
    on_step: OnStep | None = None,
    *,
    checkpoints: Checkpoints | None = None,
    on_end: OnEnd | None = None,
    track: Track | None = None,
) -> TrainResult:
    """Trains a freshly built model of the workload, with differential privacy unless ``grouping`` is None.

    Batches are Poisson samples of the training data, processed in pieces of at most
    ``physical_batch`` examples. On a CPU the same arguments with the same seed give the same numbers, bit for bit.
    Private training begins with a check of the model on a few of the examples, as it is trained: its
    sites must be those of the grouping, and every example's gradient that of plain autograd on it alone
    (:mod:`groupsearch.engine.truth`). A watch looks at some of the batches again.

    Where a process group is initialised all its processes train together, as :func:`groupsearch.engine.make_private`
    has it; rank 0 alone reads and writes checkpoints. ``physical_batch`` is then that of each.

    Args:
        workload: must have data.
        grouping: which sites share a clipping factor; None trains the same way without clipping
            and without noise, for reference.
        settings: see :class:`TrainSettings`.
        on_step: called after every step with its number, from 1, and with the point of the curve
            where the step was evaluated. What it raises ends the training. A training that is gone on with
            begins with the points there were.
        checkpoints: where to write checkpoints, and whether to go on with the one that is there.
        on_end: called with the trained model, without the engine.
        track: called after every step of this process with what it can be followed by, which changes no number of the
            training. What it is told is exact; see :class:`StepRecord`.

    Raises:
        DivergedError: when a weight is no longer finite. Nothing is decided by losses or metrics, which are of
            private data: no step is skipped, repeated or the last because of them.
        UnsupportedModelError: when the model cannot be trained privately, or has no blocks to checkpoint.
        GroupSearchError: when the workload has no data, when both or neither of epsilon and the
            noise multiplier are given for private training, or when the model has other sites than
            the grouping; nothing has been trained then. For a checkpoint of another training, or one that cannot be
            written.
    """
    if workload.data is None:
        raise GroupSearchError(
            f"Expected a workload with data to train on, found none in {workload.name!r}. Give its Workload a "
            f"`data=Data(train=..., validation=...)`."
        )
    size = workload.data.train_size
    noise_multiplier = 0.0 if grouping is None else settings.noise_multiplier_for(size)
    statement = None if grouping is None else settings.statement(size)
    tell = on_step or (lambda step, point: None)
    known = agreement(workload, grouping, settings)
    ranks = _ranks(grouping)
    resumed = _read(checkpoints, known, ranks)
    run = _Run(workload, settings, grouping, noise_multiplier, resumed, ranks)
    run.seen = None if track is None else _Seen()
    points, seconds, taken = _so_far(resumed)
    for point in points:
        tell(point.step, point)
    with run.attached():
        if resumed is not None and checkpoints is not None:
            run.restore(resumed, checkpoints.path)
            tell(taken, None)
        for step, logical in enumerate(run.batches if taken < settings.steps else (), start=taken + 1):
            seconds.append(run.step(step, logical))
            due = run.evaluate(step) if run.is_due(step) else None
            if due is not None:
                points.append(due)
            tell(step, due)
            if track is not None and run.seen is not None:
                spent = None if due is None else run.epsilon(settings.delta_for(size))
                track(run.seen.record(step, seconds[-1], spent, due))
            if checkpoints is not None and checkpoints.every and step % checkpoints.every == 0:
                run.write(checkpoints, step, {"agreed": known, "points": _rows(points), "seconds": seconds})
    if on_end is not None:
        on_end(run.model)
    return TrainResult(
        metric=points[-1].metric,
        metric_name=workload.metric_name,
        curve=tuple(points),
        step_seconds=statistics.median(seconds),
        epsilon=math.inf if statement is None else statement.epsilon,
        delta=settings.delta_for(size),
        noise_multiplier=noise_multiplier,
        steps=settings.steps,
        statement=statement,
        added_delta=0.0 if run.engine is None else run.engine.added_delta,
        checked=None if run.report is None else run.report.checked,
        watched=None if run.report is None else run.report.watched,
    )


def _ranks(grouping: Grouping | None) -> Ranks | None:
    ranks = Ranks.of(None)
    if ranks is not None and grouping is None:
        raise GroupSearchError(
            f"Expected a grouping to train with on {ranks.size} processes, found none: training without privacy is for "
            "reference. Run it in one process."
        )
    return ranks


def _rows(points: Sequence[CurvePoint]) -> list[tuple[Any, ...]]:
    return [(p.step, p.loss, p.metric, p.thresholds) for p in points]


def _read(checkpoints: Checkpoints | None, known: Mapping[str, str], ranks: Ranks | None) -> dict[str, Any] | None:
    """The checkpoint to go on with, if there is one; on several processes rank 0 reads it for all."""
    if checkpoints is None or ranks is None:
        return None if checkpoints is None else checkpoints.read(known)
    found: list[dict[str, Any] | None] = [None]

    def read() -> dict[str, object]:
        if ranks.rank == 0:
            found[0] = checkpoints.read(known)
        return {}

    ranks.alike("the checkpoint", read)
    told: dict[str, Any] | None = ranks.tell(found[0])
    return told


def _so_far(resumed: Mapping[str, Any] | None) -> tuple[list[CurvePoint], list[float], int]:
    """The curve, the steps' seconds and how many steps were taken when the checkpoint was written."""
    if resumed is None:
        return [], [], 0
    points = [CurvePoint(step, loss, metric, tuple(more)) for step, loss, metric, more in resumed["points"]]
    return points, list(resumed["seconds"]), int(resumed["step"])


class _Seen:
    """What is seen of the examples of a logical batch, kept on the device until it is asked for."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._thresholds: tuple[float, ...] = ()

    def add(self, losses_B: Tensor, engine: PrivateEngine | None) -> None:
        """Examples that backward has reached; with what they are clipped by, if they are."""
        self._losses.append(losses_B.detach())
        if engine is not None:
            self._norms.append(engine.norms)
            self._thresholds = engine.mechanism.thresholds  # adaptive ones are others after the step

    def record(self, step: int, seconds: float, epsilon: float | None, point: CurvePoint | None) -> StepRecord:
        """What was seen since the last record."""
        losses = torch.cat(self._losses).double().cpu() if self._losses else torch.empty(0, device="cpu")
        clipped = norms = None
        if self._norms:
            norms_BM = torch.cat(self._norms).double().cpu()
            thresholds_M = torch.tensor(self._thresholds, dtype=torch.float64, device="cpu")
            clipped = tuple((norms_BM > thresholds_M).double().mean(0).tolist())
            shares = torch.tensor(QUANTILES, dtype=torch.float64, device="cpu")
            # Some norm of those there are: between a finite and an infinite one there is no number.
            norms = tuple(map(tuple, norms_BM.quantile(shares, dim=0, interpolation="nearest").T.tolist()))
        loss = losses.mean().item() if len(losses) else None
        self._losses, self._norms = [], []
        return StepRecord(step, epsilon, seconds, len(losses), loss, clipped, norms, point)


class _Run:
    """A model in training: its optimizer, its batches, its judge."""

    def __init__(
        self,
        workload: Workload,
        settings: TrainSettings,
        grouping: Grouping | None,
        noise_multiplier: float,
        resumed: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        assert workload.data is not None  # it was looked for
        self.workload = workload
        self.data = data = workload.data
        self.settings = settings
        self.grouping = grouping
        self.noise_multiplier = noise_multiplier
        self.engine: PrivateEngine | None = None
        self.report: EngineReport | None = None
        self.seen: _Seen | None = None
        self.ranks = ranks
        self.streams = settings.streams()
        # Every rank has dropout of its own; a seed of so many bits is no other experiment's.
        rank = 0 if ranks is None else ranks.rank
        self._dropout = self.streams if settings.seed is None else Streams(settings.seed + rank * 2**64)
        self.device = torch.device(settings.device)
        self._cuda = [self.device] if self.device.type == "cuda" else []
        self._frozen = ""
        # Weights that are not trained are those of this number again when the run is gone on with.
        self.weights = self.streams.number("weights") if resumed is None else int(resumed["weights"])
        self.weights = self.weights if ranks is None else ranks.tell(self.weights)
        self.model = workload.build(self.weights).to(self.device)
        checkpoint_as(self.model, settings.checkpoint)
        self.scaler = GradScaler(self.device.type, _LOSS_SCALE, enabled=settings.autocast == "float16")
        self.optimizer = make_optimizer(settings.optimizer, self.model.parameters(), settings.learning_rate)
        self.batches = PoissonBatches(
            data.train,
            expected_batch_size=settings.sampling_rate * data.train_size,
            steps=settings.steps,
            physical_batch=settings.physical_batch,
            views=workload.views,
            augment=workload.augment,
            # Drawn on the CPU whatever the device, so that every device sees the same batches.
            generator=self._generator("sampling", torch.device("cpu")),
            secure=settings.secure,
        )

    def _generator(self, stream: str, device: torch.device) -> torch.Generator | None:
        """Of an experiment; None where it is to be secret."""
        return None if self.streams.seed is None else self.streams.generator(stream, device)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The engine on the model, if there is a grouping, and dropout drawing from its own stream."""
        settings = self.settings
        with self._dropout.drawn_globally("dropout", [self.device]) as begin_dropout:
            if self.grouping is None:
                yield
                return
            self._check_sites(self.grouping)
            # What the check drew must not move what training draws.
            begin_dropout()
            self.engine = make_private(
                self.model,
                self.optimizer,
                settings.plan(self.grouping),
                noise_multiplier=self.noise_multiplier,
                batches=self.batches,
                loss_reduction="sum",
                grad_scaler=self.scaler,
                options=settings.options,
                loss=self.workload.loss,
                watch=settings.watch,
                allow_state=settings.allow_state,
                generator=self._generator("noise", self.device),
                secure=settings.secure,
            )
            try:
                with (
                    self.engine.same_examples()
                ):  # row i of a batch is example i, however often the loss calls the model
                    yield
            finally:
                self.report = self.engine.report()
                self.engine.detach()

    def state(self, step: int) -> dict[str, Any]:
        """What the run can be gone on with after so many steps; of an experiment with all that is random."""
        exact = self.settings.seed is not None
        self._frozen = self._frozen or frozen_digest(self.model)
        dropout = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._cuda)] if exact else []
        return {
            "step": step,
            "weights": self.weights,
            "frozen": self._frozen,
            "model": learned(self.model),
            "optimizer": self.optimizer.state_dict(),
            "engine": None if self.engine is None else self.engine.state_dict(exact=exact),
            "batches": self.batches.state_dict(exact=exact),
            "dropout": dropout if self.ranks is None else self.ranks.gather(dropout),
        }

    def write(self, checkpoints: Checkpoints, step: int, known: Mapping[str, Any]) -> None:
        """A checkpoint after so many steps; of several processes rank 0 writes it."""
        state = {**known, **self.state(step)}
        if self.ranks is None or self.ranks.rank == 0:
            checkpoints.write(state)

    def restore(self, state: Mapping[str, Any], path: Path) -> None:
        """Go on where a run stood.

        Raises:
            GroupSearchError: when it was a run of another model or other data.
        """
        exact = self.settings.seed is not None
        restore(self.model, state, path)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.engine is not None:
            self.engine.load_state_dict(state["engine"], exact=exact)
        self.batches.load_state_dict(state["batches"], exact=exact)
        dropout = state["dropout"] if self.ranks is None else state["dropout"][self.ranks.rank]
        for device, generator in zip((None, *self._cuda), dropout, strict=False):
            torch.set_rng_state(generator) if device is None else torch.cuda.set_rng_state(generator, device)

    def _check_sites(self, grouping: Grouping) -> None:
        few: Batch = self._select(self.data.train, torch.arange(min(_SHOWN, self.data.train_size), device="cpu"))
        if self.workload.views > 1:
            few = repeat_views(few, self.workload.views, self.workload.augment)
        found = sites_of(self.model, few, self.workload.loss, self.settings.options, apart=grouping.sites[0].rows.apart)
        check_sites(grouping, found)

    def step(self, step: int, logical: LogicalBatch) -> float:
        """One optimizer step on one logical batch; its seconds."""
        begin = time.perf_counter()
        for batch in logical:
            with self._casting():
                losses = self.workload.loss(self.model, _moved(batch, self.device))
                loss = losses.sum()
            # The engine divides by the expected batch size itself.
            share = loss if self.grouping is not None else loss / self.batches.expected_batch_size
            torch.autograd.backward(self.scaler.scale(share))
            if self.seen is not None:
                self.seen.add(losses, self.engine)
        self._take_step(logical)
        self.optimizer.zero_grad(set_to_none=True)
        self._check_weights(step)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begin

    def _take_step(self, logical: LogicalBatch) -> None:
        if self.grouping is None and not logical.examples:
            self.optimizer.step()  # a scaler expects gradients to look at
            return
        self.scaler.step(self.optimizer)
        self.scaler.update(_LOSS_SCALE)

    def epsilon(self, delta: float) -> float:
        """Spent so far; infinite without privacy."""
        return math.inf if self.engine is None else self.engine.epsilon(delta)

    def is_due(self, step: int) -> bool:
        every = self.settings.evaluate_every
        return step == self.settings.steps or (every > 0 and step % every == 0)

    @torch.no_grad()
    def evaluate(self, step: int) -> CurvePoint:
        """Mean loss and metric over the validation data, in evaluation mode; they may be any numbers."""
        count = self.data.validation_size
        limit = self.settings.physical_batch or self.workload.batch_size
        loss = metric = 0.0
        with _evaluation_mode(self.model), self._casting():
            for chunk in physical_chunks(torch.arange(count, device="cpu"), limit):
                batch = self._select(self.data.validation, chunk)
                loss += self.workload.loss(self.model, batch).double().sum().item()
                if self.workload.metric is not None:
                    metric += self.workload.metric(self.model, batch).double().sum().item()
        return CurvePoint(
            step, loss / count, None if self.workload.metric is None else metric / count, self._adaptive_thresholds()
        )

    def _casting(self) -> AbstractContextManager[None]:
        if self.settings.autocast == "none":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.settings.autocast))

    def _adaptive_thresholds(self) -> tuple[float, ...]:
        if self.engine is None or self.engine.plan.adaptive is None:
            return ()
        return self.engine.mechanism.thresholds

    def _select(self, examples: Batch, indices: Tensor) -> dict[str, Tensor]:
        return _moved({name: tensor[indices] for name, tensor in examples.items()}, self.device)

    def _check_weights(self, step: int) -> None:
        """Raise when a weight is not finite: of what a step lets out, which is private, nothing more is asked."""
        finite = [p.detach().isfinite().all() for p in self.model.parameters() if p.requires_grad]
        if not torch.stack(finite).all():
            raise DivergedError(step, self.settings.learning_rate)


def _moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on a device; the program does not wait for its way to a GPU, which takes pinned memory."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    pinned = {name: tensor if tensor.is_cuda else tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in pinned.items()}


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode it was in (frozen BatchNorm stays frozen)."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
