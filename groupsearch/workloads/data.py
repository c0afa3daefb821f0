"""People's own data for models of the hub: files and folders, and data sets, as batches.

Apart from the models of the hub, as data need none.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import compress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from groupsearch.errors import GroupSearchError
from groupsearch.workloads.batches import first_examples
from groupsearch.workloads.settings import require_choice
from groupsearch.workloads.tasks import IGNORED, Task, decoder_start, image_shape, targets
from groupsearch.workloads.workload import Batch, Data, TrainingDefaults, Workload

# -- Columns of a data set, as the tensors that a transformers model takes -------------------------
#
# Shapes: B rows, T positions, C channels, H by W pixels.

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_OTHER_FILES = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")


class Reader(Protocol):
    """Turns rows into tensors; equal readers read alike.

    Attributes:
        processor: folder of what was saved with the model to make tensors of text or pictures.
    """

    @property
    def processor(self) -> str: ...  # noqa: D102

    def __hash__(self) -> int: ...

    def choose(self, columns: tuple[str, ...], where: str) -> tuple[str, ...]:
        """The columns to read of those that there are.

        Raises:
            GroupSearchError: when none fits.
        """

    def read(self, rows: Mapping[str, list[Any]], first: int, where: str) -> dict[str, Tensor]:
        """Tensors of some rows.

        Raises:
            GroupSearchError: when their values do not fit the model.
        """


@dataclass(frozen=True)
class TextReader:
    """Columns ``input_ids`` (and ``attention_mask``) or ``text``: (B, T) tokens, then padding, and their mask.

    Longer rows are cut. Masked tokens are left out, so that padding comes last. What a sequence is to become are the
    columns ``labels`` (tokens, of which -100 are left out) or ``target`` (text), cut and padded alike.

    Attributes:
        text: the workload, for errors.
        length: T.
        vocabulary: how many tokens the model knows.
        processor: folder of a saved tokenizer.
        padding: token that stands where there is none.
        start: token that a decoder begins with where sequences become sequences; None where they do not.
    """

    text: str
    length: int
    vocabulary: int
    processor: str
    padding: int
    start: int | None = None

    def choose(self, columns: tuple[str, ...], where: str) -> tuple[str, ...]:
        """``input_ids`` with its mask if there is one, else ``text``; and ``labels``, else ``target``, where asked."""
        of_target: tuple[str, ...] = ()
        if self.start is not None:
            of_target = ("labels",) if "labels" in columns else _only("target", "labels", columns, where)
        if "input_ids" in columns:
            return (*(name for name in ("input_ids", "attention_mask") if name in columns), *of_target)
        return (*_only("text", "input_ids", columns, where), *of_target)

    def read(self, rows: Mapping[str, list[Any]], first: int, where: str) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, both (B, T) int64; ``labels`` and ``decoder_input_ids`` alike."""
        if "text" in rows:
            tokens = self._of_texts("text", rows["text"], first, where)
        else:
            tokens = self._of_tokens("input_ids", rows["input_ids"], where, rows.get("attention_mask"))
        ids, mask = self._padded(tokens, first, where, self.padding)
        found = {"input_ids": ids, "attention_mask": mask}
        if self.start is None:
            return found
        if "target" in rows:
            tokens = self._of_texts("target", rows["target"], first, where)
        else:
            tokens = self._of_tokens("labels", rows["labels"], where, ignored=IGNORED)
        labels, _ = self._padded(tokens, first, where, IGNORED)
        return {**found, **targets(labels, self.padding, self.start)}

    def _padded(self, tokens: list[list[int]], first: int, where: str, padding: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, T), then padding, and their mask."""
        ids = torch.full((len(tokens), self.length), padding, dtype=torch.int64, device="cpu")
        mask = torch.zeros_like(ids)
        for i, row in enumerate(tokens):
            if not row:
                raise GroupSearchError(
                    f"Found no token in row {first + i} of {where}. Leave out empty rows: dataset.filter(...)."
                )
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64, device="cpu")
            mask[i, : len(row)] = 1
        found = ids[mask == 1]
        if not (int(found.min()) >= 0 and int(found.max()) < self.vocabulary):
            raise GroupSearchError(
                f"Expected tokens from 0 to {self.vocabulary - 1}, the vocabulary of {self.text}, found "
                f"{int(found.min())} to {int(found.max())} in {where}. Use the tokenizer that belongs to the model."
            )
        return ids, mask

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.text, self.processor)

    def _of_texts(self, column: str, texts: list[Any], first: int, where: str) -> list[list[int]]:
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise GroupSearchError(
                    f"Expected text in row {first + i} of the column {column} of {where}, found {text!r}. Mend it."
                )
        # Some tokenizers mark what is to be made otherwise than what it is made of.
        told = {"text_target" if column == "target" else "text": texts}
        tokens: list[list[int]] = self._tokenizer(**told, truncation=True, max_length=self.length)["input_ids"]
        return tokens

    def _of_tokens(
        self,
        column: str,
        tokens: list[Any],
        where: str,
        attention_mask: list[Any] | None = None,
        ignored: int | None = None,
    ) -> list[list[int]]:
        try:
            if attention_mask is not None:
                tokens = [list(compress(row, mask)) for row, mask in zip(tokens, attention_mask, strict=True)]
            return [[int(token) for token in row if token != ignored][: self.length] for row in tokens]
        except TypeError as error:
            raise GroupSearchError(
                f"Expected a list of whole numbers in each row of the column {column} of {where}, found another "
                f"thing. Write what the tokenizer returns as input_ids."
            ) from error


@dataclass(frozen=True)
class ImageReader:
    """Columns ``pixel_values`` (numbers, as the model takes them) or ``image`` (pictures): (B, C, H, W).

    Pictures are scaled and normalised as the processor says that was saved with the model.

    Attributes:
        text: the workload, for errors.
        shape: C, H and W.
        dtype: name of the numbers' type.
        processor: folder with a ``preprocessor_config.json``.
    """

    text: str
    shape: tuple[int, int, int]
    dtype: str
    processor: str

    def choose(self, columns: tuple[str, ...], where: str) -> tuple[str, ...]:
        """``pixel_values`` if it is there, else ``image``."""
        return ("pixel_values",) if "pixel_values" in columns else _only("image", "pixel_values", columns, where)

    def read(self, rows: Mapping[str, list[Any]], first: int, where: str) -> dict[str, Tensor]:
        """``pixel_values``, (B, C, H, W)."""
        try:
            pixels = self._pixels(rows)
        except (TypeError, ValueError) as error:
            raise GroupSearchError(
                f"Expected every image of {where} to become numbers of shape {self.shape}, found something else from "
                f"row {first} on: {error}. Mend the rows, or the processor in {self.processor}."
            ) from error
        if tuple(pixels.shape[1:]) != self.shape:
            raise GroupSearchError(
                f"Expected images of shape {self.shape} (channels, height, width) for {self.text}, found "
                f"{tuple(pixels.shape[1:])} in {where}. Scale them, or mend the size in the processor's configuration."
            )
        return {"pixel_values": pixels.to(getattr(torch, self.dtype))}

    def _pixels(self, rows: Mapping[str, list[Any]]) -> Tensor:
        if "pixel_values" in rows:
            return torch.tensor(rows["pixel_values"], dtype=torch.float32, device="cpu")
        mode = "L" if self.shape[0] == 1 else "RGB"
        images = [image.convert(mode) for image in rows["image"]]
        processed: Tensor = self._processor(images, return_tensors="pt")["pixel_values"]
        return processed

    @cached_property
    def _processor(self) -> Any:
        remedy = (
            "Save the model's own there with processor.save_pretrained, or name its folder with processor=..., or give "
            "the data a column pixel_values in place of image."
        )
        return _load("AutoImageProcessor", "image processor", self.text, self.processor, _PROCESSOR_FILES, remedy)


def load_tokenizer(text: str, folder: str) -> Any:
    """The tokenizer that was saved in a folder.

    Raises:
        GroupSearchError: when there is none, or it cannot be read.
    """
    remedy = "Save the model's own there with tokenizer.save_pretrained, or name its folder with processor=..."
    return _load("AutoTokenizer", "tokenizer", text, folder, _TOKENIZER_FILES, remedy)


def copy_processor(folder: str, to: Path) -> None:
    """Copy what a folder has of a tokenizer and an image processor, so that a saved model has its own."""
    for file in (*_TOKENIZER_FILES, *_PROCESSOR_FILES, *_OTHER_FILES):
        if (Path(folder) / file).is_file():
            shutil.copyfile(Path(folder) / file, to / file)


def _load(auto_class: str, kind: str, text: str, folder: str, files: tuple[str, ...], remedy: str) -> Any:
    import transformers

    if not any((Path(folder) / file).is_file() for file in files):
        raise GroupSearchError(f"Expected a saved {kind} for {text} in {folder}, found no {files[0]}. {remedy}")
    try:
        return getattr(transformers, auto_class).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers thinks of a file that it cannot read
        found = " ".join(str(error).split("\n\n")[0].split()).rstrip(".")
        raise GroupSearchError(f"The {kind} in {folder} could not be read for {text}: {found}. {remedy}") from error


def _only(wanted: str, other: str, columns: tuple[str, ...], where: str) -> tuple[str, ...]:
    if wanted in columns:
        return (wanted,)
    raise GroupSearchError(
        f"Expected a column {wanted} or {other} in {where}, found {', '.join(columns)}. Rename the column with "
        f"rename_column."
    )


# -- A data set of a local folder, as ``Dataset.save_to_disk`` of the datasets package writes it, for hf: models
#
# A row is an example: what is clipped, and what the privacy is of. Nothing is downloaded, and nothing
# of the data is written anywhere.

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


# -- What a transformers model is trained on and judged by, when it is given a data set of a local folder

DATA_SETTINGS = ("processor", "validation", "metric")
_METRICS = ("accuracy", "negative-loss")


def hub_data(text: str, settings: Mapping[str, Any], config: Any, task: Task, saved: str) -> Data:
    """The data of the folder ``settings["data"]``, as tensors that the model takes.

    Args:
        text: the workload, for errors.
        settings: ``data``, and maybe ``processor`` (folder of the tokenizer or image processor),
            ``validation`` (share of the rows to judge by) and ``metric`` (accuracy or negative-loss).
        config: the model's configuration; gets the padding token where it has none and needs one.
        task: what the model is asked to do.
        saved: folder where the tokenizer or image processor is when no other is given.

    Raises:
        GroupSearchError: for a setting without sense, for a task that needs columns of its own, and see
            :func:`groupsearch.workloads.data.read_data`.
    """
    require_choice(text, "metric", settings.get("metric", _METRICS[0]), _METRICS)
    share = settings.get("validation")
    if share is not None and not (isinstance(share, (int, float)) and 0 < share < 1):
        raise GroupSearchError(f"Expected validation of {text} to be a share between 0 and 1, found {share!r}.")
    labels = int(settings["num_labels"]) if task.labelled else 0
    request = DataRequest(text, settings["data"], share, labels)
    return read_data(request, _reader(text, settings, config, task, settings.get("processor", saved)))


def with_data(workload: Workload, data: Data, task: Task) -> Workload:
    """The workload with data to train on, whose batches are those data, and with what judges it."""
    metric = workload.settings.get("metric", "accuracy" if task.labelled else "negative-loss")

    def negative_loss(model: nn.Module, batch: Batch) -> Tensor:
        return -task.loss(model, batch)

    return replace(
        workload,
        make_batch=lambda batch_size: first_examples(data.train, batch_size),
        metric=task.accuracy if metric == "accuracy" else negative_loss,
        metric_name=task.accuracy_name if metric == "accuracy" else "negative loss",
        metric_is_share=metric == "accuracy",
        data=data,
        training=training_defaults(data.train_size),
        settings={**workload.settings, "metric": metric},
    )


def _reader(text: str, settings: Mapping[str, Any], config: Any, task: Task, processor: str) -> Reader:
    if not task.text:
        return ImageReader(text, image_shape(config), settings["dtype"], processor)
    padding = _padding(text, config, processor)
    if padding is None and task.labelled:
        raise GroupSearchError(
            f"Expected a padding token for {text}, found none in its configuration nor in a tokenizer in {processor}. "
            "Set pad_token_id in config.json, or tokenizer.pad_token (to tokenizer.eos_token, say), and save it again."
        )
    if task.labelled:
        config.pad_token_id = padding
    # Where tokens are predicted, padding comes after all that counts, or is masked, and any token will do.
    start = decoder_start(config) if task.auto_class == "AutoModelForSeq2SeqLM" else None
    return TextReader(text, settings["sequence_length"], config.vocab_size, processor, padding or 0, start)


def _padding(text: str, config: Any, processor: str) -> int | None:
    if getattr(config, "pad_token_id", None) is not None:
        return int(config.pad_token_id)
    try:
        found = load_tokenizer(text, processor).pad_token_id
    except GroupSearchError:  # tokens may be in the data already, and then none is needed
        return None
    return None if found is None else int(found)
