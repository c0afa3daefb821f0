"""What is asked of a job: the step that is looked at, how it is trained, and the check of every value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import PurePath
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from groupsearch.documents import Document
from groupsearch.errors import GroupSearchError
from groupsearch.jobs.events import Notify, ignore
from groupsearch.plan.clipping import AdaptiveQuantile
from groupsearch.units import exact_bytes, parse_bytes

if TYPE_CHECKING:
    from groupsearch.workloads import Workload


LEVELS: dict[str, tuple[str, ...]] = {
    "none": (),
    "simulate": ("simulations",),
    "measure": ("measurements",),
    "all": ("simulations", "measurements"),
}
RUNGS = ("proxy", "short", "full")
_CHOICES: dict[str, tuple[object, ...]] = {
    "verify": tuple(LEVELS),
    "find": ("batch-size", "sequence-length"),
    "objective": (None, "time"),
}
_FROM_ZERO = ("random", "evaluate_every")
_FROM_ONE = (
    *("batch_size", "micro_batches", "max_groups", "groups", "steps", "trials", "promote", "seeds", "max_runs"),
    *("sequence_length", "limit", "dataset_size"),
)
_SHARES = ("short_fraction", "confidence")
_POSITIVE = (
    *("epsilon", "delta", "learning_rate", "sampling_rate", "max_grad_norm"),
    *("count_noise", "score_noise"),
)


@dataclass(frozen=True)
class Request:
    """What is asked of a job.

    Attributes:
        notify: is told what goes on; ``print`` will do.

    Raises:
        GroupSearchError: for a value outside its range.
    """

    _: KW_ONLY
    notify: Notify = field(default=ignore, compare=False, repr=False)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in _CHOICES and value not in _CHOICES[each.name]:
                known = ", ".join(map(str, _CHOICES[each.name]))
                raise GroupSearchError(f"Expected {each.name} to be one of {known}, found {value!r}.")
            expected = _expected(each.name, value)
            if expected:
                raise GroupSearchError(f"Expected {each.name} to be {expected}, found {value!r}.")


@dataclass(frozen=True)
class StepRequest(Request):
    """A step of a model; the fields are the options of the command line.

    Attributes:
        model: a name as on the command line, a function in a file that returns a workload or ``(model, batch, loss)``,
            or a :class:`~groupsearch.workloads.Workload`, of which nothing can be measured in fresh processes.
        batch_size: physical batch; None for the model's.
        setting: settings of the workload.
        dtype: same as the setting ``dtype``.
        device: ``cpu``, ``cuda``, ``cuda:1``, or to estimate a card: ``cuda:h100``.
        checkpoint: ``none``, ``blocks`` or ``every:K``.
        optimizer: None for the model's, else ``adam``.
        norm_method: of :data:`groupsearch.options.NORM_METHODS`; in a profile also ``joint``.
        micro_batches: batches accumulated before the optimizer's step.
        autocast: ``none``, ``bfloat16`` or ``float16``.
    """

    model: str | Workload | Callable[..., object]
    _: KW_ONLY
    batch_size: int | None = None
    setting: Mapping[str, object] | Sequence[tuple[str, object]] = ()
    dtype: str | None = None
    device: str = "cpu"
    checkpoint: str = "none"
    optimizer: str | None = None
    norm_method: str = "mixed"
    micro_batches: int | None = None
    autocast: str = "none"


@dataclass(frozen=True)
class TrainingRequest(StepRequest):
    """A training with privacy; what is None is the model's own.

    Attributes:
        epsilon: budget of one training.
        delta: the other half of it.
        steps: optimizer steps.
        learning_rate: constant over them.
        sampling_rate: probability of each example to be in a batch.
        rule: clip rule.
        max_grad_norm: R, that thresholds are allotted from.
        watch: part of the batches of which one example is taken alone and compared; None for 0.01.
        allow_state: buffers and attributes that a forward pass may leave data in, without noise.
        seed: of everything random; None for the operating system's entropy.
    """

    _: KW_ONLY
    epsilon: float | None = None
    delta: float | None = None
    steps: int | None = None
    learning_rate: float | None = None
    sampling_rate: float | None = None
    rule: str | None = None
    max_grad_norm: float | None = None
    watch: float | None = None
    allow_state: Sequence[str] = ()
    seed: int | None = None


@dataclass(frozen=True)
class SearchRequest(TrainingRequest):
    """What to search; ``seed`` is of the sampler, and the first one of the trainings.

    Attributes:
        budget: largest estimated peak, as in ``12GiB``; others are never trained.
        rungs: kinds of evidence, the cheapest first: ``proxy``, ``short`` and ``full`` runs.
        short_fraction: steps of a short run, as a share of those of a full one.
        trials: groupings to train before the front is repeated; None for 18 in short runs, 16 in full ones.
        promote: groupings to train in full after short runs.
        seeds: training runs of every grouping on the front.
        max_runs: repeat the front until groupings are told apart or so many full runs are made.
        confidence: of all that is declared of the front together.
        selection_data: ``public`` or ``private``: what is trained on and judged by.
        private_selection: choose at a known epsilon instead of searching.
        score_noise: of its scores, in validation examples.
        vary: what to search, too, and its values; without values the usual ones.
        objective: ``time`` to search for a short step, too.
        groups: exactly so many groups.
        granularity: where to cut: ``site``, ``layer`` or ``block``.
        max_groups: the most groups.
        sampler: ``front``, ours, or one of Optuna's.
        storage: a journal file or a database URL; None to keep the study in memory.
        study: its name there.
        resume: go on with the study in the storage.
        force: throw away the study in the storage.
        verify: check estimates first: ``none``, ``simulate``, ``measure`` or ``all``.
        fail_over: stop before anything is trained where a check is further off its estimate than this share.
    """

    model: str | Workload | Callable[..., object] = "digits-vit"
    _: KW_ONLY
    budget: int | str | None = None
    rungs: str | Sequence[str] = RUNGS
    short_fraction: float = 0.125
    trials: int | None = None
    promote: int = 7
    seeds: int = 3
    max_runs: int | None = None
    confidence: float = 0.95
    selection_data: str = "private"
    private_selection: bool = False
    score_noise: float = 5.0
    vary: Mapping[str, Sequence[str]] | Sequence[str] = ()
    objective: str | None = None
    groups: int | None = None
    granularity: str = "site"
    max_groups: int | None = None
    sampler: str = "front"
    storage: str | None = None
    study: str = "groupsearch"
    resume: bool = False
    force: bool = False
    verify: str = "all"
    fail_over: float | None = None
    seed: int | None = 0


_NOT_ASKED = ("model", "document", "notify", "force", "resume", "track")
_SIZES = ("budget", "memory", "pick")
_JOINED = ("rungs",)


def asked(request: Request) -> dict[str, tuple[str, ...]] | None:
    """The fields that are not at their defaults as options of the command line; None where one has no text.

    >>> asked(StepRequest("digits-vit", checkpoint="blocks", setting={"width": 16}))
    {'setting': ('width=16',), 'checkpoint': ('blocks',)}
    """
    found = {}
    for each in fields(request):
        value = getattr(request, each.name)
        if each.name in _NOT_ASKED or value == each.default or value in ((), {}, []):
            continue
        texts = _texts(each.name, value)
        if texts is None:
            return None
        found[each.name.replace("_", "-")] = texts
    return found


def _texts(name: str, value: object) -> tuple[str, ...] | None:
    """A value as it is typed, once for each time that its option is given; of a flag nothing is."""
    if value is True:
        return ()
    if name in _SIZES and isinstance(value, int):
        return (exact_bytes(value),)
    if isinstance(value, AdaptiveQuantile):
        return (f"adaptive:{value.quantile}",)
    if isinstance(value, (str, int, float, PurePath)):
        return (str(value),)
    if name == "setting" and isinstance(value, Sequence):
        value = dict(value)
    if isinstance(value, Mapping):
        return tuple(_setting(str(key), each) for key, each in value.items())
    if not isinstance(value, Sequence):
        return None
    words = tuple(map(str, value))
    return words if name not in _JOINED and all(isinstance(each, str) for each in value) else (",".join(words),)


def _setting(key: str, value: object) -> str:
    """``key=value``, or ``key=a,b``; the name alone where no values are said."""
    if isinstance(value, (list, tuple)):
        return f"{key}={','.join(map(str, value))}" if value else key
    return f"{key}={value}"


P = ParamSpec("P")
R = TypeVar("R")
D = TypeVar("D", bound=Document)


def door(request: Callable[P, R], job: Callable[[R], D]) -> Callable[P, D]:
    """The job as a function of its request's fields, which says of what it found how to go on."""

    def call(*fields: P.args, **options: P.kwargs) -> D:
        return job(request(*fields, **options)).followed()

    name = job.__module__.rpartition(".")[2]
    call.__module__, call.__name__, call.__qualname__ = job.__module__, name, name
    call.__doc__ = f"{inspect.getdoc(job)}\n\nTakes the fields of :class:`{request.__name__}`."
    found = inspect.signature(request).replace(return_annotation=inspect.signature(job).return_annotation)
    call.__signature__ = found  # type: ignore[attr-defined]
    return call


