"""Document, which has what all kinds share; and the kinds: Profile, Fit, Search, Verify, Train, Study.

Imported by the package alone, which is where others take them from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass, replace
from html import escape
from importlib import import_module
from pathlib import Path
from typing import ClassVar, Self

from groupsearch.documents import tables
from groupsearch.documents.codec import Part
from groupsearch.documents.commands import STEP, TRAINING, Next, Options, command_line, only, own_loop
from groupsearch.documents.rows import (
    Boundaries,
    Candidate,
    Cell,
    Check,
    Communication,
    Comparison,
    Correlation,
    Cost,
    Descent,
    Environment,
    Estimate,
    Evidence,
    Failure,
    Fitting,
    FrontRow,
    Guarantee,
    Held,
    Joint,
    Measurement,
    Metric,
    Model,
    Point,
    Randomness,
    Simulation,
    Training,
    Variant,
)
from groupsearch.documents.tables import Table
from groupsearch.errors import DocumentError, ToleranceError
from groupsearch.plan.checked import Checked
from groupsearch.plan.trace import Trace
from groupsearch.privacy import PrivacyStatement
from groupsearch.records import (
    COMMANDS,
    SCHEMA_VERSION,
    check_header,
    default_path,
    plain,
    read_document,
    write_document,
)
from groupsearch.units import format_bytes, format_number, format_signed_percent, slug

_SHOWN = 12
_NEAR_FLOOR = 1.01


@dataclass(frozen=True, kw_only=True, repr=False)
class Document(Part):
    """A typed document: read with :meth:`load`, written with :meth:`save`, never changed.

    Attributes:
        model: what it is about.
        environment: where its numbers come from.
        settings: what was asked for.
        asked: the options that were given, as texts; None where no command line says the same.
        next: what to do with what was found.
    """

    KIND: ClassVar[str]

    model: Model
    environment: Environment
    settings: Mapping[str, object]
    asked: Mapping[str, tuple[str, ...]] | None = None
    next: Next | None = None

    @classmethod
    def from_json(cls, data: object, where: str = "document") -> Self:
        """The document that a plain structure tells, of the class of its kind.

        Raises:
            DocumentError: when it is of another kind than this class, or a part is missing or garbled.
        """
        found = plain(data)
        check_header(where, found)
        kinds = [kind for kind in _kinds(cls) if kind.is_of(found)]
        if not kinds:
            raise DocumentError(
                f"Expected a {cls.__name__} in {where}, found a document of kind {found['kind']}. Name one written by "
                f"`groupsearch {COMMANDS[getattr(cls, 'KIND', found['kind'])]}`."
            )
        body = {key: value for key, value in found.items() if key not in ("schema_version", "kind")}
        kind = kinds[-1]
        return super(Document, kind).from_json(body, where)  # type: ignore[return-value]

    @classmethod
    def is_of(cls, data: Mapping[str, object]) -> bool:
        """Whether a plain structure is of this kind."""
        return data["kind"] == getattr(cls, "KIND", None)

    def to_json(self) -> dict[str, object]:
        """The document as it is written; :meth:`from_json` is its inverse."""
        return {"schema_version": SCHEMA_VERSION, "kind": self.KIND, **super().to_json()}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The document in a file.

        Raises:
            DocumentError: when it cannot be read, or is of another kind than this class.
        """
        return cls.from_json(read_document(path), str(path))

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write the document whole or not at all, over another one only with ``force``, and return its path.

        Raises:
            GroupSearchError: when it is there already, or its folder cannot be written.
        """
        return write_document(path, self.to_json(), force=force)

    def to_dataframe(self) -> Sized:
        """Its rows as a table: of pandas where that is installed, else of polars, else a list of dictionaries."""
        rows = [_flat(row.to_json()) for row in self.rows_of_table()]
        for library in ("pandas", "polars"):
            try:
                return import_module(library).DataFrame(rows)
            except ModuleNotFoundError:
                continue
        return rows

    def rows_of_table(self) -> tuple[Part, ...]:
        """What :meth:`to_dataframe` has a row of each for."""
        raise NotImplementedError

    def table(self) -> Table:
        """What a person reads first, as text."""
        raise NotImplementedError

    @property
    def command(self) -> str | None:
        """The command line that makes such a document; None where there is none, or nobody has kept it."""
        return None if self.asked is None else command_line(self.verb, self.model.name, self.asked)

    @property
    def verb(self) -> str:
        """The command that makes such documents."""
        return COMMANDS[self.KIND]

    def following(self, path: str | Path | None = None) -> Next | None:
        """What to do next with what was found, where there is something.

        Args:
            path: of the document; what :func:`~groupsearch.records.default_path` says where it is not given.
        """
        return None

    def followed(self, path: str | Path | None = None) -> Self:
        """The document with what to do :attr:`next`."""
        return replace(self, next=self.following(path))

    def _place(self, path: str | Path | None) -> str:
        return str(path or default_path(self.to_json()))

    def _beside(self, path: str | Path | None, word: str) -> Options:
        """The option that has the next document of this kind written beside this one, which is not overwritten."""
        if path is None:
            return {}
        place = Path(path)
        return {"output": (str(place.with_name(f"{place.stem}-{word}{place.suffix}")),)}

    @property
    def about(self) -> str:
        """Model and batch."""
        return f"{self.model.name}, batch {self.model.batch_size}"

    @property
    def finding(self) -> str:
        """What it found, in a sentence or two; empty where there is none."""
        return ""

    def __repr__(self) -> str:
        table = self.table()
        more = [f"... {len(table.rows) - _SHOWN} more"] if len(table.rows) > _SHOWN else []
        said = [self.finding] if self.finding else []
        return "\n".join((f"{type(self).__name__} of {table.title}", table.text(_SHOWN), *more, *said))

    def _repr_html_(self) -> str:
        table = self.table()
        shown = table._replace(title=f"{type(self).__name__} of {table.title}", rows=table.rows[:_SHOWN])
        more = f"<p>... {len(table.rows) - _SHOWN} more</p>" if len(table.rows) > _SHOWN else ""
        return f"{shown.html()}{more}<p>{escape(self.finding)}</p>"


def _unwritten(path: str | Path | None, place: str) -> str:
    """What to do before the document is named, where nobody has written it."""
    return f"Save this document as {place} first." if path is None else ""


def _kinds(kind: type[Document]) -> list[type[Document]]:
    """The class and those under it, the most particular ones last."""
    return [kind, *(each for below in kind.__subclasses__() for each in _kinds(below))]


def _flat(row: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """The row with mappings in it written out, as in ``metric.mean``."""
    found: dict[str, object] = {}
    for key, value in row.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


@dataclass(frozen=True, kw_only=True, repr=False)
class Memory(Document):
    """A document that has a traced step and what groupings of it cost.

    Attributes:
        trace: the step.
        nonprivate_peak_bytes: of the step without privacy.
        floor_bytes: the least peak of any grouping.
        front: the least peak with 1, 2, ... groups.
        estimates: of the groupings that were asked for.
        simulations: by the engine on fake tensors.
        measurements: by the engine on the device.
        summary: what grouping is worth, and why.
        nonprivate_held: what a CUDA device's allocator holds without privacy.
        not_measured: of a card that is not there: that nothing was measured on it.
    """

    trace: Trace
    nonprivate_peak_bytes: int
    floor_bytes: int
    front: tuple[FrontRow, ...]
    estimates: tuple[Estimate, ...]
    simulations: tuple[Simulation, ...]
    measurements: tuple[Measurement, ...]
    summary: str
    nonprivate_held: Held | None = None
    not_measured: str | None = None

    def peaks(self) -> Table:
        """Estimates, their ratio to non-private training, and how they were checked."""
        reference, held = self.nonprivate_peak_bytes, self.nonprivate_held
        title = f"{self.about}: non-private {format_bytes(reference)}"
        title += "" if held is None else f", {format_bytes(held.reserved_bytes)} held"
        return tables.peaks(title, reference, self.estimates, self.simulations, self.measurements)

    @property
    def worst(self) -> Simulation | None:
        """The check that is furthest from its estimate, either way; None where nothing was checked."""
        checks = (*self.simulations, *self.measurements)
        return max(checks, key=lambda row: abs(row.relative_error), default=None)

    @property
    def doubt(self) -> str:
        """That a check is more than 1 % off its estimate; empty where none is."""
        checks = [("simulation", row) for row in self.simulations]
        checks += [("measurement", row) for row in self.measurements]
        return tables.doubt([(how, row.grouping, row.relative_error, row.peak_bytes) for how, row in checks])

    def check(self, fail_over: float | None) -> None:
        """Raise where a check is further off its estimate than this share, either way; None allows everything.

        Raises:
            ToleranceError: which names the check.
        """
        worst = self.worst
        if fail_over is not None and worst is not None and abs(worst.relative_error) > fail_over:
            raise ToleranceError(
                f"Expected every estimate within {format_number(100 * fail_over)} % of its check, found that of "
                f"{worst.grouping} {format_signed_percent(worst.relative_error)} off {format_bytes(worst.peak_bytes)}. "
                "Trust what was measured, allow more with --fail-over, or report the model."
            )

    def following(self, path: str | Path | None = None) -> Next | None:
        """Search, where there is data to train on; else check the grouping, unless that is done."""
        row = next((row for row in self.front if row.peak_bytes <= _NEAR_FLOOR * self.floor_bytes), self.front[-1])
        return self._with_grouping(row.boundaries, {}, self.model.batch_size, self._beside(path, "checked"))

    def _with_grouping(
        self, boundaries: Boundaries, changed: Options, batch_size: int, output: Options | None = None
    ) -> Next:
        """How to go on with a grouping and with options that are not those that were asked for."""
        python = own_loop(boundaries, None, batch_size)
        if self.asked is None:
            return Next(command=None, python=python)
        step = only(self.asked, (*STEP, "sampling-rate")) | dict(changed)
        card = self.not_measured is not None
        if self.model.examples is not None:
            note = "To be run where that card is." if card else ""
            there = {**step, "device": ("cuda",)} if card else step
            return Next(command=command_line("optimize", self.model.name, there), python=python, note=note)
        if not changed and (self.measurements or (card and self.simulations)):
            return Next(command=None, python=python)
        step.pop("sampling-rate", None)
        cuts = ",".join(map(str, boundaries)) or "all-layer"
        check = {"grouping": (cuts,), "verify": ("simulate" if card else "measure",)}
        return Next(command=command_line("profile", self.model.name, step | check | dict(output or {})), python=python)


@dataclass(frozen=True, kw_only=True, repr=False)
class Profile(Memory):
    """What every grouping costs in memory.

    Attributes:
        joint: a grouping chosen together with norm methods, where that was asked for.
        communication: what several processes cost, where that was asked for.
    """

    KIND: ClassVar[str] = "profile"

    joint: Joint | None = None
    communication: Communication | None = None

    def rows_of_table(self) -> tuple[Part, ...]:
        """The estimates."""
        return self.estimates

    def table(self) -> Table:
        """The peaks."""
        return self.peaks()

    def following(self, path: str | Path | None = None) -> Next | None:
        """Train with what was chosen together with norm methods; else as for every grouping."""
        if self.joint is None or self.asked is None or self.model.examples is None:
            return super().following(path)
        place = self._place(path)
        step = {name: texts for name, texts in only(self.asked, STEP).items() if name != "norm-method"}
        given = {**step, "grouping": (place,), "save": (f"{slug(self.model.name)}-private",)}
        settings = dict(text.split("=", 1) for text in step.get("setting", ()))
        told = {name.replace("-", "_"): texts[0] for name, texts in step.items() if name != "setting"}
        arguments: dict[str, object] = {**told, **({"setting": settings} if settings else {})}
        for name in ("batch_size", "micro_batches"):
            arguments |= {name: int(told[name])} if name in told else {}
        words = "".join(f", {name}={value!r}" for name, value in arguments.items())
        train = f"found = groupsearch.train({self.model.name!r}, grouping={place!r}{words})"
        lines = ("import groupsearch", train, "print(found)")
        return Next(command=command_line("train", self.model.name, given), python=lines, note=_unwritten(path, place))

    @property
    def finding(self) -> str:
        """The summary."""
        return self.summary


@dataclass(frozen=True, kw_only=True, repr=False)
class Fit(Profile):
    """A profile that also tells what fits into a memory.

    Attributes:
        fit: the largest sizes.
    """

    fit: Fitting

    @classmethod
    def is_of(cls, data: Mapping[str, object]) -> bool:
        """Whether it is a profile with that part."""
        return super().is_of(data) and "fit" in data

    def rows_of_table(self) -> tuple[Part, ...]:
        """The rows of the fit."""
        return self.fit.rows

    def table(self) -> Table:
        """What fits, against non-private training."""
        return tables.fits(self.model, self.fit)

    @property
    def verb(self) -> str:
        """The command that makes such documents."""
        return "fit"

    def following(self, path: str | Path | None = None) -> Next | None:
        """Go on with the grouping that fits most, and with as much of it as there are examples."""
        rows = [row for row in self.fit.rows if row.boundaries is not None and row.size]
        if not rows:
            return None
        best = max(rows, key=lambda row: (row.size, -(row.groups or 0)))
        assert best.boundaries is not None  # as filtered above
        if self.fit.varies != "batch_size":
            given = {k: v for k, v in (self.asked or {}).items() if k == "setting"}
            longer = {"setting": (*given.get("setting", ()), f"{self.fit.varies}={best.size}")}
            return self._with_grouping(best.boundaries, longer, self.model.batch_size)
        batch_size = min(best.size, self.model.examples or best.size)
        return self._with_grouping(best.boundaries, {"batch-size": (str(batch_size),)}, batch_size)

    @property
    def finding(self) -> str:
        """The summary of the fit."""
        return self.fit.summary or ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Search(Memory):
    """The front of accuracy against peak memory; a private selection has one candidate and few of the parts.

    Attributes:
        candidates: what was trained, by falling peak.
        recommended: which to use; None when nothing was evaluated before an interrupt.
        reason: why.
        cost: of the search.
        training: how every run was trained.
        privacy: what one training costs, and what is known of having chosen it.
        not_private: which parts are exact numbers of private data, and why.
        randomness: where noise came from.
        variants: ways of taking a step that were compared, the request's own first.
        interrupted: whether it was stopped; the study can then be resumed.
    """

    KIND: ClassVar[str] = "search"

    candidates: tuple[Candidate, ...]
    recommended: Candidate | None
    reason: str
    cost: Cost
    training: Training
    privacy: PrivacyStatement
    not_private: Mapping[str, str]
    randomness: Randomness
    variants: tuple[Variant, ...] | None = None
    answer: str | None = None
    confidence: float | None = None
    comparisons: tuple[Comparison, ...] | None = None
    rung: str | None = None
    evidence: tuple[Evidence, ...] | None = None
    correlations: tuple[Correlation, ...] | None = None
    hypervolume: Mapping[str, float] | None = None
    interrupted: bool | None = None
    failures: tuple[Failure, ...] | None = None

    def rows_of_table(self) -> tuple[Part, ...]:
        """The candidates."""
        return self.candidates

    def table(self) -> Table:
        """The front, the references and what is recommended."""
        return tables.candidates(self.about, self.candidates, self.recommended)

    def following(self, path: str | Path | None = None) -> Next | None:
        """Train with what is recommended and keep the weights; go on searching where nothing is."""
        place, chosen = self._place(path), self.recommended
        if chosen is None:
            return None if self.asked is None else Next(command=self._again(path), python=())
        plan = {"max_grad_norm": self.training.max_grad_norm, "rule": chosen.rule or self.training.rule}
        plan |= {} if chosen.allocation is None else {"allocation": chosen.allocation}
        expected = self.training.sampling_rate * self.privacy.examples
        python = own_loop(chosen.boundaries, self.training.noise_multiplier, expected, **plan)
        if self.asked is None:
            return Next(command=None, python=python)
        given = {**only(self.asked, TRAINING), "grouping": (place,), "save": (f"{slug(self.model.name)}-private",)}
        return Next(command=command_line("train", self.model.name, given), python=python, note=_unwritten(path, place))

    def _again(self, path: str | Path | None) -> str:
        named = {} if path is None or Path(path) == default_path(self.to_json()) else {"output": (str(path),)}
        return command_line(self.verb, self.model.name, {**(self.asked or {}), "resume": (), **named})

    @property
    def finding(self) -> str:
        """Why what is recommended is."""
        return self.reason


@dataclass(frozen=True, kw_only=True, repr=False)
class Verify(Document):
    """Groupings of a document, measured again.

    Attributes:
        rows: the measurements, and whether the estimates are within the tolerance.
    """

    KIND: ClassVar[str] = "verify"

    rows: tuple[Check, ...]

    @property
    def command(self) -> str | None:
        """The command line that makes such a document, of which the subject is another document."""
        name = self.settings.get("document")
        return None if self.asked is None or name is None else command_line("verify", str(name), self.asked)

    @property
    def outside(self) -> tuple[Check, ...]:
        """The rows whose estimate is outside the tolerance."""
        return tuple(row for row in self.rows if not row.within)

    def rows_of_table(self) -> tuple[Part, ...]:
        """The rows."""
        return self.rows

    def table(self) -> Table:
        """Estimates and measurements side by side."""
        return tables.checks(self.about, self.rows)


@dataclass(frozen=True, kw_only=True, repr=False)
class Train(Document):
    """One training; what comes after ``privacy`` an interrupted one lacks.

    Attributes:
        trace: one step of it.
        grouping: as it was asked for.
        boundaries: of that grouping.
        groups: how many.
        peak_bytes: the estimated peak.
        curve: loss and metric of the validation data.
        thresholds: step and every group's threshold, where those are adaptive.
        steps: optimizer steps taken.
        privacy: what they cost.
        metric: after the last step.
        tracked: what every step was followed by, where that was asked for: exact numbers of the training examples.
    """

    KIND: ClassVar[str] = "train"

    trace: Trace
    grouping: str
    boundaries: Boundaries
    groups: int
    peak_bytes: int
    curve: tuple[Point, ...]
    thresholds: tuple[tuple[float, ...], ...]
    steps: int
    epsilon: float | None
    delta: float
    learning_rate: float
    sampling_rate: float
    rule: str
    max_grad_norm: float
    noise_multiplier: float
    optimizer: str
    sampling: str
    allocation: object
    noise_allocation: object
    randomness: Randomness
    not_private: Mapping[str, str]
    privacy: PrivacyStatement
    metric: Metric | None = None
    step_seconds: float | None = None
    expected_examples: float | None = None
    added_delta: float | None = None
    checked: Checked | None = None
    watched: Mapping[str, float] | None = None
    tracked: tuple[Mapping[str, object], ...] | None = None

    def rows_of_table(self) -> tuple[Part, ...]:
        """The curve."""
        return tuple(Part(extra=point._asdict()) for point in self.curve)

    def table(self) -> Table:
        """The curve."""
        title = f"{self.about}, {self.groups} group{'' if self.groups == 1 else 's'}, {self.steps} steps"
        return tables.curve(title, self.curve, "metric" if self.metric is None else self.metric.name)

    def following(self, path: str | Path | None = None) -> Next | None:
        """Load the weights, as the job that kept them says; train anew where they were not kept."""
        if self.asked is not None and self.metric is None and "checkpoint-every" in self.asked:
            named = {} if path is None or Path(path) == default_path(self.to_json()) else {"output": (str(path),)}
            again = command_line("train", self.model.name, {**self.asked, "resume": (), **named})
            return Next(command=again, python=(), note="Goes on with the last checkpoint.")
        if self.asked is None or "save" in self.asked:
            return self.next
        given = {**self.asked, "save": (f"{slug(self.model.name)}-private",), **self._beside(path, "saved")}
        note = "The weights were not kept: this trains anew, and spends its epsilon a second time."
        return Next(command=command_line("train", self.model.name, given), python=(), note=note)

    @property
    def finding(self) -> str:
        """What the training cost in privacy."""
        return self.privacy.sentences[0]


@dataclass(frozen=True, kw_only=True, repr=False)
class Study(Document):
    """Methods that clip what each worker sends, side by side; an interrupted one has fewer cells.

    Attributes:
        records: the steps that curves are told at.
        thresholds: that every method was run with.
        cells: the methods in every setting.
        curves: those of the fewest workers.
        guarantees: what the noise costs a worker.
        randomness: where noise and batches came from.
    """

    KIND: ClassVar[str] = "study"

    records: tuple[int, ...]
    thresholds: tuple[float, ...]
    cells: tuple[Cell, ...]
    curves: tuple[Descent, ...]
    guarantees: tuple[Guarantee, ...]
    randomness: Randomness

    def rows_of_table(self) -> tuple[Part, ...]:
        """The cells."""
        return tuple(Part(extra=cell._asdict()) for cell in self.cells)

    def table(self) -> Table:
        """Methods against settings."""
        found = tables.methods(self.cells)
        return found._replace(title=f"{self.model.name}: {found.title}")

    @property
    def finding(self) -> str:
        """What error feedback did for clipping, without noise and with it."""
        return tables.methods_finding(self.cells)
