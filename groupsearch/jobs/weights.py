"""The folder that a training leaves: weights, and beside them the privacy they were trained under."""

from __future__ import annotations

import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from groupsearch.documents import Train
from groupsearch.errors import GroupSearchError
from groupsearch.records import document_text
from groupsearch.units import format_number

if TYPE_CHECKING:
    from groupsearch.workloads.saving import Saved

CARD = "privacy.json"
README = "README.md"
_SHARED = (
    *("model", "environment", "grouping", "boundaries", "groups", "rule", "max_grad_norm", "allocation"),
    *("noise_allocation", "noise_multiplier", "optimizer", "learning_rate", "sampling", "sampling_rate"),
    *("expected_examples", "steps", "epsilon", "delta", "added_delta", "privacy", "randomness"),
)
_UNKNOWN = (
    "It is not known what was chosen by a look at private data before this training (grouping, learning rate, number "
    "of steps), nor what that cost: epsilon leaves it out."
)


def checkpoint_path(folder: Path) -> Path:
    """Where the checkpoint of a training is that is to leave this folder."""
    return folder.with_name(f"{folder.name}.checkpoint")


def check_folder(folder: str | Path, *, force: bool = False, resume: bool = False) -> Path:
    """The folder, if weights may be put there: to be asked before the training, not after it.

    With ``force`` a folder that a training left, or an empty one, is replaced, and a checkpoint thrown away; one with
    other things in it never is.

    Raises:
        GroupSearchError: when it is there already, or what it is to be made in is not there or cannot be written.
    """
    folder, name = Path(folder), Path(folder).name
    _put_back(folder)
    unfinished = checkpoint_path(folder).is_file()
    if not name or not folder.parent.is_dir() or not os.access(folder.parent, os.W_OK | os.X_OK):
        raise GroupSearchError(
            f"Expected a folder to make for the weights, in one that is there and can be written, found {folder}. Name "
            f"another, or make {folder.parent} first."
        )
    if folder.exists() and not (folder / CARD).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise GroupSearchError(
            f"Expected a folder to make for the weights, found {folder}, which is there and was not left by "
            "`groupsearch train --save`: it is not overwritten, with --force neither. Name another."
        )
    if resume and folder.exists() and not unfinished:
        raise GroupSearchError(
            f"Found the weights of a finished training in {folder}, and no checkpoint to go on with. Use them, or "
            "train anew into another folder, or with --force in place of --resume."
        )
    if folder.exists() and not (force or resume):
        raise GroupSearchError(
            f"{folder} exists already and is not overwritten. Name another folder, or overwrite it with --force."
        )
    if unfinished and not (force or resume):
        raise GroupSearchError(
            f"Found {checkpoint_path(folder)}, the checkpoint of a training that did not end. Go on with --resume, or "
            "throw it away with --force."
        )
    return folder


