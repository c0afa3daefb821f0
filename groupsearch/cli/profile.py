"""``groupsearch profile``: what every grouping costs in memory."""

from __future__ import annotations

from typing import Any

import click

from groupsearch.cli.parameters import Size, fail_over_option, model_options, output_options, seed_option, step_options


@click.command("profile")
@click.argument("model")
@model_options
@step_options
@click.option(
    "--budget",
    type=Size(),
    help="Peak that --norm-method joint keeps within, with the fewest operations. [default: the least peak there is]",
)
@click.option(
    "--grouping",
    multiple=True,
    help="all-layer, layer-wise, block-wise, uniform:4, best:4, best:2..8, within:12GiB or boundaries such as 3,17,40; "
    "repeatable. [default: all-layer, layer-wise, block-wise, uniform:4 and best:2..8]",
)
@click.option("--max-groups", type=click.IntRange(min=1), default=8, help="Where the exact front of groups ends.")
@click.option("--random", type=click.IntRange(min=0), default=0, help="Random groupings to add.")
@click.option(
    "--verify",
    type=click.Choice(["none", "simulate", "measure", "all"]),
    default="none",
    help="Check each estimate: run the engine on fake tensors (simulate), on the device (measure), or both (all).",
)
@fail_over_option
@click.option(
    "--world-size",
    type=click.IntRange(min=2),
    help="Predict the communication of a training on so many processes, from a step measured on the device.",
)
@click.option("--bandwidth", help="Between these processes, as in 10Gbit.")
@click.option("--latency", default="50us", help="Of a message between them, as in 50us.")
@seed_option
@output_options
def command(model: str, output: str | None, force: bool, as_json: bool, fail_over: float | None, **given: Any) -> None:
    """Estimate the peak memory of groupings of MODEL.

    One traced step is enough to know the peak of every grouping; --verify checks it.

    \b
    groupsearch profile digits-vit --verify all
    groupsearch profile hf:gpt2 --batch-size 16 --checkpoint blocks --verify simulate
    groupsearch profile mine.py:factory --grouping best:4 --grouping 3,17,40
    groupsearch profile digits-vit --world-size 4 --bandwidth 1Gbit
    groupsearch profile hf:gpt2 --batch-size 4 --norm-method joint --budget 2500MiB
    """
    from groupsearch.cli.terminal import Watch, say, say_next, show, show_peaks, watching
    from groupsearch.documents import tables
    from groupsearch.jobs.profile import profile
    from groupsearch.report.finding import communication_sentence

    watch = Watch(output, force, as_json)
    with watching(watch):
        found = profile(model, notify=watch, **given)
    if found.joint is not None:
        show(tables.joint(found.joint))
    show_peaks(found)
    if found.communication is not None:
        show(tables.communication(found.communication))
        say(communication_sentence(found.communication))
    say_next(watch.save(found))
    found.check(fail_over)
