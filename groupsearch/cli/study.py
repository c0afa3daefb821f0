"""``groupsearch study``: methods side by side, on problems that are known, in one document and one page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from groupsearch.cli.parameters import output_options
from groupsearch.cli.terminal import say

STUDIES = ("clip21",)  # of jobs.study, without loading torch for --help


@click.command("study")
@click.argument("name", type=click.Choice(STUDIES))
@click.option("--quick", is_flag=True, help="A small part of it, in under a minute.")
@click.option("--steps", type=click.IntRange(min=10), help="Steps of every run. [default: 200; 40 if quick]")
@click.option(
    "--resume", is_flag=True, help="Go on with what a study left that was stopped: the .jsonl file beside its document."
)
@click.option("--report", type=click.Path(), help="Also draw the page, into this file.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of noise and batches: a study is an experiment.")
@output_options
def command(name: str, report: str | None, output: str | None, force: bool, as_json: bool, **given: Any) -> None:
    """Run a study of methods: clip21.

    clip21 compares clipping of what distributed workers send, with error feedback and without, with noise and without,
    over workers that do not agree. It takes about ten minutes of one core.

    \b
    groupsearch study clip21 --quick
    groupsearch study clip21 --report reports/clip21.html
    """
    from groupsearch.cli.report import write_page
    from groupsearch.cli.terminal import Watch, make_folder, show, watching, writable
    from groupsearch.jobs.study import study

    force = force or given["resume"]  # of what was stopped the document is there
    if output is None and not as_json:
        output = f"reports/{name}-study.json"
        make_folder(Path(output).parent)
    if report is not None:
        writable(report, force=force)
    journal = None if output is None else writable(output, force=force).with_suffix(".jsonl")
    watch = Watch(output, force, as_json)
    with watching(watch):
        found = study(name, journal=journal, notify=watch, **given)
    show(found.table())
    say(found.finding)
    watch.save(found)
    if report is not None:
        write_page(found.to_json(), report, force=force)
    if journal is not None:
        journal.unlink(missing_ok=True)
