"""``groupsearch train``: one training run with one grouping."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from groupsearch.cli.parameters import (
    Positive,
    Size,
    model_options,
    output_options,
    private_seed_option,
    secure_option,
    step_options,
    training_options,
)
from groupsearch.cli.terminal import say
from groupsearch.errors import DocumentError, GroupSearchError
from groupsearch.jobs.request import allotment
from groupsearch.plan.clipping import ALLOCATIONS, NOISE_ALLOCATIONS
from groupsearch.privacy import not_private_sentence
from groupsearch.records import default_path, read_document
from groupsearch.units import format_bytes, format_interval, format_seconds

if TYPE_CHECKING:
    from groupsearch.documents import Train


class Allotment(click.ParamType[Any]):
    """How something is allotted to the groups: a name, or a number for each group; adaptive:0.7 where that is one."""

    name = "allotment"

    def __init__(self, names: tuple[str, ...], adaptive: bool = False) -> None:
        self._names = names
        self._adaptive = adaptive

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The name, the numbers, or adaptive thresholds at the quantile given."""
        try:
            return allotment(value, self._names, adaptive=self._adaptive)
        except GroupSearchError as error:
            self.fail(str(error), param, ctx)


@click.command("train")
@click.argument("model")
@click.option(
    "--grouping",
    required=True,
    help="all-layer, layer-wise, best:4, within:12GiB, 3,17,40; the document of a search, whose recommendation is "
    "taken (search.json#3: its third candidate); or one of profile --norm-method joint, whose norm methods are then "
    "used too.",
)
@click.option("--pick", type=Size(), help="Of a search: the best candidate whose peak is at most so much, as in 12GiB.")
@model_options
@step_options
@training_options
@click.option(
    "--thresholds",
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
@click.option(
    "--save",
    type=click.Path(),
    help="A folder to make for the trained weights, with the privacy they were trained under beside them.",
)
@click.option(
    "--checkpoint-every", type=click.IntRange(min=1), help="Steps between two checkpoints, beside that folder."
)
@click.option("--resume", is_flag=True, help="Go on with the checkpoint that a training left that was killed.")
@click.option(
    "--track",
    multiple=True,
    metavar="WHERE",
    help="Follow loss, clipped shares, norms, epsilon and time: terminal, document or tensorboard:FOLDER; repeatable. "
    "What is written there is exact, not private.",
)
@private_seed_option
@secure_option
@output_options
def command(model: str, output: str | None, force: bool, as_json: bool, **given: Any) -> None:
    """Train MODEL with privacy and one grouping.

    The document has the curve, the metric, the epsilon that the run cost and what that means. Nobody can draw the noise
    and the batches again, you included; --seed makes them known, for experiments.

    \b
    groupsearch train digits-vit --grouping best:4 --epsilon 8
    groupsearch train digits-vit --grouping reports/digits-vit.json --save weights --checkpoint-every 10
    groupsearch train digits-vit --grouping best:4 --track terminal --track tensorboard:runs
    groupsearch train digits-vit --grouping profiles/digits-vit-b288-cpu-norms-joint.json
    torchrun --nproc-per-node 2 -m groupsearch train digits-vit --grouping best:4 --epsilon 8
    """
    from groupsearch.jobs.trackers import check_tracks
    from groupsearch.jobs.weights import folder_of
    from groupsearch.jobs.winners import winner_of

    check_tracks(given["track"])
    winner_of(given["grouping"], given["pick"])  # refused before torch is loaded, as a folder is
    folder_of(given["save"], given["checkpoint_every"], given["resume"], force)
    from groupsearch.cli.terminal import Watch, say_next, watching
    from groupsearch.distributed.launch import is_first
    from groupsearch.jobs.train import train

    class Resuming(Watch):
        """Replaces what the interrupted training left that is gone on with, and nothing else."""

        def begin(self, header: Mapping[str, Any]) -> None:
            there = Path(output) if output is not None else default_path(header)
            self.asked = output, force or _is_unfinished(there, header["model"]["name"]), as_json
            super().begin(header)

    watch = (Resuming if given["resume"] else Watch)(output, force, as_json)
    with watching(watch):
        found = train(model, notify=watch, force=force, **given)
    if not is_first():
        return
    _print_result(found)
    if given["save"] is not None:
        say(f"Saved the weights in {given['save']}; its README.md says how to load them and what they cost.")
    say_next(watch.save(found))


def _is_unfinished(path: Path, model: str) -> bool:
    try:
        found = read_document(path, ("train",))
    except DocumentError:
        return False
    return "metric" not in found and found["model"]["name"] == model


def _print_result(found: Train) -> None:
    from groupsearch.report.words import randomness

    assert found.metric is not None  # it was not interrupted
    assert found.step_seconds is not None
    reached = "finished"
    if found.metric.mean is not None:
        value = format_interval(found.metric.mean, None, percent="accuracy" in found.metric.name)
        reached = f"reached {value} {found.metric.name}"
    groups = f"{found.groups} group{'' if found.groups == 1 else 's'}"
    say(
        f"{found.model.name} with {groups} {reached} after {found.steps} steps of "
        f"{format_seconds(found.step_seconds)}; estimated peak {format_bytes(found.peak_bytes)}."
    )
    say(str(found.privacy))
    say(not_private_sentence(found.not_private))
    say(randomness(found.to_json()))
