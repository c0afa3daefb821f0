"""What ``optimize`` does between a checked profile and its document: the search in rungs, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from groupsearch.cli.console import print_table, progress, say
from groupsearch.cli.varying import Ways, mechanism_of, searched
from groupsearch.clipping import AdaptiveQuantile
from groupsearch.errors import GroupSearchError
from groupsearch.units import format_bytes, format_count, format_interval, format_number, format_seconds

if TYPE_CHECKING:
    from groupsearch.search import Choice, Event, Outcome, Proxy, SearchResult, SearchSettings, Short
    from groupsearch.training import TrainSettings
    from groupsearch.verify import Setup

RUNGS = ("proxy", "short", "full")
TRIALS = {"short": 18, "full": 16}  # where the lowest rung of runs is this one and nothing else is said
FINGERPRINT = (
    *("norm_method", "checkpoint", "optimizer", "micro_batches", "autocast", "device"),
    *("epsilon", "delta", "steps", "learning_rate"),
    *("sampling_rate", "rule", "max_grad_norm"),
)
LOSS = "negative loss"  # what short runs are judged by
_DONE = {"short": "Short run", "full": "Full run", "replication": "Further seed"}


class Rungs(click.ParamType[tuple[str, ...]]):
    """Rungs of evidence, as in short,full."""

    name = "rungs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The rungs of the text, from the cheapest on."""
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in str(value).split(",")]
        if not set(words) <= set(RUNGS) or "full" not in words:
            self.fail(
                f"Expected full, and proxy, short or both before it, as in short,full; found {value!r}.", param, ctx
            )
        return tuple(rung for rung in RUNGS if rung in words)


def trials_of(given: Mapping[str, Any]) -> int:
    """How many groupings the lowest rung of runs is to have."""
    lowest = "short" if "short" in given["rungs"] else "full"
    return TRIALS[lowest] if given["trials"] is None else int(given["trials"])


def search_settings(
    document: Mapping[str, Any], metric_name: str, given: Mapping[str, Any], storage: str | None, force: bool
) -> SearchSettings:
    """The settings of the rung of full runs.

    Raises:
        GroupSearchError: for a value out of its range, or options that exclude each other.
    """
    from groupsearch.search import SearchSettings

    fixed = {key: document["settings"][key] for key in FINGERPRINT}
    fixed["device"] = fixed["device"].partition(":")[0]  # workers have one GPU of the same kind each
    return SearchSettings(
        trials=given["promote"] if "short" in given["rungs"] else trials_of(given),
        budget_bytes=given["budget"],
        seeds=given["seeds"],
        seed=given["seed"],
        max_runs=given["max_runs"],
        confidence=given["confidence"],
        sampler=given["sampler"],
        storage=storage,
        study_name=given["study"],
        resume=given["resume"],
        force=force,
        granularity=given["granularity"],
        max_groups=given["max_groups"],
        metric_name=metric_name,
        selection_data=given["selection_data"],
        **searched(given, document["settings"]),
        fingerprint={**document["model"], **fixed, "packages": document["environment"]["packages"]},
    )


def search(
    setup: Setup, ways: Ways, training: TrainSettings, settings: SearchSettings, given: Mapping[str, Any]
) -> SearchResult:
    """Search in the rungs that were asked for, drawing progress; every training run is one evaluation."""
    from groupsearch.search import search_in_rungs
    from groupsearch.search.together import run_together

    short = _short(setup, ways, training, given) if "short" in given["rungs"] else None
    proxy = _proxy(setup, training) if "proxy" in given["rungs"] else None
    what = f"{settings.trials} groupings" if short is None else f"{short.trials} groupings in short runs, then the best"
    say(f"Searching: {what}, then {settings.seeds} seeds of each on the front")
    with progress() as bars:
        bar = bars.add_task("Search", total=settings.trials)

        def notify(event: Event) -> None:
            groups = f"{len(event.boundaries) + 1} groups" if event.boundaries else "all-layer"
            groups = ", ".join((groups, *event.choice.options))
            seed = "" if event.seed is None else f", seed {event.seed}"
            what = f"{_DONE[event.phase]}: {groups}{seed}"
            bars.update(bar, description=what, completed=event.done, total=event.total)
            if event.kind == "failed" or (event.kind == "trained" and event.value is not None):  # else another's
                name = LOSS if event.phase == "short" else settings.metric_name
                value = f"failed ({event.reason})" if event.value is None else f"{name} {event.value:.4f}"
                say(f"{event.done}/{event.total} {what}: {value}, {format_bytes(event.peak_bytes)}")

        evaluate, traces = trainer(setup, ways, training), ways.traces
        return search_in_rungs(traces, evaluate, settings, proxy=proxy, short=short, on_event=notify, run=run_together)


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


def _short(setup: Setup, ways: Ways, training: TrainSettings, given: Mapping[str, Any]) -> Short:
    """Runs of the first steps of a full one: the same noise, and with the same seed the same beginning."""
    from groupsearch.search import Short

    steps = max(1, round(given["short_fraction"] * training.steps))
    if steps >= training.steps:
        raise GroupSearchError(
            f"Expected short runs to be shorter than the {training.steps} steps of full ones, found {steps}. Search "
            f"with --rungs full, or give more --steps."
        )
    shorter = replace(training, steps=steps, evaluate_every=0)
    evaluate = trainer(setup, ways, shorter, by_loss=True)
    return Short(evaluate, steps / training.steps, trials_of(given), LOSS)


def _proxy(setup: Setup, training: TrainSettings) -> Proxy:
    """Gram matrices of some training examples, which score any grouping."""
    from groupsearch.proxy import gram_matrices
    from groupsearch.search import Proxy

    assert training.noise_multiplier is not None
    data = setup.loaded.data
    assert data is not None  # it is being trained
    noise_multiplier, batch = training.noise_multiplier, training.sampling_rate * data.train_size
    say("Taking per-example gradients for the proxy, as a training begins")
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


def print_result(result: SearchResult) -> None:
    """The front, what is recommended, and what the search cost and is worth."""
    percent = "accuracy" in result.metric_name
    best = result.recommended
    shown = [c for c in result.candidates if c.on_front or c is best or c.source in ("all-layer", "layer-wise")]
    rows = [
        (
            ", ".join((c.source, *c.choice.options)),
            str(c.groups),
            format_bytes(c.peak_bytes),
            format_interval(c.mean, c.half_width, percent=percent),
            str(len(c.values)),
            "yes" if c.on_front else "",
            "<- recommended" if c is best else "",
        )
        for c in shown
    ]
    print_table(("from ", "groups", "peak", result.metric_name, "seeds", "front", " "), rows)
    ways = {c.variant: None for c in result.front if c.variant is not None}
    if ways:
        say(f"What is on the front needs least with: {'; '.join(ways)}.")
    say(result.reason)
    _print_rungs(result)


def _print_rungs(result: SearchResult) -> None:
    cost = result.cost
    rows = [
        (
            rung.name,
            format_count(rung.runs) if rung.runs else "",
            format_seconds(rung.seconds),
            format_count(rung.steps),
            format_number(rung.full_trainings),
        )
        for rung in cost.rungs
    ]
    print_table(("rung ", "runs", "time", "steps", "full trainings"), rows)
    for agreement in result.agreements:
        say(agreement.statement)
    say(
        f"{cost.trained} training runs in {format_seconds(cost.seconds)}: the cost of "
        f"{format_number(cost.before_replication)} full trainings to find the front and "
        f"{format_number(cost.full_trainings - cost.before_replication)} to repeat it."
    )
