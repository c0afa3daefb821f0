"""Settings of a workload: texts from the command line or values from code, checked and converted."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from groupsearch.errors import GroupSearchError

_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def read_settings(workload: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, overridden by what was given and converted to the default's own type.

    Integers must be positive. A default of ``None`` takes any value as it is, a text of digits
    as an integer.

    Raises:
        GroupSearchError: naming the setting that is unknown or cannot be converted.

    >>> read_settings("digits-cnn", {"width": "16"}, {"batch_size": 64, "width": 32})
    {'batch_size': 64, 'width': 16}
    """
    for key in given:
        if key not in defaults:
            close = get_close_matches(key, defaults, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            known = ", ".join(defaults) or "none"
            raise GroupSearchError(f"{workload} has no setting {key!r}.{hint} Its settings are: {known}.")
    return {key: _convert(workload, key, given.get(key, default), default) for key, default in defaults.items()}


def read_value(value: Any) -> Any:
    """A text as the integer, number or truth value it spells, else as it is; other values unchanged.

    >>> [read_value(text) for text in ("3", "1e-3", "true", "gelu")]
    [3, 0.001, True, 'gelu']
    """
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for number in (int, float):
        try:
            return number(value)
        except ValueError:
            continue
    return value


def require_choice(workload: str, key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a GroupSearchError unless the value of the setting is one of the choices."""
    if value not in choices:
        raise GroupSearchError(f"Expected {key} of {workload} to be one of {', '.join(choices)}, found {value!r}.")


def require_multiple(workload: str, settings: Mapping[str, Any], key: str, of: str | int) -> None:
    """Raise a GroupSearchError unless the setting is a multiple of another setting, or of a number."""
    divisor = settings[of] if isinstance(of, str) else of
    if settings[key] % divisor:
        name = f"{of}={divisor}" if isinstance(of, str) else str(of)
        raise GroupSearchError(f"Expected {key} of {workload} to be a multiple of {name}, found {settings[key]}.")


def _convert(workload: str, key: str, value: Any, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return value if isinstance(value, bool) else _WORDS[str(value).lower()]
        if isinstance(default, int):
            return _positive(value)
        if isinstance(default, float):
            return float(value)
        return read_value(value) if default is None else str(value)
    except (ValueError, KeyError, TypeError) as error:
        kind = "true or false" if isinstance(default, bool) else "a positive integer"
        kind = "a number" if isinstance(default, float) else kind
        raise GroupSearchError(f"Expected {key} of {workload} to be {kind}, found {value!r}.") from error


def _positive(value: Any) -> int:
    number = int(value)
    if number < 1 or number != float(value):
        raise ValueError
    return number
