"""One training with one grouping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path

from torch import nn

from groupsearch.distributed.launch import is_first, launched
from groupsearch.documents import Profile, Search, Train
from groupsearch.documents.commands import Next
from groupsearch.engine.ranks import Ranks
from groupsearch.errors import GroupSearchError
from groupsearch.jobs.events import Advanced, Begun, Interrupted, Said
from groupsearch.jobs.request import TrainingRequest, allotment, door
from groupsearch.jobs.stages import describe, joint_choice, names_document, part_of, start_document, training_setup
from groupsearch.jobs.trackers import Track, check_tracks, following
from groupsearch.jobs.weights import checkpoint_path, folder_of, sweep, write_card, write_folder
from groupsearch.jobs.winners import Winner, winner_of
from groupsearch.plan.clipping import ALLOCATIONS, NOISE_ALLOCATIONS, AdaptiveQuantile
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.memory import peak_memory
from groupsearch.plan.trace import Trace
from groupsearch.privacy import NOT_PRIVATE
from groupsearch.training import Checkpoints, CurvePoint, TrainSettings
from groupsearch.training import train as train_workload
from groupsearch.verify import Setup

Allotment = str | Sequence[float]


@dataclass(frozen=True)
class TrainRequest(TrainingRequest):
    """What to train with which grouping; ``seed`` makes it an experiment that can be repeated.

    Attributes:
        grouping: as text, as boundaries, a profile (or the file of one) with a joint choice of norm methods, or a
            search (or the file of one), whose recommendation is taken; ``search.json#3`` is its third candidate.
        pick: of a search: the best candidate whose peak is at most so many bytes, as in ``12GiB``.
        thresholds: ``uniform``, ``dimension``, ``adaptive``, ``adaptive:0.7`` or a number for each group.
        count_noise: noise of adaptive thresholds' counts; None for batch / 20.
        noise_allocation: ``global``, ``equal`` or a weight for each group.
        evaluate_every: steps between points of the curve; None for a tenth of all.
        secure: draw noise and batches from a cipher.
        save: a folder to make for the trained weights, with the privacy they were trained under beside them.
        checkpoint_every: steps between two checkpoints, beside that folder; None for none.
        resume: go on with the checkpoint that is there.
        force: replace the folder and the checkpoint of another training.
        track: where to follow the training: ``terminal``, ``document``, ``tensorboard:FOLDER`` or functions that are
            called with the :class:`~groupsearch.training.StepRecord` of every step.
    """

    _: KW_ONLY
    grouping: str | Path | Sequence[int] | Profile | Search
    pick: int | str | None = None
    thresholds: Allotment | AdaptiveQuantile | None = None
    count_noise: float | None = None
    noise_allocation: Allotment | None = None
    evaluate_every: int | None = None
    secure: bool = False
    save: str | Path | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    force: bool = False
    track: Sequence[str | Track] = ()


@dataclass
class Draft:
    """A document of a training while it runs.

    Attributes:
        known: everything that does not grow.
        curve: step, loss and metric of what was evaluated.
        thresholds: step and thresholds, where those are adaptive.
        steps: taken so far.
        tracked: what is known of every step, where that was asked for.
    """

    known: dict[str, object]
    curve: list[tuple[int, float, float | None]] = field(default_factory=list)
    thresholds: list[tuple[float, ...]] = field(default_factory=list)
    steps: int = 0
    tracked: list[dict[str, object]] = field(default_factory=list)

    def document(self) -> Train:
        """The training as far as it has come."""
        grown = {"curve": self.curve, "thresholds": self.thresholds, "steps": self.steps}
        grown |= {"tracked": self.tracked} if self.tracked else {}
        return Train.from_json({**self.known, **grown})


def run(request: TrainRequest) -> Train:
    """Train with privacy and one grouping.

    Processes that ``torchrun`` started train together; all have the document, and rank 0 alone tells and writes.

    Raises:
        GroupSearchError: for a model that cannot be trained, a grouping there is not, or options that exclude each
            other.
        DivergedError: when weights are no longer finite.
        Interrupted: with the curve so far, and what it cost.
    """
    with launched(request.device) as ranks:
        if ranks is not None and ranks.rank:
            request = replace(request, notify=lambda event: None, track=())
        return _run_on(ranks, request)


def _run_on(ranks: Ranks | None, request: TrainRequest) -> Train:
    text, boundaries = _asked(request.grouping), None
    found_by = winner_of(request.grouping, request.pick)
    check_tracks(request.track)
    folder = folder_of(request.save, request.checkpoint_every, request.resume, request.force)
    setup, settings = training_setup(_as_searched(request, found_by), request.evaluate_every, secure=request.secure)
    settings = _with_mechanism(settings, request, found_by)
    if found_by is not None:
        boundaries = found_by.candidate.boundaries
    elif isinstance(request.grouping, Profile) or names_document(text):
        found = request.grouping if isinstance(request.grouping, Profile) else text
        boundaries, options = joint_choice(found, setup.workload)
        setup, settings = setup.with_options(options), replace(settings, options=options)
    plan = describe(settings) | _describe_mechanism(settings)
    header = start_document("train", setup, request, device=setup.device, grouping=text, **_known_of(settings), **plan)
    header |= {"randomness": settings.streams().describe(), "not_private": _not_private(request)}
    _begin(ranks, request, header)
    trace = setup.trace()
    if found_by is not None:
        found_by.check(setup.workload, trace)
    chosen = Grouping.parse(trace, text) if boundaries is None else Grouping.from_boundaries(trace, boundaries)
    settings.plan(chosen)  # refused before anything runs
    if folder is not None:
        sweep(folder)
    draft = Draft(header | plan | _describe_grouping(trace, text, chosen))
    model = _trained(setup, chosen, settings, draft, request)
    document = draft.document()
    if folder is not None and is_first():
        loading = _save(setup, document, folder, found_by, model)
        document = replace(document, next=Next(command=None, python=tuple(loading.splitlines())))
    return document


def _not_private(request: TrainRequest) -> dict[str, str]:
    return NOT_PRIVATE["train"] | (NOT_PRIVATE["tracked"] if "document" in request.track else {})


def _begin(ranks: Ranks | None, request: TrainRequest, header: dict[str, object]) -> None:
    """Tell of the beginning; of several processes all, or none."""
    if ranks is None:
        request.notify(Begun(header))
        return
    header["settings"] = {**part_of(header, "settings"), "processes": ranks.size}

    def told() -> dict[str, object]:
        request.notify(Begun(header))
        return {"settings": part_of(header, "settings")}

    ranks.alike("the training", told)


def _asked(grouping: str | Path | Sequence[int] | Profile | Search) -> str:
    """The grouping as the document says it."""
    if isinstance(grouping, (Profile, Search)):
        return "joint" if isinstance(grouping, Profile) else "search"
    if isinstance(grouping, (str, Path)):
        return str(grouping)
    return ",".join(map(str, grouping)) or "all-layer"


def _known_of(settings: TrainSettings) -> dict[str, object]:
    """The seed of an experiment; a secret training has none to tell."""
    return {} if settings.seed is None else {"seed": settings.seed}


def _as_searched(request: TrainRequest, found: Winner | None) -> TrainRequest:
    """The request with the way of taking a step that a candidate's peak is of, where several were searched."""
    variant = None if found is None else found.variant
    if variant is None:
        return request
    return replace(
        request,
        checkpoint=variant.checkpoint,
        norm_method=variant.norm_method,
        batch_size=variant.batch_size,
        micro_batches=variant.micro_batches if variant.micro_batches > 1 else request.micro_batches,
    )


