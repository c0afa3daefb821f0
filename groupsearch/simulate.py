"""The second level: the real engine on fake tensors, with the grouping that is asked about."""

from __future__ import annotations

from typing import Any

from torch import nn

from groupsearch.clipping import ClipPlan
from groupsearch.engine import make_private
from groupsearch.grouping import Grouping
from groupsearch.options import EngineOptions
from groupsearch.trace import weights_with_choice
from groupsearch.tracer.scratch import cpu_scratch
from groupsearch.tracer.step import Loss, Stage, StepSettings, fake_stage
from groupsearch.workloads.batches import count_examples


def simulate_peak(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    grouping: Grouping,
    *,
    options: EngineOptions | None = None,
    optimizer: str = "adam",
    checkpoint: str = "none",
    micro_batches: int = 1,
    autocast: str = "none",
) -> int:
    """Peak bytes of one private step, from the engine itself on fake tensors (CPU).

    Costs about as much time as a trace and no memory; the model is left as it is. Bytes are
    those of tensors (weights, optimizer state, batch and everything an operation allocates), and
    of scratch inside operations as :mod:`groupsearch.tracer.scratch` probes it.

    Raises:
        UnsupportedModelError: as :func:`groupsearch.make_private`.
    """
    settings = StepSettings(options or EngineOptions(), optimizer, checkpoint, micro_batches, autocast)
    fake, stage = fake_stage(model, batch, loss, settings, cpu_scratch)
    with fake:
        return private_peak(stage, settings, grouping, count_examples(batch))


def private_peak(stage: Stage, settings: StepSettings, grouping: Grouping, examples: int) -> int:
    """Peak bytes of one private step of a stage, static ones included.

    Raises:
        GroupSearchError: when the options name a method for a weight that no site chooses one for.
    """
    settings.options.check_weights(weights_with_choice(grouping.sites))
    engine = make_private(
        stage.model,
        stage.optimizer,
        ClipPlan(grouping),
        noise_multiplier=settings.noise_multiplier,
        expected_batch_size=examples,
        options=settings.options,
    )
    try:
        with engine.same_examples():  # a batch is one set of examples, however often the loss calls the model
            return stage.counted_step()
    finally:
        engine.detach()
