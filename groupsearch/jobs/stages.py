"""The stages that jobs share: a setup, its trace, its estimates and their check, a joint choice, how it is trained."""

from __future__ import annotations

import inspect
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from groupsearch.documents import Profile
from groupsearch.documents.rows import Bound, Compared, Estimate, FrontRow, Joint, Measurement, Simulation
from groupsearch.errors import DocumentError, GroupSearchError
from groupsearch.jobs.events import Advanced, Notify, Said
from groupsearch.jobs.request import LEVELS, Request, StepRequest, TrainingRequest, asked
from groupsearch.options import NORM_METHODS, SITE_METHODS, EngineOptions
from groupsearch.plan.cards import card_of, named_cards
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.joint import JOINT, Alternatives, JointChoice, fewest_operations, least_peak_choice
from groupsearch.plan.memory import peak_memory
from groupsearch.plan.partition import floor_bytes
from groupsearch.plan.trace import Trace
from groupsearch.privacy.accounting import default_delta, epsilon, noise_multiplier_for
from groupsearch.records import environment, new_document
from groupsearch.report.finding import finding, joint_finding
from groupsearch.training import TrainSettings
from groupsearch.units import format_number
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


def start_document(kind: str, setup: Setup, request: Request, **settings: object) -> dict[str, object]:
    """A document that so far says what it is about."""
    card, options = card_of(setup.device), asked(request) if setup.given is None else None
    said: dict[str, object] = {} if card is None else {"not_measured": card.not_measured}
    said |= {} if options is None else {"asked": options}
    described = {**setup.describe_step(), **settings}
    return new_document(kind, setup.describe_model(), environment(setup.device), described, **said)


def part_of(document: Mapping[str, object], name: str) -> Mapping[str, object]:
    """A part of the header: ``model``, ``environment`` or ``settings``."""
    part = document[name]
    assert isinstance(part, Mapping)  # as start_document wrote it
    return part


@dataclass(frozen=True)
class Asked:
    """Of which groupings to estimate the peak.

    Attributes:
        texts: groupings as text; none for :data:`DEFAULT_GROUPINGS`, as far as the model has sites for them.
        max_groups: where the front ends.
        randoms: how many random groupings to add.
        seed: of the random groupings.
    """

    texts: Sequence[str] = ()
    max_groups: int = 8
    randoms: int = 0
    seed: int = 0


@dataclass
class Known:
    """What one traced step told of its groupings; checks are added one by one."""

    trace: Trace
    front: list[FrontRow]
    estimates: list[Estimate]
    summary: str
    joint: Joint | None = None
    simulations: list[Simulation] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """The parts of a document that tell it."""
        found: dict[str, object] = {
            "trace": self.trace.to_json(),
            "nonprivate_peak_bytes": self.trace.nonprivate_peak_bytes,
            "floor_bytes": floor_bytes(self.trace),
            "front": [row.to_json() for row in self.front],
            "estimates": [row.to_json() for row in self.estimates],
            "simulations": [row.to_json() for row in self.simulations],
            "measurements": [row.to_json() for row in self.measurements],
            "summary": self.summary,
        }
        if self.joint is not None:
            found[JOINT] = self.joint.to_json()
        if held := held_bytes(self.trace, None):
            found["nonprivate_held"] = held
        return found


def estimated(
    setup: Setup, asked: Asked, notify: Notify, *, trace: Trace | None = None, joint: Joint | None = None
) -> Known:
    """Trace one step, and estimate the peaks of groupings and the front.

    What was chosen together with norm methods is the first of the estimates, under the name ``joint``.

    Args:
        setup: what to trace.
        asked: of which groupings.
        notify: is told.
        trace: of the step, where it was taken already.
        joint: what was chosen together with norm methods.
    """
    if trace is None:
        notify(tracing(setup))
        trace = setup.trace()
    chosen = {} if joint is None else {JOINT: Grouping.from_boundaries(trace, joint.boundaries)}
    texts = asked.texts
    parsed = _parse(trace, texts) if texts else _parse(trace, DEFAULT_GROUPINGS, as_far_as_possible=True)
    chosen |= {text: grouping for text, grouping in parsed.items() if grouping not in chosen.values()}
    chosen |= _random_groupings(trace, asked.randoms, asked.seed)
    return Known(
        trace,
        front=front_rows(trace, asked.max_groups),
        estimates=estimate_rows(trace, chosen),
        summary=finding(trace) if joint is None else joint_finding(trace, joint),
        joint=joint,
    )


def tracing(setup: Setup, how: str = "") -> Said:
    """What takes its time now."""
    return Said(f"Tracing one step of {setup.workload} at batch {setup.loaded.batch_size}{how}")


