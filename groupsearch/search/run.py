"""A search from beginning to end."""

from __future__ import annotations

from groupsearch.search.choice import Evaluate
from groupsearch.search.evaluations import Ledger
from groupsearch.search.exploration import Search, explore
from groupsearch.search.replication import replicate
from groupsearch.search.result import SearchResult, conclude
from groupsearch.search.samplers import make_sampler
from groupsearch.search.settings import Notify, SearchSettings, ignore
from groupsearch.search.space import Space
from groupsearch.search.study import open_study, quiet_optuna, requeue_running
from groupsearch.search.variants import Traces


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
        search = Search(space, study, Ledger(study, evaluate), settings, on_event)
        interrupted = False
        try:
            explore(search)
            replicate(search)
        except KeyboardInterrupt:
            interrupted = True
        requeue_running(study, space)
        return conclude(space, study, search.ledger.evaluations, settings, interrupted=interrupted)
