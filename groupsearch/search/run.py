"""A search from beginning to end."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from groupsearch.errors import GroupSearchError
from groupsearch.search.candidates import worthiest
from groupsearch.search.choice import Choice, Evaluate
from groupsearch.search.evaluations import POLL_SECONDS, EvaluationLog
from groupsearch.search.exploration import Exploration, explore, replicate
from groupsearch.search.proxied import Agreement, Evidence, Judge, Proxy
from groupsearch.search.result import Cost, Rung, SearchResult, conclude
from groupsearch.search.sampler import make_sampler
from groupsearch.search.settings import Event, Notify, SearchSettings, ignore
from groupsearch.search.shared import open_storage, shown, study_names
from groupsearch.search.space import Space, Traces
from groupsearch.search.statistics import rank_correlation
from groupsearch.search.study import SharedStudy, open_study, quiet_optuna, requeue_running


def run_search(
    trace: Traces, evaluate: Evaluate, settings: SearchSettings | None = None, on_event: Notify = ignore
) -> SearchResult:
    """Search for groupings that are worth having, and give those on the front several seeds.

    * ``evaluate`` is never called for a grouping whose estimated peak exceeds the budget, and never twice
      with the same choice and seed, in this process or one that resumes it.
    * Every evaluation is stored before the next begins: a kill loses at most the one under way,
      which is made again on resume.
    * All groupings are evaluated with the same seeds, so that they compare in pairs.
    * Without interruption and storage, equal settings give equal evaluations in equal order,
      if ``evaluate`` is a function of its arguments.

    Args:
        trace: the traced step that peaks are estimated from; or several by name, ways of taking the step that
            differ in memory and time alone, of which every grouping takes the one with its least peak.
        evaluate: takes a :class:`Choice` and a seed, gives an :class:`Outcome`. What it raises is recorded
            as a failed evaluation and the search goes on.
        settings: how to search; one process at a time may work on a study.
        on_event: is told of everything that happens.

    Returns:
        What was found; after KeyboardInterrupt what was found until then, with ``interrupted``.

    Raises:
        BudgetError: when the budget is below the floor; nothing has been evaluated or stored.
        GroupSearchError: when the study exists and is neither resumed nor forced, is of another
            problem, cannot be stored, or when every evaluation failed.
    """
    settings = settings or SearchSettings()
    space = Space.of(trace, settings)
    with quiet_optuna():
        study = open_study(space, settings)
        study.sampler = make_sampler(space, settings, study.place)
        search = Exploration(space, study, EvaluationLog(study, evaluate), settings, on_event)
        interrupted = False
        try:
            explore(search)
            replicate(search)
        except KeyboardInterrupt:
            interrupted = True
        requeue_running(study, space)
        return conclude(space, study, search.ledger.evaluations, settings, interrupted=interrupted)


# -- A search in rungs of evidence, each an order dearer than the one below it: a proxy, short runs, full runs
#
# The runs of every rung are a search of their own, in the same storage: whatever ends a search in rungs, it goes
# on where it was. A rung is believed as far as it is seen to say what the one above it finds. The proxy is seen
# first, on choices that it had no part in choosing; only when it is known to predict does it choose further ones.
# Short runs are the beginning of full ones and choose what is run in full; how well, is measured with the result.

Run = Callable[[Traces, Evaluate, SearchSettings, Notify], SearchResult]


@dataclass(frozen=True)
class Short:
    """Runs of a fraction of the steps of a full one.

    Attributes:
        evaluate: makes one.
        fraction: of the steps, between 0 and 1.
        trials: how many choices are run, see :class:`SearchSettings`.
        metric_name: what its values are, which may tell more of the end than the metric does so early; None for the
            metric.

    Raises:
        GroupSearchError: for a number out of its range.
    """

    evaluate: Evaluate
    fraction: float
    trials: int
    metric_name: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise GroupSearchError(f"Expected short runs of a fraction between 0 and 1, found {self.fraction}.")
        if self.trials < 1:
            raise GroupSearchError(f"Expected at least 1 short run, found {self.trials}.")


def search_in_rungs(  # noqa: PLR0913 - settings by name, each with a default
    traces: Traces,
    evaluate: Evaluate,
    settings: SearchSettings,
    *,
    proxy: Proxy | None = None,
    short: Short | None = None,
    on_event: Notify = ignore,
    run: Run = run_search,
) -> SearchResult:
    """Search with cheap evidence first, and give the front of full runs its intervals.

    Args:
        traces: see :func:`run_search`.
        evaluate: makes a full run.
        settings: with ``short``, its ``trials`` are full runs before the front is replicated: the references and as
            many of the best by short runs as there is room for; without, they are found by full runs alone.
        proxy: chooses candidates for the lowest rung of runs, if it is seen to predict it.
        short: runs of fewer steps, by which those of full length are chosen.
        on_event: is told of everything that happens; the phase is the rung's name, or ``replication``.
        run: :func:`run_search`, or :func:`groupsearch.search.run.run_together`.

    Returns:
        What full runs found, with what all rungs cost and how they agreed. After KeyboardInterrupt among short
        runs what those found.

    Raises:
        GroupSearchError: as ``run`` does, and before anything is evaluated.
    """
    space = Space.of(traces, settings)
    judge = None if proxy is None else Judge(space, proxy)
    if short is None:
        settings = replace(settings, further=judge.choose_for(settings) if judge else None)
        return _join(judge, settings, None, None, run(traces, evaluate, settings, _told_as("full", on_event)))
    below = _settings_below(settings, short, judge)
    above = replace(settings, trials=max(settings.trials, len(_references(space)) + 1))  # refused now if too many
    if settings.storage is not None:  # refused now, not when the short runs are done
        with quiet_optuna():
            open_study(space, below)
            open_study(space, above)
        below, above = (replace(each, resume=True, force=False) for each in (below, above))
    found = run(traces, short.evaluate, below, _told_as("short", on_event))
    if found.interrupted:
        return _join(judge, below, short, found, None)
    first = promoted(space, found, above)
    above = replace(above, first=first, trials=len(first))
    return _join(judge, below, short, found, run(traces, evaluate, above, _told_as("full", on_event)))


def promoted(space: Space, found: SearchResult, settings: SearchSettings) -> tuple[Choice, ...]:
    """The references, and of what was found the best that there is room for among as many ``trials``."""
    references = _references(space)
    others = [c for c in found.candidates if c.choice not in references]
    points = [(c.mean, float(c.peak_bytes), *([c.step_seconds] if settings.timed else [])) for c in others]
    best = worthiest(points, settings.trials - len(references))
    return (*references, *(others[i].choice for i in best))


def _references(space: Space) -> list[Choice]:
    return [r for r in space.references() if set(r.boundaries) <= set(space.cuts)]


def _settings_below(settings: SearchSettings, short: Short, judge: Judge | None) -> SearchSettings:
    below = replace(
        settings,
        trials=short.trials,
        seeds=1,
        max_runs=None,
        study_name=f"{settings.study_name}/short",
        metric_name=short.metric_name or settings.metric_name,
        fingerprint={**settings.fingerprint, "short_fraction": short.fraction},
    )
    return replace(below, further=judge.choose_for(below) if judge else None)


def _told_as(rung: str, on_event: Notify) -> Notify:
    def tell(event: Event) -> None:
        on_event(replace(event, phase=rung) if event.phase == "search" or rung == "short" else event)

    return tell


def _join(
    judge: Judge | None,
    lowest: SearchSettings,
    short: Short | None,
    below: SearchResult | None,
    top: SearchResult | None,
) -> SearchResult:
    """One result of all rungs; ``lowest`` are the settings of the lowest one that runs."""
    found = {name: each for name, each in (("short", below), ("full", top)) if each is not None}
    shown = next((name for name in reversed(found) if found[name].candidates), next(reversed(found)))
    values = {name: {c.choice: c.mean for c in each.candidates} for name, each in found.items()}
    fraction = 0.0 if short is None else short.fraction
    agreements = [] if judge is None else _agreements(judge, lowest, found, values)
    if len(values) == 2:
        pairs = [(values["short"][c], value) for c, value in values["full"].items() if c in values["short"]]
        agreements.append(Agreement("short", "full", rank_correlation(pairs)))
    evidence = [Evidence(name, 1.0 if name == "full" else fraction, each) for name, each in values.items()]
    if judge is not None:
        scores = {c: judge.scores[c] for each in values.values() for c in each if c in judge.scores}
        evidence.insert(0, Evidence("proxy", 0.0, scores))
    return replace(
        found[shown],
        rung=shown,
        interrupted=any(each.interrupted for each in found.values()),
        cost=_cost(judge, found, lowest.seed, fraction),
        evidence=tuple(evidence),
        agreements=tuple(agreements),
    )


def _agreements(
    judge: Judge,
    lowest: SearchSettings,
    found: Mapping[str, SearchResult],
    values: Mapping[str, Mapping[Choice, float]],
) -> list[Agreement]:
    """Of the proxy: first over what it had no part in choosing, which decides, then with every rung over everything."""
    first = next(iter(found))
    seen = judge.unchosen(lowest, found[first].evaluations)
    used = judge.is_used(lowest, found[first].evaluations)
    decisive = judge.agreement(first, seen, used)
    others = [judge.agreement(name, each) for name, each in values.items() if each.keys() != seen.keys()]
    return [decisive, *others]


def _cost(judge: Judge | None, found: Mapping[str, SearchResult], first_seed: int, fraction: float) -> Cost:
    """The sum of all rungs, in units of a full run."""
    made = {name: each.evaluations for name, each in found.items()}
    full = made.get("full") or ()
    unit = full or made.get("short") or ()  # an interrupt may have left no full run
    share = 1.0 if full else fraction
    longest = max((e.steps for e in unit), default=0) / share
    rungs = []
    if judge is not None:
        seconds, usual = judge.proxy.seconds + judge.seconds, statistics.fmean([e.seconds for e in unit] or [0.0])
        trainings = seconds * share / usual if usual else 0.0
        rungs.append(Rung("proxy", 0, seconds, judge.proxy.steps, trainings, judge.proxy.passes))
    if "short" in made:
        rungs.append(Rung.of("short", made["short"], longest))
    if "full" in made:
        rungs.append(Rung.of("full", [e for e in full if e.seed == first_seed], longest))
        rungs.append(Rung.of("replication", [e for e in full if e.seed != first_seed], longest))
    costs = [each.cost for each in found.values()]
    return Cost(
        seconds=sum(rung.seconds for rung in rungs),
        trials=sum(cost.trials for cost in costs),
        trained=sum(cost.trained for cost in costs),
        steps=sum(rung.steps for rung in rungs),
        full_trainings=sum(rung.full_trainings for rung in rungs),
        rejected=sum(cost.rejected for cost in costs),
        cached=sum(cost.cached for cost in costs),
        failed=sum(cost.failed for cost in costs),
        rungs=tuple(rungs),
    )


# -- Several processes, on one machine or many, that search together -------------------------------


def run_together(
    trace: Traces, evaluate: Evaluate, settings: SearchSettings, on_event: Notify = ignore
) -> SearchResult:
    """:func:`run_search` in one of several processes that work on the study, to the end of what all of them do.

    * ``evaluate`` is called once for a grouping and a seed, by one process. When that process dies, another
      calls it again: at once where both run on one machine, else after a minute of silence.
    * ``trials`` of all processes together end the search; those that are under way then are finished.
    * Every process gives the same result.

    Raises:
        GroupSearchError: as :func:`run_search` does, or when the storage is out of reach for ten minutes.
    """
    result = run_search(trace, evaluate, settings, on_event)
    again = replace(settings, resume=True, force=False)
    while settings.storage is not None and not result.interrupted:
        try:
            if not _others_went_on(evaluate, again, len(result.evaluations)):
                break
        except KeyboardInterrupt:
            return replace(result, interrupted=True)
        result = run_search(trace, evaluate, again, on_event)
    return result


def await_study(settings: SearchSettings, patience_seconds: float = 600.0) -> None:
    """Wait until another process has begun the study, for a worker that may start before it.

    Raises:
        GroupSearchError: when nobody has begun it in that time, or there is no storage to wait at.
    """
    end = time.monotonic() + patience_seconds
    while True:
        if _begun(settings):
            return
        if time.monotonic() > end:
            raise GroupSearchError(
                f"Expected a study {settings.study_name!r} in {shown(settings.storage)} to work on, found none in "
                f"{patience_seconds:.0f} s. Begin it with the same command without --worker, or mend --storage."
            )
        time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))


def _begun(settings: SearchSettings) -> bool:
    where = str(settings.storage)
    if "://" not in where and not Path(where).exists():
        return False  # opening it would make the file, and whoever begins the search would find one there
    with quiet_optuna():
        return settings.study_name in study_names(open_storage(settings.storage))


def _others_went_on(evaluate: Evaluate, settings: SearchSettings, known: int) -> bool:
    """Wait for what others are at; whether there is more than so many evaluations then, or someone died at one."""
    with quiet_optuna():
        ledger = EvaluationLog(SharedStudy(settings.study_name, open_storage(settings.storage)), evaluate)
        return ledger.wait_for_others() or len(ledger.evaluations) > known
