"""``groupsearch profile``: what every grouping costs in memory."""

from __future__ import annotations

from typing import Any

import click

from groupsearch.cli.parameters import model_options, output_options, seed_option, step_options


@click.command("profile")
@click.argument("model")
@model_options
@step_options
@click.option(
    "--grouping",
    "groupings",
    multiple=True,
    help="all-layer, layer-wise, block-wise, uniform:4, best:4, best:2..8, within:12GiB or boundaries such as 3,17,40; "
    "repeatable. [default: all-layer, layer-wise, block-wise, uniform:4 and best:2..8]",
)
@click.option("--max-groups", type=click.IntRange(min=1), default=8, help="Where the exact front of groups ends.")
@click.option("--random", "randoms", type=click.IntRange(min=0), default=0, help="Random groupings to add.")
@click.option(
    "--verify",
    type=click.Choice(["none", "simulate", "measure", "all"]),
    default="none",
    help="Check each estimate: run the engine on fake tensors (simulate), on the device (measure), or both (all).",
)
@seed_option
@output_options
def command(model: str, output: str | None, force: bool, as_json: bool, **given: Any) -> None:
    """Estimate the peak memory of groupings of MODEL.

    One traced step is enough to know the peak of every grouping; --verify checks it.

    \b
    groupsearch profile digits-vit --verify all
    groupsearch profile hf:gpt2 --batch-size 16 --checkpoint blocks --verify simulate
    groupsearch profile mine.py:factory --grouping best:4 --grouping 3,17,40
    """
    from groupsearch.cli.output import Output
    from groupsearch.cli.stages import add_checks, add_estimates, make_setup, print_peaks, start_document

    setup = make_setup(model, given)
    document = start_document(
        "profile",
        setup,
        device=setup.device,
        groupings=list(given["groupings"]),
        max_groups=given["max_groups"],
        random=given["randoms"],
        seed=given["seed"],
        verify=given["verify"],
    )
    planned = Output.plan(document, output, force, as_json)
    trace = add_estimates(
        document,
        setup,
        given["groupings"],
        max_groups=given["max_groups"],
        randoms=given["randoms"],
        seed=given["seed"],
    )
    try:
        add_checks(document, setup, trace, given["verify"])
    except KeyboardInterrupt as interrupt:
        planned.save(document)
        done = len(document["simulations"]) + len(document["measurements"])
        raise KeyboardInterrupt(
            f"Interrupted; the document has every estimate and {done} checks of them."
        ) from interrupt
    print_peaks(document)
    planned.save(document)
