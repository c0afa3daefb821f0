"""The three levels of a peak side by side: estimate, simulation, measurement.

An estimate comes from one trace; a simulation runs the real engine on fake tensors; a
measurement runs it on the device, in a fresh process per number. Errors are signed:
``relative_error`` is estimate / other - 1, so an under-estimate is negative.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, TypedDict

import torch

from groupsearch.documents.rows import Check, Estimate, FrontRow, GroupingRow, Measurement, Simulation
from groupsearch.errors import DocumentError, GroupSearchError
from groupsearch.measure import measure_pace, measure_peak, simulate_peak
from groupsearch.options import SITE_METHODS, EngineOptions
from groupsearch.plan.cards import card_of
from groupsearch.plan.communication import Pace
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.joint import JOINT, Alternatives
from groupsearch.plan.memory import peak_memory
from groupsearch.plan.partition import front
from groupsearch.plan.reserved import holding
from groupsearch.plan.trace import Trace
from groupsearch.records import COMMANDS
from groupsearch.tracer import StepSettings, trace_model
from groupsearch.tracer.fake import ValuesNeededError
from groupsearch.tracer.step import real_copy
from groupsearch.workloads import Workload, load_workload
from groupsearch.workloads.factory import described, in_mode


@dataclass(frozen=True)
class Setup:
    """A model, a batch and a way to take one step: all that a peak depends on but the grouping.

    Attributes:
        workload: the text of a workload, see :func:`groupsearch.workloads.load_workload`.
        settings: its settings, ``batch_size`` among them.
        options: cost-only choices of the engine.
        optimizer: a name for :func:`groupsearch.engine.optimizers.make_optimizer`.
        checkpoint: ``none``, ``blocks`` or ``every:K``.
        micro_batches: how many batches are accumulated before the optimizer's step.
        autocast: ``none``, ``bfloat16`` or ``float16``: what forward and loss are cast to.
        device: where measurements run; ``cpu`` is traced on fake tensors, another device as it is. A card that is not
            there (``cuda:h100``) is traced and simulated on fake tensors, and not measured.
        given: the workload itself, where no text loads it; then nothing can be measured.
    """

    workload: str
    settings: Mapping[str, Any]
    options: EngineOptions = field(default_factory=EngineOptions)
    optimizer: str = "adam"
    checkpoint: str = "none"
    micro_batches: int = 1
    autocast: str = "none"
    device: str = "cpu"
    given: Workload | None = None
    _known: dict[str, Workload] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_document(cls, document: Mapping[str, Any], device: str | None = None) -> Setup:
        """The setup whose peaks a document tells, on its device or on another.

        Raises:
            DocumentError: when the document does not say how its step was taken.
        """
        model, settings = document["model"], document["settings"]
        try:
            return cls(
                workload=model["name"],
                settings={**settings["workload"], "batch_size": model["batch_size"]},
                **_how(StepSettings.from_json(_with_methods(settings))),
                device=device or document["environment"]["device"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            found = f"no {error}" if isinstance(error, KeyError) else f"otherwise: {error}"
            raise DocumentError(
                f"Expected the document to say its model and how a step was taken, found {found}. "
                f"Write it again with `groupsearch {COMMANDS[document['kind']]}`."
            ) from error

    @cached_property
    def loaded(self) -> Workload:
        """The workload, loaded once.

        Raises:
            GroupSearchError: when it cannot be loaded, or the one that is given is to have other settings.
        """
        if self.given is None:
            # A factory may take its time: setups that were made of this one by dataclasses.replace share what it gave.
            key = repr((self.workload, self.settings))
            if key not in self._known:
                self._known[key] = load_workload(self.workload, **self.settings)
            return self._known[key]
        made = {**self.given.settings, "batch_size": self.settings.get("batch_size")}
        other = [key for key, value in self.settings.items() if key not in made or made[key] != value]
        if other:
            raise GroupSearchError(
                f"Found the settings {', '.join(other)} of a Workload that is made already. Make it with them, or give "
                f"the function that makes it, or its name, instead."
            )
        return replace(in_mode(self.given), batch_size=int(self.settings.get("batch_size", self.given.batch_size)))

    @property
    def how(self) -> dict[str, Any]:
        """How the step is taken, by the arguments of :func:`groupsearch.measure.measure_peak`."""
        names = ("options", "optimizer", "checkpoint", "micro_batches", "autocast", "device")
        return {name: getattr(self, name) for name in names}

    def empty_model(self) -> torch.nn.Module:
        """The model on the meta device, so that no weights are allocated."""
        return self.loaded.empty()

    def with_options(self, options: EngineOptions) -> Setup:
        """The same step by other options of the engine."""
        return replace(self, options=options)

    def alternatives(self) -> Alternatives:
        """The step traced by every norm method, so that methods can be chosen per weight.

        Raises:
            GroupSearchError: when the steps are not the same between hooks, see :class:`Alternatives`.
        """
        return Alternatives({method: self.with_options(EngineOptions(method)).trace() for method in SITE_METHODS})

    def describe_model(self) -> dict[str, Any]:
        """The ``model`` part of a document."""
        model = self.empty_model()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        known = {"name": self.workload, "batch_size": self.loaded.batch_size, "parameters": trainable}
        known |= {"mode": described(model)}
        known |= {} if self.loaded.data is None else {"examples": self.loaded.data.train_size}
        return {**self.loaded.settings, **known}

    def describe_step(self) -> dict[str, Any]:
        """The part of a document's ``settings`` that :meth:`from_document` needs."""
        return {"workload": dict(self.settings), **self.step.to_json()}

    @property
    def step(self) -> StepSettings:
        """How a step is taken, without its model and batch."""
        return StepSettings(self.options, self.optimizer, self.checkpoint, self.micro_batches, self.autocast)

    def trace(self) -> Trace:
        """One traced step: on fake tensors for the CPU, on the device itself for any other.

        A model whose path depends on values is traced with its weights on the CPU, too.
        """
        if card_of(self.device) is not None:
            return self._trace(self.empty_model(), self.device)
        if self.device == "cpu":
            try:
                return self._trace(self.empty_model(), None)
            except ValuesNeededError:
                pass
        model = self.loaded.build()
        if self.device != "cpu":  # looked at where it is fast
            model, _ = real_copy(model, (), torch.device(self.device), copy_model=False)
        return self._trace(model, self.device)

    def _trace(self, model: torch.nn.Module, device: str | None) -> Trace:
        batch = self.loaded.make_batch(self.loaded.batch_size)
        return trace_model(model, batch, self.loaded.loss, **_how(self.step), device=device, copy_model=False)

    def check_measurable(self) -> None:
        """Raise a GroupSearchError where no fresh process can take the step.

        Raises:
            GroupSearchError: for a card that is not there, or a workload that no name loads.
        """
        check_measurable(self.device)
        if self.given is not None:
            raise GroupSearchError(
                f"Found the Workload {self.workload!r} to measure with. Every measurement is taken in a fresh process, "
                f"which loads the model by its name: put the function that makes it into a file, and give that "
                f"function or path/to/file.py:function instead. Estimates and simulations (verify='simulate') need "
                f"no such process."
            )

    def simulate(self, name: str, grouping: Grouping, estimate_bytes: int) -> Simulation:
        """One simulated row of a document: the engine itself, on fake tensors or, for a CUDA device, on real ones."""
        workload = self.loaded
        peak_bytes = simulate_peak(
            self.empty_model(),
            workload.make_batch(workload.batch_size),
            workload.loss,
            grouping,
            **_how(self.step),
            device=None if self.device == "cpu" else self.device,
        )
        return Simulation(**_row(name, grouping, peak_bytes), relative_error=estimate_bytes / peak_bytes - 1)

    def measure(self, name: str, grouping: Grouping, estimate_bytes: int) -> Measurement:
        """One measured row of a document: the engine on the device, in a fresh process.

        Raises:
            GroupSearchError: for a card that is not there, a workload without a name, or when the process failed.
        """
        self.check_measurable()
        measured = measure_peak(
            self.workload,
            grouping,
            settings=dict(self.settings),
            **_how(self.step),
            device=self.device,
        )
        return Measurement(
            **_row(name, grouping, measured.peak_bytes),
            relative_error=estimate_bytes / measured.peak_bytes - 1,
            step_seconds=measured.step_seconds,
            metric=measured.metric,
            reserved_bytes=measured.reserved_bytes,
            fragmentation_bytes=measured.fragmentation_bytes,
            requested_bytes=measured.requested_bytes,
        )

    def pace(self, trace: Trace) -> Pace:
        """When each site of a step on the device is closed, in a fresh process.

        Raises:
            GroupSearchError: as :meth:`measure`.
        """
        self.check_measurable()
        return measure_pace(self.workload, trace.sites, self.settings, self.step, self.device)


