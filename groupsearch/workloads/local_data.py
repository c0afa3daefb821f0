"""A data set of a local folder, as ``Dataset.save_to_disk`` of the datasets package writes it, for hf: models.

A row is an example: what is clipped, and what the privacy is of. Nothing is downloaded, and nothing
of the data is written anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groupsearch.errors import GroupSearchError
from groupsearch.workloads.columns import Reader
from groupsearch.workloads.workload import Batch, Data, TrainingDefaults

_CHUNK = 1000  # rows that are in memory as Python objects at a time
_LABELS = ("label", "labels")
_EXPECTED_BATCH = 1024
_EPOCHS = 10


@dataclass(frozen=True)
class DataRequest:
    """What is asked of a data set; equal requests for unchanged folders are answered from memory.

    Attributes:
        text: the workload, for errors.
        folder: where the data set is.
        validation: share of the training rows to judge by, where there is no split of that name.
        labels: number of labels, or 0 where there are none.
    """

    text: str
    folder: str
    validation: float | None
    labels: int


def read_data(request: DataRequest, reader: Reader) -> Data:
    """The training and validation data of a folder, as tensors in memory.

    A split ``validation`` is judged by; without one, a share (a tenth) of the rows of ``train`` is
    taken for it, the same ones every time. Other splits, such as ``test``, are not looked at.

    Args:
        request: which folder, and what is expected of it.
        reader: what turns rows into tensors.

    Raises:
        GroupSearchError: when the datasets package is missing, the folder holds no data set, a column is
            missing, or its values do not fit the model.
    """
    return _read(request, reader, _stamp(request.folder) + _stamp(reader.processor))


@lru_cache(maxsize=1)
def _read(request: DataRequest, reader: Reader, stamp: tuple[Any, ...]) -> Data:
    train, validation = _splits(request)
    tensors = _tensors(request, reader, train, "train")
    if validation is not None:
        return Data(tensors, _tensors(request, reader, validation, "validation"))
    rows = len(train)
    count = max(1, round((request.validation or 0.1) * rows))
    if rows - count < 1:
        raise GroupSearchError(
            f"Expected at least 2 rows to train {request.text} on in {request.folder}, of which {count} is kept for "
            f"validation, found {rows}. Add examples, or a split named validation."
        )
    order = torch.randperm(rows, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    parts = order[count:].sort().values, order[:count].sort().values
    chosen = [{name: tensor[part] for name, tensor in tensors.items()} for part in parts]
    return Data(chosen[0], chosen[1])


def training_defaults(train_size: int) -> TrainingDefaults:
    """Ten passes over the data in batches of about 1,024, or of a fifth of the data where that is less.

    Large batches are what private training wants; delta is 1e-2 / n for n examples.
    """
    rate = min(0.2, _EXPECTED_BATCH / train_size)
    return TrainingDefaults(
        steps=round(_EPOCHS / rate),
        learning_rate=1e-3,
        sampling_rate=rate,
        rule="auto-s",
    )


def _stamp(place: str) -> tuple[Any, ...]:
    """What changes when the files of a folder do."""
    folder = Path(place)
    files = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.is_file())
    return tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files)


def _splits(request: DataRequest) -> tuple[Any, Any | None]:
    """The rows to train on, and those to validate by if they are a split of their own."""
    where = f"{request.folder}, the data of {request.text}"
    remedy = "Write one with Dataset.save_to_disk(folder) or DatasetDict.save_to_disk(folder) of the datasets package."
    if not Path(request.folder).is_dir():  # also keeps URLs away from datasets, which would fetch them
        raise GroupSearchError(f"Found no folder {where}, which is looked for from {Path.cwd()}. {remedy}")
    try:
        import datasets
    except ImportError as error:
        raise GroupSearchError(
            f"Reading {where}, needs the datasets package, which could not be imported: {error}. "
            "Install it with `pip install 'groupsearch[datasets]'`."
        ) from error
    try:
        found = datasets.load_from_disk(request.folder)
    except Exception as error:  # whatever datasets and Arrow think of files that they cannot read
        raise GroupSearchError(f"Found no data set in {where}: {_first_line(error)}. {remedy}") from error
    if not isinstance(found, datasets.DatasetDict):
        return found, None
    if "train" not in found:
        raise GroupSearchError(
            f"Expected a split named train in {where}, found {', '.join(found) or 'none'}. Rename "
            "the split to train on."
        )
    if "validation" in found and request.validation is not None:
        raise GroupSearchError(
            f"Found a split named validation in {where}, and validation={request.validation} besides. Give one of them."
        )
    return found["train"], found.get("validation")


def _tensors(request: DataRequest, reader: Reader, rows: Any, split: str) -> Batch:
    where = f"the {split} rows of {request.folder}"
    if not len(rows):
        raise GroupSearchError(f"Expected examples for {request.text}, found none in {where}. Add some.")
    columns = reader.choose(tuple(rows.column_names), where)
    labels = {"labels": _labels(request, rows, where)} if request.labels else {}
    chunks = [reader.read(chunk, first, where) for first, chunk in _chunks(rows, columns)]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]} | labels


def _chunks(rows: Any, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Pieces of some columns as lists, each with the number of its first row."""
    chosen = rows.with_format(None).select_columns(list(columns))
    for first in range(0, len(rows), _CHUNK):
        yield first, chosen[first : first + _CHUNK]


def _labels(request: DataRequest, rows: Any, where: str) -> Tensor:
    column = next((name for name in _LABELS if name in rows.column_names), None)
    if column is None:
        raise GroupSearchError(
            f"Expected a column label in {where}, found {', '.join(rows.column_names)}. Rename the column with "
            f"rename_column."
        )
    values = [value for _, chunk in _chunks(rows, (column,)) for value in chunk[column]]
    others = [value for value in values if isinstance(value, bool) or not isinstance(value, int)]
    if others:
        raise GroupSearchError(
            f"Expected whole numbers from 0 in the column {column} of {where}, found {others[0]!r}. Turn it into "
            f"numbers with Dataset.class_encode_column({column!r})."
        )
    if not (min(values) >= 0 and max(values) < request.labels):
        raise GroupSearchError(
            f"Expected labels from 0 to {request.labels - 1}, as {request.text} has {request.labels} of them, found "
            f"{min(values)} to {max(values)} in the column {column} of {where}. Mend the column, or give the model "
            f"another head with num_labels=..., one more than the largest label."
        )
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n\n")[0].split()).rstrip(".") or type(error).__name__
