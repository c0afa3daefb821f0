"""``groupsearch optimize``: profile, check, search by training, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from groupsearch.cli.console import say
from groupsearch.cli.output import Output, make_folder, writable
from groupsearch.cli.parameters import (
    Positive,
    Size,
    model_options,
    output_options,
    seed_option,
    step_options,
    training_options,
)
from groupsearch.cli.report import write_page
from groupsearch.cli.searching import RUNGS, TRIALS, Rungs, print_result, search, search_settings, trials_of
from groupsearch.cli.selecting import refuse_excluded, select
from groupsearch.cli.varying import COSTS, Vary, Ways, varied
from groupsearch.errors import GroupSearchError
from groupsearch.privacy import NOT_PRIVATE, PrivacyStatement, not_private_sentence
from groupsearch.records import default_path

if TYPE_CHECKING:
    from groupsearch.search import SearchSettings
    from groupsearch.trace import Trace
    from groupsearch.training import TrainSettings
    from groupsearch.verify import Setup

GRANULARITIES = ("site", "layer", "block")  # of search.settings, without loading Optuna for --help
SAMPLERS = ("front", "tpe", "nsga2", "gp", "random")
_WORKER_PATIENCE_SECONDS = 3600.0  # the search begins when its profile is made and checked
CHECKED = ("all-layer", "layer-wise", "best:2", "best:4")
SEARCH_SETTINGS = (
    *("budget", "rungs", "short_fraction", "trials", "promote", "seeds", "max_runs", "confidence", "selection_data"),
    *("vary", "objective", "groups", "granularity", "max_groups", "sampler", "seed", "verify"),
)
SELECTION_SETTINGS = ("budget", "trials", "score_noise", "vary", "groups", "granularity", "max_groups", "verify")


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
@model_options
@step_options
@training_options
@seed_option
@output_options
def command(model: str, output: str | None, force: bool, as_json: bool, **given: Any) -> None:  # noqa: PLR0915 - stages in order
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
    from groupsearch.cli.console import say
    from groupsearch.cli.training import describe, training_setup
    from groupsearch.jobs.stages import start_document
    from groupsearch.report.words import randomness

    if given["private_selection"]:
        refuse_excluded(given)
    setup, training = training_setup(model, given)
    given["trials"] = trials_of(given)
    names = SELECTION_SETTINGS if given["private_selection"] else SEARCH_SETTINGS
    chosen = {key: given[key] for key in names}
    document = start_document("search", setup, device=setup.device, **chosen, **describe(training))
    if given["private_selection"]:
        training = replace(training, seed=None)
    document["randomness"] = training.streams().describe()
    if given["private_selection"]:
        _select(document, setup, training, given, Output.plan(document, output, force, as_json))
        return
    if given["worker"]:
        _refuse_of_worker(given, output=output, force=force, json=as_json)
        _work(document, setup, training, given)
        return
    places = _Places.plan(document, given, output, force, as_json)
    settings = search_settings(document, setup.loaded.metric_name, given, places.storage, force)
    trace = _profile(document, setup, settings, given["verify"])
    ways = Ways.of(setup, trace, training, given["vary"])
    document["variants"] = ways.describe()
    result = search(setup, ways, training, settings, given)
    parts = result.to_json()
    training_part = {**describe(training), **parts["training"]}
    document |= {**parts, "training": training_part, "cost": {**parts["cost"], "epsilon": training_part["epsilon"]}}
    statement = _statement(setup, training, settings.selection_data)
    document["privacy"] = statement.to_json()
    document["not_private"] = NOT_PRIVATE["search"] if settings.selection_data == "private" else {}
    places.output.save(document)
    if result.interrupted:
        raise KeyboardInterrupt(
            f"Interrupted. The {result.cost.trained} training runs that ended are kept in {places.shown}; the "
            f"same command with --resume instead of --force goes on."
        )
    print_result(result)
    say(str(statement))
    if document["not_private"]:
        say(not_private_sentence(document["not_private"]))
    say(randomness(document))
    if places.page is not None:
        write_page(document, places.page, force=places.output.force)


def _statement(setup: Setup, training: TrainSettings, selection_data: str) -> PrivacyStatement:
    """What one training costs, and what is known of the cost of having chosen it."""
    from groupsearch.search.selection import adaptive_selection_cost

    assert setup.loaded.data is not None  # it was trained
    statement = training.statement(setup.loaded.data.train_size)
    return replace(statement, selection=adaptive_selection_cost(selection_data))


@dataclass(frozen=True)
class _Places:
    """Where the document, the page (None: nowhere) and the study go."""

    output: Output
    page: Path | None
    storage: str

    @property
    def shown(self) -> str:
        """The storage without a password."""
        from groupsearch.search.storage import shown

        return shown(self.storage)

    @classmethod
    def plan(
        cls, document: Mapping[str, Any], given: Mapping[str, Any], output: str | None, force: bool, as_json: bool
    ) -> _Places:
        """See that everything can be written before any work is done; ``--resume`` rewrites what it resumes.

        Raises:
            GroupSearchError: when something is there already, or a folder cannot be written.
        """
        beside = Path(output) if output else default_path(document)
        storage = given["storage"] or str(beside.with_suffix(".journal"))
        replace_files = force or given["resume"]
        if "://" not in storage and Path(storage).exists() and not replace_files:
            raise GroupSearchError(
                f"{storage} holds a search already. Go on with it with --resume, begin anew with --force, or name "
                f"another file with -o."
            )
        planned = Output.plan(document, output, replace_files, as_json)
        page = given["report"] or (planned.path.with_suffix(".html") if planned.path else None)
        page = writable(page, force=replace_files) if page else None
        if "://" not in storage:
            make_folder(Path(storage).parent)
            writable(storage, force=True)
        return cls(planned, page, storage)


def _select(
    document: dict[str, Any], setup: Setup, training: TrainSettings, given: Mapping[str, Any], output: Output
) -> None:
    """Choose privately among fixed groupings; there is no study, and the document has the chosen one alone."""
    from groupsearch.cli.training import describe

    page = given["report"] or (output.path.with_suffix(".html") if output.path else None)
    page = writable(page, force=output.force) if page else None
    settings = search_settings(document, setup.loaded.metric_name, {**given, "rungs": ("full",)}, None, force=False)
    trace = _profile(document, setup, settings, given["verify"])
    select(document, setup, trace, training, settings, given["score_noise"])
    document["training"] = describe(training)
    document["not_private"] = {}
    document["cost"]["epsilon"] = document["training"]["epsilon"]
    output.save(document)
    if page is not None:
        write_page(document, page, force=output.force)


def _refuse_of_worker(given: Mapping[str, Any], **other: Any) -> None:
    if given["storage"] is None:
        raise GroupSearchError(
            "Expected --storage with --worker: a worker helps with the search that was begun there. Name the file or "
            "the database that the search was begun with."
        )
    asked = {**other, "report": given["report"], "resume": given["resume"]}
    found = [f"--{name}" for name, value in asked.items() if value]
    if found:
        raise GroupSearchError(
            f"Found {', '.join(found)} with --worker: a worker writes no document, and begins and ends no search. "
            f"Give them to the command without --worker."
        )


def _work(document: dict[str, Any], setup: Setup, training: TrainSettings, given: Mapping[str, Any]) -> None:
    """Take trials of a search that another process began, until it ends."""
    from groupsearch.search.storage import shown
    from groupsearch.search.together import await_study

    joined = {**given, "resume": True}
    settings = search_settings(document, setup.loaded.metric_name, joined, given["storage"], force=False)
    say(f"Tracing one step of {setup.workload} at batch {document['model']['batch_size']}")
    trace = setup.trace()
    say(f"Waiting for the search {settings.study_name!r} in {shown(settings.storage)}")
    await_study(settings, _WORKER_PATIENCE_SECONDS)
    result = search(setup, Ways.of(setup, trace, training, given["vary"]), training, settings, given)
    if result.interrupted:
        raise KeyboardInterrupt("Interrupted. What this worker was training is left to the others.")
    say(f"The search has ended: {result.cost.trained} training runs of all workers together.")


def _profile(document: dict[str, Any], setup: Setup, settings: SearchSettings, level: str) -> Trace:
    """Trace a step and check its estimates, which is done before anything is trained."""
    from groupsearch.cli.watch import Watch, show_peaks
    from groupsearch.documents import Profile
    from groupsearch.grouping import fewest_groups
    from groupsearch.jobs.stages import add_checks, add_estimates

    try:
        watch = Watch(None, False, False)
        trace = add_estimates(document, setup, (), max_groups=8, notify=watch)
        if settings.budget_bytes is not None and not set(COSTS) & set(document["settings"].get("vary", {})):
            fewest_groups(trace, settings.budget_bytes)  # refuses a budget below the floor before any check
        add_checks(document, setup, trace, level, watch, CHECKED)
        watch.close()
        show_peaks(Profile.from_json({**document, "kind": "profile"}))
    except KeyboardInterrupt as interrupt:
        kept = "An earlier search is kept as it was; running" if settings.resume else "Running"
        raise KeyboardInterrupt(
            f"Interrupted before the search: nothing was searched yet and no document was written. {kept} the same "
            f"command again starts over with the trace."
        ) from interrupt
    return trace
