"""``groupsearch fit``: the largest batch, or the longest sequence, that fits into a memory."""

from __future__ import annotations

from typing import Any

import click

from groupsearch.cli.parameters import (
    Positive,
    Share,
    Size,
    model_options,
    no_seed_option,
    output_options,
    step_options,
)
from groupsearch.cli.terminal import say


@click.command("fit")
@click.argument("model")
@click.option(
    "--memory", type=Size(), help="What a step may take, as in 24GiB. [default: all of a card named by --device]"
)
@click.option(
    "--find",
    type=click.Choice(["batch-size", "sequence-length"]),
    default="batch-size",
    help="What to enlarge; the other stays as given. The search starts at --batch-size, or --sequence-length.",
)
@click.option("--sequence-length", type=click.IntRange(min=1), help="Length of a sequence. [default: the model's]")
@click.option(
    "--grouping",
    multiple=True,
    help="all-layer, layer-wise, block-wise, uniform:4, best:4 or boundaries such as 3,17,40; repeatable. "
    "[default: layer-wise, block-wise, uniform:4, best:2, best:3, ... until nothing more is gained]",
)
@click.option("--max-groups", type=click.IntRange(min=1), default=8, help="Where best:2, best:3, ... end.")
@click.option(
    "--margin",
    type=Share(),
    help="Share of the memory that is held back. [default: 0.5%; 4% on a CUDA device, of which 0.7 GiB for its "
    "context are held back too]",
)
@click.option("--limit", type=click.IntRange(min=1), default=65536, help="The largest batch or length that is tried.")
@click.option("--dataset-size", type=click.IntRange(min=1), help="Training examples. [default: the model's data]")
@click.option(
    "--sampling-rate",
    type=Positive(),
    help="Of Poisson sampling: says in how many pieces batches are taken; steps then have "
    "--micro-batches 2, unless given, and the same peak with more.",
)
@click.option(
    "--measure", is_flag=True, help="Measure each grouping's step at two smaller batches: examples per second."
)
@model_options
@step_options
@no_seed_option
@output_options
def command(model: str, output: str | None, force: bool, as_json: bool, **given: Any) -> None:
    """Find the largest batch of MODEL that fits into --memory.

    For non-private training and for every grouping; the batch named was traced and fits, one more does not.
    Writes a profile of the step that the search starts from, with the answer as its part "fit".

    \b
    groupsearch fit hf:gpt2 --memory 24GiB --checkpoint blocks
    groupsearch fit hf:roberta-base --memory 16GiB --sequence-length 256 --dataset-size 104743
    groupsearch fit digits-vit --memory 40MiB --measure
    groupsearch fit stdlib-gpt --memory 1GiB --find sequence-length --batch-size 8
    groupsearch fit hf:gpt2 --device cuda:h100
    """
    from groupsearch.cli.terminal import Watch, say_next, say_not_measured, show, watching
    from groupsearch.jobs.fit import fit

    watch = Watch(output, force, as_json)
    with watching(watch):
        found = fit(model, notify=watch, **given)
    show(found.table())
    say_not_measured(found)
    say(f"{found.fit.summary} {found.fit.poisson.rule}")
    say_next(watch.save(found))
