"""The largest batch, or the longest sequence, that fits into a memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace

from groupsearch.documents import Fit
from groupsearch.documents.rows import FitRow, Fitting
from groupsearch.errors import GroupSearchError
from groupsearch.fit import (
    BATCH,
    MARGIN,
    Room,
    Sizes,
    fit_rows,
    length_setting,
    poisson_part,
    summarise,
    with_rate,
)
from groupsearch.jobs.events import Advanced, Begun, Interrupted, Said
from groupsearch.jobs.request import StepRequest, bytes_of, door, texts_of
from groupsearch.jobs.stages import Asked, estimated, make_setup, start_document, tracing
from groupsearch.plan.cards import card_of
from groupsearch.plan.reserved import CARD_MARGIN, CONTEXT_BYTES
from groupsearch.units import format_bytes


@dataclass(frozen=True)
class FitRequest(StepRequest):
    """What is to fit, and into which memory.

    Attributes:
        memory: what a step may take, as in ``24GiB``; None for all of a card named by ``device``.
        find: ``batch-size`` or ``sequence-length``: what to enlarge, from the one that is given.
        sequence_length: None for the model's.
        grouping: groupings as text; none for the fixed styles and best:2, best:3, ... until nothing more is gained.
        max_groups: where best:2, best:3, ... end.
        margin: share of the memory that is held back; None for 0.005, on a CUDA device 0.04.
        limit: the largest size that is tried.
        dataset_size: training examples; None for the model's data.
        sampling_rate: of Poisson sampling, where it is decided.
        measure: whether to measure examples per second, at two smaller batches.
    """

    _: KW_ONLY
    memory: int | str | None = None
    find: str = "batch-size"
    sequence_length: int | None = None
    grouping: str | Sequence[str] = ()
    max_groups: int = 8
    margin: float | None = None
    limit: int = 65536
    dataset_size: int | None = None
    sampling_rate: float | None = None
    measure: bool = False


def run(request: FitRequest) -> Fit:
    """Find the largest size that fits, for non-private training and for every grouping.

    Raises:
        BudgetError: when nothing fits.
        GroupSearchError: for a model, grouping or device that there is not.
        Interrupted: with the rows that are known.
    """
    sizes, room = _plan(request)
    notify, texts = request.notify, texts_of(request.grouping)
    kept: dict[str, object] = {"max_groups": request.max_groups, "limit": request.limit, "measure": request.measure}
    setup = sizes.setup
    kept |= {"device": setup.device, "margin": room.margin, "groupings": list(texts)}
    header = start_document("profile", setup, request, **kept)
    fitting = _start_fit(sizes, room)
    notify(Begun({**header, "fit": fitting.to_json()}))
    notify(tracing(setup))
    header |= estimated(setup, Asked(texts, request.max_groups), notify, trace=sizes.first).to_json()
    notify(
        Said(f"Looking for the largest {sizes.vary} within {format_bytes(room.usable_bytes)}, up to {fitting.limit}")
    )
    rows: list[FitRow] = []
    summary = None
    try:
        _add_rows(rows, sizes, room, request)
        summary = summarise(rows, sizes.vary)
        if request.measure:
            _add_rates(rows, sizes, request)
    except KeyboardInterrupt as interrupt:
        said = f"Interrupted; the document has {len(rows)} rows of the fit."
        raise Interrupted(said, _document(header, fitting, rows, summary, sizes)) from interrupt
    return _document(header, fitting, rows, summary, sizes)


def _document(
    header: Mapping[str, object], fitting: Fitting, rows: Sequence[FitRow], summary: str | None, sizes: Sizes
) -> Fit:
    found = replace(fitting, rows=tuple(rows), summary=summary, traced=sizes.traced)
    return Fit.from_json({**header, "fit": found.to_json()})


def _plan(request: FitRequest) -> tuple[Sizes, Room]:
    """What to trace at which sizes, and the room there is."""
    longer, length = request.find == "sequence-length", None
    if request.sequence_length is not None or longer:
        length = length_setting(make_setup(request, cards=True).loaded)
    if request.sequence_length is not None:
        request = replace(request, setting={**dict(request.setting), str(length): request.sequence_length})
    if request.micro_batches is None and request.sampling_rate is not None:
        request = replace(request, micro_batches=2)  # a batch taken in pieces adds to the sums of those before
    setup = make_setup(request, cards=True)
    if request.measure:
        setup.check_measurable()
    if longer and length not in setup.loaded.settings:
        raise GroupSearchError(
            f"Expected a sequence length to start from, found none: {setup.workload} has no setting {length!r} of its "
            "own. Give --sequence-length, or leave --find away."
        )
    population = request.dataset_size
    if population is None and setup.loaded.data is not None:
        population = setup.loaded.data.train_size
    margin, context = (MARGIN, 0) if setup.device == "cpu" else (CARD_MARGIN, CONTEXT_BYTES)
    margin = margin if request.margin is None else request.margin
    memory = _memory(bytes_of(request.memory), setup.device)
    room = Room(memory, margin, request.limit, population, request.sampling_rate, context)
    return Sizes(setup, str(length) if longer else BATCH), room


def _memory(given: int | None, device: str) -> int:
    card = card_of(device)
    if given is None and card is None:
        raise GroupSearchError(
            "Expected --memory, what a step may take, found none. Give it as in --memory 24GiB, or name a card with "
            "--device cuda:h100 for all of its memory."
        )
    return given if given is not None else card.memory_bytes  # type: ignore[union-attr]


def _start_fit(sizes: Sizes, room: Room) -> Fitting:
    return Fitting(
        memory_bytes=room.memory_bytes,
        margin=room.margin,
        context_bytes=room.context_bytes,
        held_back=room.held_back,
        usable_bytes=room.usable_bytes,
        varies=sizes.vary,
        limit=sizes.limit(room.limit),
        poisson=poisson_part(room, sizes.setup.micro_batches),
        rows=(),
        summary=None,
    )


def _add_rows(rows: list[FitRow], sizes: Sizes, room: Room, request: FitRequest) -> None:
    """Every row is there as soon as it is known."""
    request.notify(Advanced("Tracing", "", 0, None))
    for row in fit_rows(sizes, room, texts_of(request.grouping), request.max_groups):
        rows.append(row)
        request.notify(Advanced("Tracing", f"{row.grouping}: {row.size}; tracing", len(rows), None))


def _add_rates(rows: list[FitRow], sizes: Sizes, request: FitRequest) -> None:
    """Measure each row that has a size; one that fails is said and has no rate."""
    sized = [index for index, row in enumerate(rows) if row.size]
    for done, index in enumerate(sized):
        name = rows[index].grouping
        request.notify(Advanced("Measuring", f"Measuring {name}", done, len(sized)))
        try:
            rows[index] = with_rate(rows[index], sizes)
        except GroupSearchError as error:
            request.notify(Said(f"Without a rate for {name}: {error}"))


fit = door(FitRequest, run)
