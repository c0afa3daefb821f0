"""``groupsearch optimize``: profile, check, search by training, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from groupsearch.cli.output import Output, make_folder, writable
from groupsearch.cli.parameters import Size, model_options, output_options, seed_option, training_options
from groupsearch.cli.report import write_page
from groupsearch.errors import GroupSearchError
from groupsearch.records import default_path
from groupsearch.units import format_bytes, format_interval, format_seconds

if TYPE_CHECKING:
    from groupsearch.search import SearchResult, SearchSettings
    from groupsearch.trace import Trace
    from groupsearch.training import TrainSettings
    from groupsearch.verify import Setup

GRANULARITIES = ("site", "layer", "block")  # of search.settings, without loading Optuna for --help
SAMPLERS = ("front", "tpe", "nsga2", "gp", "random")
_WORKER_PATIENCE_SECONDS = 3600.0  # the search begins when its profile is made and checked
CHECKED = ("all-layer", "layer-wise", "best:2", "best:4")
SEARCH_SETTINGS = ("budget", "trials", "seeds", "granularity", "max_groups", "sampler", "seed", "verify")
FINGERPRINT = (
    *("norm_method", "checkpoint", "optimizer", "device", "epsilon", "delta", "steps", "learning_rate"),
    *("sampling_rate", "rule", "max_grad_norm"),
)


@click.command("optimize")
@click.argument("model", default="digits-vit")
@click.option("--budget", type=Size(), help="Largest estimated peak, as in 12GiB; others are never trained.")
@click.option(
    "--trials", type=click.IntRange(min=1), default=16, help="Groupings to train before the front is repeated."
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="Training runs of every grouping on the front.")
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
@training_options
@seed_option
@output_options
def command(model: str, output: str | None, force: bool, as_json: bool, **given: Any) -> None:
    """Search the front of accuracy against peak memory.

    MODEL (default: digits-vit, which needs no download) is traced and its estimates are checked by
    runs; then groupings are trained with differential privacy, each with the same budget, and the
    front is repeated with several seeds and drawn as a page. An interrupted search goes on with --resume.
    Any number of processes, with one GPU each, help when started with the same options and --worker.

    \b
    groupsearch optimize
    groupsearch optimize digits-cnn --epsilon 3 --trials 30 --budget 40MiB
    groupsearch optimize digits-cnn --storage postgresql://me@host/searches --worker --device cuda:1
    """
    from groupsearch.cli.stages import make_setup, start_document
    from groupsearch.cli.train import describe, train_settings

    setup = make_setup(model, given)
    training = train_settings(setup, given)
    chosen = {key: given[key] for key in SEARCH_SETTINGS}
    document = start_document("search", setup, device=setup.device, **chosen, **describe(training))
    if given["worker"]:
        _refuse_of_worker(given, output=output, force=force, json=as_json)
        _work(document, setup, training, given)
        return
    places = _Places.plan(document, given, output, force, as_json)
    settings = _search_settings(document, setup.loaded.metric_name, given, places.storage, force)
    trace = _profile(document, setup, settings, given["verify"])
    result = _search(setup, trace, training, settings)
    parts = result.to_json()
    training_part = {**describe(training), **parts["training"]}
    document |= {**parts, "training": training_part, "cost": {**parts["cost"], "epsilon": training_part["epsilon"]}}
    places.output.save(document)
    if result.interrupted:
        raise KeyboardInterrupt(
            f"Interrupted. The {len(result.evaluations)} training runs that ended are kept in {places.shown}; the "
            f"same command with --resume instead of --force goes on."
        )
    _print_front(result)
    if places.page is not None:
        write_page(document, places.page, force=places.output.force)


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
    from groupsearch.cli.console import say
    from groupsearch.search.storage import shown
    from groupsearch.search.together import await_study

    joined = {**given, "resume": True}
    settings = _search_settings(document, setup.loaded.metric_name, joined, given["storage"], force=False)
    say(f"Tracing one step of {setup.workload} at batch {document['model']['batch_size']}")
    trace = setup.trace()
    say(f"Waiting for the search {settings.study_name!r} in {shown(settings.storage)}")
    await_study(settings, _WORKER_PATIENCE_SECONDS)
    result = _search(setup, trace, training, settings)
    if result.interrupted:
        raise KeyboardInterrupt("Interrupted. What this worker was training is left to the others.")
    say(f"The search has ended: {len(result.evaluations)} training runs of all workers together.")


def _search_settings(
    document: Mapping[str, Any], metric_name: str, given: Mapping[str, Any], storage: str, force: bool
) -> SearchSettings:
    from groupsearch.search import SearchSettings

    fixed = {key: document["settings"][key] for key in FINGERPRINT}
    fixed["device"] = fixed["device"].partition(":")[0]  # workers have one GPU of the same kind each
    return SearchSettings(
        trials=given["trials"],
        budget_bytes=given["budget"],
        seeds=given["seeds"],
        seed=given["seed"],
        sampler=given["sampler"],
        storage=storage,
        study_name=given["study"],
        resume=given["resume"],
        force=force,
        granularity=given["granularity"],
        max_groups=given["max_groups"],
        metric_name=metric_name,
        fingerprint={**document["model"], **fixed, "packages": document["environment"]["packages"]},
    )


def _profile(document: dict[str, Any], setup: Setup, settings: SearchSettings, level: str) -> Trace:
    """Trace a step and check its estimates, which is done before anything is trained."""
    from groupsearch.cli.stages import add_checks, add_estimates, print_peaks
    from groupsearch.grouping import fewest_groups

    try:
        trace = add_estimates(document, setup, (), max_groups=8)
        if settings.budget_bytes is not None:
            fewest_groups(trace, settings.budget_bytes)  # refuses a budget below the floor before any check
        add_checks(document, setup, trace, level, CHECKED)
        print_peaks(document)
    except KeyboardInterrupt as interrupt:
        kept = "An earlier search is kept as it was; running" if settings.resume else "Running"
        raise KeyboardInterrupt(
            f"Interrupted before the search: nothing was searched yet and no document was written. {kept} the same "
            f"command again starts over with the trace."
        ) from interrupt
    return trace


def _search(setup: Setup, trace: Trace, training: TrainSettings, settings: SearchSettings) -> SearchResult:
    """Run the search, drawing its progress; every training run is one evaluation."""
    from groupsearch.cli.console import progress, say
    from groupsearch.grouping import Grouping
    from groupsearch.search import Event, Outcome
    from groupsearch.search.together import run_together
    from groupsearch.training import train

    def evaluate(boundaries: tuple[int, ...], seed: int) -> Outcome:
        result = train(setup.loaded, Grouping.from_boundaries(trace, boundaries), replace(training, seed=seed))
        points = tuple((point.step, point.metric) for point in result.curve if point.metric is not None)
        value = float("nan") if result.metric is None else result.metric
        return Outcome(value, result.step_seconds, result.steps, points)

    def notify(event: Event) -> None:
        groups = f"{len(event.boundaries) + 1} groups" if event.boundaries else "all-layer"
        seed = "" if event.seed is None else f", seed {event.seed}"
        what = f"{event.phase.capitalize()}: {groups}{seed}"
        bars.update(bars.task_ids[0], description=what, completed=event.done, total=event.total)
        if event.kind == "failed" or (event.kind == "trained" and event.value is not None):  # else another trains it
            value = "failed" if event.value is None else f"{settings.metric_name} {event.value:.4f}"
            say(f"{event.done}/{event.total} {what}: {value}, {format_bytes(event.peak_bytes)}")

    say(f"Searching: {settings.trials} groupings, then {settings.seeds} seeds of each on the front")
    with progress() as bars:
        bars.add_task("Search", total=settings.trials)
        return run_together(trace, evaluate, settings, notify)


def _print_front(result: SearchResult) -> None:
    from groupsearch.cli.console import print_table, say

    percent = "accuracy" in result.metric_name
    best = result.recommended
    shown = [c for c in result.candidates if c.on_front or c is best or c.source in ("all-layer", "layer-wise")]
    rows = [
        (
            c.source,
            str(c.groups),
            format_bytes(c.peak_bytes),
            format_interval(c.mean, c.half_width, percent=percent),
            str(len(c.values)),
            "yes" if c.on_front else "",
            "<- recommended" if c is best else "",
        )
        for c in shown
    ]
    print_table(("from ", "groups", "peak", result.metric_name, "seeds", "front", " "), rows)
    say(result.reason)
    say(f"{result.cost.trained} training runs in {format_seconds(result.cost.seconds)}.")
