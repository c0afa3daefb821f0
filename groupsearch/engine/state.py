"""The engine's state as plain types and tensors, and what must agree for a run to be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from groupsearch.clipping import ClipPlan
from groupsearch.errors import GroupSearchError
from groupsearch.trace import Rows, Site

VERSION = 2


def describe_plan(plan: ClipPlan) -> dict[str, Any]:
    """Everything of a plan that changes what is clipped and how: two plans do the same if these are equal."""
    settings = {field.name: repr(getattr(plan, field.name)) for field in fields(plan) if field.name != "grouping"}
    sites = [[site.name, _layout(site), *site.parameters] for site in plan.grouping.sites]
    return {"sites": sites, "boundaries": list(plan.grouping.boundaries), **settings}


def check_state(state: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Check that a state is one of an engine with these fixed settings.

    Raises:
        GroupSearchError: naming what is missing or differs.
    """
    if state.get("version") != VERSION or not all(key in state for key in ("steps", "mechanism", "accountant")):
        raise GroupSearchError(
            f"Expected the state of an engine of version {VERSION}, found one with {sorted(map(str, state))}. Give "
            "what engine.state_dict() returned."
        )
    for name, here in fixed.items():
        there = state.get(name)
        if there == here:
            continue
        found = f"{name}={there}, this engine has {here}"
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            differing = [key for key in here if there.get(key) != here[key]]
            found = f"another {name}, which differs in {', '.join(differing)}"
        raise GroupSearchError(
            f"The state was written with {found}. Resume with the same {name}; to go on under another one, start a new "
            "engine and load the accountant's state alone."
        )


def _layout(site: Site) -> str:
    return site.layout if site.rows == Rows() else f"{site.layout}, {site.rows}"
