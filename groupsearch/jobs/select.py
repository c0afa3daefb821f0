"""Choosing among fixed groupings on private data, at an epsilon that is known."""

from __future__ import annotations

from dataclasses import asdict, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from groupsearch.errors import GroupSearchError
from groupsearch.jobs.events import Interrupted, Said
from groupsearch.jobs.request import SearchRequest
from groupsearch.jobs.varying import mechanism_of
from groupsearch.units import format_bytes, format_count, format_interval, format_number

if TYPE_CHECKING:
    from groupsearch.privacy import SelectionCost
    from groupsearch.search import Choice, SearchSettings
    from groupsearch.search.selection import RepeatAndSelect, Selected
    from groupsearch.search.space import Space
    from groupsearch.trace import Trace
    from groupsearch.training import TrainSettings
    from groupsearch.verify import Setup
    from groupsearch.workloads import Workload

_CONFIDENCE = 0.95


def select(
    document: dict[str, Any],
    setup: Setup,
    trace: Trace,
    training: TrainSettings,
    settings: SearchSettings,
    request: SearchRequest,
) -> None:
    """Select, and put into the document what may be published: the best, its noisy score, and what it cost.

    Args:
        document: is added to.
        setup: what is trained.
        trace: of its step.
        training: how it is trained.
        settings: ``trials`` is the expected number of trainings; the limits are those of the groupings.
        request: says the standard deviation of the noise of scores, in validation examples; whom it notifies is never
            told what is not published.

    Raises:
        GroupSearchError: when the workload does not state that its metric is a share, or a training raises.
    """
    from groupsearch.randomness import secret_rng
    from groupsearch.search.selection import RepeatAndSelect, select_privately
    from groupsearch.search.space import Space

    workload, space = _judged_by_shares(setup.loaded), Space.of(trace, settings)
    choices, scheme = space.fixed_choices(), RepeatAndSelect(settings.trials)
    noise = request.score_noise
    cost = _cost(scheme, len(choices), training, noise)
    request.notify(
        Said(
            f"Training a random number of {format_count(len(choices))} groupings, {format_number(scheme.mean)} "
            f"expected. How many they are, and how long it takes, is no part of what may be published."
        )
    )
    score = _scorer(workload, trace, training)
    try:
        best = select_privately(choices, score, scheme, noise, secret_rng())
    except KeyboardInterrupt as interrupt:
        raise Interrupted("Interrupted. Nothing of a private selection is kept.") from interrupt
    assert best is not None  # a geometric number is at least 1
    row = _row(space, best, workload, noise)
    metric = row["metric"]
    reason = (
        f"{row['groups']} groups ({row['source']}) need {format_bytes(row['peak_bytes'])} and had the best noisy score "
        f"of those that were drawn: {format_interval(metric['mean'], metric['half_width'], percent=True)}."
    )
    document |= {"candidates": [row], "recommended": row, "reason": reason}
    document["cost"] = {"selection": asdict(cost)}
    assert workload.data is not None  # it was trained
    # Its trainings are drawn from the system's entropy, whatever seed the settings have.
    statement = replace(training.statement(workload.data.train_size), selection=cost, seeded=False)
    document["privacy"] = statement.to_json()


def _cost(scheme: RepeatAndSelect, choices: int, training: TrainSettings, noise: float) -> SelectionCost:
    from groupsearch.search.selection import candidate_event, repeated_selection_cost, training_event

    assert training.noise_multiplier is not None
    assert training.delta is not None
    spent = (training.noise_multiplier, training.sampling_rate, training.steps)
    event, delta = candidate_event(*spent, noise), training.delta
    epsilon, anew = scheme.epsilon(event, delta), scheme.epsilon(event, delta, then=training_event(*spent))
    return repeated_selection_cost(choices, scheme.mean, delta, epsilon, anew)


def _scorer(workload: Workload, trace: Trace, training: TrainSettings) -> Any:
    from groupsearch.grouping import Grouping
    from groupsearch.training import DivergedError, train

    def score(choice: Choice, seed: int) -> float | None:
        """How many validation examples are right, each counting 1 at most; None where weights are not finite."""
        assert workload.data is not None
        # No seed, not even one that was drawn for it: the noise of every training has entropy of its own.
        settings = replace(mechanism_of(choice, training), seed=None, evaluate_every=0)
        try:
            found = train(workload, Grouping.from_boundaries(trace, choice.boundaries), settings)
        except DivergedError:
            return None
        return (found.metric or 0.0) * workload.data.validation_size

    return score


def _judged_by_shares(workload: Workload) -> Workload:
    """The workload with a metric of which one example is worth from 0 to 1, whatever it says itself."""
    from torch import Tensor, nn

    metric = workload.metric
    if metric is None or not workload.metric_is_share:
        raise GroupSearchError(
            f"Expected a metric from 0 to 1 for each example to select by, found that {workload.metric_name!r} is not "
            f"stated to be one: noise can hide an example only if it is known how much one can weigh. Give the "
            f"Workload such a metric and metric_is_share=True; a score outside that range then counts as its end."
        )

    def share(model: nn.Module, batch: Any) -> Tensor:
        return metric(model, batch).nan_to_num(0.0).clamp(0.0, 1.0)

    return replace(workload, metric=share)


def _row(space: Space, best: Selected[Choice], workload: Workload, noise: float) -> dict[str, Any]:
    """The candidate of the document; its interval is of the noise that was added, which is known."""
    assert workload.data is not None
    examples, choice = workload.data.validation_size, best.candidate
    mean = min(1.0, max(0.0, best.score / examples))
    half_width = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2) * noise / examples
    return {
        **choice.to_json(),
        "groups": choice.groups,
        "peak_bytes": space.peak_bytes(choice.boundaries),
        "metric": {
            "name": workload.metric_name,
            "mean": mean,
            "half_width": half_width,
            "interval": [mean - half_width, mean + half_width],
            "interval_from": "the noise added to the score",
            "seeds": 1,
        },
        "on_front": True,
        "source": space.source(choice.boundaries),
    }
