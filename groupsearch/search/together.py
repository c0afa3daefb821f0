"""Several processes, on one machine or many, that search together."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from groupsearch.errors import GroupSearchError
from groupsearch.search.choice import Evaluate
from groupsearch.search.evaluations import POLL_SECONDS, Ledger
from groupsearch.search.result import SearchResult
from groupsearch.search.run import run_search
from groupsearch.search.settings import Notify, SearchSettings, ignore
from groupsearch.search.storage import open_storage, shown, study_names
from groupsearch.search.study import SharedStudy, quiet_optuna
from groupsearch.search.variants import Traces


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
        ledger = Ledger(SharedStudy(settings.study_name, open_storage(settings.storage)), evaluate)
        return ledger.wait_for_others() or len(ledger.evaluations) > known
