"""The front of accuracy against peak memory: profile, check, search by training; or choose privately."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import NormalDist
from typing import NamedTuple

from torch import Tensor, nn

from groupsearch.documents import Profile, Search
from groupsearch.documents.rows import Candidate, Metric
from groupsearch.errors import GroupSearchError
from groupsearch.jobs.evaluation import (
    COSTS,
    Ways,
    mechanism_of,
    rungs_of,
    search_rungs,
    search_settings,
    trials_of,
    values_of,
)
from groupsearch.jobs.events import Begun, Interrupted, Profiled, Said
from groupsearch.jobs.request import LEVELS, SearchRequest, bytes_of, door
from groupsearch.jobs.stages import (
    Asked,
    Known,
    add_checks,
    describe,
    estimated,
    start_document,
    tracing,
    training_setup,
)
from groupsearch.plan.grouping import Grouping, fewest_groups
from groupsearch.plan.trace import Trace
from groupsearch.privacy import NOT_PRIVATE, PrivacyStatement, SelectionCost
from groupsearch.randomness import secret_rng
from groupsearch.search import Choice, SearchSettings
from groupsearch.search.run import await_study
from groupsearch.search.selection import (
    RepeatAndSelect,
    Selected,
    adaptive_selection_cost,
    candidate_event,
    repeated_selection_cost,
    select_privately,
    training_event,
)
from groupsearch.search.shared import shown
from groupsearch.search.space import Space
from groupsearch.training import DivergedError, TrainSettings, train
from groupsearch.units import format_bytes, format_count, format_interval, format_number
from groupsearch.verify import Setup
from groupsearch.workloads import Workload

CHECKED = ("all-layer", "layer-wise", "best:2", "best:4")
_WORKER_PATIENCE_SECONDS = 3600.0  # the search begins when its profile is made and checked
_SEARCH_SETTINGS = (
    *("budget", "rungs", "short_fraction", "trials", "promote", "seeds", "max_runs", "confidence", "selection_data"),
    *("vary", "objective", "groups", "granularity", "max_groups", "sampler", "seed", "verify"),
)
_SELECTION_SETTINGS = ("budget", "trials", "score_noise", "vary", "groups", "granularity", "max_groups", "verify")
# What would let something out besides the best, make candidates depend on scores, or make noise known.
EXCLUDED = (
    *("rungs", "short_fraction", "promote", "seeds", "max_runs", "confidence", "sampler"),
    *("storage", "study", "worker", "resume", "seed", "objective"),
)


def run(request: SearchRequest) -> Search:
    """Trace and check, then search for groupings that are worth having; or select privately, where that is asked for.

    Raises:
        BudgetError: when the budget is below the floor.
        ToleranceError: when an estimate is further off its check than ``fail_over``; nothing was trained then.
        GroupSearchError: for a request that makes no sense, a study that is there already, or when every training
            failed.
        Interrupted: with what was found; the study in the storage can be resumed.
    """
    prepared = Prepared.of(request)
    request.notify(Begun(prepared.header))
    return prepared.select() if request.private_selection else prepared.run(request.storage, force=request.force)


def refuse_excluded(request: SearchRequest, asked: Sequence[str] = ()) -> None:
    """Raise when private selection was asked for with an option that its proof leaves no room for.

    Args:
        request: any field of which that is not at its default was asked for.
        asked: options that were asked for besides.

    Raises:
        GroupSearchError: which names the options.
    """
    changed = [f.name for f in fields(request) if f.name in EXCLUDED and getattr(request, f.name) != f.default]
    found = [name for name in EXCLUDED if name in changed or name in asked]
    found += [f"vary {name}" for name in COSTS if name in request.vary]
    found += ["selection_data"] if request.selection_data == "public" else []
    if found:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in found)
        raise GroupSearchError(
            f"Found {names} with --private-selection. Its epsilon holds for one random number of trainings of "
            f"groupings drawn independently, of which the best alone is kept: no search that learns from scores, no "
            f"seed that is known, nothing on disk to go on with. Leave out the one or the other."
        )


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request that makes sense, before anything is run: ``header`` is the document so far."""

    request: SearchRequest
    setup: Setup
    training: TrainSettings
    header: dict[str, object]

    @classmethod
    def of(cls, request: SearchRequest) -> Prepared:
        """Load the model and settle how it is trained.

        Raises:
            GroupSearchError: when it cannot be trained, or options exclude each other.
        """
        private = request.private_selection
        if private:
            refuse_excluded(request)
        rungs = rungs_of(request.rungs)
        settled = replace(
            request,
            rungs=rungs,
            vary=values_of(request.vary),
            budget=bytes_of(request.budget),
            trials=trials_of(rungs, request.trials),
        )
        setup, training = training_setup(settled)
        if "measurements" in LEVELS[request.verify]:
            setup.check_measurable()
        chosen = {key: getattr(settled, key) for key in (_SELECTION_SETTINGS if private else _SEARCH_SETTINGS)}
        header = start_document("search", setup, request, device=setup.device, **chosen, **describe(training))
        training = replace(training, seed=None) if private else training
        header["randomness"] = training.streams().describe()
        return cls(settled, setup, training, header)

    def run(self, storage: str | None, *, force: bool) -> Search:
        """Search, in this process and in any that helps."""
        training, request = self.training, self.request
        settings = search_settings(self.header, self.setup.loaded.metric_name, request, storage, force=force)
        known = self._profile(settings)
        ways = Ways.of(self.setup, known.trace, training, values_of(request.vary))
        result = search_rungs(self.setup, ways, training, settings, request)
        parts = result.to_json()
        trained = {**describe(training), **parts["training"]}
        found = self._document(
            known,
            {
                "variants": [each.to_json() for each in ways.describe()],
                **parts,
                "training": trained,
                "cost": {**parts["cost"], "epsilon": trained["epsilon"]},
                "privacy": self._statement(settings.selection_data).to_json(),
                "not_private": NOT_PRIVATE["search"] if settings.selection_data == "private" else {},
            },
        )
        if result.interrupted:
            kept = "gone with the process, as there was no storage" if storage is None else f"kept in {shown(storage)}"
            raise Interrupted(
                f"Interrupted. The {result.cost.trained} training runs that ended are {kept}; the "
                f"same command with --resume instead of --force goes on.",
                found,
            )
        return found

    def select(self) -> Search:
        """Choose privately among fixed groupings; there is no study, and the document has the chosen one alone."""
        request, training = replace(self.request, rungs=("full",)), describe(self.training)
        settings = search_settings(self.header, self.setup.loaded.metric_name, request, None, force=False)
        known = self._profile(settings)
        selected = select(self.setup, known.trace, self.training, settings, request)
        return self._document(
            known,
            {
                "candidates": [selected.candidate.to_json()],
                "recommended": selected.candidate.to_json(),
                "reason": selected.reason,
                "cost": {"selection": asdict(selected.cost), "epsilon": training["epsilon"]},
                "training": training,
                "privacy": selected.privacy.to_json(),
                "not_private": {},
            },
        )

    def _document(self, known: Known, parts: Mapping[str, object]) -> Search:
        return Search.from_json({**self.header, **known.to_json(), **parts})

    def work(self, storage: str) -> int:
        """Take trials of a search that another process began, until it ends; how many trainings all of them made.

        Raises:
            GroupSearchError: when nobody begins it for an hour.
            Interrupted: what was being trained is left to the others.
        """
        notify, request = self.request.notify, replace(self.request, resume=True)
        settings = search_settings(self.header, self.setup.loaded.metric_name, request, storage, force=False)
        notify(tracing(self.setup))
        trace = self.setup.trace()
        notify(Said(f"Waiting for the search {settings.study_name!r} in {shown(settings.storage)}"))
        await_study(settings, _WORKER_PATIENCE_SECONDS)
        ways = Ways.of(self.setup, trace, self.training, values_of(request.vary))
        result = search_rungs(self.setup, ways, self.training, settings, request)
        if result.interrupted:
            raise Interrupted("Interrupted. What this worker was training is left to the others.")
        return result.cost.trained

    def _statement(self, selection_data: str) -> PrivacyStatement:
        """What one training costs, and what is known of the cost of having chosen it."""
        assert self.setup.loaded.data is not None  # it was trained
        statement = self.training.statement(self.setup.loaded.data.train_size)
        return replace(statement, selection=adaptive_selection_cost(selection_data))

    def _profile(self, settings: SearchSettings) -> Known:
        """Trace a step and check its estimates, which is done before anything is trained."""
        notify = self.request.notify
        try:
            known = estimated(self.setup, Asked(), notify)
            if settings.budget_bytes is not None and not set(COSTS) & set(self.request.vary):
                fewest_groups(known.trace, settings.budget_bytes)  # refuses a budget below the floor before any check
            add_checks(known, self.setup, self.request.verify, notify, CHECKED)
            profile = Profile.from_json({**self.header, **known.to_json(), "kind": "profile"})
            notify(Profiled(profile))
        except KeyboardInterrupt as interrupt:
            kept = "An earlier search is kept as it was; running" if settings.resume else "Running"
            raise Interrupted(
                f"Interrupted before the search: nothing was searched yet and no document was written. {kept} the "
                f"same command again starts over with the trace."
            ) from interrupt
        profile.check(self.request.fail_over)
        return known


