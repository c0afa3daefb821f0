"""The stages that profile and optimize share: a setup, its trace, its estimates and their check."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from groupsearch.cards import card_of, named_cards
from groupsearch.cli.console import print_table, progress, say
from groupsearch.cli.joint import refuse_joint
from groupsearch.cli.parameters import expand_ranges
from groupsearch.errors import GroupSearchError
from groupsearch.grouping import Grouping
from groupsearch.joint import JOINT
from groupsearch.options import EngineOptions
from groupsearch.partition import floor_bytes
from groupsearch.records import environment, new_document
from groupsearch.report.finding import finding, joint_finding
from groupsearch.trace import Trace
from groupsearch.units import format_bytes, format_percent, format_ratio, format_seconds, format_signed_percent
from groupsearch.verify import Setup, check_measurable, estimate_rows, front_rows, held_bytes
from groupsearch.workloads import load_workload

DEFAULT_GROUPINGS = ("all-layer", "layer-wise", "block-wise", "uniform:4", "best:2..8")
LEVELS = {"none": (), "simulate": ("simulations",), "measure": ("measurements",)}
RESERVED = ("reserved", "fragmented")
HELD, HELD_PARTS = ["to allocate", "to hold"], ("allocated_bytes", "reserved_bytes")
LEVELS["all"] = LEVELS["simulate"] + LEVELS["measure"]


def make_setup(model: str, given: Mapping[str, Any], *, cards: bool = False) -> Setup:
    """The setup that the options of :func:`groupsearch.cli.parameters.model_options` describe.

    Args:
        model: the workload.
        given: the options.
        cards: whether the device may be a card that is not there.

    Raises:
        GroupSearchError: for a device that is not there, a model that cannot be loaded, or a joint choice of norms.
    """
    refuse_joint(given["norm_method"])
    check_device(given["device"], cards=cards)
    settings = dict(given["settings"])
    settings |= {key: given[key] for key in ("batch_size", "dtype") if given[key] is not None}
    defaults = load_workload(model, **settings).training
    return Setup(
        workload=model,
        settings=settings,
        options=EngineOptions(norm_method=given["norm_method"]),
        optimizer=given["optimizer"] or (defaults.optimizer if defaults else "adam"),
        checkpoint=given["checkpoint"],
        micro_batches=given["micro_batches"] or 1,
        autocast=given["autocast"],
        device=given["device"],
    )


def start_document(kind: str, setup: Setup, **settings: Any) -> dict[str, Any]:
    """A document that so far says what it is about."""
    card = card_of(setup.device)
    said = {} if card is None else {"not_measured": card.not_measured}
    described = {**setup.describe_step(), **settings}
    return new_document(kind, setup.describe_model(), environment(setup.device), described, **said)


def add_estimates(  # noqa: PLR0913 - settings by name, each with a default
    document: dict[str, Any],
    setup: Setup,
    texts: Sequence[str],
    *,
    max_groups: int,
    randoms: int = 0,
    seed: int = 0,
    trace: Trace | None = None,
) -> Trace:
    """Trace one step and put the trace, the estimates and the front into the document.

    What was chosen together with norm methods is the first of the estimates, under the name ``joint``.

    Args:
        document: is added to.
        setup: what to trace.
        texts: groupings as text; none for :data:`DEFAULT_GROUPINGS`, as far as the model has sites for them.
        max_groups: where the front ends.
        randoms: how many random groupings to add.
        seed: of the random groupings.
        trace: of the step, where it was taken already.

    Returns:
        The trace.
    """
    if trace is None:
        say_tracing(document)
        trace = setup.trace()
    joint = document.get(JOINT)
    chosen = {} if joint is None else {JOINT: Grouping.from_boundaries(trace, joint["boundaries"])}
    parsed = _parse(trace, texts) if texts else _parse(trace, DEFAULT_GROUPINGS, as_far_as_possible=True)
    chosen |= {text: grouping for text, grouping in parsed.items() if grouping not in chosen.values()}
    chosen |= _random_groupings(trace, randoms, seed)
    document |= {
        "trace": trace.to_json(),
        "nonprivate_peak_bytes": trace.nonprivate_peak_bytes,
        "floor_bytes": floor_bytes(trace),
        "front": front_rows(trace, max_groups),
        "estimates": estimate_rows(trace, chosen),
        "simulations": [],
        "measurements": [],
        "summary": finding(trace) if joint is None else joint_finding(trace, joint),
    }
    if held := held_bytes(trace, None):
        document["nonprivate_held"] = held
    return trace


def say_tracing(document: Mapping[str, Any], how: str = "") -> None:
    """Say what takes its time now."""
    model = document["model"]
    say(f"Tracing one step of {model['name']} at batch {model['batch_size']}{how}")


def add_checks(document: dict[str, Any], setup: Setup, trace: Trace, level: str, names: Iterable[str] = ()) -> None:
    """Simulate and measure estimates of the document; each row is in it as soon as it is known.

    Args:
        document: is added to.
        setup: how a step is taken.
        trace: the document's trace.
        level: a key of :data:`LEVELS`.
        names: which estimates to check; none for all.
    """
    wanted = set(names)
    rows = [row for row in document["estimates"] if not wanted or row["grouping"] in wanted]
    with progress() as bars:
        for part in LEVELS[level]:
            check = setup.simulate if part == "simulations" else setup.measure
            verb = "Simulating" if part == "simulations" else "Measuring"
            bar = bars.add_task(verb, total=len(rows))
            for row in rows:
                bars.update(bar, description=f"{verb} {row['grouping']}")
                grouping = Grouping.from_boundaries(trace, row["boundaries"])
                document[part].append(check(row["grouping"], grouping, row["peak_bytes"]))
                bars.advance(bar)


def print_peaks(document: Mapping[str, Any]) -> None:
    """The table of groupings: estimate, ratio to non-private training, simulation and measurement."""
    reference = document["nonprivate_peak_bytes"]
    simulated = {tuple(row["boundaries"]): row for row in document["simulations"]}
    measured = {tuple(row["boundaries"]): row for row in document["measurements"]}
    columns = ["grouping ", "groups", "estimate", "of non-private"]
    held = any("reserved_bytes" in row for row in document["estimates"])
    columns += HELD if held else []
    columns += ["simulated", "error"] if simulated else []
    reserved = any("reserved_bytes" in row for row in measured.values())
    columns += ["measured", "error", *(RESERVED if reserved else ()), "step"] if measured else []
    rows = []
    for row in document["estimates"]:
        cuts, peak = tuple(row["boundaries"]), row["peak_bytes"]
        cells = [row["grouping"], str(row["groups"]), format_bytes(peak), format_ratio(peak / reference)]
        cells += [format_bytes(row[part]) if part in row else "" for part in HELD_PARTS] if held else []
        cells += _checked(simulated.get(cuts)) if simulated else []
        cells += _checked(measured.get(cuts)) if measured else []
        cells += reserved_cells(measured.get(cuts, {})) if reserved else []
        if measured:
            cells.append(format_seconds(measured[cuts]["step_seconds"]) if cuts in measured else "")
        rows.append(cells)
    model = document["model"]
    title = f"{model['name']}, batch {model['batch_size']}: non-private {format_bytes(reference)}"
    if "nonprivate_held" in document:
        title += f", {format_bytes(document['nonprivate_held']['reserved_bytes'])} held"
    print_table(columns, rows, title=title)
    say_not_measured(document)
    say(document["summary"])


def say_not_measured(document: Mapping[str, Any]) -> None:
    """Say of numbers for a card that is not there that they are of one."""
    if "not_measured" in document:
        say(document["not_measured"])


def reserved_cells(row: Mapping[str, Any]) -> list[str]:
    """What a GPU's caching allocator had reserved at a measured peak, and how much of that was not allocated."""
    if "reserved_bytes" not in row:
        return ["", ""]
    reserved = row["reserved_bytes"]
    return [format_bytes(reserved), format_percent(1 - row["peak_bytes"] / reserved)]


