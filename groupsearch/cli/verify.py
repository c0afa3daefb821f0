"""``groupsearch verify``: measure a document's groupings again."""

from __future__ import annotations

from typing import Any

import click

from groupsearch.cli.parameters import Share, no_seed_option, output_options
from groupsearch.errors import ToleranceError
from groupsearch.units import format_bytes, format_percent, format_seconds, format_signed_percent


@click.command("verify")
@click.argument("document", type=click.Path())
@click.option("--tolerance", type=Share(), default="1%", help="Largest relative error, either way.")
@click.option("--device", help="Measure on another device than the document's.")
@no_seed_option
@output_options
def command(
    document: str, tolerance: float, device: str | None, output: str | None, force: bool, as_json: bool
) -> None:
    """Measure the groupings of DOCUMENT again.

    DOCUMENT is a profile or a search. Exit code 1 when an estimate is outside the tolerance.

    \b
    groupsearch verify profiles/digits-vit-b288-cpu.json --tolerance 2%
    """
    from groupsearch.records import COMMANDS, read_document

    found = read_document(document, kind=("profile", "search"))

    from groupsearch.cli.console import progress, say
    from groupsearch.cli.output import Output
    from groupsearch.cli.stages import check_device, start_document
    from groupsearch.trace import Trace
    from groupsearch.verify import Setup, check_rows, rows_to_check

    wanted = rows_to_check(found)
    setup = Setup.from_document(found, device=device)
    check_device(setup.device)
    trace = Trace.from_json(found.get("trace") or {})
    checked = start_document("verify", setup, device=setup.device, document=document, tolerance=tolerance)
    checked["rows"] = rows = []
    planned = Output.plan(checked, output, force, as_json)
    try:
        with progress() as bars:
            bar = bars.add_task("Measuring", total=len(wanted))
            for row in check_rows(setup, trace, wanted, tolerance):
                rows.append(row)
                bars.advance(bar)
    except KeyboardInterrupt as interrupt:
        planned.save(checked)
        raise KeyboardInterrupt(f"Interrupted; {len(rows)} of {len(wanted)} groupings were measured.") from interrupt
    _print_rows(rows)
    planned.save(checked)
    outside = [row["grouping"] for row in rows if not row["within"]]
    if outside:
        raise ToleranceError(
            f"Expected estimates within {format_percent(tolerance)} of the measurement, found {len(outside)} of "
            f"{len(rows)} outside: {', '.join(outside)}. The document may come from another device or version of "
            f"torch; write it again with `groupsearch {COMMANDS[found['kind']]}`."
        )
    say(f"All {len(rows)} groupings are within {format_percent(tolerance)} of the measurement.")


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from groupsearch.cli.console import print_table
    from groupsearch.cli.stages import RESERVED, reserved_cells

    known = any("reserved_bytes" in row for row in rows)
    columns = ("grouping ", "groups", "estimate", "measured", "error", *(RESERVED if known else ()), "step", "within")
    print_table(
        columns,
        [
            (
                row["grouping"],
                str(row["groups"]),
                format_bytes(row["estimate_bytes"]),
                format_bytes(row["peak_bytes"]),
                format_signed_percent(row["relative_error"]),
                *(reserved_cells(row) if known else ()),
                format_seconds(row["step_seconds"]),
                "yes" if row["within"] else "no",
            )
            for row in rows
        ],
    )
