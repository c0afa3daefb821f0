"""What every clipping grouping costs under differentially private training, and which are worth having.

The names below are imported when they are first used, so ``import groupsearch`` takes no
longer than it must and everything that needs no torch works without loading it.

The work of every command is one function: ``profile``, ``fit``, ``search``, ``train``, ``verify``, ``study`` and
``report``, with the command's options as arguments. Four of them are also the package of that name, which can be
called.

>>> import groupsearch
>>> groupsearch.Grouping.__module__
'groupsearch.plan.grouping'
"""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from groupsearch.documents import Fit, Profile, Search, Study, Train, Verify
    from groupsearch.engine import PrivateEngine, make_private
    from groupsearch.engine.loading import PoissonBatches
    from groupsearch.errors import BudgetError, DocumentError, GroupSearchError, ToleranceError, UnsupportedModelError
    from groupsearch.jobs.fit import fit
    from groupsearch.jobs.profile import profile
    from groupsearch.jobs.search import search
    from groupsearch.jobs.study import study
    from groupsearch.jobs.train import train
    from groupsearch.jobs.verify import verify
    from groupsearch.measure import Measurement, measure_peak, simulate_peak
    from groupsearch.options import EngineOptions
    from groupsearch.plan.clipping import AdaptiveQuantile, ClipPlan
    from groupsearch.plan.export import to_fastdp, to_jax_privacy
    from groupsearch.plan.grouping import Grouping, fewest_groups, least_peak
    from groupsearch.plan.joint import Alternatives, fewest_operations, least_peak_choice
    from groupsearch.plan.memory import PeakEstimate, peak_memory, peaks
    from groupsearch.plan.reserved import Holding, replay_memory
    from groupsearch.plan.trace import Site, Trace
    from groupsearch.privacy.accounting import default_delta, noise_multiplier_for
    from groupsearch.records import read_document, write_document
    from groupsearch.report.page import report
    from groupsearch.tracer import trace_methods, trace_model
    from groupsearch.workloads import Workload, load_workload

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveQuantile": "plan.clipping",
    "Alternatives": "plan.joint",
    "BudgetError": "errors",
    "ClipPlan": "plan.clipping",
    "DocumentError": "errors",
    "EngineOptions": "options",
    "Fit": "documents",
    "GroupSearchError": "errors",
    "Grouping": "plan.grouping",
    "Holding": "plan.reserved",
    "Measurement": "measure",
    "PeakEstimate": "plan.memory",
    "PoissonBatches": "engine.loading",
    "PrivateEngine": "engine",
    "Profile": "documents",
    "Search": "documents",
    "Site": "plan.trace",
    "Study": "documents",
    "ToleranceError": "errors",
    "Trace": "plan.trace",
    "Train": "documents",
    "UnsupportedModelError": "errors",
    "Verify": "documents",
    "Workload": "workloads",
    "default_delta": "privacy.accounting",
    "fewest_groups": "plan.grouping",
    "fewest_operations": "plan.joint",
    "least_peak": "plan.grouping",
    "least_peak_choice": "plan.joint",
    "load_workload": "workloads",
    "make_private": "engine",
    "measure_peak": "measure",
    "noise_multiplier_for": "privacy.accounting",
    "peak_memory": "plan.memory",
    "peaks": "plan.memory",
    "profile": "jobs.profile",
    "read_document": "records",
    "replay_memory": "plan.reserved",
    "simulate_peak": "measure",
    "study": "jobs.study",
    "to_fastdp": "plan.export",
    "to_jax_privacy": "plan.export",
    "trace_methods": "tracer",
    "trace_model": "tracer",
    "train": "jobs.train",
    "write_document": "records",
}
_DOORS = {
    "fit": "jobs.fit",
    "report": "report.page",
    "search": "jobs.search",
    "verify": "jobs.verify",
}  # names of packages, too

__all__ = [
    "AdaptiveQuantile",
    "Alternatives",
    "BudgetError",
    "ClipPlan",
    "DocumentError",
    "EngineOptions",
    "Fit",
    "GroupSearchError",
    "Grouping",
    "Holding",
    "Measurement",
    "PeakEstimate",
    "PoissonBatches",
    "PrivateEngine",
    "Profile",
    "Search",
    "Site",
    "Study",
    "ToleranceError",
    "Trace",
    "Train",
    "UnsupportedModelError",
    "Verify",
    "Workload",
    "default_delta",
    "fewest_groups",
    "fewest_operations",
    "fit",
    "least_peak",
    "least_peak_choice",
    "load_workload",
    "make_private",
    "measure_peak",
    "noise_multiplier_for",
    "peak_memory",
    "peaks",
    "profile",
    "read_document",
    "replay_memory",
    "report",
    "search",
    "simulate_peak",
    "study",
    "to_fastdp",
    "to_jax_privacy",
    "trace_methods",
    "trace_model",
    "train",
    "verify",
    "write_document",
]


def __getattr__(name: str) -> Any:
    if name in _DOORS or name == "distributed":
        return import_module(f"groupsearch.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'groupsearch' has no attribute {name!r}")
    value = getattr(import_module(f"groupsearch.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Door(ModuleType):
    """A package that is called as the function of its name."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._function()(*arguments, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function())

    def _function(self) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(f"groupsearch.{_DOORS[name]}"), name)


class _Package(ModuleType):
    """This package: Python tells it of every package in it that is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _DOORS:
            value.__class__ = _Door
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