search = door(SearchRequest, run)


_CONFIDENCE = 0.95


class Chosen(NamedTuple):
    """What a private selection may publish: the best, why, what choosing it cost, and what is stated of it."""

    candidate: Candidate
    reason: str
    cost: SelectionCost
    privacy: PrivacyStatement


def select(
    setup: Setup, trace: Trace, training: TrainSettings, settings: SearchSettings, request: SearchRequest
) -> Chosen:
    """Select among fixed groupings on private data: the best, its noisy score, and what it cost.

    Args:
        setup: what is trained.
        trace: of its step.
        training: how it is trained.
        settings: ``trials`` is the expected number of trainings; the limits are those of the groupings.
        request: says the standard deviation of the noise of scores, in validation examples; whom it notifies is never
            told what is not published.

    Raises:
        GroupSearchError: when the workload does not state that its metric is a share, or a training raises.
    """
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
    assert row.metric.mean is not None  # it has a score
    reason = (
        f"{row.groups} groups ({row.source}) need {format_bytes(row.peak_bytes)} and had the best noisy score "
        f"of those that were drawn: {format_interval(row.metric.mean, row.metric.half_width, percent=True)}."
    )
    assert workload.data is not None  # it was trained
    # Its trainings are drawn from the system's entropy, whatever seed the settings have.
    statement = replace(training.statement(workload.data.train_size), selection=cost, seeded=False)
    return Chosen(row, reason, cost, statement)


