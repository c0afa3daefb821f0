"""``groupsearch optimize``: profile, check, search by training, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from groupsearch.cli.parameters import (
    Positive,
    Size,
    fail_over_option,
    model_options,
    output_options,
    seed_option,
    step_options,
    training_options,
)
from groupsearch.cli.report import write_page
from groupsearch.cli.terminal import Output, Watch, make_folder, say, say_next, show, show_peaks, watching, writable
from groupsearch.documents import tables
from groupsearch.errors import GroupSearchError
from groupsearch.jobs.evaluation import TRIALS, check_values, rungs_of
from groupsearch.jobs.events import Event, Profiled
from groupsearch.jobs.request import RUNGS
from groupsearch.privacy import not_private_sentence
from groupsearch.records import default_path
from groupsearch.units import format_number, format_seconds

if TYPE_CHECKING:
    from groupsearch.documents import Search
    from groupsearch.jobs.search import Prepared

GRANULARITIES = ("site", "layer", "block")  # of search.settings, without loading Optuna for --help
SAMPLERS = ("front", "tpe", "nsga2", "gp", "random")
CHECKED = ("all-layer", "layer-wise", "best:2", "best:4")  # of jobs.search, likewise
Values = tuple[str, ...]


class Rungs(click.ParamType[tuple[str, ...]]):
    """Rungs of evidence, as in short,full."""

    name = "rungs"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """The rungs of the text, from the cheapest on."""
        try:
            return rungs_of(value)
        except GroupSearchError as error:
            self.fail(str(error), param, ctx)


class Vary(click.ParamType[tuple[str, Values]]):
    """What is searched and among which values, as in rule=auto-s,abadi."""

    name = "name[=values]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Values]:
        """Name and values of the text."""
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        try:
            return name, tuple(check_values(name, [word.strip() for word in text.split(",")] if equals else ()))
        except GroupSearchError as error:
            self.fail(str(error), param, ctx)


def varied(ctx: click.Context, param: click.Parameter, pairs: Sequence[tuple[str, Values]]) -> dict[str, list[str]]:
    """The values of every name; none where the defaults are meant."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise click.BadParameter(
            f"Expected every name once, found {', '.join(names)}. Give all values of one together."
        )
    return {name: list(values) for name, values in pairs}


class _Watch(Watch):
    """Shows what the search starts from as a table."""

    def say(self, event: Event) -> None:
        """Print an event that is no bar."""
        if isinstance(event, Profiled):
            self.close()
            show_peaks(event.profile)
        else:
            super().say(event)


