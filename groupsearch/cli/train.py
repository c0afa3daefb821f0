"""``groupsearch train``: one training run with one grouping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from groupsearch.cli.parameters import (
    Positive,
    model_options,
    output_options,
    private_seed_option,
    secure_option,
    step_options,
    training_options,
)
from groupsearch.cli.training import describe, training_setup
from groupsearch.clipping import ALLOCATIONS, NOISE_ALLOCATIONS, AdaptiveQuantile
from groupsearch.errors import GroupSearchError
from groupsearch.jobs.joint import joint_choice, names_document
from groupsearch.privacy import NOT_PRIVATE, PrivacyStatement, not_private_sentence
from groupsearch.units import format_bytes, format_interval, format_seconds

if TYPE_CHECKING:
    from groupsearch.grouping import Grouping
    from groupsearch.trace import Trace
    from groupsearch.training import CurvePoint, TrainSettings
    from groupsearch.verify import Setup

MECHANISM = ("allocation", "noise_allocation")


class Allotment(click.ParamType[Any]):
    """How something is allotted to the groups: a name, or a number for each group; adaptive:0.7 where that is one."""

    name = "allotment"

    def __init__(self, names: tuple[str, ...], adaptive: bool = False) -> None:
        self._names = names
        self._adaptive = adaptive

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The name, the numbers, or adaptive thresholds at the quantile given."""
        if not isinstance(value, str) or value in self._names:
            return value
        name, colon, quantile = value.partition(":")
        try:
            if self._adaptive and name == "adaptive":
                return AdaptiveQuantile(float(quantile)) if colon else AdaptiveQuantile()
            return tuple(float(part) for part in value.split(","))
        except (ValueError, GroupSearchError):
            names = ", ".join((*self._names, *(("adaptive", "adaptive:0.7") if self._adaptive else ())))
            self.fail(f"Expected {names} or a number for each group, such as 0.5,1,0.8, found {value!r}.", param, ctx)


@click.command("train")
@click.argument("model")
@click.option(
    "--grouping",
    required=True,
    help="all-layer, layer-wise, best:4, within:12GiB, 3,17,40, or a document of profile --norm-method joint, whose "
    "norm methods are then used too.",
)
@model_options
@step_options
@training_options
@click.option(
    "--thresholds",
    "allocation",
    type=Allotment(ALLOCATIONS, adaptive=True),
    help="Clipping thresholds: uniform, dimension, adaptive (private median), adaptive:0.7 or 0.5,1,0.8. "
    "[default: uniform]",
)
@click.option("--count-noise", type=Positive(), help="Noise of adaptive thresholds' counts. [default: batch / 20]")
@click.option(
    "--noise-allocation",
    type=Allotment(NOISE_ALLOCATIONS),
    help="Noise of the groups: global (the same), equal (by threshold) or weights 1,2,1. [default: global]",
)
@click.option("--evaluate-every", type=click.IntRange(min=0), help="Steps between points. [default: a tenth of all]")
@private_seed_option
@secure_option
@output_options
def command(
    model: str, grouping: str, evaluate_every: int | None, output: str | None, force: bool, as_json: bool, **given: Any
) -> None:
    """Train MODEL with privacy and one grouping.

    The document has the curve, the metric, the epsilon that the run cost and what that means. Nobody can draw the noise
    and the batches again, you included; --seed makes them known, for experiments.

    \b
    groupsearch train digits-vit --grouping best:4 --epsilon 8
    groupsearch train digits-vit --grouping profiles/digits-vit-b288-cpu-norms-joint.json
    """
    from groupsearch.cli.output import Output
    from groupsearch.grouping import Grouping
    from groupsearch.jobs.stages import start_document

    setup, settings = training_setup(model, given, evaluate_every)
    settings = replace(settings, **_mechanism(given))
    boundaries = None
    if names_document(grouping):
        boundaries, options = joint_choice(grouping, model)
        setup, settings = setup.with_options(options), replace(settings, options=options)
    plan = describe(settings) | _describe_mechanism(settings)
    document = start_document("train", setup, device=setup.device, grouping=grouping, **_known_of(settings), **plan)
    document["randomness"] = settings.streams().describe()
    planned = Output.plan(document, output, force, as_json)
    trace = setup.trace()
    chosen = Grouping.parse(trace, grouping) if boundaries is None else Grouping.from_boundaries(trace, boundaries)
    settings.plan(chosen)  # refused before anything runs
    document |= {**plan, **_describe_grouping(trace, grouping, chosen), "curve": [], "thresholds": [], "steps": 0}
    document["not_private"] = NOT_PRIVATE["train"]
    try:
        _run(setup, chosen, settings, document)
    except KeyboardInterrupt as interrupt:
        done = document["steps"]
        spent = settings.statement(_train_size(setup), steps=done)
        document |= {"epsilon": spent.epsilon, "privacy": spent.to_json()}
        planned.save(document)
        raise KeyboardInterrupt(
            f"Interrupted after {done} of {settings.steps} steps; the curve so far and what it cost are kept."
        ) from interrupt
    _print_result(document)
    planned.save(document)


