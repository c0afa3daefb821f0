"""The front of accuracy against peak memory: profile, check, search by training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from groupsearch.documents import Profile, Search
from groupsearch.errors import GroupSearchError
from groupsearch.grouping import fewest_groups
from groupsearch.jobs.events import Begun, Interrupted, Profiled, Said
from groupsearch.jobs.request import LEVELS, SearchRequest, bytes_of, door
from groupsearch.jobs.rungs import rungs_of, search_settings, trials_of
from groupsearch.jobs.rungs import search as search_rungs
from groupsearch.jobs.select import select
from groupsearch.jobs.stages import add_checks, add_estimates, start_document, tracing
from groupsearch.jobs.training import describe, training_setup
from groupsearch.jobs.varying import COSTS, Ways, values_of
from groupsearch.privacy import NOT_PRIVATE, PrivacyStatement
from groupsearch.search import SearchSettings
from groupsearch.search.run import await_study
from groupsearch.search.selection import adaptive_selection_cost
from groupsearch.search.shared import shown
from groupsearch.trace import Trace
from groupsearch.training import TrainSettings
from groupsearch.verify import Setup

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
    header: dict[str, Any]

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
        header = start_document("search", setup, device=setup.device, **chosen, **describe(training))
        training = replace(training, seed=None) if private else training
        header["randomness"] = training.streams().describe()
        return cls(settled, setup, training, header)

    def run(self, storage: str | None, *, force: bool) -> Search:
        """Search, in this process and in any that helps."""
        document, training, request = self.header, self.training, self.request
        settings = search_settings(document, self.setup.loaded.metric_name, request, storage, force=force)
        trace = self._profile(settings)
        ways = Ways.of(self.setup, trace, training, values_of(request.vary))
        document["variants"] = ways.describe()
        result = search_rungs(self.setup, ways, training, settings, request)
        parts = result.to_json()
        trained = {**describe(training), **parts["training"]}
        document |= {**parts, "training": trained, "cost": {**parts["cost"], "epsilon": trained["epsilon"]}}
        document["privacy"] = self._statement(settings.selection_data).to_json()
        document["not_private"] = NOT_PRIVATE["search"] if settings.selection_data == "private" else {}
        found = Search.from_json(document)
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
        document, request = self.header, replace(self.request, rungs=("full",))
        settings = search_settings(document, self.setup.loaded.metric_name, request, None, force=False)
        trace = self._profile(settings)
        select(document, self.setup, trace, self.training, settings, request)
        document["training"] = describe(self.training)
        document["not_private"] = {}
        document["cost"]["epsilon"] = document["training"]["epsilon"]
        return Search.from_json(document)

    def work(self, storage: str) -> int:
        """Take trials of a search that another process began, until it ends; how many trainings all of them made.

        Raises:
            GroupSearchError: when nobody begins it for an hour.
            Interrupted: what was being trained is left to the others.
        """
        notify, request = self.request.notify, replace(self.request, resume=True)
        settings = search_settings(self.header, self.setup.loaded.metric_name, request, storage, force=False)
        notify(tracing(self.header))
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

    def _profile(self, settings: SearchSettings) -> Trace:
        """Trace a step and check its estimates, which is done before anything is trained."""
        document, notify, level = self.header, self.request.notify, self.request.verify
        try:
            trace = add_estimates(document, self.setup, (), max_groups=8, notify=notify)
            if settings.budget_bytes is not None and not set(COSTS) & set(document["settings"].get("vary", {})):
                fewest_groups(trace, settings.budget_bytes)  # refuses a budget below the floor before any check
            add_checks(document, self.setup, trace, level, notify, CHECKED)
            notify(Profiled(Profile.from_json({**document, "kind": "profile"})))
        except KeyboardInterrupt as interrupt:
            kept = "An earlier search is kept as it was; running" if settings.resume else "Running"
            raise Interrupted(
                f"Interrupted before the search: nothing was searched yet and no document was written. {kept} the "
                f"same command again starts over with the trace."
            ) from interrupt
        return trace


search = door(SearchRequest, run)
