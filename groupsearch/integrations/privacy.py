"""What the integrations have in common: what is said of privacy, the engine attached, batches as loops take them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.engine.loading import PoissonBatches
from groupsearch.engine.truth.comparison import Loss
from groupsearch.engine.truth.draws import alike
from groupsearch.errors import GroupSearchError
from groupsearch.options import EngineOptions
from groupsearch.plan.clipping import AdaptiveQuantile
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer import trace_model
from groupsearch.training import TrainSettings
from groupsearch.workloads.batches import map_tensors


@dataclass(frozen=True)
class Privacy:
    """What a training is to cost in privacy, and how its gradients are clipped.

    Attributes:
        grouping: which sites share a factor: a form that :meth:`Grouping.parse` reads, of a trace that is made when the
            engine is attached, or a grouping of the same model.
        epsilon: budget of all planned steps, which the noise is calibrated for. Either this or ``noise_multiplier``.
        noise_multiplier: sigma, used as it is.
        seed: of sampling and noise, for experiments alone: whoever knows it can take the noise away.

    The others are those of :class:`groupsearch.training.TrainSettings`.
    """

    grouping: str | Grouping = "all-layer"
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    rule: str = "auto-s"
    max_grad_norm: float = 1.0
    allocation: str | Sequence[float] | AdaptiveQuantile = "uniform"
    noise_allocation: str | Sequence[float] = "global"
    seed: int | None = None
    secure: bool = False
    options: EngineOptions = field(default_factory=EngineOptions)
    watch: float = 0.01
    allow_state: Collection[str] = ()

    def batches(self, dataset: Any, **loading: Any) -> PoissonBatches:
        """Poisson samples of a data set, drawn in secret or from the seed.

        Args:
            dataset: as :class:`~groupsearch.engine.loading.PoissonBatches` takes it.
            loading: its other arguments.

        Raises:
            GroupSearchError: as it does.
        """
        streams = self._settings(steps=1, sampling_rate=1.0).streams()
        generator = None if self.seed is None else streams.generator("sampling", "cpu")
        return PoissonBatches(dataset, generator=generator, secure=self.secure, **loading)

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        batches: PoissonBatches,
        loss: Loss,
        *,
        steps: int,
        loss_divisor: float = 1.0,
    ) -> PrivateEngine:
        """The engine on a model that lies where it is trained, in the mode in which it is trained.

        Args:
            model: the model.
            optimizer: torch's own, not yet wrapped by a library.
            batches: what the loop iterates, whole logical batches.
            loss: ``loss(model, batch)``, one loss per example (B,), whose mean the loop backpropagates.
            steps: optimizer steps planned, in all.
            loss_divisor: what the loop divides that mean by before backward.

        Raises:
            GroupSearchError: for settings that contradict each other or cannot be reached.
            UnsupportedModelError: for a model, a loss or an optimizer that cannot be made private.
        """
        settings = self._settings(steps=steps, sampling_rate=batches.sampling_rate)
        noise_multiplier = settings.noise_multiplier_for(len(batches.dataset))
        device = next(p.device for p in model.parameters() if p.requires_grad)
        grouping = self.grouping
        if isinstance(grouping, str):
            with alike():  # what loading draws is no part of the training
                sample = batches.first(batches.physical_batch or round(batches.expected_batch_size))
            sample = map_tensors(lambda tensor: tensor.to(device), sample)
            trace = trace_model(model, sample, loss, options=self.options, allow_state=self.allow_state)
            grouping = Grouping.parse(trace, grouping)
        return make_private(
            model,
            optimizer,
            settings.plan(grouping),
            noise_multiplier=noise_multiplier,
            batches=batches,
            loss=loss,
            loss_divisor=loss_divisor,
            options=self.options,
            watch=self.watch,
            allow_state=self.allow_state,
            secure=self.secure,
            generator=None if self.seed is None else settings.streams().generator("noise", device),
        )

    def delta_for(self, batches: PoissonBatches) -> float:
        """The delta given, or the default one of so many examples."""
        return self._settings(steps=1, sampling_rate=1.0).delta_for(len(batches.dataset))

    def _settings(self, **loop: Any) -> TrainSettings:
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "grouping"}
        return TrainSettings(learning_rate=1.0, **own, **loop)  # the rate is the loop's own, and not looked at


class MicroBatches:
    """Logical batches for a loop that steps after so many micro-batches: each comes as a list of physical ones.

    A Poisson sample may have more or fewer physical batches than the loop has micro-batches. They are handed out one a
    micro-batch; the last one has what is left, and some may be empty. The loop runs backward on every physical batch.
    ``state_dict`` and ``load_state_dict`` are those of the batches, exact where they were seeded.

    Args:
        batches: the logical batches.
        accumulation: micro-batches between two optimizer steps.
    """

    def __init__(self, batches: PoissonBatches, accumulation: int = 1) -> None:
        if accumulation < 1:
            raise GroupSearchError(f"Expected at least one micro-batch between two steps, found {accumulation}.")
        self.batches = batches
        self.accumulation = accumulation

    def __len__(self) -> int:
        return self.batches.steps * self.accumulation

    def __iter__(self) -> Iterator[list[Any]]:
        last = self.accumulation - 1
        for logical in self.batches:
            pieces = list(logical)
            yield from ([piece] for piece in pieces[:last])
            yield from ([] for _ in range(last - len(pieces)))
            yield pieces[last:]

    def state_dict(self) -> dict[str, Any]:
        """Of the batches, between two optimizer steps."""
        return self.batches.state_dict(exact=self.batches.seeded)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the batches stood."""
        self.batches.load_state_dict(state, exact=self.batches.seeded)


def engine_state(engine: PrivateEngine) -> dict[str, Any]:
    """Of an engine, with the noise's generator where it was seeded: an experiment goes on bit for bit."""
    return engine.state_dict(exact=engine.settings.seeded)


def load_engine_state(engine: PrivateEngine, state: Mapping[str, Any]) -> None:
    """Go on where the engine stood, with fresh noise unless it was seeded."""
    engine.load_state_dict(state, exact=engine.settings.seeded)


def refuse(library: str, found: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse what cannot be private in a library's loop.

    Args:
        library: its name.
        found: of every setting, whether it is there, and why it cannot be and what to do.

    Raises:
        GroupSearchError: naming all that were found.
    """
    there = [f"{name}: {words}" for name, (is_there, words) in found.items() if is_there]
    if there:
        raise GroupSearchError(f"Found settings of {library} that private training cannot have. {' '.join(there)}")


def mean_loss(total: Tensor, batches: PoissonBatches) -> Tensor:
    """A step's summed losses over the expected batch size, for a log: an exact number about private examples."""
    return total / batches.expected_batch_size
