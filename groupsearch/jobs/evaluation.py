"""How a search evaluates a choice: what is searched besides the grouping, and what every rung judges by."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, TypedDict

from groupsearch.documents.rows import Variant
from groupsearch.errors import GroupSearchError
from groupsearch.jobs.events import LOSS, Advanced, Evaluated, Notify, Said, described
from groupsearch.jobs.request import RUNGS, SearchRequest, bytes_of
from groupsearch.options import NORM_METHODS, EngineOptions, checkpoint_interval
from groupsearch.plan.clipping import RULES, AdaptiveQuantile

if TYPE_CHECKING:
    from groupsearch.plan.grouping import Grouping
    from groupsearch.plan.trace import Trace
    from groupsearch.search import Choice, Event, Outcome, Proxy, SearchResult, SearchSettings, Short
    from groupsearch.search.space import Variants
    from groupsearch.training import TrainSettings
    from groupsearch.verify import Setup


THRESHOLDS = ("uniform", "dimension", "adaptive")  # of search.settings, without loading Optuna for --help
# What is tried where no values are given. The first two change the mechanism, the others memory and time alone.
DEFAULTS = {
    "rule": RULES,
    "thresholds": THRESHOLDS[:2],
    "checkpoint": ("none", "blocks"),
    "micro-batches": ("1", "2", "4"),
    "norm-method": NORM_METHODS,
}
COSTS = ("checkpoint", "micro-batches", "norm-method")


def values_of(vary: Mapping[str, Sequence[str]] | Sequence[str]) -> dict[str, list[str]]:
    """What is searched and among which values; none where the defaults are meant.

    Raises:
        GroupSearchError: for a name or a value that is not known.
    """
    found = dict(vary) if isinstance(vary, Mapping) else dict.fromkeys(vary, ())
    return {name: check_values(name, values) for name, values in found.items()}


def check_values(name: str, values: Sequence[str]) -> list[str]:
    """The values, each once.

    Raises:
        GroupSearchError: for a name or a value that is not known.
    """
    if name not in DEFAULTS:
        raise GroupSearchError(f"Expected {', '.join(DEFAULTS)}, as in rule or rule=auto-s,abadi, found {name!r}.")
    if wrong := [each for each in values if not _is_known(name, each)]:
        known = ", ".join(DEFAULTS[name] if name != "thresholds" else THRESHOLDS)
        raise GroupSearchError(f"Expected values of {name} such as {known}, found {wrong[0]!r}.")
    return list(dict.fromkeys(values))


class Searched(TypedDict):
    """The part of the search's settings that says what is searched."""

    rules: tuple[str, ...]
    allocations: tuple[str, ...]
    objectives: tuple[str, ...]


def searched(
    vary: Mapping[str, Sequence[str]], given_rule: str | None, own_rule: str, objective: str | None
) -> Searched:
    """What is searched; the training's own rule is tried first.

    Raises:
        GroupSearchError: when the clip rule is both searched and given.
    """
    if "rule" in vary and given_rule is not None:
        raise GroupSearchError("Found --rule and --vary rule: the one fixes it, the other searches it. Leave one out.")
    rules = tuple(vary["rule"] or dict.fromkeys((own_rule, *RULES))) if "rule" in vary else ()
    allocations = tuple(vary["thresholds"] or DEFAULTS["thresholds"]) if "thresholds" in vary else ()
    objectives = ("metric", "peak", *(["time"] if objective else []))
    return {"rules": rules, "allocations": allocations, "objectives": objectives}