def _checked(row: Mapping[str, Any] | None) -> list[str]:
    return ["", ""] if row is None else [format_bytes(row["peak_bytes"]), format_signed_percent(row["relative_error"])]


def _parse(trace: Trace, texts: Sequence[str], *, as_far_as_possible: bool = False) -> dict[str, Grouping]:
    """Each distinct grouping once, under the first text that names it."""
    found: dict[tuple[int, ...], tuple[str, Grouping]] = {}
    for text in expand_ranges(texts):
        groups = text.partition(":")[2]
        if as_far_as_possible and groups.isdigit() and int(groups) > trace.length:
            continue
        grouping = Grouping.parse(trace, text)
        found.setdefault(grouping.boundaries, (text, grouping))
    return dict(found.values())


def _random_groupings(trace: Trace, count: int, seed: int) -> dict[str, Grouping]:
    """Groupings with a random number of groups, each distinct one once, in an order that the seed fixes."""
    generator, found = random.Random(seed), {}
    for _ in range(count):
        cuts = generator.sample(range(1, trace.length), generator.randint(0, trace.length - 1))
        grouping = Grouping.from_boundaries(trace, cuts)
        found[grouping.boundaries] = grouping
    return {f"random:{number}": grouping for number, grouping in enumerate(found.values(), 1)}


def check_device(text: str, *, cards: bool = False) -> None:
    """Raise a GroupSearchError unless the text names a device of this machine, or where they will do a known card."""
    import torch

    if card_of(text) is not None:
        if not cards:
            check_measurable(text)
        return
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise GroupSearchError(f"Expected a device such as cpu, cuda or cuda:1, found {text!r}.") from error
    if device.type not in ("cpu", "cuda"):
        raise GroupSearchError(f"Expected the device cpu or a CUDA device, found {text!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise GroupSearchError(
            f"Found {torch.cuda.device_count()} CUDA devices, expected one called {text}. To estimate for a GPU "
            f"that is not there name the card, as in --device cuda:h100 ({', '.join(named_cards())}); use "
            "--device cpu, which estimates and simulates a step on the CPU; or run on a machine that has a GPU."
        )
