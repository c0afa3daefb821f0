"""Norm methods chosen together with the grouping: made by a profile, taken from its document by a training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groupsearch.documents import Profile
from groupsearch.errors import DocumentError, GroupSearchError
from groupsearch.joint import JOINT, Alternatives, Choice, fewest_operations, least_peak_choice
from groupsearch.memory import peak_memory
from groupsearch.options import NORM_METHODS, SITE_METHODS, EngineOptions
from groupsearch.partition import floor_bytes
from groupsearch.records import read_document
from groupsearch.trace import Trace

if TYPE_CHECKING:
    from groupsearch.verify import Setup


def refuse_joint(norm_method: str) -> None:
    """Raise where norm methods cannot be chosen with the grouping, and say where they can.

    Raises:
        GroupSearchError: when that is what was asked for.
    """
    if norm_method == JOINT:
        raise GroupSearchError(
            f"Expected one of {', '.join(NORM_METHODS)} as --norm-method here, found {JOINT}, which chooses a norm "
            "method for every weight together with the grouping. Make that choice with `groupsearch profile MODEL "
            "--norm-method joint --budget 12GiB`; `groupsearch train MODEL --grouping DOCUMENT` trains with it."
        )


def choose_jointly(document: dict[str, Any], setup: Setup, budget_bytes: int | None) -> tuple[Setup, Trace]:
    """Trace the step by every norm method, choose methods and grouping, and put the choice into the document.

    With a budget the fewest operations within it are chosen, without one the least peak.

    Returns:
        The setup with the methods chosen, and the trace of its step.

    Raises:
        BudgetError: when the budget is below the least peak that was found; the message says that peak.
        GroupSearchError: when the step cannot be traced by every method.
    """
    mixed, known = setup.trace(), setup.alternatives()
    if budget_bytes is None:
        choice, bound_bytes = least_peak_choice(known)
    else:
        choice, bound_bytes = fewest_operations(known, budget_bytes), None
    trace = known.trace(choice.methods)
    traces = {"mixed": mixed, **known.traces, JOINT: trace}
    document["settings"] |= {"norm_method": JOINT, "methods": dict(choice.methods)}
    document[JOINT] = {
        "budget_bytes": budget_bytes,
        "boundaries": list(choice.boundaries),
        "groups": len(choice.boundaries) + 1,
        "peak_bytes": choice.peak_bytes,
        "operations": choice.operations,
        "bound": _bound(choice, bound_bytes),
        "weights": {method: count for method in SITE_METHODS if (count := _count(choice)[method])},
        "compared": [_compared(known, method, traces[method]) for method in (*NORM_METHODS, JOINT)],
    }
    return setup.with_options(EngineOptions("mixed", choice.methods)), trace


def joint_choice(found: str | Profile, workload: str) -> tuple[tuple[int, ...], EngineOptions]:
    """Boundaries and norm methods of a profile for a workload in which they were chosen together.

    Raises:
        DocumentError: when it is no such profile, or the file holds none.
        GroupSearchError: when it is about another workload.
    """
    document: dict[str, Any] = read_document(found, kind="profile") if isinstance(found, str) else found.to_json()
    path = found if isinstance(found, str) else "the one given"
    try:
        boundaries = tuple(int(boundary) for boundary in document[JOINT]["boundaries"])
        options = EngineOptions("mixed", dict(document["settings"]["methods"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DocumentError(
            f"Expected a profile with norm methods chosen together with the grouping, found one without in {path}. "
            "Write it with `groupsearch profile MODEL --norm-method joint`, or name a grouping such as best:4."
        ) from error
    if document["model"].get("name") != workload:
        raise GroupSearchError(
            f"Expected a profile of {workload}, found one of {document['model'].get('name')} in {path}. Name the "
            "document of the model that is to be trained."
        )
    return boundaries, options


def names_document(text: str) -> bool:
    """Whether a grouping as text is the name of a document."""
    return text.endswith(".json") or Path(text).is_file()


def _bound(choice: Choice, bound_bytes: int | None) -> dict[str, Any]:
    """What no choice goes below: operations within the budget, or bytes; and how far above it the choice may be."""
    if bound_bytes is None:
        return {"of": "operations", "least": choice.bound, "gap": choice.gap}
    return {"of": "peak_bytes", "least": bound_bytes, "gap": choice.peak_bytes / bound_bytes - 1}


def _count(choice: Choice) -> Counter[str]:
    return Counter(choice.methods.values())


def _compared(known: Alternatives, method: str, trace: Trace) -> dict[str, Any]:
    return {
        "norm_method": method,
        "all_layer_bytes": peak_memory(trace, ()).peak_bytes,
        "floor_bytes": floor_bytes(trace),
        "operations": known.operations_of(trace.sites),
    }
