"""A search in rungs: what every one of them evaluates a grouping by."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from groupsearch.clipping import AdaptiveQuantile
from groupsearch.errors import GroupSearchError
from groupsearch.jobs.events import LOSS, Advanced, Evaluated, Notify, Said, described
from groupsearch.jobs.request import RUNGS, SearchRequest, bytes_of
from groupsearch.jobs.varying import Ways, mechanism_of, searched, values_of

if TYPE_CHECKING:
    from groupsearch.search import Choice, Event, Outcome, Proxy, SearchResult, SearchSettings, Short
    from groupsearch.training import TrainSettings
    from groupsearch.verify import Setup

TRIALS = {"short": 18, "full": 16}  # where the lowest rung of runs is this one and nothing else is said
FINGERPRINT = (
    *("norm_method", "checkpoint", "optimizer", "micro_batches", "autocast", "device"),
    *("epsilon", "delta", "steps", "learning_rate"),
    *("sampling_rate", "rule", "max_grad_norm"),
)


def rungs_of(rungs: str | Sequence[str]) -> tuple[str, ...]:
    """Rungs of evidence from the cheapest on, as in ``short,full``.

    Raises:
        GroupSearchError: unless full runs are among them, and nothing else than there is.
    """
    words = [word.strip() for word in rungs.split(",")] if isinstance(rungs, str) else list(rungs)
    if not set(words) <= set(RUNGS) or "full" not in words:
        raise GroupSearchError(f"Expected full, and proxy, short or both before it, as in short,full; found {rungs!r}.")
    return tuple(rung for rung in RUNGS if rung in words)


def trials_of(rungs: Sequence[str], trials: int | None) -> int:
    """How many groupings the lowest rung of runs is to have."""
    return TRIALS["short" if "short" in rungs else "full"] if trials is None else trials


def search_settings(
    document: Mapping[str, Any], metric_name: str, request: SearchRequest, storage: str | None, *, force: bool
) -> SearchSettings:
    """The settings of the rung of full runs.

    Raises:
        GroupSearchError: for a value out of its range, or options that exclude each other.
    """
    from groupsearch.search import SearchSettings

    asked = document["settings"]
    fixed = {key: asked[key] for key in FINGERPRINT}
    fixed["device"] = fixed["device"].partition(":")[0]  # workers have one GPU of the same kind each
    return SearchSettings(
        trials=request.promote if "short" in request.rungs else trials_of(request.rungs, request.trials),
        budget_bytes=bytes_of(request.budget),
        seeds=request.seeds,
        seed=request.seed or 0,
        max_runs=request.max_runs,
        confidence=request.confidence,
        sampler=request.sampler,
        storage=storage,
        study_name=request.study,
        resume=request.resume,
        force=force,
        granularity=request.granularity,
        groups=request.groups,
        max_groups=request.max_groups,
        metric_name=metric_name,
        selection_data=request.selection_data,
        **searched(values_of(request.vary), request.rule, asked["rule"], request.objective),
        fingerprint={**document["model"], **fixed, "packages": document["environment"]["packages"]},
    )


def search(
    setup: Setup, ways: Ways, training: TrainSettings, settings: SearchSettings, request: SearchRequest
) -> SearchResult:
    """Search in the rungs that were asked for; every training run is one evaluation."""
    from groupsearch.search import search_in_rungs
    from groupsearch.search.run import run_together

    notify = request.notify
    short = _short(setup, ways, training, request) if "short" in request.rungs else None
    proxy = _proxy(setup, training, notify) if "proxy" in request.rungs else None
    what = f"{settings.trials} groupings" if short is None else f"{short.trials} groupings in short runs, then the best"
    notify(Said(f"Searching: {what}, then {settings.seeds} seeds of each on the front"))
    notify(Advanced("Search", "", 0, settings.trials))

    def tell(event: Event) -> None:
        notify(Advanced("Search", described(event), event.done, event.total))
        if event.kind == "failed" or (event.kind == "trained" and event.value is not None):  # else another's
            notify(Evaluated(event, settings.metric_name))

    evaluate, traces = trainer(setup, ways, training), ways.traces
    return search_in_rungs(traces, evaluate, settings, proxy=proxy, short=short, on_event=tell, run=run_together)


def trainer(
    setup: Setup, ways: Ways, training: TrainSettings, *, by_loss: bool = False
) -> Callable[[Choice, int], Outcome]:
    """What trains a choice with a seed and judges it: by the metric, or by the loss, which moves before the metric."""
    from groupsearch.search import Outcome
    from groupsearch.training import train

    def evaluate(choice: Choice, seed: int) -> Outcome:
        grouping, chosen = ways.of_choice(choice, training)
        result = train(setup.loaded, grouping, replace(chosen, seed=seed))
        points = tuple((point.step, point.metric) for point in result.curve if point.metric is not None)
        value = float("nan") if result.metric is None else result.metric
        value = -result.curve[-1].loss if by_loss else value
        return Outcome(value, result.step_seconds, result.steps, points)

    return evaluate


def _short(setup: Setup, ways: Ways, training: TrainSettings, request: SearchRequest) -> Short:
    """Runs of the first steps of a full one: the same noise, and with the same seed the same beginning."""
    from groupsearch.search import Short

    steps = max(1, round(request.short_fraction * training.steps))
    if steps >= training.steps:
        raise GroupSearchError(
            f"Expected short runs to be shorter than the {training.steps} steps of full ones, found {steps}. Search "
            f"with --rungs full, or give more --steps."
        )
    shorter = replace(training, steps=steps, evaluate_every=0)
    evaluate = trainer(setup, ways, shorter, by_loss=True)
    return Short(evaluate, steps / training.steps, trials_of(request.rungs, request.trials), LOSS)


def _proxy(setup: Setup, training: TrainSettings, notify: Notify) -> Proxy:
    """Gram matrices of some training examples, which score any grouping."""
    from groupsearch.proxy import gram_matrices
    from groupsearch.search import Proxy

    assert training.noise_multiplier is not None
    data = setup.loaded.data
    assert data is not None  # it is being trained
    noise_multiplier, batch = training.noise_multiplier, training.sampling_rate * data.train_size
    notify(Said("Taking per-example gradients for the proxy, as a training begins"))
    begin = time.perf_counter()
    assert training.seed is not None  # a search is an experiment
    grams = gram_matrices(setup.loaded, seed=training.seed, settings=training)
    seconds = time.perf_counter() - begin

    def predict(choice: Choice) -> float | None:
        chosen = mechanism_of(choice, training)
        if isinstance(chosen.allocation, AdaptiveQuantile):
            return None  # its thresholds are those of a whole training
        found = grams.score(
            choice.boundaries,
            rule=chosen.rule,
            allocation=chosen.allocation,
            max_grad_norm=training.max_grad_norm,
            noise_allocation=chosen.noise_allocation,
            noise_multiplier=noise_multiplier,
            expected_batch_size=batch,
        )
        return found.value

    return Proxy(predict, seconds, max(grams.steps), len(grams.steps))
