"""Checkpoints of a training: written whole or not at all, and gone on with by the training that wrote them alone.

A training with a seed goes on bit for bit on the CPU; its checkpoints hold the state of every generator. One from the
operating system's entropy goes on with noise and batches that are drawn anew: its checkpoints tell nothing of the
noise, and the steps that were lost with a kill have let nothing out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groupsearch.errors import GroupSearchError
from groupsearch.plan.grouping import Grouping
from groupsearch.training.settings import TrainSettings
from groupsearch.workloads.workload import Workload

VERSION = 1
_FREE = ("watch", "evaluate_every")  # change no weight


@dataclass(frozen=True)
class Checkpoints:
    """Where a training writes what it can be gone on with, and whether it begins with that.

    Attributes:
        path: a file; the folder that it is in is there.
        every: steps between two of them; 0 for none.
        resume: whether to go on with the one that is there; without one the training begins at its beginning.
    """

    path: Path
    every: int = 0
    resume: bool = False

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint.

        Raises:
            GroupSearchError: when it cannot be written; the one before is still there.
        """
        beside = self.path.with_name(f".{self.path.name}.tmp")
        try:
            with beside.open("wb") as file:
                torch.save({"version": VERSION, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise GroupSearchError(
                f"Expected to write the checkpoint {self.path}, found: {error.strerror or error}. See that its disk "
                "has room; --resume goes on with the checkpoint before, if there is one."
            ) from error

    def read(self, agreed: Mapping[str, str]) -> dict[str, Any] | None:
        """The checkpoint to go on with, if there is one.

        Raises:
            GroupSearchError: when it cannot be read, or is of a training with other settings or of another model.
        """
        if not (self.resume and self.path.is_file()):
            return None
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            found, version = state["agreed"], state["version"]
        except Exception as error:  # whatever torch thinks of a file that it cannot read
            raise GroupSearchError(
                f"Expected a checkpoint of `groupsearch train` in {self.path}, found another file. Remove it, or train "
                "anew with --force in place of --resume."
            ) from error
        if version != VERSION:
            raise GroupSearchError(
                f"Expected a checkpoint of version {VERSION} in {self.path}, found version {version}. Go on with the "
                "groupsearch that wrote it, or train anew with --force in place of --resume."
            )
        differing = [key for key in agreed if found.get(key) != agreed[key]]
        if differing:
            told = "; ".join(f"{key} {found.get(key)}, here {agreed[key]}" for key in differing)
            raise GroupSearchError(
                f"The checkpoint {self.path} was written by a training with other settings: {told:.600}. Give those of "
                "that training, or train anew with --force in place of --resume."
            )
        return dict(state)

    def remove(self) -> None:
        """Remove the checkpoint: there is nothing left to go on with."""
        self.path.unlink(missing_ok=True)
        self.path.with_name(f".{self.path.name}.tmp").unlink(missing_ok=True)


def agreement(workload: Workload, grouping: Grouping | None, settings: TrainSettings) -> dict[str, str]:
    """What must be the same for a training to be gone on with, by name."""
    told = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in _FREE}
    boundaries = "none" if grouping is None else ",".join(map(str, grouping.boundaries)) or "all-layer"
    model = {"model": workload.name, "grouping": boundaries}
    model |= {f"setting {key}": value for key, value in workload.settings.items()}
    return {key: str(value) for key, value in (model | told).items()}


def learned(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a training changes of a model: trainable parameters and buffers, by name."""
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return named | {name: buffer.detach() for name, buffer in model.named_buffers()}


def frozen_digest(model: nn.Module) -> str:
    """What tells the frozen weights of one model from those of another; they are built, and not saved."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
            digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def restore(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Put what was learned into a model.

    Raises:
        GroupSearchError: when it is another model.
    """
    own, found = learned(model), state["model"]
    differing = [key for key in sorted({*own, *found}) if key not in own or key not in found]
    differing += [key for key in own if key in found and own[key].shape != found[key].shape]
    if differing or state["frozen"] != frozen_digest(model):
        what = f"other weights to train, such as {differing[0]}" if differing else "other frozen weights"
        raise GroupSearchError(
            f"The checkpoint {path} is of another model: it has {what}. Name the model that was trained, as it was "
            "then, or train anew with --force in place of --resume."
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(found[key])
