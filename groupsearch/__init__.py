"""What every clipping grouping costs under differentially private training, and which are worth having.

The names below are imported when they are first used, so ``import groupsearch`` takes no
longer than it must and everything that needs no torch works without loading it.

>>> import groupsearch
>>> groupsearch.Grouping.__module__
'groupsearch.grouping'
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groupsearch.clipping import ClipPlan
    from groupsearch.engine import PrivateEngine, make_private
    from groupsearch.errors import BudgetError, DocumentError, GroupSearchError, ToleranceError, UnsupportedModelError
    from groupsearch.grouping import Grouping, fewest_groups, least_peak
    from groupsearch.measure import Measurement, measure_peak
    from groupsearch.memory import PeakEstimate, peak_memory, peaks
    from groupsearch.options import EngineOptions
    from groupsearch.records import read_document, write_document
    from groupsearch.simulate import simulate_peak
    from groupsearch.trace import Site, Trace
    from groupsearch.tracer import trace_model
    from groupsearch.workloads import Workload, load_workload

__version__ = "0.1.0"

_HOMES = {
    "BudgetError": "errors",
    "ClipPlan": "clipping",
    "DocumentError": "errors",
    "EngineOptions": "options",
    "GroupSearchError": "errors",
    "Grouping": "grouping",
    "Measurement": "measure",
    "PeakEstimate": "memory",
    "PrivateEngine": "engine",
    "Site": "trace",
    "ToleranceError": "errors",
    "Trace": "trace",
    "UnsupportedModelError": "errors",
    "Workload": "workloads",
    "fewest_groups": "grouping",
    "least_peak": "grouping",
    "load_workload": "workloads",
    "make_private": "engine",
    "measure_peak": "measure",
    "peak_memory": "memory",
    "peaks": "memory",
    "read_document": "records",
    "simulate_peak": "simulate",
    "trace_model": "tracer",
    "write_document": "records",
}

__all__ = [
    "BudgetError",
    "ClipPlan",
    "DocumentError",
    "EngineOptions",
    "GroupSearchError",
    "Grouping",
    "Measurement",
    "PeakEstimate",
    "PrivateEngine",
    "Site",
    "ToleranceError",
    "Trace",
    "UnsupportedModelError",
    "Workload",
    "fewest_groups",
    "least_peak",
    "load_workload",
    "make_private",
    "measure_peak",
    "peak_memory",
    "peaks",
    "read_document",
    "simulate_peak",
    "trace_model",
    "write_document",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'groupsearch' has no attribute {name!r}")
    value = getattr(import_module(f"groupsearch.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
