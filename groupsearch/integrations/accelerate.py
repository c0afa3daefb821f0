"""accelerate's loop, private: backward, accumulation and saved state stay accelerate's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn
from torch.optim import Optimizer

from groupsearch.engine import PrivateEngine
from groupsearch.engine.loading import PoissonBatches
from groupsearch.engine.truth.comparison import Loss
from groupsearch.integrations.privacy import MicroBatches, Privacy, engine_state, load_engine_state, refuse
from groupsearch.workloads.batches import map_tensors


class PlacedBatches(MicroBatches):
    """Micro-batches whose physical batches come on the device of the loop, one after the other."""

    def __init__(self, batches: PoissonBatches, accumulation: int, device: torch.device) -> None:
        super().__init__(batches, accumulation)
        self.device = device

    def __iter__(self) -> Iterator[Any]:
        for pieces in super().__iter__():
            yield (map_tensors(lambda tensor: tensor.to(self.device), piece) for piece in pieces)


class _EngineState:
    """What ``save_state`` and ``load_state`` of accelerate call."""

    def __init__(self, engine: PrivateEngine) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, Any]:
        return engine_state(self._engine)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_engine_state(self._engine, state)


def prepare_private(  # noqa: PLR0913 - what prepare takes, and what is said of privacy
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    batches: PoissonBatches,
    *,
    loss: Loss,
    privacy: Privacy,
    steps: int | None = None,
) -> tuple[nn.Module, Any, PlacedBatches, PrivateEngine]:
    """In place of ``accelerator.prepare``: places the model, attaches the engine, prepares, and registers for saving.

    Args:
        accelerator: of one process on one device; it may accumulate.
        model: the model; it is put into training mode.
        optimizer: torch's own.
        batches: Poisson samples; ``privacy.batches(...)`` makes them.
        loss: one loss per example (B,), whose mean the loop gives ``accelerator.backward``.
        privacy: see :class:`groupsearch.integrations.Privacy`.
        steps: optimizer steps planned; those of one iteration over the batches if not given.

    Returns:
        model, optimizer and batches as the loop takes them, and the engine. A batch is one micro-batch: iterate it, and
        run backward on every physical batch in it.

    Raises:
        GroupSearchError: for an accelerator that cannot be private, or a loader that draws no Poisson samples.
        UnsupportedModelError: for a model that cannot be private.
    """
    one = "one process on one device is what the engine serves; start one."
    refuse(
        "accelerate",
        {
            "several processes": (accelerator.state.distributed_type != DistributedType.NO, one),
            "mixed_precision='fp16'": (accelerator.mixed_precision == "fp16", "its scaler skips steps; take bf16."),
            "dynamo_backend": (
                accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
                "layers of a compiled model cannot be followed; leave it out.",
            ),
            "a loader of your own": (
                not isinstance(batches, PoissonBatches),
                "it shuffles, or draws otherwise than is accounted; give privacy.batches(dataset, ...).",
            ),
        },
    )
    passes = accelerator.gradient_accumulation_steps
    model.to(accelerator.device).train()
    steps = steps or batches.steps
    engine = privacy.attach(model, optimizer, batches, loss, steps=steps, loss_divisor=passes)
    placed = PlacedBatches(batches, passes, accelerator.device)
    model, prepared = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(_EngineState(engine), placed)
    return model, prepared, placed, engine
