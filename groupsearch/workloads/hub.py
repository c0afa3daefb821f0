"""hf:NAME: models of transformers, built from a configuration with random weights, without network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.workloads.settings import read_settings, require_choice
from groupsearch.workloads.tasks import TASKS, Task
from groupsearch.workloads.workload import Workload, seeded

HUB_PREFIX = "hf:"
HUB_SETTINGS: Mapping[str, Any] = {
    "batch_size": 16,
    "sequence_length": None,
    "attn_implementation": "sdpa",
    "dtype": "float32",
    "num_labels": None,
    "dropout": "off",
}
_CHOICES = {
    "attn_implementation": ("sdpa", "eager"),
    "dtype": ("float32", "float64", "bfloat16", "float16"),
    "dropout": ("off", "config"),
}
_SEQUENCE_LENGTH = 128


@dataclass(frozen=True)
class Architecture:
    """A public configuration that is shipped as data.

    Attributes:
        summary: what it is, in one line.
        task: a key of :data:`groupsearch.workloads.tasks.TASKS`.
        config: the contents of its ``config.json``.
    """

    summary: str
    task: str
    config: Mapping[str, Any]


@cache
def known_architectures() -> dict[str, Architecture]:
    """The architectures that need neither network nor cache, by their name on the hub."""
    text = resources.files("groupsearch.workloads").joinpath("architectures.json").read_text(encoding="utf-8")
    return {name: Architecture(**fields) for name, fields in json.loads(text).items()}


def load_hub(text: str, given: Mapping[str, Any]) -> Workload:
    """The workload of ``hf:NAME``, with random weights.

    NAME is a folder with a ``config.json``, or a name on the hub whose configuration is in the local
    cache or shipped with the package; nothing is downloaded. The head follows the model type:
    next-token prediction for decoders, sequence classification for encoders, image
    classification, sequence to sequence. The model is in train mode, without a key-value cache,
    and without dropout unless ``dropout=config``.

    Raises:
        GroupSearchError: when transformers is missing, the name is not known here, or a setting is wrong.
        UnsupportedModelError: when the architecture has none of these heads.
    """
    settings = _read(text, given)
    transformers = _transformers(text)
    config = _configuration(transformers, text)
    task_name = _task_name(text, config)
    task = TASKS[task_name]
    settings = _complete(text, settings, config, task)
    _configure(config, settings, task)

    def make() -> nn.Module:
        auto_class = getattr(transformers, task.auto_class)
        dtype = getattr(torch, settings["dtype"])
        # from_config sets the attention of the configuration it is given: let every model have its own.
        own_config = type(config).from_dict(config.to_dict())
        attention = settings["attn_implementation"]
        try:
            model: nn.Module = auto_class.from_config(own_config, attn_implementation=attention, dtype=dtype)
        except (ValueError, ImportError) as error:
            raise GroupSearchError(
                f"transformers could not build {text}: {_paragraph(error)}. Change the setting or the configuration."
            ) from error
        return model.train()

    return Workload(
        name=text,
        build=seeded(make),
        make_batch=lambda batch_size: task.make_batch(config, settings, batch_size),
        loss=task.loss,
        batch_size=settings["batch_size"],
        settings={**settings, "task": task_name},
    )


def _read(text: str, given: Mapping[str, Any]) -> dict[str, Any]:
    settings = read_settings(text, given, HUB_SETTINGS)
    for key, choices in _CHOICES.items():
        require_choice(text, key, settings[key], choices)
    for key in ("sequence_length", "num_labels"):
        if settings[key] is not None:
            settings |= read_settings(text, {key: settings[key]}, {key: 1})
    return settings


def _complete(text: str, settings: Mapping[str, Any], config: Any, task: Task) -> dict[str, Any]:
    """Settings left open are filled from the architecture; those without meaning for the task are refused."""
    for key, meaningful in (("sequence_length", task.text), ("num_labels", task.labelled)):
        if settings[key] is not None and not meaningful:
            raise GroupSearchError(f"{text} has no setting {key!r}: it means nothing in {task.summary}. Leave it out.")
    settings = {key: value for key, value in settings.items() if value is not None}
    if task.labelled:
        settings.setdefault("num_labels", config.num_labels)
    if task.text:
        longest = _longest(config)
        settings.setdefault("sequence_length", min(_SEQUENCE_LENGTH, longest or _SEQUENCE_LENGTH))
        if longest is not None and settings["sequence_length"] > longest:
            raise GroupSearchError(
                f"Expected sequence_length of {text} to be at most {longest}, the positions it has, "
                f"found {settings['sequence_length']}."
            )
    return settings


def _longest(config: Any) -> int | None:
    positions: int | None = getattr(config, "max_position_embeddings", None)
    # The RoBERTa family numbers its positions from the padding index on.
    offset = config.pad_token_id + 1 if positions == 514 and config.pad_token_id is not None else 0
    return None if positions is None else positions - offset


def _configure(config: Any, settings: Mapping[str, Any], task: Task) -> None:
    config.use_cache = False
    if task.labelled:
        config.num_labels = settings["num_labels"]
    if settings["dropout"] == "off":
        for key, value in config.to_dict().items():
            if ("drop" in key) and isinstance(value, float):
                setattr(config, key, 0.0)


def _transformers(text: str) -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise GroupSearchError(
            f"{text} needs the transformers package, which could not be imported: {error}. "
            "Install it with `pip install 'groupsearch[hf]'`."
        ) from error
    return transformers


def _configuration(transformers: ModuleType, text: str) -> Any:
    name = text.removeprefix(HUB_PREFIX)
    shipped = known_architectures().get(name)
    if not name or (Path(name).is_dir() and not (Path(name) / "config.json").is_file() and shipped is None):
        raise GroupSearchError(
            f"Found no config.json in the folder {name or '.'}; {text} needs one there, or a known name."
        )
    try:
        return transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers thinks of a file that it cannot read
        if shipped is not None:
            return transformers.AutoConfig.for_model(**shipped.config)
        raise GroupSearchError(_unknown(text, name, error)) from error


def _unknown(text: str, name: str, error: Exception) -> str:
    if Path(name).is_dir():
        return f"The configuration in the folder {name} could not be read: {_paragraph(error)}. Mend its config.json."
    known = known_architectures()
    close = [HUB_PREFIX + match for match in get_close_matches(name, known, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"Found no configuration for {text} on this machine, and nothing is downloaded.{hint} Known without network "
        f"are {', '.join(known)}; for another model fetch its config.json first (`hf download {name} config.json`) "
        f"or name a folder that holds one."
    )


def _paragraph(error: Exception) -> str:
    return " ".join(str(error).split("\n\n")[0].split()).rstrip(".")


def _task_name(text: str, config: Any) -> str:
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    if kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and config.is_encoder_decoder:
        return "seq2seq-lm"
    if kind in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "image-classification"
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and kind in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return "sequence-classification"
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal-lm"
    heads = "; ".join(task.summary for task in TASKS.values())
    raise UnsupportedModelError(
        f"{text} is of type {kind!r}, for which there is none of these heads: {heads}. Write a factory that returns "
        "(model, batch, loss) and name it as path/to/file.py:factory."
    )