def check_measurable(device: str) -> None:
    """Raise a GroupSearchError for a card that is not there: nothing can be run on it."""
    card = card_of(device)
    if card is not None:
        raise GroupSearchError(
            f"Found {device}, a card to estimate for without having it: nothing can be run or measured there. Use "
            f"`groupsearch profile` or `groupsearch fit` without what measures, or run this on a machine with an "
            f"NVIDIA {card.title} with --device cuda."
        )


def estimate_rows(trace: Trace, groupings: Mapping[str, Grouping]) -> list[Estimate]:
    """One estimated row of a document per grouping, by name, with what is alive at its peak and where that is.

    On a CUDA device with what its allocator hands out and holds at most, ``allocated_bytes`` and ``reserved_bytes``.
    """
    rows = []
    for name, grouping in groupings.items():
        estimate = peak_memory(trace, grouping)
        held = holding(trace, grouping.boundaries)
        rows.append(
            Estimate(
                **_row(name, grouping, estimate.peak_bytes),
                breakdown=asdict(estimate.breakdown),
                site=estimate.site,
                where=estimate.where,
                allocated_bytes=None if held is None else held.allocated_bytes,
                reserved_bytes=None if held is None else held.reserved_bytes,
            )
        )
    return rows


def held_bytes(trace: Trace, boundaries: Sequence[int] | None) -> dict[str, int]:
    """``allocated_bytes`` and ``reserved_bytes`` of a grouping's step (None: without privacy); empty on the CPU."""
    found = holding(trace, boundaries)
    return {} if found is None else {name: getattr(found, name) for name in ("allocated_bytes", "reserved_bytes")}


