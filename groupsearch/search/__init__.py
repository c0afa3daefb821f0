"""Which groupings are worth having: Optuna searches accuracy against peak memory.

Peaks are estimated from one trace and cost nothing; accuracy is what the caller's ``evaluate``
gives. Nothing here trains: the search is handed a function and asks it for one value per
grouping and seed, never twice for the same.
"""

from __future__ import annotations

from groupsearch.search.candidates import Candidate
from groupsearch.search.comparison import Comparison
from groupsearch.search.evaluations import Evaluate, Evaluation, Outcome
from groupsearch.search.front import hypervolume
from groupsearch.search.recommendation import Recommendation
from groupsearch.search.result import Cost, Rung, SearchResult
from groupsearch.search.run import run_search
from groupsearch.search.settings import Event, SearchSettings

__all__ = [
    "Candidate",
    "Comparison",
    "Cost",
    "Evaluate",
    "Evaluation",
    "Event",
    "Outcome",
    "Recommendation",
    "Rung",
    "SearchResult",
    "SearchSettings",
    "hypervolume",
    "run_search",
]