def add_checks(known: Known, setup: Setup, level: str, notify: Notify, names: Iterable[str] = ()) -> None:
    """Simulate and measure estimates; each check is known as soon as it is made.

    Args:
        known: is added to.
        setup: how a step is taken.
        level: a key of :data:`LEVELS`.
        notify: is told.
        names: which estimates to check; none for all.
    """
    wanted = set(names)
    rows = [row for row in known.estimates if not wanted or row.grouping in wanted]
    for part in LEVELS[level]:
        verb = "Simulating" if part == "simulations" else "Measuring"
        for done, row in enumerate(rows):
            notify(Advanced(verb, f"{verb} {row.grouping}", done, len(rows)))
            what = row.grouping, Grouping.from_boundaries(known.trace, row.boundaries), row.peak_bytes
            if part == "simulations":
                known.simulations.append(setup.simulate(*what))
            else:
                known.measurements.append(setup.measure(*what))


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


def refuse_joint(norm_method: str) -> None:
    """Raise where norm methods cannot be chosen with the grouping, and say where they can.

    Raises:
        GroupSearchError: when that is what was asked for.
    """
    if norm_method == JOINT:
        raise GroupSearchError(
            f"Expected one of {', '.join(NORM_METHODS)} as --norm-method here, found {JOINT}, which chooses a norm "
            "method for every weight together with the grouping. Make that choice with `groupsearch profile MODEL "
            "--norm-method joint --budget 12GiB`; `groupsearch train MODEL --grouping DOCUMENT` trains with it."
        )


def choose_jointly(setup: Setup, budget_bytes: int | None) -> tuple[Setup, Trace, Joint]:
    """Trace the step by every norm method, and choose methods and grouping.

    With a budget the fewest operations within it are chosen, without one the least peak.

    Returns:
        The setup with the methods chosen, the trace of its step, and what a document says of the choice.

    Raises:
        BudgetError: when the budget is below the least peak that was found; the message says that peak.
        GroupSearchError: when the step cannot be traced by every method.
    """
    mixed, known = setup.trace(), setup.alternatives()
    if budget_bytes is None:
        choice, bound_bytes = least_peak_choice(known)
    else:
        choice, bound_bytes = fewest_operations(known, budget_bytes), None
    trace = known.trace(choice.methods)
    traces = {"mixed": mixed, **known.traces, JOINT: trace}
    counts = Counter(choice.methods.values())
    joint = Joint(
        budget_bytes=budget_bytes,
        boundaries=tuple(choice.boundaries),
        groups=len(choice.boundaries) + 1,
        peak_bytes=choice.peak_bytes,
        operations=choice.operations,
        bound=_bound(choice, bound_bytes),
        weights={method: counts[method] for method in SITE_METHODS if counts[method]},
        compared=tuple(_compared(known, method, traces[method]) for method in (*NORM_METHODS, JOINT)),
    )
    return setup.with_options(EngineOptions("mixed", choice.methods)), trace, joint


def joint_choice(found: str | Profile, workload: str) -> tuple[tuple[int, ...], EngineOptions]:
    """Boundaries and norm methods of a profile for a workload in which they were chosen together.

    Raises:
        DocumentError: when it is no such profile, or the file holds none.
        GroupSearchError: when it is about another workload.
    """
    profile = Profile.load(found) if isinstance(found, str) else found
    path = found if isinstance(found, str) else "the one given"
    methods = profile.settings.get("methods")
    if profile.joint is None or not isinstance(methods, Mapping):
        raise DocumentError(
            f"Expected a profile with norm methods chosen together with the grouping, found one without in {path}. "
            "Write it with `groupsearch profile MODEL --norm-method joint`, or name a grouping such as best:4."
        )
    if profile.model.name != workload:
        raise GroupSearchError(
            f"Expected a profile of {workload}, found one of {profile.model.name} in {path}. Name the document of the "
            "model that is to be trained."
        )
    return profile.joint.boundaries, EngineOptions("mixed", dict(methods))


def names_document(text: str) -> bool:
    """Whether a grouping as text is the name of a document."""
    return text.endswith(".json") or Path(text).is_file()


def _bound(choice: JointChoice, bound_bytes: int | None) -> Bound:
    """What no choice goes below: operations within the budget, or bytes; and how far above it the choice may be."""
    if bound_bytes is None:
        return Bound(of="operations", least=choice.bound, gap=choice.gap)
    return Bound(of="peak_bytes", least=bound_bytes, gap=choice.peak_bytes / bound_bytes - 1)


