"""What all tests share: no GPU means no GPU tests, and the same examples every time."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side
os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler tells of its stages on standard error otherwise

import pytest
from hypothesis import settings

settings.register_profile("groupsearch", deadline=None, derandomize=True)
settings.load_profile("groupsearch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