def front_rows(trace: Trace, max_groups: int | None = None) -> list[FrontRow]:
    """The least peak with 1, 2, ... groups, up to ``max_groups`` or the floor."""
    return [
        FrontRow(groups=len(boundaries) + 1, boundaries=boundaries, peak_bytes=peak_bytes)
        for boundaries, peak_bytes in front(trace, max_groups)
    ]


def check_rows(setup: Setup, trace: Trace, rows: Iterable[GroupingRow], tolerance: float) -> Iterator[Check]:
    """Measure the groupings of a document's rows again, one by one as they are asked for.

    Args:
        setup: how the step is taken.
        trace: the document's trace, which the rows' boundaries refer to.
        rows: name, boundaries and estimated peak of each.
        tolerance: largest relative error, either way, that counts as within.

    Yields:
        Measured rows with ``estimate_bytes``, ``tolerance`` and ``within``.
    """
    for row in rows:
        grouping = Grouping.from_boundaries(trace, row.boundaries)
        measured = setup.measure(row.grouping, grouping, row.peak_bytes)
        within = abs(measured.relative_error) <= tolerance
        checked = {"estimate_bytes": row.peak_bytes, "tolerance": tolerance, "within": within}
        yield Check.from_json({**measured.to_json(), **checked})


def rows_to_check(document: Mapping[str, Any]) -> list[GroupingRow]:
    """The rows of a profile or a search that :func:`check_rows` measures: what was measured, else what is recommended.

    ``peak_bytes`` of each is the document's estimate.

    Raises:
        DocumentError: when the document has none, or a row that is garbled.
    """
    try:
        rows = _known_rows(document)
    except (KeyError, TypeError, AttributeError) as error:
        raise DocumentError(
            f"Expected rows with grouping, boundaries and peak_bytes, found one that lacks or garbles {error}. Write "
            f"the document again with `groupsearch {COMMANDS[document['kind']]}`."
        ) from error
    if not rows:
        raise DocumentError(
            "Expected a profile with estimates or a search with candidates to measure again, found a document "
            "with neither. Write it again with `groupsearch profile`."
        )
    return rows


def _known_rows(document: Mapping[str, Any]) -> list[GroupingRow]:
    estimates = {tuple(row["boundaries"]): row["peak_bytes"] for row in document.get("estimates") or []}
    measured = list(document.get("measurements") or document.get("estimates") or [])
    if document["kind"] == "search":
        # What needs least in another way of taking the step would be measured in the wrong one.
        own = (document.get("variants") or [{}])[0].get("name")
        recommended = document.get("recommended")
        recommended = recommended if recommended and recommended.get("variant") == own else None
        candidates = [row for row in document.get("candidates") or [] if row.get("on_front")]
        candidates = [row for row in candidates if row.get("variant") == own]
        estimates |= {tuple(row["boundaries"]): row["peak_bytes"] for row in candidates}
        measured += candidates + ([recommended] if recommended else [])
    names: dict[tuple[int, ...], str] = {}
    for row in measured:
        names.setdefault(tuple(row["boundaries"]), str(row.get("grouping") or row.get("source")))
    return [
        GroupingRow(grouping=name, boundaries=cuts, groups=len(cuts) + 1, peak_bytes=estimates[cuts])
        for cuts, name in names.items()
        if cuts in estimates
    ]


def _with_methods(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings as the engine has them: a joint choice is a method for every weight that has the choice."""
    if settings["norm_method"] != JOINT:
        return settings
    return {**settings, "norm_method": "mixed", "methods": settings["methods"]}


def _how(step: StepSettings) -> dict[str, Any]:
    return {
        "options": step.options,
        "optimizer": step.optimizer,
        "checkpoint": step.checkpoint,
        "micro_batches": step.micro_batches,
        "autocast": step.autocast,
    }


class _Named(TypedDict):
    """A :class:`GroupingRow`, of which other rows are made."""

    grouping: str
    boundaries: tuple[int, ...]
    groups: int
    peak_bytes: int


def _row(name: str, grouping: Grouping, peak_bytes: int) -> _Named:
    return {
        "grouping": name,
        "boundaries": grouping.boundaries,
        "groups": grouping.groups,
        "peak_bytes": peak_bytes,
    }
