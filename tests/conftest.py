"""What all tests share: no GPU means no GPU tests, and the same examples every time."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler tells of its stages on standard error otherwise

import pytest
from hypothesis import settings

gc.set_threshold(50_000, 20, 100)  # autograd leaves few circles; looking for them took 4 % more of the tests' time
settings.register_profile("groupsearch", deadline=None, derandomize=True)
settings.load_profile("groupsearch")

TESTS = Path(__file__).parent
FAST = {
    "norms and clipped sums, against a second implementation": (
        "engine/test_opacus.py",
        "engine/test_arithmetic_ieee.py",
    ),
    "what is refused, and the truth check": ("engine/test_refusals.py", "engine/test_truth.py"),
    "noise, thresholds, sampling and what they cost": (
        *(
            "engine/test_mechanism.py",
            "engine/test_mechanism_noise.py",
            "engine/test_loading_sampling.py",
            "test_randomness.py",
        ),
        *("privacy/test_noise_distribution.py", "privacy/test_sizes.py", "privacy/test_statement.py"),
    ),
    "the optimizer's step": ("engine/test_optimizers.py",),
    "groups, plans and the partition search": (
        *("plan/test_clipping.py", "plan/test_grouping.py", "test_options.py", "plan/test_partition.py"),
        *("test_gram.py",),
        *("search/test_choice.py", "search/test_candidates.py", "search/test_statistics.py", "search/test_space.py"),
        *("search/test_verdict_recommendation.py",),
    ),
    "the memory model": ("plan/test_memory.py", "plan/test_reserved_segments.py", "plan/test_trace.py"),
    "documents": ("documents/test_documents.py", "test_records.py", "plan/test_export.py", "test_units.py"),
    "the command line's errors and pages": ("cli/test_program.py", "cli/test_documents.py", "report/test_info.py"),
}
"""The fast tier: what each of its files protects. ``pytest -m fast`` collects no others."""
_FAST_FILES = {TESTS / file for files in FAST.values() for file in files}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.option.markexpr != "fast" or not collection_path.is_file():
        return None
    return None if collection_path in _FAST_FILES or collection_path.name == "conftest.py" else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path in _FAST_FILES and not item.get_closest_marker("slow"):
            item.add_marker("fast")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    set_aside()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """What a test function leaves (modules it imported, traces it shares with others) stays, too."""
    try:
        yield
    finally:
        if getattr(nextitem, "function", None) is not getattr(item, "function", None):
            set_aside()


def set_aside() -> None:
    """Let no later collection look at what is alive now: that took more of the tests' time than the tests."""
    gc.collect()
    gc.freeze()