def _with_mechanism(settings: TrainSettings, request: TrainRequest, found: Winner | None) -> TrainSettings:
    """The settings with the mechanism that its own options ask for, or that a search found."""
    asked = request.thresholds
    if found is not None:
        if found.candidate.rule is not None and request.rule is None:
            settings = replace(settings, rule=found.candidate.rule)
        asked = found.candidate.allocation if asked is None else asked
    allocation = None if asked is None else allotment(asked, ALLOCATIONS, adaptive=True)
    if request.count_noise is not None:
        if not isinstance(allocation, AdaptiveQuantile):
            raise GroupSearchError(
                "Found --count-noise without --thresholds adaptive: fixed thresholds count nothing. Give both or none."
            )
        allocation = replace(allocation, count_noise=request.count_noise)
    if allocation is not None:
        settings = replace(settings, allocation=allocation)
    if request.noise_allocation is not None:
        shared = allotment(request.noise_allocation, NOISE_ALLOCATIONS)
        assert not isinstance(shared, AdaptiveQuantile)  # which was not asked for
        settings = replace(settings, noise_allocation=shared)
    return settings


def _describe_mechanism(settings: TrainSettings) -> dict[str, object]:
    allocation = settings.allocation
    found = {"adaptive": asdict(allocation)} if isinstance(allocation, AdaptiveQuantile) else allocation
    return {"allocation": found, "noise_allocation": settings.noise_allocation, "sampling": "poisson"}


