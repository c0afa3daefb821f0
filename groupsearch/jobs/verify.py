"""Measure a document's groupings again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from groupsearch.documents import Profile, Search, Verify
from groupsearch.documents.rows import Check
from groupsearch.jobs.events import Advanced, Begun, Interrupted
from groupsearch.jobs.request import Request, door
from groupsearch.jobs.stages import check_device, start_document
from groupsearch.plan.trace import Trace
from groupsearch.records import read_document
from groupsearch.verify import Setup, check_rows, rows_to_check


@dataclass(frozen=True)
class VerifyRequest(Request):
    """What to measure again.

    Attributes:
        document: a profile or a search, or the file of one.
        tolerance: largest relative error, either way.
        device: to measure on; None for the document's.
    """

    document: Profile | Search | str | Path
    _: KW_ONLY
    tolerance: float = 0.01
    device: str | None = None


def run(request: VerifyRequest) -> Verify:
    """Measure the groupings of a document again, each in a fresh process.

    Raises:
        DocumentError: when there is nothing to measure in it.
        GroupSearchError: when a measurement fails.
        Interrupted: with the rows that were measured.
    """
    found, name = _found(request.document)
    wanted = rows_to_check(found)
    setup = Setup.from_document(found, device=request.device)
    check_device(setup.device)
    told = found.get("trace")
    trace = Trace.from_json(told if isinstance(told, Mapping) else {})
    header = start_document("verify", setup, request, device=setup.device, document=name, tolerance=request.tolerance)
    rows: list[Check] = []
    request.notify(Begun(header))
    try:
        for row in check_rows(setup, trace, wanted, request.tolerance):
            rows.append(row)
            request.notify(Advanced("Measuring", "", len(rows), len(wanted)))
    except KeyboardInterrupt as interrupt:
        said = f"Interrupted; {len(rows)} of {len(wanted)} groupings were measured."
        raise Interrupted(said, _document(header, rows)) from interrupt
    return _document(header, rows)


def _document(header: Mapping[str, object], rows: Sequence[Check]) -> Verify:
    return Verify.from_json({**header, "rows": [row.to_json() for row in rows]})


def _found(document: Profile | Search | str | Path) -> tuple[Mapping[str, object], str | None]:
    """What the document says, and the name of its file where it has one."""
    if isinstance(document, (Profile, Search)):
        return document.to_json(), None
    return read_document(document, kind=("profile", "search")), str(document)


verify = door(VerifyRequest, run)