def _compared(known: Alternatives, method: str, trace: Trace) -> Compared:
    return Compared(
        norm_method=method,
        all_layer_bytes=peak_memory(trace, ()).peak_bytes,
        floor_bytes=floor_bytes(trace),
        operations=known.operations_of(trace.sites),
    )


TRAINING = ("epsilon", "delta", "steps", "learning_rate", "sampling_rate", "rule", "max_grad_norm")
_ROUNDING = 1e-9


def training_setup(
    request: TrainingRequest, evaluate_every: int | None = None, *, secure: bool = False
) -> tuple[Setup, TrainSettings]:
    """What is traced and how it is trained, with the step that is traced being the step that is trained.

    A batch of more examples than ``--batch-size`` (else the model's) is taken in pieces, so the step that is
    traced has as many micro-batches. ``--micro-batches`` without a sampling rate decides the rate.

    Raises:
        GroupSearchError: when the model cannot be trained, for a value outside its range, or when micro-batches and
            sampling rate contradict each other.
    """
    setup = make_setup(request)
    settings = train_settings(setup, request, evaluate_every, secure=secure)
    assert setup.loaded.data is not None  # else there would be no settings
    examples, physical, asked = setup.loaded.data.train_size, setup.loaded.batch_size, request.micro_batches
    expected = settings.sampling_rate * examples
    if expected < 1:
        raise GroupSearchError(
            f"Expected a sampling rate that takes at least one example in a step, found "
            f"{format_number(settings.sampling_rate)}, which takes {format_number(expected)} of {examples}: such a "
            f"training would consist of noise. Give a --sampling-rate of at least 1/{examples}."
        )
    pieces = math.ceil(expected / physical - _ROUNDING)
    if asked is not None and asked != pieces:
        if request.sampling_rate is not None or asked * physical > examples:
            raise GroupSearchError(
                f"Expected --micro-batches {pieces}, in which {format_number(settings.sampling_rate * examples, 4)} of "
                f"{examples} examples are taken {physical} at a time, found {asked}. Leave it away, or change "
                "--sampling-rate or --batch-size."
            )
        pieces, request = asked, replace(request, sampling_rate=asked * physical / examples)
        settings = train_settings(setup, request, evaluate_every, secure=secure)
    if pieces > 1:
        settings = replace(settings, physical_batch=physical)
    return replace(setup, micro_batches=pieces), settings


def train_settings(
    setup: Setup, request: TrainingRequest, evaluate_every: int | None = None, *, secure: bool = False
) -> TrainSettings:
    """The workload's own settings, with what was asked for in their place.

    The noise multiplier is settled here, so that every run of a search has the same one.

    Raises:
        GroupSearchError: when the workload cannot be trained, or for a value outside its range.
    """
    workload = setup.loaded
    if workload.data is None:
        raise GroupSearchError(
            f"Expected a model with data to train on, found {setup.workload!r}, which can be profiled only. "
            "`groupsearch models` marks those that can be trained; your own factory returns a "
            "Workload with data and training, and a transformers model has data by --setting data=FOLDER."
        )
    changes = {key: value for key in (*TRAINING, "watch") if (value := getattr(request, key)) is not None}
    if request.allow_state:
        changes["allow_state"] = tuple(request.allow_state)
    chosen = TrainSettings.of(
        workload,
        **changes,
        optimizer=setup.optimizer,
        physical_batch=request.batch_size,
        seed=request.seed,
        secure=secure,
        device=setup.device,
        options=setup.options,
        checkpoint=setup.checkpoint,
        autocast=setup.autocast,
    )
    delta = default_delta(workload.data.train_size) if chosen.delta is None else chosen.delta
    assert chosen.epsilon is not None  # TrainingDefaults has one, and --epsilon is a number
    noise = noise_multiplier_for(chosen.epsilon, delta, chosen.sampling_rate, chosen.steps)
    every = max(1, chosen.steps // 10) if evaluate_every is None else evaluate_every
    return replace(chosen, epsilon=None, delta=delta, noise_multiplier=noise, evaluate_every=every)


def describe(settings: TrainSettings) -> dict[str, object]:
    """The part of a document that says how a run was trained; its epsilon is that of all steps."""
    assert settings.noise_multiplier is not None
    assert settings.delta is not None
    return {
        "epsilon": epsilon(settings.noise_multiplier, settings.sampling_rate, settings.steps, settings.delta),
        **{key: getattr(settings, key) for key in TRAINING if key != "epsilon"},
        "noise_multiplier": settings.noise_multiplier,
        "optimizer": settings.optimizer,
    }
