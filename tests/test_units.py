"""Numbers to text and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupsearch.errors import GroupSearchError
from groupsearch.units import format_bytes, format_percent, format_ratio, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1k", 2**10),
        ("512MiB", 512 * 2**20),
        ("12 GB", 12 * 2**30),
        ("12gib", 12 * 2**30),
        ("1.5T", 3 * 2**39),
        ("  24GiB ", 24 * 2**30),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e3", "12 parsecs", "1,5GiB", "12PiB", "nan", "0x10", "1 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(GroupSearchError, match="12GiB, 512MiB"):
        parse_bytes(text)


@given(st.integers(0, 2**50))
def test_text_of_a_size_keeps_about_three_digits(size_bytes: int) -> None:
    assert parse_bytes(format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=0.0051)


@given(st.integers(0, 2**50))
def test_negative_sizes_only_gain_a_sign(size_bytes: int) -> None:
    if size_bytes:
        assert format_bytes(-size_bytes) == f"-{format_bytes(size_bytes)}"


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (10235, "10.0 KiB"),
        (100 * 2**20, "100 MiB"),
        (1023 * 2**20, "1.00 GiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_text_of_sizes(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.0 ms"), (0.5, "500.0 ms"), (1, "1.0 s"), (59.94, "59.9 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")],
)
def test_text_of_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_text_of_fractions() -> None:
    assert (format_percent(0.5), format_percent(-0.00123, digits=2), format_ratio(2)) == ("50.0 %", "-0.12 %", "2.00x")