def folder_of(save: str | Path | None, checkpoint_every: int | None, resume: bool, force: bool) -> Path | None:
    """The folder for the weights, if there may be one.

    Raises:
        GroupSearchError: when it may not be written, or checkpoints are asked for without it.
    """
    if save is not None:
        return check_folder(save, force=force, resume=resume)
    if resume or checkpoint_every is not None:
        raise GroupSearchError(
            "Found --checkpoint-every or --resume without --save: checkpoints lie beside the folder of the weights. "
            "Give --save FOLDER, too."
        )
    return None


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all: it is filled under another name beside its place, and renamed.

    One that is there (see :func:`check_folder`) is replaced. What killed trainings have left of this folder goes.

    Raises:
        GroupSearchError: when it cannot be written; nothing has changed then.
    """
    made: Path | None = None
    locks = ExitStack()
    try:
        made = _beside(folder, "tmp", locks)
        fill(made)
        made.chmod(0o755)
        for path in [*made.rglob("*"), made]:
            _sync(path)
        if folder.exists():
            before = _beside(folder, "old", locks)
            os.replace(folder, before / folder.name)
            os.replace(made, folder)
            shutil.rmtree(before)
        else:
            os.replace(made, folder)
        _sync(folder.parent)
        made = None
        for old in _left(folder, "old"):
            if (old / folder.name).exists() or not any(old.iterdir()):  # of a longer name that begins alike otherwise
                shutil.rmtree(old)
    except OSError as error:
        raise GroupSearchError(
            f"Expected to write the weights into {folder}, found: {error.strerror or error}. Nothing was written "
            "there. See that the disk has room; with --checkpoint-every, --resume goes on with the last checkpoint."
        ) from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        locks.close()


def sweep(folder: Path) -> None:
    """Remove what trainings that were killed while they wrote have left beside this folder, so that there is room."""
    for path in _left(folder, "tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _put_back(folder: Path) -> None:
    """A kill between the two renames of :func:`write_folder` leaves the folder before under a hidden name."""
    if folder.parent.is_dir() and not folder.exists():
        for old in _left(folder, "old"):
            if (old / folder.name).exists():
                os.replace(old / folder.name, folder)
                old.rmdir()
                return


def _beside(folder: Path, ending: str, locks: ExitStack) -> Path:
    """A new hidden folder beside this one, locked while we are alive."""
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", suffix=f".{ending}", dir=folder.parent))
    handle = os.open(made, os.O_RDONLY)
    locks.callback(os.close, handle)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return made


def _left(folder: Path, ending: str) -> Iterator[Path]:
    """The hidden folders beside this one that nobody alive writes to."""
    name = folder.name[:100]
    for path in sorted(folder.parent.glob(f".{glob.escape(name)}.????????.{ending}")):
        if path.is_dir() and re.fullmatch(rf"\.{re.escape(name)}\.[a-z0-9_]{{8}}\.{ending}", path.name):
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            finally:
                os.close(handle)
            yield path


def write_card(made: Path, document: Train, saved: Saved, search: Mapping[str, object] | None) -> None:
    """Write what the weights are and what they cost in privacy, to be read by programs and by people.

    Exact numbers about validation data, metric and curve, stay in the training's document: weights are published.

    Args:
        made: the folder.
        document: of the training.
        saved: how the weights were written.
        search: the part of a search's document that says what choosing cost; None where nothing is known.
    """
    found, chosen = document.to_json(), search or {"epsilon": None, "statement": _UNKNOWN}
    card: dict[str, object] = {
        "kind": "weights",
        "schema_version": 1,
        "weights": {"what": saved.what, "library": saved.library, "base": saved.base, "loading": saved.loading},
        "search": chosen,
        **{key: found[key] for key in _SHARED if key in found},
    }
    card["clip_plan"] = {
        key: card[key] for key in ("boundaries", "groups", "rule", "max_grad_norm", "allocation", "noise_allocation")
    }
    (made / CARD).write_text(document_text(card) + "\n", encoding="utf-8")
    (made / README).write_text(_readme(document, saved, str(chosen["statement"])), encoding="utf-8")


def _readme(document: Train, saved: Saved, chosen: str) -> str:
    front = {"library_name": saved.library, "base_model": saved.base, "tags": "[differential-privacy]"}
    settings = {
        "groups": document.groups,
        "clip rule": document.rule,
        "norm that thresholds are allotted from": format_number(document.max_grad_norm),
        "noise multiplier": format_number(document.noise_multiplier),
        "sampling": f"{document.sampling}, rate {format_number(document.sampling_rate)}",
        "steps": document.steps,
        "optimizer": f"{document.optimizer}, learning rate {format_number(document.learning_rate)}",
        **document.environment.packages,
    }
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in front.items() if value),
        "---",
        "",
        f"# {document.model.name}, trained with differential privacy",
        "",
        f"Here are {saved.what}. {' '.join(document.privacy.sentences)}",
        "",
        f"What was chosen beforehand: {chosen}",
        "",
        f"`{CARD}` says the same to programs.",
        "",
        "## Loading",
        "",
        "```python",
        saved.loading,
        "model.eval()",
        "```",
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in settings.items()),
    ]
    return "\n".join(lines) + "\n"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
