"""What training and searching share: the step that is traced and the training that takes it, settled together."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from groupsearch.errors import GroupSearchError
from groupsearch.jobs.request import TrainingRequest
from groupsearch.jobs.stages import make_setup
from groupsearch.privacy.accounting import default_delta, epsilon, noise_multiplier_for
from groupsearch.training import TrainSettings
from groupsearch.units import format_number
from groupsearch.verify import Setup

TRAINING = ("epsilon", "delta", "steps", "learning_rate", "sampling_rate", "rule", "max_grad_norm")
_ROUNDING = 1e-9


def training_setup(
    request: TrainingRequest, evaluate_every: int | None = None, *, secure: bool = False
) -> tuple[Setup, TrainSettings]:
    """What is traced and how it is trained, with the step that is traced being the step that is trained.

    A batch of more examples than ``--batch-size`` (else the model's) is taken in pieces, so the step that is
    traced has as many micro-batches. ``--micro-batches`` without a sampling rate decides the rate.

    Raises:
        GroupSearchError: when the model cannot be trained, for a value outside its range, or when micro-batches and
            sampling rate contradict each other.
    """
    setup = make_setup(request)
    settings = train_settings(setup, request, evaluate_every, secure=secure)
    assert setup.loaded.data is not None  # else there would be no settings
    examples, physical, asked = setup.loaded.data.train_size, setup.loaded.batch_size, request.micro_batches
    expected = settings.sampling_rate * examples
    if expected < 1:
        raise GroupSearchError(
            f"Expected a sampling rate that takes at least one example in a step, found "
            f"{format_number(settings.sampling_rate)}, which takes {format_number(expected)} of {examples}: such a "
            f"training would consist of noise. Give a --sampling-rate of at least 1/{examples}."
        )
    pieces = math.ceil(expected / physical - _ROUNDING)
    if asked is not None and asked != pieces:
        if request.sampling_rate is not None or asked * physical > examples:
            raise GroupSearchError(
                f"Expected --micro-batches {pieces}, in which {format_number(settings.sampling_rate * examples, 4)} of "
                f"{examples} examples are taken {physical} at a time, found {asked}. Leave it away, or change "
                "--sampling-rate or --batch-size."
            )
        pieces, request = asked, replace(request, sampling_rate=asked * physical / examples)
        settings = train_settings(setup, request, evaluate_every, secure=secure)
    if pieces > 1:
        settings = replace(settings, physical_batch=physical)
    return replace(setup, micro_batches=pieces), settings


def train_settings(
    setup: Setup, request: TrainingRequest, evaluate_every: int | None = None, *, secure: bool = False
) -> TrainSettings:
    """The workload's own settings, with what was asked for in their place.

    The noise multiplier is settled here, so that every run of a search has the same one.

    Raises:
        GroupSearchError: when the workload cannot be trained, or for a value outside its range.
    """
    workload = setup.loaded
    if workload.data is None:
        raise GroupSearchError(
            f"Expected a model with data to train on, found {setup.workload!r}, which can be profiled only. "
            "`groupsearch models` marks those that can be trained; your own factory returns a "
            "Workload with data and training, and a transformers model has data by --setting data=FOLDER."
        )
    changes = {key: value for key in (*TRAINING, "watch") if (value := getattr(request, key)) is not None}
    if request.allow_state:
        changes["allow_state"] = tuple(request.allow_state)
    chosen = TrainSettings.of(
        workload,
        **changes,
        optimizer=setup.optimizer,
        physical_batch=request.batch_size,
        seed=request.seed,
        secure=secure,
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
    assert settings.noise_multiplier is not None
    assert settings.delta is not None
    return {
        "epsilon": epsilon(settings.noise_multiplier, settings.sampling_rate, settings.steps, settings.delta),
        **{key: getattr(settings, key) for key in TRAINING if key != "epsilon"},
        "noise_multiplier": settings.noise_multiplier,
        "optimizer": settings.optimizer,
    }
