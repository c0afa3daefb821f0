"""What ``train`` and ``optimize`` share: the step that is traced and the training that takes it, settled together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from groupsearch.errors import GroupSearchError
from groupsearch.units import format_number

if TYPE_CHECKING:
    from groupsearch.training import TrainSettings
    from groupsearch.verify import Setup

TRAINING = ("epsilon", "delta", "steps", "learning_rate", "sampling_rate", "rule", "max_grad_norm")
_CHECKED = ("watch", "allow_state")
_ROUNDING = 1e-9


def training_setup(
    model: str, given: Mapping[str, Any], evaluate_every: int | None = None
) -> tuple[Setup, TrainSettings]:
    """What is traced and how it is trained, with the step that is traced being the step that is trained.

    A batch of more examples than ``--batch-size`` (else the model's) is taken in pieces, so the step that is
    traced has as many micro-batches. ``--micro-batches`` without a sampling rate decides the rate.

    Raises:
        GroupSearchError: when the model cannot be trained, for a value outside its range, or when micro-batches and
            sampling rate contradict each other.
    """
    from groupsearch.jobs.request import StepRequest
    from groupsearch.jobs.stages import make_setup

    step = ("batch_size", "setting", "dtype", "device", "checkpoint", "optimizer", "norm_method", "micro_batches")
    setup = make_setup(StepRequest(model, autocast=given["autocast"], **{name: given[name] for name in step}))
    settings = train_settings(setup, given, evaluate_every)
    assert setup.loaded.data is not None  # else there would be no settings
    examples, physical, asked = setup.loaded.data.train_size, setup.loaded.batch_size, given["micro_batches"]
    expected = settings.sampling_rate * examples
    if expected < 1:
        raise GroupSearchError(
            f"Expected a sampling rate that takes at least one example in a step, found "
            f"{format_number(settings.sampling_rate)}, which takes {format_number(expected)} of {examples}: such a "
            f"training would consist of noise. Give a --sampling-rate of at least 1/{examples}."
        )
    pieces = math.ceil(expected / physical - _ROUNDING)
    if asked is not None and asked != pieces:
        if given["sampling_rate"] is not None or asked * physical > examples:
            raise GroupSearchError(
                f"Expected --micro-batches {pieces}, in which {format_number(settings.sampling_rate * examples, 4)} of "
                f"{examples} examples are taken {physical} at a time, found {asked}. Leave it away, or change "
                "--sampling-rate or --batch-size."
            )
        pieces, given = asked, {**given, "sampling_rate": asked * physical / examples}
        settings = train_settings(setup, given, evaluate_every)
    if pieces > 1:
        settings = replace(settings, physical_batch=physical)
    return replace(setup, micro_batches=pieces), settings


def train_settings(setup: Setup, given: Mapping[str, Any], evaluate_every: int | None = None) -> TrainSettings:
    """The workload's own settings, with what was given on the command line in their place.

    The noise multiplier is settled here, so that every run of a search has the same one.

    Raises:
        GroupSearchError: when the workload cannot be trained, or for a value outside its range.
    """
    from groupsearch.engine.accounting import default_delta, noise_multiplier_for
    from groupsearch.training import TrainSettings

    workload = setup.loaded
    if workload.data is None:
        raise GroupSearchError(
            f"Expected a model with data to train on, found {setup.workload!r}, which can be profiled only. "
            "`groupsearch models` marks those that can be trained; your own factory returns a "
            "Workload with data and training, and a transformers model has data by --setting data=FOLDER."
        )
    changes = {key: given[key] for key in (*TRAINING, *_CHECKED) if given.get(key) not in (None, ())}
    chosen = TrainSettings.of(
        workload,
        **changes,
        optimizer=setup.optimizer,
        physical_batch=given["batch_size"],
        seed=given["seed"],
        secure=given.get("secure", False),
        device=setup.device,
        options=setup.options,
        checkpoint=setup.checkpoint,
        autocast=setup.autocast,
    )
    delta = default_delta(workload.data.train_size) if chosen.delta is None else chosen.delta
    assert chosen.epsilon is not None  # TrainingDefaults has one, and --epsilon is a number
    noise = noise_multiplier_for(chosen.epsilon, delta, chosen.sampling_rate, chosen.steps)
    every = max(1, chosen.steps // 10) if evaluate_every is None else evaluate_every
    return replace(chosen, epsilon=None, delta=delta, noise_multiplier=noise, evaluate_every=every)


def describe(settings: TrainSettings) -> dict[str, Any]:
    """The part of a document that says how a run was trained; its epsilon is that of all steps."""
    from groupsearch.engine.accounting import epsilon

    assert settings.noise_multiplier is not None
    assert settings.delta is not None
    return {
        "epsilon": epsilon(settings.noise_multiplier, settings.sampling_rate, settings.steps, settings.delta),
        **{key: getattr(settings, key) for key in TRAINING if key != "epsilon"},
        "noise_multiplier": settings.noise_multiplier,
        "optimizer": settings.optimizer,
    }