def _describe_grouping(trace: Trace, text: str, grouping: Grouping) -> dict[str, object]:
    return {
        "trace": trace.to_json(),
        "grouping": text,
        "boundaries": list(grouping.boundaries),
        "groups": grouping.groups,
        "peak_bytes": peak_memory(trace, grouping).peak_bytes,
    }


def _trained(
    setup: Setup, grouping: Grouping, settings: TrainSettings, draft: Draft, request: TrainRequest
) -> nn.Module:
    """The trained model; an interrupt leaves the document of the steps so far."""
    try:
        return _run(setup, grouping, settings, draft, request)
    except KeyboardInterrupt as interrupt:
        done = draft.steps
        spent = settings.statement(_train_size(setup), steps=done)
        draft.known |= {"epsilon": spent.epsilon, "privacy": spent.to_json()}
        said = f"Interrupted after {done} of {settings.steps} steps; the curve so far and what it cost are kept."
        said += "" if request.checkpoint_every is None else " --resume goes on with the last checkpoint."
        raise Interrupted(said, draft.document()) from interrupt


def _run(
    setup: Setup,
    grouping: Grouping,
    settings: TrainSettings,
    draft: Draft,
    request: TrainRequest,
) -> nn.Module:
    """Train, and keep in the document what is known after every step."""
    notify = request.notify
    checkpoints = None
    if request.save is not None:
        path = checkpoint_path(Path(request.save))
        checkpoints = Checkpoints(path, request.checkpoint_every or 0, request.resume)
        if request.resume and not path.is_file():
            notify(Said(f"Found no checkpoint {path}: the training begins at its beginning."))
        elif not request.resume and is_first():
            checkpoints.remove()

    def on_step(step: int, point: CurvePoint | None) -> None:
        draft.steps = step
        if point is not None:
            draft.curve.append((point.step, point.loss, point.metric))
            if point.thresholds:
                draft.thresholds.append((point.step, *point.thresholds))
        notify(Advanced("Training", "", step, settings.steps))

    kept: list[nn.Module] = []
    with following(request.track, notify, draft.tracked.append) as track:
        result = train_workload(
            *(setup.loaded, grouping, settings, on_step), checkpoints=checkpoints, on_end=kept.append, track=track
        )
    draft.known |= {
        "metric": {"name": result.metric_name, "mean": result.metric},
        "step_seconds": result.step_seconds,
        "expected_examples": settings.steps * settings.sampling_rate * _train_size(setup),
        "privacy": settings.statement(_train_size(setup)).to_json(),
        "added_delta": result.added_delta,
        "checked": None if result.checked is None else result.checked.to_json(),
        "watched": None if result.watched is None else result.watched.to_json(),
    }
    return kept[0]


def _save(setup: Setup, document: Train, folder: Path, found: Winner | None, model: nn.Module) -> str:
    """Make the folder of the weights, after which there is nothing to go on with; Python that loads them."""
    loading = ""
    told = "".join(f", {key}={value!r}" for key, value in setup.settings.items())
    task = f'model = groupsearch.load_workload("{setup.workload}"{told}).build()'

    def fill(made: Path) -> None:
        saved = setup.loaded.save(model, made, str(folder))
        if saved.needs_model and setup.given is None:
            saved = replace(saved, loading=f"import groupsearch\n\n{task}\n{saved.loading}")
        write_card(made, document, saved, None if found is None else found.cost)
        nonlocal loading
        loading = saved.loading

    write_folder(folder, fill)
    Checkpoints(checkpoint_path(folder)).remove()
    return loading


def _train_size(setup: Setup) -> int:
    assert setup.loaded.data is not None  # it is being trained
    return setup.loaded.data.train_size


train = door(TrainRequest, run)