def bytes_of(size: int | str | None) -> int | None:
    """Bytes of a size such as ``12GiB``, or of a number of them."""
    return parse_bytes(size) if isinstance(size, str) else size


def texts_of(grouping: str | Sequence[str]) -> tuple[str, ...]:
    """Groupings as text, of which there may be one alone."""
    return (grouping,) if isinstance(grouping, str) else tuple(grouping)


def _expected(name: str, value: object) -> str:
    """What a number was expected to be; empty where it is that."""
    if value is None or not isinstance(value, (int, float)):
        return ""
    if name in _FROM_ONE + _FROM_ZERO:
        least = int(name in _FROM_ONE)
        return "" if value >= least else f"at least {least}"
    if name in _SHARES:
        return "" if 0 < value < 1 else "between 0 and 1"
    if name in _POSITIVE:
        return "" if 0 < value < float("inf") else "a number above zero"
    return "" if name != "watch" or 0 <= value <= 1 else "from 0 to 1"


def allotment(
    value: str | Sequence[float] | AdaptiveQuantile, names: tuple[str, ...], *, adaptive: bool = False
) -> str | tuple[float, ...] | AdaptiveQuantile:
    """A name, a number for each group, or ``adaptive:0.7`` where that is one.

    Raises:
        GroupSearchError: for anything else.

    >>> allotment("0.5,1", ("uniform",)), allotment("adaptive:0.7", (), adaptive=True).quantile
    ((0.5, 1.0), 0.7)
    """
    if isinstance(value, AdaptiveQuantile):
        return value
    if not isinstance(value, str):
        return tuple(map(float, value))
    if value in names:
        return value
    name, colon, quantile = value.partition(":")
    try:
        if adaptive and name == "adaptive":
            return AdaptiveQuantile(float(quantile)) if colon else AdaptiveQuantile()
        return tuple(float(part) for part in value.split(","))
    except (ValueError, GroupSearchError) as error:
        known = ", ".join((*names, *(("adaptive", "adaptive:0.7") if adaptive else ())))
        raise GroupSearchError(
            f"Expected {known} or a number for each group, such as 0.5,1,0.8, found {value!r}."
        ) from error
