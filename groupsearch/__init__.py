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
    from groupsearch.clipping import AdaptiveQuantile, ClipPlan
    from groupsearch.engine import PrivateEngine, make_private
    from groupsearch.engine.accounting import default_delta, noise_multiplier_for
    from groupsearch.engine.loading import PoissonBatches
    from groupsearch.errors import BudgetError, DocumentError, GroupSearchError, ToleranceError, UnsupportedModelError
    from groupsearch.export import to_fastdp, to_jax_privacy
    from groupsearch.grouping import Grouping, fewest_groups, least_peak
    from groupsearch.joint import Alternatives, fewest_operations, least_peak_choice
    from groupsearch.measure import Measurement, measure_peak
    from groupsearch.memory import PeakEstimate, peak_memory, peaks
    from groupsearch.options import EngineOptions
    from groupsearch.records import read_document, write_document
    from groupsearch.reserved import Holding, replay_memory
    from groupsearch.simulate import simulate_peak
    from groupsearch.trace import Site, Trace
    from groupsearch.tracer import trace_methods, trace_model
    from groupsearch.workloads import Workload, load_workload

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveQuantile": "clipping",
    "Alternatives": "joint",
    "BudgetError": "errors",
    "ClipPlan": "clipping",
    "DocumentError": "errors",
    "EngineOptions": "options",
    "GroupSearchError": "errors",
    "Grouping": "grouping",
    "Holding": "reserved",
    "Measurement": "measure",
    "PeakEstimate": "memory",
    "PoissonBatches": "engine.loading",
    "PrivateEngine": "engine",
    "Site": "trace",
    "ToleranceError": "errors",
    "Trace": "trace",
    "UnsupportedModelError": "errors",
    "Workload": "workloads",
    "default_delta": "engine.accounting",
    "fewest_groups": "grouping",
    "fewest_operations": "joint",
    "least_peak": "grouping",
    "least_peak_choice": "joint",
    "load_workload": "workloads",
    "make_private": "engine",
    "measure_peak": "measure",
    "noise_multiplier_for": "engine.accounting",
    "peak_memory": "memory",
    "peaks": "memory",
    "read_document": "records",
    "replay_memory": "reserved",
    "simulate_peak": "simulate",
    "to_fastdp": "export",
    "to_jax_privacy": "export",
    "trace_methods": "tracer",
    "trace_model": "tracer",
    "write_document": "records",
}

__all__ = [
    "AdaptiveQuantile",
    "Alternatives",
    "BudgetError",
    "ClipPlan",
    "DocumentError",
    "EngineOptions",
    "GroupSearchError",
    "Grouping",
    "Holding",
    "Measurement",
    "PeakEstimate",
    "PoissonBatches",
    "PrivateEngine",
    "Site",
    "ToleranceError",
    "Trace",
    "UnsupportedModelError",
    "Workload",
    "default_delta",
    "fewest_groups",
    "fewest_operations",
    "least_peak",
    "least_peak_choice",
    "load_workload",
    "make_private",
    "measure_peak",
    "noise_multiplier_for",
    "peak_memory",
    "peaks",
    "read_document",
    "replay_memory",
    "simulate_peak",
    "to_fastdp",
    "to_jax_privacy",
    "trace_methods",
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
