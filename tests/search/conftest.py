"""Storages that the tests of the search share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.search import postgres


@pytest.fixture(scope="session")
def server() -> Iterator[postgres.Server]:
    if reason := postgres.missing():
        pytest.skip(reason)
    with postgres.running_server() as running:
        yield running
