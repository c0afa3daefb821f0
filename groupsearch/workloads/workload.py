"""Workload: everything the other stages need to know of a model and its task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from groupsearch.errors import GroupSearchError, is_out_of_memory
from groupsearch.workloads.copies import shapes_of
from groupsearch.workloads.saving import Save, save_weights

Batch = Mapping[str, Tensor]
PerExample = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Data:
    """Examples to train on and to judge by; the first dimension of every tensor counts examples.

    Raises:
        GroupSearchError: when the tensors of one part disagree on the number of examples.
    """

    train: Batch
    validation: Batch

    def __post_init__(self) -> None:
        for part, tensors in (("train", self.train), ("validation", self.validation)):
            lengths = {name: len(tensor) for name, tensor in tensors.items()}
            if len(set(lengths.values())) != 1 or 0 in lengths.values():
                raise GroupSearchError(
                    f"Expected every tensor of the {part} data to have the same, positive number of examples "
                    f"as its first dimension, found {lengths}."
                )

    @property
    def train_size(self) -> int:
        """Number of training examples."""
        return len(next(iter(self.train.values())))

    @property
    def validation_size(self) -> int:
        """Number of validation examples."""
        return len(next(iter(self.validation.values())))


@dataclass(frozen=True)
class TrainingDefaults:
    """How a workload is trained with differential privacy when nothing else is said.

    Attributes:
        steps: optimizer steps.
        learning_rate: constant over the steps.
        optimizer: ``adam`` or ``sgd``.
        sampling_rate: probability with which Poisson sampling takes each training example.
        epsilon: privacy budget that the noise is calibrated for.
        delta: the other half of the budget; None for 1e-2 / n, n being the number of training examples.
        rule: clip rule, see :class:`groupsearch.plan.clipping.ClipPlan`.
        max_grad_norm: R of the clip plan.
    """

    steps: int
    learning_rate: float
    optimizer: str = "adam"
    sampling_rate: float = 0.2
    epsilon: float = 8.0
    delta: float | None = None
    rule: str = "abadi"
    max_grad_norm: float = 1.0


@dataclass(frozen=True, eq=False)
class Workload:
    """A model, how to feed it, and how to judge it.

    Attributes:
        name: the text that :func:`groupsearch.workloads.load_workload` was given.
        build: ``build(seed=0)`` makes the model, on torch's default device. The same seed gives the same weights. It
            is first tried under ``torch.device("meta")``, where it should allocate nothing; one that fails there
            (``from_pretrained``, values that are looked at, adapters) is called once for real.
        make_batch: ``make_batch(B)`` gives a mapping of CPU tensors with B examples, the same each time.
        loss: ``loss(model, batch)`` is one loss per example, shape (B,).
        metric: ``metric(model, batch)`` is one score per example, shape (B,), up is better; or None.
        metric_name: what the mean of that score is called.
        metric_is_share: whether that score lies in [0, 1] for every example, as 1 for a right answer and 0 for a wrong
            one does. Choosing by private data needs it: noise hides an example if it is known how much one may weigh.
        data: training and validation data, or None where there is only a made-up batch.
        batch_size: the physical batch size to assume when none is given.
        training: how to train it, or None where there are no data.
        settings: what the workload was made with, for documents.
        views: K, how many views of every example a step takes, see :func:`groupsearch.workloads.batches.with_views`.
        augment: makes the views of one another different; None where they are not.
        save: writes a trained model into a folder, as :func:`groupsearch.workloads.saving.save_weights` does.
    """

    name: str
    build: Callable[..., nn.Module]
    make_batch: Callable[[int], Any]
    loss: PerExample
    metric: PerExample | None = None
    metric_name: str = "accuracy"
    metric_is_share: bool = False
    data: Data | None = None
    batch_size: int = 32
    training: TrainingDefaults | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    views: int = 1
    augment: Callable[[Any], Any] | None = None
    save: Save = save_weights

    @cached_property
    def model(self) -> nn.Module:
        """The model of ``build()``, made once."""
        return self.build()

    def empty(self) -> nn.Module:
        """The model with every tensor on the meta device, another one at every call.

        Raises:
            GroupSearchError: when ``build`` fails on a real device, too.
        """
        return shapes_of(self._shapes)

    @cached_property
    def _shapes(self) -> nn.Module:
        if "model" in vars(self):
            return shapes_of(self.model)
        try:
            with torch.device("meta"):
                return shapes_of(self.build())
        except Exception as error:
            if is_out_of_memory(error):
                raise
        # Whatever it was that meta tensors cannot do: with values it may be done.
        return shapes_of(self.build())


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Inside, torch's generators start from ``seed``; its CPU generator is afterwards as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def seeded(make: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    """``build(seed=0)`` that runs ``make`` under :func:`fixed_seed`."""

    def build(seed: int = 0) -> nn.Module:
        with fixed_seed(seed):
            return make()

    return build
