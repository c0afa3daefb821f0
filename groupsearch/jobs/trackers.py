"""Where a training can be followed while it runs: the terminal, its own document, TensorBoard, or any function."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from groupsearch.errors import GroupSearchError
from groupsearch.jobs.events import Notify, Said
from groupsearch.units import format_at_most, format_number, format_percent, format_seconds

if TYPE_CHECKING:
    from groupsearch.training import StepRecord

Track = Callable[["StepRecord"], None]
QUANTILES = ("p10", "p50", "p90")
_KINDS = "terminal, document, tensorboard:FOLDER"


def check_tracks(tracks: Iterable[str | Track]) -> None:
    """See that a training can be followed there, before anything is trained.

    Raises:
        GroupSearchError: for a place that is not known, or TensorBoard without its package or a folder.
    """
    for track in tracks:
        if callable(track) or track in ("terminal", "document"):
            continue
        kind, _, folder = track.partition(":")
        if kind != "tensorboard" or not folder:
            raise GroupSearchError(f"Expected one of {_KINDS} to follow the training in, found {track!r}.")
        above = next(each for each in (Path(folder), *Path(folder).absolute().parents) if each.exists())
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            raise GroupSearchError(
                f"Expected a folder that can be written for TensorBoard, found {folder}, where {above} is a file or "
                "may not be written. Name another."
            )
        if importlib.util.find_spec("tensorboard") is None:
            raise GroupSearchError(
                f"Found --track {track}, and no tensorboard package. Install it with `pip install tensorboard`, or "
                "follow the training in its document."
            )


def numbers(record: StepRecord) -> dict[str, float]:
    """A record as trackers want it, a number by name; what begins with ``not-private/`` is to be kept like the data."""
    told: dict[str, float | None] = {"epsilon": record.epsilon, "not-private/step_seconds": record.seconds}
    told |= {"not-private/examples": record.examples, "not-private/loss": record.loss}
    for group, share in enumerate(record.clipped or ()):
        told[f"not-private/clipped/{group}"] = share
    for group, quantiles in enumerate(record.norms or ()):
        told |= {f"not-private/norm/{group}/{q}": norm for q, norm in zip(QUANTILES, quantiles, strict=True)}
    if record.point is not None:
        told |= {"not-private/validation/loss": record.point.loss, "not-private/validation/metric": record.point.metric}
    return {name: float(value) for name, value in told.items() if value is not None}


def row(record: StepRecord) -> dict[str, object]:
    """A record as it stands in the training's document; a norm that is not finite is null."""
    norms = record.norms and [[n if math.isfinite(n) else None for n in group] for group in record.norms]
    loss = record.loss if record.loss is not None and math.isfinite(record.loss) else None
    shown = {"step": record.step, "epsilon": record.epsilon, "seconds": record.seconds, "examples": record.examples}
    return {**shown, "loss": loss, "clipped": record.clipped, "norms": norms}


@contextmanager
def following(
    tracks: Iterable[str | Track], notify: Notify, keep: Callable[[dict[str, object]], None]
) -> Iterator[Track | None]:
    """What is to be called after every step; None where nobody follows.

    Args:
        tracks: ``terminal``, ``document``, ``tensorboard:FOLDER`` or functions of a record.
        notify: is told a sentence at every point of the curve, for ``terminal``.
        keep: is given the row of every step, for ``document``.
    """
    with ExitStack() as stack:
        found = [_tracker(track, notify, keep, stack) for track in tracks]

        def tell(record: StepRecord) -> None:
            for each in found:
                each(record)

        yield tell if found else None


def _tracker(track: str | Track, notify: Notify, keep: Callable[[dict[str, object]], None], stack: ExitStack) -> Track:
    if callable(track):
        return track
    if track == "document":
        return lambda record: keep(row(record))
    if track == "terminal":
        return lambda record: None if record.point is None else notify(Said(_sentence(record)))
    return _tensorboard(track.partition(":")[2], stack)


def _tensorboard(folder: str, stack: ExitStack) -> Track:
    """Scalars of every step; those that a killed run left beyond its checkpoint are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []

    def tell(record: StepRecord) -> None:
        if not writers:
            writers.append(SummaryWriter(folder, purge_step=record.step))
            stack.callback(writers[0].close)
        for name, value in numbers(record).items():
            writers[0].add_scalar(name, value, record.step)

    return tell


def _sentence(record: StepRecord) -> str:
    spent = "" if record.epsilon is None else f", epsilon {format_at_most(record.epsilon)}"
    told = [f"loss {'none' if record.loss is None else format_number(record.loss)}"]
    if record.clipped is not None:
        told.append(f"clipped by group {', '.join(format_percent(share, 0) for share in record.clipped)}")
    if record.norms is not None:
        told.append(f"median norms {', '.join(format_number(group[1]) for group in record.norms)}")
    seconds = format_seconds(record.seconds)
    return f"Step {record.step}{spent}; not private: {record.examples} examples in {seconds}, {', '.join(told)}"
