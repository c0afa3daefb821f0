"""What is committed beside the code stays small."""

from __future__ import annotations

from pathlib import Path

PROFILES = Path(__file__).resolve().parent.parent / "profiles"
LIMIT_BYTES = 600 * 1024


def test_the_committed_documents_are_summaries_and_not_raw_rows() -> None:
    sizes = {path.name: path.stat().st_size for path in PROFILES.iterdir()}
    assert sum(sizes.values()) <= LIMIT_BYTES, sizes
