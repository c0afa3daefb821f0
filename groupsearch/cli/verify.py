"""``groupsearch verify``: measure a document's groupings again."""

from __future__ import annotations

import click

from groupsearch.cli.parameters import Share, no_seed_option, output_options
from groupsearch.cli.terminal import say
from groupsearch.errors import ToleranceError
from groupsearch.units import format_percent


@click.command("verify")
@click.argument("document", type=click.Path())
@click.option(
    "--tolerance",
    "--fail-over",
    "tolerance",
    type=Share(),
    default="1%",
    help="Largest relative error, either way; beyond it the exit code is 1.",
)
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
    from groupsearch.cli.terminal import Watch, show, watching
    from groupsearch.jobs.verify import verify

    watch = Watch(output, force, as_json)
    with watching(watch):
        found = verify(document, tolerance=tolerance, device=device, notify=watch)
    show(found.table()._replace(title=""))
    watch.save(found)
    if found.outside:
        from groupsearch.records import COMMANDS, read_document

        names = ", ".join(row.grouping for row in found.outside)
        raise ToleranceError(
            f"Expected estimates within {format_percent(tolerance)} of the measurement, found {len(found.outside)} of "
            f"{len(found.rows)} outside: {names}. The document may come from another device or version of "
            f"torch; write it again with `groupsearch {COMMANDS[read_document(document)['kind']]}`."
        )
    say(f"All {len(found.rows)} groupings are within {format_percent(tolerance)} of the measurement.")
