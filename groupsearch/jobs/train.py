"""One training with one grouping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from pathlib import Path
from typing import Any

from groupsearch.clipping import ALLOCATIONS, NOISE_ALLOCATIONS, AdaptiveQuantile
from groupsearch.documents import Profile, Train
from groupsearch.errors import GroupSearchError
from groupsearch.grouping import Grouping
from groupsearch.jobs.events import Advanced, Begun, Interrupted, Notify
from groupsearch.jobs.request import TrainingRequest, allotment, door
from groupsearch.jobs.stages import describe, joint_choice, names_document, start_document, training_setup
from groupsearch.memory import peak_memory
from groupsearch.privacy import NOT_PRIVATE
from groupsearch.trace import Trace
from groupsearch.training import CurvePoint, TrainSettings
from groupsearch.training import train as train_workload
from groupsearch.verify import Setup

Allotment = str | Sequence[float]


@dataclass(frozen=True)
class TrainRequest(TrainingRequest):
    """What to train with which grouping; ``seed`` makes it an experiment that can be repeated.

    Attributes:
        grouping: as text, as boundaries, or a profile (or the file of one) with a joint choice of norm methods.
        thresholds: ``uniform``, ``dimension``, ``adaptive``, ``adaptive:0.7`` or a number for each group.
        count_noise: noise of adaptive thresholds' counts; None for batch / 20.
        noise_allocation: ``global``, ``equal`` or a weight for each group.
        evaluate_every: steps between points of the curve; None for a tenth of all.
        secure: draw noise and batches from a cipher.
    """

    _: KW_ONLY
    grouping: str | Path | Sequence[int] | Profile
    thresholds: Allotment | AdaptiveQuantile | None = None
    count_noise: float | None = None
    noise_allocation: Allotment | None = None
    evaluate_every: int | None = None
    secure: bool = False


def run(request: TrainRequest) -> Train:
    """Train with privacy and one grouping.

    Raises:
        GroupSearchError: for a model that cannot be trained, a grouping there is not, or options that exclude each
            other.
        DivergedError: when weights are no longer finite.
        Interrupted: with the curve so far, and what it cost.
    """
    setup, settings = training_setup(request, request.evaluate_every, secure=request.secure)
    settings = replace(settings, **_mechanism(request))
    text, boundaries = _asked(request.grouping), None
    if isinstance(request.grouping, Profile) or names_document(text):
        found = request.grouping if isinstance(request.grouping, Profile) else text
        boundaries, options = joint_choice(found, setup.workload)
        setup, settings = setup.with_options(options), replace(settings, options=options)
    plan = describe(settings) | _describe_mechanism(settings)
    draft: dict[str, Any] = start_document(
        "train", setup, device=setup.device, grouping=text, **_known_of(settings), **plan
    )
    draft["randomness"] = settings.streams().describe()
    request.notify(Begun(draft))
    trace = setup.trace()
    chosen = Grouping.parse(trace, text) if boundaries is None else Grouping.from_boundaries(trace, boundaries)
    settings.plan(chosen)  # refused before anything runs
    draft |= {**plan, **_describe_grouping(trace, text, chosen), "curve": [], "thresholds": [], "steps": 0}
    draft["not_private"] = NOT_PRIVATE["train"]
    try:
        _run(setup, chosen, settings, draft, request.notify)
    except KeyboardInterrupt as interrupt:
        done = draft["steps"]
        spent = settings.statement(_train_size(setup), steps=done)
        draft |= {"epsilon": spent.epsilon, "privacy": spent.to_json()}
        said = f"Interrupted after {done} of {settings.steps} steps; the curve so far and what it cost are kept."
        raise Interrupted(said, Train.from_json(draft)) from interrupt
    return Train.from_json(draft)


def _asked(grouping: str | Path | Sequence[int] | Profile) -> str:
    """The grouping as the document says it."""
    if isinstance(grouping, Profile):
        return "joint"
    if isinstance(grouping, (str, Path)):
        return str(grouping)
    return ",".join(map(str, grouping)) or "all-layer"


def _known_of(settings: TrainSettings) -> dict[str, Any]:
    """The seed of an experiment; a secret training has none to tell."""
    return {} if settings.seed is None else {"seed": settings.seed}


def _mechanism(request: TrainRequest) -> dict[str, Any]:
    """Changes of the settings that the mechanism's own options ask for."""
    changes: dict[str, Any] = {}
    if request.thresholds is not None:
        changes["allocation"] = allotment(request.thresholds, ALLOCATIONS, adaptive=True)
    if request.noise_allocation is not None:
        changes["noise_allocation"] = allotment(request.noise_allocation, NOISE_ALLOCATIONS)
    if request.count_noise is not None:
        if not isinstance(changes.get("allocation"), AdaptiveQuantile):
            raise GroupSearchError(
                "Found --count-noise without --thresholds adaptive: fixed thresholds count nothing. Give both or none."
            )
        changes["allocation"] = replace(changes["allocation"], count_noise=request.count_noise)
    return changes


def _describe_mechanism(settings: TrainSettings) -> dict[str, Any]:
    allocation = settings.allocation
    found = {"adaptive": asdict(allocation)} if isinstance(allocation, AdaptiveQuantile) else allocation
    return {"allocation": found, "noise_allocation": settings.noise_allocation, "sampling": "poisson"}


def _describe_grouping(trace: Trace, text: str, grouping: Grouping) -> dict[str, Any]:
    return {
        "trace": trace.to_json(),
        "grouping": text,
        "boundaries": list(grouping.boundaries),
        "groups": grouping.groups,
        "peak_bytes": peak_memory(trace, grouping).peak_bytes,
    }


def _run(setup: Setup, grouping: Grouping, settings: TrainSettings, draft: dict[str, Any], notify: Notify) -> None:
    """Train, and keep in the document what is known after every step."""

    def on_step(step: int, point: CurvePoint | None) -> None:
        draft["steps"] = step
        if point is not None:
            draft["curve"].append([point.step, point.loss, point.metric])
            if point.thresholds:
                draft["thresholds"].append([point.step, *point.thresholds])
        notify(Advanced("Training", "", step, settings.steps))

    result = train_workload(setup.loaded, grouping, settings, on_step)
    draft |= {
        "metric": {"name": result.metric_name, "mean": result.metric},
        "step_seconds": result.step_seconds,
        "expected_examples": settings.steps * settings.sampling_rate * _train_size(setup),
        "privacy": settings.statement(_train_size(setup)).to_json(),
        "added_delta": result.added_delta,
        "checked": None if result.checked is None else result.checked.to_json(),
        "watched": None if result.watched is None else result.watched.to_json(),
    }


def _train_size(setup: Setup) -> int:
    assert setup.loaded.data is not None  # it is being trained
    return setup.loaded.data.train_size


train = door(TrainRequest, run)
