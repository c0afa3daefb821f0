"""``groupsearch profile``: what every grouping costs in memory."""

from __future__ import annotations

from typing import Any

import click

from groupsearch.cli.parameters import Size, model_options, output_options, seed_option, step_options
from groupsearch.errors import GroupSearchError
from groupsearch.joint import JOINT


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
    groupsearch profile hf:gpt2 --batch-size 4 --norm-method joint --budget 2500MiB
    """
    from groupsearch.cli.joint import choose_jointly, print_joint
    from groupsearch.cli.output import Output
    from groupsearch.cli.stages import add_checks, add_estimates, make_setup, print_peaks, say_tracing, start_document
    from groupsearch.verify import check_measurable

    joint = given["norm_method"] == JOINT
    if given["budget"] is not None and not joint:
        raise GroupSearchError(
            "Found --budget without --norm-method joint: with one rule for all norms there is nothing to choose but "
            "the grouping. Give --norm-method joint too, or --grouping within:12GiB for the fewest groups in a budget."
        )
    setup = make_setup(model, {**given, "norm_method": "mixed"} if joint else given, cards=True)
    if given["verify"] in ("measure", "all"):
        check_measurable(setup.device)
    document = start_document(
        "profile",
        setup,
        device=setup.device,
        groupings=list(given["groupings"]),
        max_groups=given["max_groups"],
        random=given["randoms"],
        seed=given["seed"],
        verify=given["verify"],
        **({"norm_method": JOINT, "budget_bytes": given["budget"]} if joint else {}),
    )
    planned = Output.plan(document, output, force, as_json)
    trace = None
    if joint:
        say_tracing(document, " by every norm method")
        setup, trace = choose_jointly(document, setup, given["budget"])
    trace = add_estimates(
        document,
        setup,
        given["groupings"],
        max_groups=given["max_groups"],
        randoms=given["randoms"],
        seed=given["seed"],
        trace=trace,
    )
    try:
        add_checks(document, setup, trace, given["verify"])
    except KeyboardInterrupt as interrupt:
        planned.save(document)
        done = len(document["simulations"]) + len(document["measurements"])
        raise KeyboardInterrupt(
            f"Interrupted; the document has every estimate and {done} checks of them."
        ) from interrupt
    if joint:
        print_joint(document)
    print_peaks(document)
    planned.save(document)