def _cost(scheme: RepeatAndSelect, choices: int, training: TrainSettings, noise: float) -> SelectionCost:
    assert training.noise_multiplier is not None
    assert training.delta is not None
    spent = (training.noise_multiplier, training.sampling_rate, training.steps)
    event, delta = candidate_event(*spent, noise), training.delta
    epsilon, anew = scheme.epsilon(event, delta), scheme.epsilon(event, delta, then=training_event(*spent))
    return repeated_selection_cost(choices, scheme.mean, delta, epsilon, anew)


def _scorer(workload: Workload, trace: Trace, training: TrainSettings) -> Callable[[Choice, int], float | None]:
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
    metric = workload.metric
    if metric is None or not workload.metric_is_share:
        raise GroupSearchError(
            f"Expected a metric from 0 to 1 for each example to select by, found that {workload.metric_name!r} is not "
            f"stated to be one: noise can hide an example only if it is known how much one can weigh. Give the "
            f"Workload such a metric and metric_is_share=True; a score outside that range then counts as its end."
        )

    def share(model: nn.Module, batch: object) -> Tensor:
        return metric(model, batch).nan_to_num(0.0).clamp(0.0, 1.0)

    return replace(workload, metric=share)


def _row(space: Space, best: Selected[Choice], workload: Workload, noise: float) -> Candidate:
    """The candidate of the document; its interval is of the noise that was added, which is known."""
    assert workload.data is not None
    examples, choice = workload.data.validation_size, best.candidate
    mean = min(1.0, max(0.0, best.score / examples))
    half_width = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2) * noise / examples
    return Candidate(
        boundaries=choice.boundaries,
        rule=choice.rule,
        allocation=choice.allocation,
        groups=choice.groups,
        peak_bytes=space.peak_bytes(choice.boundaries),
        metric=Metric(
            name=workload.metric_name,
            mean=mean,
            half_width=half_width,
            interval=(mean - half_width, mean + half_width),
            interval_from="the noise added to the score",
            seeds=1,
        ),
        on_front=True,
        source=space.source(choice.boundaries),
    )
