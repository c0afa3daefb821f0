"""Columns of a data set, as the tensors that a transformers model takes.

Shapes: B rows, T positions, C channels, H by W pixels.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from groupsearch.errors import GroupSearchError

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

    Longer rows are cut. Masked tokens are left out, so that padding comes last.

    Attributes:
        text: the workload, for errors.
        length: T.
        vocabulary: how many tokens the model knows.
        processor: folder of a saved tokenizer.
        padding: token that stands where there is none.
    """

    text: str
    length: int
    vocabulary: int
    processor: str
    padding: int

    def choose(self, columns: tuple[str, ...], where: str) -> tuple[str, ...]:
        """``input_ids`` with its mask if there is one, else ``text``."""
        if "input_ids" in columns:
            return tuple(name for name in ("input_ids", "attention_mask") if name in columns)
        return _only("text", "input_ids", columns, where)

    def read(self, rows: Mapping[str, list[Any]], first: int, where: str) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, both (B, T) int64."""
        tokens = self._tokens(rows, first, where)
        ids = torch.full((len(tokens), self.length), self.padding, dtype=torch.int64, device="cpu")
        mask = torch.zeros_like(ids)
        for i, row in enumerate(tokens):
            if not row:
                raise GroupSearchError(
                    f"Found no token in row {first + i} of {where}. Leave out empty rows: dataset.filter(...)."
                )
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64, device="cpu")
            mask[i, : len(row)] = 1
        if not (int(ids.min()) >= 0 and int(ids.max()) < self.vocabulary):
            raise GroupSearchError(
                f"Expected tokens from 0 to {self.vocabulary - 1}, the vocabulary of {self.text}, found "
                f"{int(ids.min())} to {int(ids.max())} in {where}. Use the tokenizer that belongs to the model."
            )
        return {"input_ids": ids, "attention_mask": mask}

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.text, self.processor)

    def _tokens(self, rows: Mapping[str, list[Any]], first: int, where: str) -> list[list[int]]:
        if "text" in rows:
            for i, text in enumerate(rows["text"]):
                if not isinstance(text, str):
                    raise GroupSearchError(
                        f"Expected text in row {first + i} of {where}, found {text!r}. Mend the row."
                    )
            tokens: list[list[int]] = self._tokenizer(rows["text"], truncation=True, max_length=self.length)[
                "input_ids"
            ]
            return tokens
        tokens = rows["input_ids"]
        if "attention_mask" in rows:
            tokens = [list(compress(row, mask)) for row, mask in zip(tokens, rows["attention_mask"], strict=True)]
        try:
            return [[int(token) for token in row[: self.length]] for row in tokens]
        except TypeError as error:
            raise GroupSearchError(
                f"Expected a list of whole numbers in each row of the column input_ids of {where}, found another "
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