@dataclass(frozen=True, eq=False)
class Ways:
    """The ways of taking a step that ``--vary`` asks for, the command's own first, each with its trace.

    Attributes:
        setups: how a step is taken, by the name of the way.
        traces: one step of each.
    """

    setups: Mapping[str, Setup]
    traces: Mapping[str, Trace]

    @classmethod
    def of(cls, setup: Setup, trace: Trace, training: TrainSettings, vary: Mapping[str, Sequence[str]]) -> Ways:
        """Trace a step of every combination; of the command's own way there is a trace already."""
        assert setup.loaded.data is not None  # it is being trained
        batch = training.sampling_rate * setup.loaded.data.train_size
        own = {
            "checkpoint": setup.checkpoint,
            "micro-batches": str(setup.micro_batches),
            "norm-method": setup.options.norm_method,
        }
        names = [name for name in own if name in vary]
        tried = [dict.fromkeys((own[name], *(vary[name] or DEFAULTS[name]))) for name in names]
        setups = {}
        for values in product(*tried):
            way = dict(zip(names, values, strict=True))
            setups[_named(way)] = setup if way.items() <= own.items() else _changed(setup, way, batch)
        traces = {name: trace if each is setup else each.trace() for name, each in setups.items()}
        return cls(setups, traces)

    @cached_property
    def variants(self) -> Variants:
        """What says which way needs least for a grouping."""
        from groupsearch.search.space import Variants

        return Variants(self.traces)

    def of_choice(self, choice: Choice, training: TrainSettings) -> tuple[Grouping, TrainSettings]:
        """The grouping of a choice, and how it is trained: in the way that needs least memory, by its mechanism."""
        from groupsearch.plan.grouping import Grouping

        name = self.variants.cheapest(choice.boundaries)
        settings = mechanism_of(choice, training)
        if len(self.setups) > 1:
            setup, own = self.setups[name], next(iter(self.setups.values()))
            if setup.micro_batches != own.micro_batches:
                physical = setup.loaded.batch_size if setup.micro_batches > 1 else None
                settings = replace(settings, physical_batch=physical)
            settings = replace(settings, checkpoint=setup.checkpoint, options=setup.options)
        return Grouping.from_boundaries(self.traces[name], choice.boundaries), settings

    def describe(self) -> list[Variant]:
        """How every way takes its step, the command's own first; nothing where there is one alone."""
        if len(self.setups) == 1:
            return []
        return [
            Variant(
                name=name,
                checkpoint=setup.checkpoint,
                micro_batches=setup.micro_batches,
                batch_size=setup.loaded.batch_size,
                norm_method=setup.options.norm_method,
            )
            for name, setup in self.setups.items()
        ]


def mechanism_of(choice: Choice, training: TrainSettings) -> TrainSettings:
    """The training with the rule and the thresholds of a choice, where it has any."""
    rule = training.rule if choice.rule is None else choice.rule
    if choice.allocation is None:
        return replace(training, rule=rule)
    allocation = AdaptiveQuantile() if choice.allocation == "adaptive" else choice.allocation
    return replace(training, rule=rule, allocation=allocation)


def _changed(setup: Setup, way: Mapping[str, str], batch: float) -> Setup:
    """The setup in another way; a batch is cut evenly into its micro-batches."""
    changed = setup
    if "checkpoint" in way:
        changed = replace(changed, checkpoint=way["checkpoint"])
    if "norm-method" in way:
        changed = replace(changed, options=EngineOptions(norm_method=way["norm-method"]))
    if "micro-batches" in way:
        pieces = int(way["micro-batches"])
        settings = {**setup.settings, "batch_size": math.ceil(batch / pieces)}
        changed = replace(changed, micro_batches=pieces, settings=settings)
    return changed


def _named(way: Mapping[str, str]) -> str:
    words = {"checkpoint": "checkpoint {}", "micro-batches": "micro-batches {}", "norm-method": "norms {}"}
    return ", ".join(words[name].format(value) for name, value in way.items())


def _is_known(name: str, value: str) -> bool:
    if name == "thresholds":
        return value in THRESHOLDS
    if name == "micro-batches":
        return value.isdecimal() and int(value) > 0
    if name == "checkpoint":
        try:
            checkpoint_interval(value)
        except GroupSearchError:
            return False
        return True
    return value in DEFAULTS[name]


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
    header: Mapping[str, object], metric_name: str, request: SearchRequest, storage: str | None, *, force: bool
) -> SearchSettings:
    """The settings of the rung of full runs.

    Raises:
        GroupSearchError: for a value out of its range, or options that exclude each other.
    """
    from groupsearch.jobs.stages import part_of
    from groupsearch.search import SearchSettings

    model, environment, asked = (part_of(header, name) for name in ("model", "environment", "settings"))
    fixed = {key: asked[key] for key in FINGERPRINT}
    fixed["device"] = str(asked["device"]).partition(":")[0]  # workers have one GPU of the same kind each
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
        **searched(values_of(request.vary), request.rule, str(asked["rule"]), request.objective),
        fingerprint={**model, **fixed, "packages": environment["packages"]},
    )


def search_rungs(
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
