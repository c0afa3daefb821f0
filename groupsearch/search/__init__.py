"""Which groupings are worth having: Optuna searches accuracy against peak memory.

Peaks are estimated from one trace and cost nothing; accuracy is what the caller's ``evaluate``
gives. Nothing here trains: the search is handed a function and asks it for one value per
choice (a grouping and what else is searched) and seed, never twice for the same.
"""

from __future__ import annotations

from groupsearch.search.candidates import Candidate
from groupsearch.search.choice import Choice, Evaluate, Evaluation, Outcome
from groupsearch.search.comparison import Comparison
from groupsearch.search.front import hypervolume
from groupsearch.search.proxied import Proxy
from groupsearch.search.recommendation import Recommendation
from groupsearch.search.result import Cost, Rung, SearchResult
from groupsearch.search.run import run_search
from groupsearch.search.rungs import Short, search_in_rungs
from groupsearch.search.settings import Event, SearchSettings

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
