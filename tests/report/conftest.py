from __future__ import annotations

from typing import Any

import pytest

from groupsearch.report import render_page
from tests.report import synthetic

KINDS = ("profile", "search", "verify", "train", "study")


@pytest.fixture(scope="session")
def documents() -> dict[str, dict[str, Any]]:
    """One document of each kind."""
    return {kind: getattr(synthetic, f"{kind}_document")() for kind in KINDS}


@pytest.fixture(scope="session")
def pages(documents: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {kind: render_page(document) for kind, document in documents.items()}
