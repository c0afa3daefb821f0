"""The only module that turns numbers into text and text into numbers (binary prefixes)."""

from __future__ import annotations

import math
import re

from groupsearch.errors import GroupSearchError

_FACTORS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_BITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SECONDS = {"us": 1e6, "ms": 1e3, "s": 1.0}
_BANDWIDTH = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:bit/s|bit|bps)\s*$", re.IGNORECASE)
_LATENCY = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*(us|ms|s)\s*$")
_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT]?)(?:iB|B)?)\s*$", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``12GiB``, ``512MiB``, ``1.5G`` or ``4096``.

    Prefixes are always binary: ``G``, ``GB`` and ``GiB`` all mean 2**30.

    Raises:
        GroupSearchError: when the text is not a size.

    >>> parse_bytes("12GiB")
    12884901888
    >>> parse_bytes("1.5 KiB")
    1536
    """
    match = _SIZE.match(text)
    if match is None:
        raise GroupSearchError(f"Expected a size such as 12GiB, 512MiB or a number of bytes, found {text!r}.")
    return int(float(match.group(1)) * _FACTORS[match.group(2).upper()])


def exact_bytes(size_bytes: int) -> str:
    """A size that :func:`parse_bytes` reads back to the byte.

    >>> exact_bytes(12 * 2**30), exact_bytes(2500 * 2**20), exact_bytes(1234)
    ('12GiB', '2500MiB', '1234')
    """
    for prefix in "TGMK":
        if size_bytes and size_bytes % _FACTORS[prefix] == 0:
            return f"{size_bytes // _FACTORS[prefix]}{prefix}iB"
    return str(size_bytes)


def slug(text: str) -> str:
    """A text as part of a file's name: letters, digits, dots, underscores and dashes.

    >>> slug("hf:google/vit-base")
    'hf-google-vit-base'
    """
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")


def parse_bandwidth(text: str) -> float:
    """Bytes per second of a bandwidth in bits, with decimal prefixes, as networks have them.

    Raises:
        GroupSearchError: when the text is none.

    >>> parse_bandwidth("10Gbit")
    1250000000.0
    """
    match = _BANDWIDTH.match(text)
    if match is None or not float(match[1]):
        raise GroupSearchError(f"Expected a bandwidth such as 10Gbit or 400Mbit (per second), found {text!r}.")
    return float(match[1]) * _BITS[match[2].upper()] / 8


def parse_latency(text: str) -> float:
    """Seconds of a latency.

    Raises:
        GroupSearchError: when the text is none.

    >>> parse_latency("50us")
    5e-05
    """
    match = _LATENCY.match(text)
    if match is None:
        raise GroupSearchError(f"Expected a latency such as 50us or 1ms, found {text!r}.")
    return float(match[1]) / _SECONDS[match[2]]


def format_bytes(size_bytes: float) -> str:
    """A size with a binary prefix and about three significant digits.

    >>> format_bytes(1536)
    '1.50 KiB'
    >>> format_bytes(-3 * 2**30)
    '-3.00 GiB'
    >>> format_bytes(17)
    '17 B'
    """
    if abs(size_bytes) < 2**10:
        return f"{size_bytes:.0f} B"
    for prefix in "KMGT":
        value = size_bytes / _FACTORS[prefix]
        if abs(value) < 999.5 or prefix == "T":
            break
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {prefix}iB"


def format_seconds(seconds: float) -> str:
    """A duration in the unit a person would use.

    >>> format_seconds(0.0123)
    '12.3 ms'
    >>> format_seconds(75)
    '1 min 15 s'
    """
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_percent(fraction: float, digits: int = 1) -> str:
    """A fraction as percent.

    >>> format_percent(0.9312)
    '93.1 %'
    """
    return f"{100 * fraction:.{digits}f} %"


def format_ratio(ratio: float) -> str:
    """A ratio to a reference.

    >>> format_ratio(1.0234)
    '1.02x'
    """
    return f"{ratio:.2f}x"


def format_short_bytes(size_bytes: float) -> str:
    """A size as on an axis: :func:`format_bytes` without zeros that say nothing.

    >>> format_short_bytes(1.5 * 2**30), format_short_bytes(2**30), format_short_bytes(400 * 2**20)
    ('1.5 GiB', '1 GiB', '400 MiB')
    """
    number, _, prefix = format_bytes(size_bytes).partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {prefix}"


def format_signed_percent(fraction: float, digits: int = 2) -> str:
    """A fraction as percent, with its sign.

    >>> format_signed_percent(0.0042), format_signed_percent(-0.03, 1), format_signed_percent(-0.000001)
    ('+0.42 %', '-3.0 %', '0.00 %')
    """
    rounded = round(100 * fraction, digits)
    return f"{rounded:+.{digits}f} %" if rounded else f"{0:.{digits}f} %"


def format_count(number: int) -> str:
    """A whole number with its thousands apart.

    >>> format_count(85800194)
    '85,800,194'
    """
    return f"{number:,}"


def format_number(value: float, digits: int = 3) -> str:
    """A number without a unit, to ``digits`` significant digits.

    >>> format_number(1.23456), format_number(8), format_number(1e-5)
    ('1.23', '8', '1e-05')
    """
    return f"{value:.{digits}g}"


def format_at_most(value: float, digits: int = 3) -> str:
    """A bound to ``digits`` significant digits, never below it.

    >>> format_at_most(7.9912), format_at_most(8.0), format_at_most(1e-5)
    ('8', '8', '1e-05')
    >>> format_at_most(7.981), format_at_most(float("inf"))
    ('7.99', 'inf')
    """
    if value == 0 or not math.isfinite(value):
        return format_number(value, digits)
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1)
    return format_number(math.ceil(value / unit - 1e-9) * unit, digits)


def format_interval(mean: float, half_width: float | None, *, percent: bool) -> str:
    """A mean with the half width of its interval, where there is one.

    >>> format_interval(0.9312, 0.0021, percent=True), format_interval(0.9312, None, percent=True)
    ('93.1 ± 0.2 %', '93.1 %')
    >>> format_interval(2.3456, 0.02, percent=False)
    '2.346 ± 0.020'
    """
    scale, digits, unit = (100, 1, " %") if percent else (1, 3, "")
    half = "" if half_width is None else f" ± {scale * half_width:.{digits}f}"
    return f"{scale * mean:.{digits}f}{half}{unit}"
