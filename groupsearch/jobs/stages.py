"""The stages that jobs share: a setup, its trace, its estimates and their check."""

from __future__ import annotations

import inspect
import random
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from groupsearch.cards import card_of, named_cards
from groupsearch.errors import GroupSearchError
from groupsearch.grouping import Grouping
from groupsearch.jobs.events import Advanced, Notify, Said
from groupsearch.jobs.joint import refuse_joint
from groupsearch.jobs.request import LEVELS, StepRequest
from groupsearch.joint import JOINT
from groupsearch.options import EngineOptions
from groupsearch.partition import floor_bytes
from groupsearch.records import environment, new_document
from groupsearch.report.finding import finding, joint_finding
from groupsearch.trace import Trace
from groupsearch.verify import Setup, check_measurable, estimate_rows, front_rows, held_bytes
from groupsearch.workloads import Workload
from groupsearch.workloads.factory import workload_of

DEFAULT_GROUPINGS = ("all-layer", "layer-wise", "block-wise", "uniform:4", "best:2..8")
_RANGE = re.compile(r"^(uniform|best):(\d+)\.\.(\d+)$")


def make_setup(request: StepRequest, *, cards: bool = False) -> Setup:
    """The setup that a request describes.

    Args:
        request: what was asked for.
        cards: whether the device may be a card that is not there.

    Raises:
        GroupSearchError: for a device that is not there, a model that cannot be loaded, or a joint choice of norms.
    """
    refuse_joint(request.norm_method)
    check_device(request.device, cards=cards)
    settings = dict(request.setting)
    name, given = named(request.model, settings)
    settings |= {key: value for key in ("batch_size", "dtype") if (value := getattr(request, key)) is not None}
    setup = Setup(
        workload=name,
        settings=settings,
        options=EngineOptions(norm_method=request.norm_method),
        checkpoint=request.checkpoint,
        micro_batches=request.micro_batches or 1,
        autocast=request.autocast,
        device=request.device,
        given=given,
    )
    defaults = setup.loaded.training
    return replace(setup, optimizer=request.optimizer or (defaults.optimizer if defaults else "adam"))


def named(model: str | Workload | Callable[..., object], settings: Mapping[str, object]) -> tuple[str, Workload | None]:
    """The name that a model can be loaded by in another process; or the workload itself, and what it is called.

    A function of a module is named by its file, as on the command line. Another one is called, also one of the program
    itself: to load that by its name would run it again.
    """
    if isinstance(model, str):
        return model, None
    if isinstance(model, Workload):
        return model.name, model
    name, module = model.__qualname__, sys.modules.get(model.__module__)
    if model.__module__ != "__main__" and getattr(module, name, None) is model and getattr(module, "__file__", None):
        path = Path(inspect.getfile(model))
        return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{name}", None
    return model.__name__, workload_of(model.__name__, model, settings)


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
    notify: Notify,
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
        notify: is told.

    Returns:
        The trace.
    """
    if trace is None:
        notify(tracing(document))
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


def tracing(document: dict[str, Any], how: str = "") -> Said:
    """What takes its time now."""
    model = document["model"]
    return Said(f"Tracing one step of {model['name']} at batch {model['batch_size']}{how}")


def add_checks(
    document: dict[str, Any], setup: Setup, trace: Trace, level: str, notify: Notify, names: Iterable[str] = ()
) -> None:
    """Simulate and measure estimates of the document; each row is in it as soon as it is known.

    Args:
        document: is added to.
        setup: how a step is taken.
        trace: the document's trace.
        level: a key of :data:`LEVELS`.
        notify: is told.
        names: which estimates to check; none for all.
    """
    wanted = set(names)
    rows = [row for row in document["estimates"] if not wanted or row["grouping"] in wanted]
    for part in LEVELS[level]:
        check = setup.simulate if part == "simulations" else setup.measure
        verb = "Simulating" if part == "simulations" else "Measuring"
        for done, row in enumerate(rows):
            notify(Advanced(verb, f"{verb} {row['grouping']}", done, len(rows)))
            grouping = Grouping.from_boundaries(trace, row["boundaries"])
            document[part].append(check(row["grouping"], grouping, row["peak_bytes"]))


def expand_ranges(texts: Iterable[str]) -> list[str]:
    """Groupings as text, with best:2..4 written out.

    >>> expand_ranges(["all-layer", "best:2..4"])
    ['all-layer', 'best:2', 'best:3', 'best:4']
    """
    expanded = []
    for text in texts:
        found = _RANGE.match(text.strip())
        if found is None:
            expanded.append(text.strip())
            continue
        style, first, last = found.group(1), int(found.group(2)), int(found.group(3))
        if first > last:
            raise GroupSearchError(f"Expected a range from few to many groups, found {text!r}. Turn it round.")
        expanded += [f"{style}:{groups}" for groups in range(first, last + 1)]
    return expanded


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
