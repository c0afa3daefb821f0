"""``groupsearch fit``: the largest batch, or the longest sequence, that fits into a memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from groupsearch.cards import card_of
from groupsearch.cli.parameters import (
    Positive,
    Share,
    Size,
    model_options,
    no_seed_option,
    output_options,
    step_options,
)
from groupsearch.errors import GroupSearchError
from groupsearch.units import format_bytes, format_number, format_ratio

if TYPE_CHECKING:
    from groupsearch.fit import Room, Sizes


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
    "groupings",
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
    from groupsearch.cli.console import say
    from groupsearch.cli.output import Output
    from groupsearch.cli.stages import add_estimates, say_not_measured, say_tracing, start_document

    sizes, room = _plan(model, given)
    kept = {key: given[key] for key in ("groupings", "max_groups", "limit", "measure")}
    document = start_document("profile", sizes.setup, device=sizes.setup.device, margin=room.margin, **kept)
    fit = document["fit"] = _start_fit(sizes, room)
    planned = Output.plan(document, output, force, as_json)
    say_tracing(document)
    add_estimates(document, sizes.setup, given["groupings"], max_groups=given["max_groups"], trace=sizes.first)
    say(f"Looking for the largest {sizes.vary} within {format_bytes(room.usable_bytes)}, up to {fit['limit']}")
    try:
        _add_rows(fit, sizes, room, given)
        _add_rates(fit, sizes, given["measure"])
    except KeyboardInterrupt as interrupt:
        planned.save(document)
        raise KeyboardInterrupt(f"Interrupted; the document has {len(fit['rows'])} rows of the fit.") from interrupt
    print_fit(document)
    say_not_measured(document)
    say(f"{fit['summary']} {fit['poisson']['rule']}")
    planned.save(document)


def _plan(model: str, given: dict[str, Any]) -> tuple[Sizes, Room]:
    """What to trace at which sizes, and the room there is."""
    from groupsearch.cli.stages import make_setup
    from groupsearch.fit import BATCH, MARGIN, Room, Sizes, length_setting
    from groupsearch.reserved import CARD_MARGIN, CONTEXT_BYTES
    from groupsearch.verify import check_measurable

    length = None
    if given["sequence_length"] is not None or given["find"] == "sequence-length":
        length = length_setting(model, dict(given["settings"]))
    if given["sequence_length"] is not None:
        given["settings"] = (*given["settings"], (length, given["sequence_length"]))
    if given["micro_batches"] is None and given["sampling_rate"] is not None:
        given["micro_batches"] = 2  # a batch that is taken in pieces adds to the sums of those before
    setup = make_setup(model, given, cards=True)
    if given["measure"]:
        check_measurable(setup.device)
    if given["find"] == "sequence-length" and length not in setup.loaded.settings:
        raise GroupSearchError(
            f"Expected a sequence length to start from, found none: {model} has no setting {length!r} of its own. "
            "Give --sequence-length, or leave --find away."
        )
    population = given["dataset_size"]
    if population is None and setup.loaded.data is not None:
        population = setup.loaded.data.train_size
    margin, context = (MARGIN, 0) if setup.device == "cpu" else (CARD_MARGIN, CONTEXT_BYTES)
    margin = margin if given["margin"] is None else given["margin"]
    room = Room(
        _memory(given["memory"], setup.device), margin, given["limit"], population, given["sampling_rate"], context
    )
    return Sizes(setup, str(length) if given["find"] == "sequence-length" else BATCH), room


def _memory(given: int | None, device: str) -> int:
    card = card_of(device)
    if given is None and card is None:
        raise GroupSearchError(
            "Expected --memory, what a step may take, found none. Give it as in --memory 24GiB, or name a card with "
            "--device cuda:h100 for all of its memory."
        )
    return given if given is not None else card.memory_bytes  # type: ignore[union-attr]


def _start_fit(sizes: Sizes, room: Room) -> dict[str, Any]:
    from groupsearch.fit import poisson_part

    return {
        "memory_bytes": room.memory_bytes,
        "margin": room.margin,
        "context_bytes": room.context_bytes,
        "held_back": room.held_back,
        "usable_bytes": room.usable_bytes,
        "varies": sizes.vary,
        "limit": sizes.limit(room.limit),
        "poisson": poisson_part(room, sizes.setup.micro_batches),
        "rows": [],
        "summary": None,
    }


def _add_rows(fit: dict[str, Any], sizes: Sizes, room: Room, given: Mapping[str, Any]) -> None:
    """Every row is in the document as soon as it is known."""
    from groupsearch.cli.console import progress
    from groupsearch.fit import fit_rows, summarise

    with progress() as bars:
        bar = bars.add_task("Tracing", total=None)
        try:
            for row in fit_rows(sizes, room, given["groupings"], given["max_groups"]):
                fit["rows"].append(row)
                bars.update(bar, description=f"{row['grouping']}: {row['size']}; tracing", advance=1)
        finally:
            fit["traced"] = list(sizes.traced)
    fit["summary"] = summarise(fit["rows"], sizes.vary)


def _add_rates(fit: dict[str, Any], sizes: Sizes, measure: bool) -> None:
    """Measure each row that has a size, where that is asked for; one that fails is said and has no rate."""
    from groupsearch.cli.console import progress, say
    from groupsearch.fit import add_rates

    rows = [row for row in fit["rows"] if row["size"]] if measure else []
    with progress() as bars:
        bar = bars.add_task("Measuring", total=len(rows))
        for row in rows:
            bars.update(bar, description=f"Measuring {row['grouping']}")
            try:
                add_rates(row, sizes)
            except GroupSearchError as error:
                say(f"Without a rate for {row['grouping']}: {error}")
            bars.advance(bar)


def print_fit(document: Mapping[str, Any]) -> None:
    """The table of a fit: what fits, against non-private training."""
    from groupsearch.cli.console import print_table

    fit = document["fit"]
    batch = fit["varies"] == "batch_size"
    rated = any("examples_per_second" in row for row in fit["rows"])
    columns = ["grouping ", "groups", "batch" if batch else "length", "of non-private", "expected batch"]
    columns += ["pieces"] if fit["poisson"]["sampling_rate"] else []
    held = any("reserved_bytes" in row for row in fit["rows"])
    columns += ["peak", "with one more", *(["to hold"] if held else []), *(["examples per second"] if rated else [])]
    reference, rows = fit["rows"][0]["size"], []
    for row in fit["rows"]:
        rate, peaks = row.get("examples_per_second"), (row["peak_bytes"], row["next_peak_bytes"])
        cells = [row["grouping"], str(row["groups"] or ""), f"{row['size']}{LIMITED[row['limited_by']]}"]
        cells += [format_ratio(row["size"] / reference) if reference else "", str(row["expected_batch_size"] or "")]
        cells += ["-".join(map(str, dict.fromkeys(row["pieces"] or ())))] if "pieces" in columns else []
        cells += ["" if peak is None else format_bytes(peak) for peak in peaks]
        cells += [format_bytes(row["reserved_bytes"]) if "reserved_bytes" in row else ""] if held else []
        cells += [f"{format_number(rate['value'], 4)} {rate['source']}" if rate else ""] if rated else []
        rows.append(cells)
    fixed = "" if batch else f", batch {document['model']['batch_size']}"
    print_table(columns, rows, title=f"{document['model']['name']}{fixed}: {fit['held_back']}")


LIMITED = {"memory": "", "limit": "+", "model": " (all it takes)"}
