"""Which groupings are worth having: Optuna searches accuracy against peak memory.

Peaks are estimated from one trace and cost nothing; accuracy is what the caller's ``evaluate``
gives. Nothing here trains: the search is handed a function and asks it for one value per
choice (a grouping and what else is searched) and seed, never twice for the same.
"""

from __future__ import annotations

from groupsearch.search.candidates import Candidate, hypervolume
from groupsearch.search.choice import Choice, Evaluate, Evaluation, Outcome
from groupsearch.search.proxied import Proxy
from groupsearch.search.result import Cost, Rung, SearchResult
from groupsearch.search.run import Short, run_search, search_in_rungs
from groupsearch.search.settings import Event, SearchSettings
from groupsearch.search.verdict import Comparison, Recommendation

__all__ = [
    "Candidate",
    "Choice",
    "Comparison",
    "Cost",
    "Evaluate",
    "Evaluation",
    "Event",
    "Outcome",
    "Proxy",
    "Recommendation",
    "Rung",
    "SearchResult",
    "SearchSettings",
    "Short",
    "hypervolume",
    "run_search",
    "search_in_rungs",
]
