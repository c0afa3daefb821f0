"""A search in rungs of evidence, each an order dearer than the one below it: a proxy, short runs, full runs.

The runs of every rung are a search of their own, in the same storage: whatever ends a search in rungs, it goes
on where it was. A rung is believed as far as it is seen to say what the one above it finds. The proxy is seen
first, on choices that it had no part in choosing; only when it is known to predict does it choose further ones.
Short runs are the beginning of full ones and choose what is run in full; how well, is measured with the result.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from groupsearch.errors import GroupSearchError
from groupsearch.search.agreement import Agreement, Evidence
from groupsearch.search.choice import Choice, Evaluate
from groupsearch.search.correlation import rank_correlation
from groupsearch.search.front import worthiest
from groupsearch.search.proxied import Judge, Proxy
from groupsearch.search.result import Cost, Rung, SearchResult
from groupsearch.search.run import run_search
from groupsearch.search.settings import Event, Notify, SearchSettings, ignore
from groupsearch.search.space import Space
from groupsearch.search.study import open_study, quiet_optuna
from groupsearch.search.variants import Traces

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
        run: :func:`run_search`, or :func:`groupsearch.search.together.run_together`.

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
