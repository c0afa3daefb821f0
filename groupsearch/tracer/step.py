"""One training step on tensors of any kind, with and without privacy, as it is traced and simulated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from groupsearch.engine.optimizers import make_optimizer, warm_state
from groupsearch.errors import GroupSearchError
from groupsearch.options import EngineOptions
from groupsearch.trace import StaticBytes
from groupsearch.tracer.fake import FakeTensors, fake_batch, fake_model
from groupsearch.tracer.live import LiveBytes, Scratch
from groupsearch.workloads.batches import check_loss
from groupsearch.workloads.blocks import checkpoint_blocks

Loss = Callable[[nn.Module, Any], Tensor]
CHECKPOINTS = ("none", "blocks")


@dataclass(frozen=True)
class StepSettings:
    """What decides the cost of a step besides model, batch and grouping.

    Attributes:
        options: of the engine.
        optimizer: a name of :data:`groupsearch.engine.optimizers.OPTIMIZERS`.
        checkpoint: ``none``, or ``blocks``: every repeated block is checkpointed.
        noise_multiplier: any positive number; only that noise is drawn matters for cost.
    """

    options: EngineOptions = field(default_factory=EngineOptions)
    optimizer: str = "adam"
    checkpoint: str = "none"
    noise_multiplier: float = 1.0

    def __post_init__(self) -> None:
        if self.checkpoint not in CHECKPOINTS:
            raise GroupSearchError(
                f"Expected checkpoint to be one of {', '.join(CHECKPOINTS)}, found {self.checkpoint!r}."
            )

    def to_json(self) -> dict[str, Any]:
        """The settings as they are written into documents."""
        return {
            "norm_method": self.options.norm_method,
            "optimizer": self.optimizer,
            "checkpoint": self.checkpoint,
        }


@dataclass(frozen=True)
class Stage:
    """A model, its optimizer with state, and a batch, ready for a step whose bytes are counted."""

    model: nn.Module
    optimizer: Optimizer
    batch: Any
    loss: Loss
    live: LiveBytes
    static: StaticBytes

    def step(self) -> None:
        """One whole step; private when an engine is attached. Gradients are none afterwards."""
        self.loss(self.model, self.batch).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def nonprivate_step(self) -> int:
        """One plain step; returns its peak in bytes, static ones included.

        Raises:
            UnsupportedModelError: when the loss is not one value per example.
        """
        start = len(self.live.log)
        with self.live:
            check_loss(self.model, self.batch, self.loss).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return self.live.peak_since(start) + self.static.total


def fake_stage(
    model: nn.Module, batch: Any, loss: Loss, settings: StepSettings, scratch: Scratch | None = None
) -> tuple[FakeTensors, Stage]:
    """A stage of fake tensors; enter what is returned with it to step on it."""
    fake, device = FakeTensors(), torch.device("cpu")
    duplicate = fake_model(model, fake.mode, device)
    with fake:
        return fake, make_stage(duplicate, fake_batch(batch, fake.mode, device), loss, settings, scratch)


def make_stage(
    model: nn.Module, batch: Any, loss: Loss, settings: StepSettings, scratch: Scratch | None = None
) -> Stage:
    """A stage on the model's own tensors. The optimizer's state is allocated, gradients are none."""
    if settings.checkpoint == "blocks":
        checkpoint_blocks(model)
    optimizer = make_optimizer(settings.optimizer, model.parameters(), 1e-3)
    warm_state(optimizer)
    live = LiveBytes(scratch)
    static = StaticBytes(
        weights=live.ignore(model.parameters()),
        buffers=live.ignore(model.buffers()),
        optimizer=live.ignore(t for t in pytree.tree_leaves(_state(optimizer)) if isinstance(t, Tensor)),
        batch=live.ignore(t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)),
    )
    return Stage(model, optimizer, batch, loss, live, static)


def real_copy(model: nn.Module, batch: Any, device: torch.device, copy_model: bool = True) -> tuple[nn.Module, Any]:
    """A copy of a model (or the model itself) and of a batch on a device.

    Raises:
        GroupSearchError: when the device is not there.
    """
    if device.type == "meta":
        raise GroupSearchError(
            "Device 'meta' holds no values to step on. Name a real device, or none to trace without."
        )
    try:
        moved = (copy.deepcopy(model) if copy_model else model).to(device)
        return moved, pytree.tree_map_only(Tensor, lambda t: t.to(device), batch)
    except (RuntimeError, AssertionError) as error:
        raise GroupSearchError(f"Device {str(device)!r} cannot be used: {str(error).splitlines()[0]}.") from error


def _state(optimizer: Optimizer) -> list[Mapping[str, Any]]:
    return [dict(state) for state in optimizer.state.values()]
