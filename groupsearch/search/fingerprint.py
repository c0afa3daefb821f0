"""What makes two runs runs of one problem."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from groupsearch.errors import GroupSearchError
from groupsearch.search.settings import SearchSettings
from groupsearch.search.space import Space
from groupsearch.search.variants import digest


def problem_fingerprint(space: Space, settings: SearchSettings) -> dict[str, Any]:
    """What must be equal for evaluations of one run to count in another; as it reads back from JSON."""
    problem = {
        "metric_name": settings.metric_name,
        "seed": settings.seed,
        "budget_bytes": settings.budget_bytes,
        "max_groups": settings.max_groups,
        "granularity": settings.granularity,
        "trace": digest(space.trace),
        # None, as in a study of before these could be searched, where they are not.
        "variants": space.variants.fingerprint() if space.variants.free else None,
        "groups": settings.groups,
        "rules": list(settings.rules) or None,
        "allocations": list(settings.allocations) or None,
        "objectives": list(settings.objectives) if settings.timed else None,
    }
    clash = sorted(problem.keys() & settings.fingerprint.keys())
    if clash:
        raise GroupSearchError(
            f"Found {', '.join(clash)} in the fingerprint, which the search keeps there itself. Leave it out."
        )
    plain: dict[str, Any] = json.loads(json.dumps({**problem, **settings.fingerprint}))
    return plain


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What differs, by dotted name and with both values; empty where nothing does."""
    old, new = _flat(stored), _flat(given)
    different = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return "; ".join(f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}" for key in different)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value under its dotted name, so that a message can name the one that differs."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) and item else {f"{prefix}{key}": item}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