@click.command("optimize")
@click.argument("model", default="digits-vit")
@click.option("--budget", type=Size(), help="Largest estimated peak, as in 12GiB; others are never trained.")
@click.option(
    "--rungs",
    type=Rungs(),
    default=",".join(RUNGS),
    help="Kinds of evidence, the cheapest first: a proxy without training, short runs, full runs.",
)
@click.option(
    "--short-fraction",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    default=0.125,
    help="Steps of a short run, as a share of those of a full one.",
)
@click.option(
    "--trials",
    type=click.IntRange(min=1),
    help=f"Groupings to train before the front is repeated; with short runs, in those. [default: {TRIALS['full']}; "
    f"{TRIALS['short']} in short runs]",
)
@click.option("--promote", type=click.IntRange(min=1), default=7, help="Groupings to train in full after short runs.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="Training runs of every grouping on the front.")
@click.option(
    "--max-runs",
    type=click.IntRange(min=1),
    help="Repeat the front until groupings are told apart or so many full runs are made. [default: --seeds alone]",
)
@click.option(
    "--confidence",
    type=click.FloatRange(min=0, max=1, min_open=True, max_open=True),
    default=0.95,
    help="Of all that is declared of the front together.",
)
@click.option(
    "--selection-data",
    type=click.Choice(["public", "private"]),
    default="private",
    help="Whether what is trained on and judged by is public (or synthetic), which costs no privacy.",
)
@click.option(
    "--private-selection",
    is_flag=True,
    help="Choose at a known epsilon instead of searching: train a random number of groupings, --trials expected, drawn "
    "from a fixed set, and publish the best by a noisy score alone.",
)
@click.option(
    "--score-noise",
    type=Positive(),
    default=5.0,
    help="Noise of --private-selection's scores, in validation examples.",
)
@click.option(
    "--vary",
    type=Vary(),
    multiple=True,
    callback=varied,
    help="Search this, too, as in rule or checkpoint=none,blocks; repeatable. Of rule and thresholds the best is "
    "found by training; of checkpoint, micro-batches and norm-method every grouping takes what needs least memory.",
)
@click.option(
    "--objective", type=click.Choice(["time"]), help="Search for a short step, too, besides accuracy and memory."
)
@click.option("--groups", type=click.IntRange(min=1), help="Exactly so many groups. [default: any number]")
@click.option("--granularity", type=click.Choice(GRANULARITIES), default="site", help="Where the search may cut.")
@click.option("--max-groups", type=click.IntRange(min=1), help="The most groups. [default: no limit]")
@click.option("--sampler", type=click.Choice(SAMPLERS), default="front", help="Ours, or one of Optuna's.")
@click.option("--storage", help="A journal file or a database URL. [default: beside the document, as .journal]")
@click.option("--study", default="groupsearch", help="Name of the search in the storage, where there are several.")
@click.option("--worker", is_flag=True, help="Only help with a search that was begun elsewhere in the same --storage.")
@click.option("--resume", is_flag=True, help="Go on with the search in the storage, if there is one.")
@click.option("--report", type=click.Path(), help="Where to draw the page. [default: beside the document, as .html]")
@click.option(
    "--verify",
    type=click.Choice(["none", "simulate", "measure", "all"]),
    default="all",
    help=f"Check the estimates of {', '.join(CHECKED)}.",
)
@fail_over_option
@model_options
@step_options
@training_options
@seed_option
@output_options
def command(
    model: str, output: str | None, force: bool, as_json: bool, worker: bool, report: str | None, **given: Any
) -> None:
    """Search the front of accuracy against peak memory.

    A search is an experiment: its trainings use known seeds, so that they can be compared and the search can go on
    where it stopped. To publish a model, train it with `groupsearch train` afterwards.

    MODEL (default: digits-vit, which needs no download) is traced and its estimates are checked by
    runs; then groupings are trained with differential privacy, each with the same noise: many in short
    runs, the best of them in full, and the front is repeated with several seeds and drawn as a page.
    An interrupted search goes on with --resume. Any number of processes, with one GPU each, help when
    started with the same options and --worker.

    \b
    groupsearch optimize
    groupsearch optimize digits-cnn --epsilon 3 --trials 30 --budget 40MiB
    groupsearch optimize digits-cnn --rungs full --max-runs 80 --confidence 0.9
    groupsearch optimize digits-cnn --storage postgresql://me@host/searches --worker --device cuda:1
    """
    from groupsearch.jobs.request import SearchRequest
    from groupsearch.jobs.search import Prepared, refuse_excluded

    watch, storage = _Watch(output, force, as_json), given.pop("storage")
    request = SearchRequest(model, notify=watch, storage=storage, **given)
    if given["private_selection"]:
        refuse_excluded(request, _asked())
    prepared = Prepared.of(request)
    if given["private_selection"]:
        _select(prepared, watch, report)
    elif worker:
        asked = {"output": output, "force": force, "json": as_json, "report": report, "resume": given["resume"]}
        _refuse_of_worker(storage, asked)
        with watching(watch):
            trained = prepared.work(storage)
        say(f"The search has ended: {trained} training runs of all workers together.")
    else:
        _search(prepared, watch, _Places.plan(prepared.header, watch, given["resume"], storage, report))


def _asked() -> list[str]:
    """The options that were given, be it with their default value."""
    context = click.get_current_context()
    return [name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT]


def _search(prepared: Prepared, watch: Watch, places: _Places) -> None:
    from groupsearch.report.words import randomness

    watch.output = places.output
    with watching(watch):
        found = prepared.run(places.storage, force=watch.asked[1])
    found = watch.save(found)
    _print_result(found)
    say(str(found.privacy))
    if found.not_private:
        say(not_private_sentence(found.not_private))
    say(randomness(found.to_json()))
    if places.page is not None:
        write_page(found.to_json(), places.page, force=places.output.force)
    say_next(found)


def _select(prepared: Prepared, watch: Watch, report: str | None) -> None:
    """Choose privately among fixed groupings."""
    watch.begin(prepared.header)
    assert watch.output is not None
    page = _page(report, watch.output)
    with watching(watch):
        found = prepared.select()
    say(found.reason)
    say(str(found.privacy))
    found = watch.save(found)
    if page is not None:
        write_page(found.to_json(), page, force=watch.asked[1])
    say_next(found)


def _print_result(found: Search) -> None:
    """The front, what is recommended, and what the search cost and is worth."""
    show(found.table()._replace(title=""))
    ways = {c.variant: None for c in found.candidates if c.on_front and c.variant is not None}
    if ways:
        say(f"What is on the front needs least with: {'; '.join(ways)}.")
    say(found.reason)
    show(tables.rungs(found.cost.rungs or (), found.correlations or ()))
    for each in found.correlations or ():
        say(each.statement)
    cost, rungs = found.cost, found.cost.rungs or ()
    before = sum(rung.full_trainings for rung in rungs if rung.name != "replication")
    say(
        f"{cost.trained} training runs in {format_seconds(cost.seconds or 0.0)}: the cost of "
        f"{format_number(before)} full trainings to find the front and "
        f"{format_number((cost.full_trainings or 0.0) - before)} to repeat it."
    )


@dataclass(frozen=True)
class _Places:
    """Where the document, the page (None: nowhere) and the study go."""

    output: Output
    page: Path | None
    storage: str

    @classmethod
    def plan(
        cls, header: Mapping[str, Any], watch: Watch, resume: bool, storage: str | None, report: str | None
    ) -> _Places:
        """See that everything can be written before any work is done; ``--resume`` rewrites what it resumes.

        Raises:
            GroupSearchError: when something is there already, or a folder cannot be written.
        """
        output, force, as_json = watch.asked
        beside = Path(output) if output else default_path(header)
        storage = storage or str(beside.with_suffix(".journal"))
        replace_files = force or resume
        if "://" not in storage and Path(storage).exists() and not replace_files:
            raise GroupSearchError(
                f"{storage} holds a search already. Go on with it with --resume, begin anew with --force, or name "
                f"another file with -o."
            )
        planned = Output.plan(header, output, replace_files, as_json)
        page = _page(report, planned)
        if "://" not in storage:
            make_folder(Path(storage).parent)
            writable(storage, force=True)
        return cls(planned, page, storage)


def _page(report: str | None, output: Output) -> Path | None:
    """Where the page goes: beside the document, unless something else was asked for."""
    page = report or (output.path.with_suffix(".html") if output.path else None)
    return writable(page, force=output.force) if page else None


def _refuse_of_worker(storage: str | None, asked: Mapping[str, Any]) -> None:
    if storage is None:
        raise GroupSearchError(
            "Expected --storage with --worker: a worker helps with the search that was begun there. Name the file or "
            "the database that the search was begun with."
        )
    found = [f"--{name}" for name, value in asked.items() if value]
    if found:
        raise GroupSearchError(
            f"Found {', '.join(found)} with --worker: a worker writes no document, and begins and ends no search. "
            f"Give them to the command without --worker."
        )