def _known_of(settings: TrainSettings) -> dict[str, Any]:
    """The seed of an experiment; a secret training has none to tell."""
    return {} if settings.seed is None else {"seed": settings.seed}


def _mechanism(given: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of the settings that the mechanism's own options ask for."""
    changes = {key: given[key] for key in MECHANISM if given[key] is not None}
    if given["count_noise"] is not None:
        if not isinstance(given["allocation"], AdaptiveQuantile):
            raise GroupSearchError(
                "Found --count-noise without --thresholds adaptive: fixed thresholds count nothing. Give both or none."
            )
        changes["allocation"] = replace(given["allocation"], count_noise=given["count_noise"])
    return changes


def _describe_mechanism(settings: TrainSettings) -> dict[str, Any]:
    allocation = settings.allocation
    found = {"adaptive": asdict(allocation)} if isinstance(allocation, AdaptiveQuantile) else allocation
    return {"allocation": found, "noise_allocation": settings.noise_allocation, "sampling": "poisson"}


def _describe_grouping(trace: Trace, text: str, grouping: Grouping) -> dict[str, Any]:
    from groupsearch.memory import peak_memory

    return {
        "trace": trace.to_json(),
        "grouping": text,
        "boundaries": list(grouping.boundaries),
        "groups": grouping.groups,
        "peak_bytes": peak_memory(trace, grouping).peak_bytes,
    }


def _run(setup: Setup, grouping: Grouping, settings: TrainSettings, document: dict[str, Any]) -> None:
    """Train, and keep in the document what is known after every step."""
    from groupsearch.cli.console import progress
    from groupsearch.training import train

    def on_step(step: int, point: CurvePoint | None) -> None:
        document["steps"] = step
        if point is not None:
            document["curve"].append([point.step, point.loss, point.metric])
            if point.thresholds:
                document["thresholds"].append([point.step, *point.thresholds])
        bars.update(bar, completed=step)

    with progress() as bars:
        bar = bars.add_task("Training", total=settings.steps)
        result = train(setup.loaded, grouping, settings, on_step)
    document |= {
        "metric": {"name": result.metric_name, "mean": result.metric},
        "step_seconds": result.step_seconds,
        "expected_examples": settings.steps * settings.sampling_rate * _train_size(setup),
        "privacy": settings.statement(_train_size(setup)).to_json(),
        "added_delta": result.added_delta,
        "checked": None if result.checked is None else result.checked.to_json(),
        "watched": None if result.watched is None else result.watched.to_json(),
    }


def _train_size(setup: Setup) -> int:
    assert setup.loaded.data is not None  # it is being trained
    return setup.loaded.data.train_size


def _print_result(document: Mapping[str, Any]) -> None:
    from groupsearch.cli.console import say
    from groupsearch.report.words import randomness

    metric = document["metric"]
    reached = "finished"
    if metric["mean"] is not None:
        value = format_interval(metric["mean"], None, percent="accuracy" in metric["name"])
        reached = f"reached {value} {metric['name']}"
    groups = f"{document['groups']} group{'' if document['groups'] == 1 else 's'}"
    say(
        f"{document['model']['name']} with {groups} {reached} after {document['steps']} steps of "
        f"{format_seconds(document['step_seconds'])}; estimated peak {format_bytes(document['peak_bytes'])}."
    )
    say(str(PrivacyStatement.from_json(document["privacy"])))
    say(not_private_sentence(document["not_private"]))
    say(randomness(document))
