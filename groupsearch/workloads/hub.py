"""hf:NAME: models of transformers from a configuration, with random weights or those of a folder, without network."""

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

from groupsearch.errors import GroupSearchError
from groupsearch.workloads.adapters import add_lora, read_lora
from groupsearch.workloads.columns import copy_processor
from groupsearch.workloads.hub_data import DATA_SETTINGS, hub_data, with_data
from groupsearch.workloads.pretrained import load_pretrained, weights_folder
from groupsearch.workloads.saving import Save, Saved, save_weights
from groupsearch.workloads.settings import read_settings, require_choice
from groupsearch.workloads.tasks import TASKS, Task, choose_task
from groupsearch.workloads.workload import Workload, seeded

HUB_PREFIX = "hf:"
HUB_SETTINGS: Mapping[str, Any] = {
    "batch_size": 16,
    "sequence_length": None,
    "attn_implementation": "sdpa",
    "dtype": "float32",
    "num_labels": None,
    "dropout": "off",
    "task": None,
    "weights": None,
    "data": None,
    "processor": None,
    "validation": None,
    "metric": None,
    "lora": None,
    "lora_alpha": None,
    "lora_targets": None,
    "lora_dropout": None,
    "lora_head": None,
}
_CHOICES = {
    "attn_implementation": ("sdpa", "eager"),
    "dtype": ("float32", "float64", "bfloat16", "float16"),
    "dropout": ("off", "config"),
}
_FOLDERS = ("weights", "data", "processor")
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
    """The workload of ``hf:NAME``.

    NAME is a folder with a ``config.json``, or a name on the hub whose configuration is in the local
    cache or shipped with the package; nothing is downloaded. The head follows the model type:
    next-token prediction for decoders, sequence classification for encoders, image
    classification, sequence to sequence. The model is in train mode, without a key-value cache,
    and without dropout unless ``dropout=config``.

    Its weights are those of the folder NAME, where it holds any, or of the setting ``weights``; else they
    are random. With the setting ``data``, a folder, it can be trained; see
    :func:`groupsearch.workloads.hub_data.hub_data`. With the setting ``lora``, a rank, adapters are trained and the
    weights are frozen; see :func:`groupsearch.workloads.adapters.read_lora`.

    Raises:
        GroupSearchError: when transformers is missing, the name is not known here, a setting is wrong,
            or a folder does not hold what it should.
        UnsupportedModelError: when the architecture has none of these heads.
    """
    settings = _read(text, given)
    transformers = _transformers(text)
    name = _name(text)
    config = _configuration(transformers, text, name)
    task_name = choose_task(text, config, settings["task"])
    task = TASKS[task_name]
    lora = read_lora(text, settings, labelled=task.labelled)
    settings = _complete(text, settings, config, task) | {key: lora[key] for key in lora if lora[key] is not None}
    found = _configure(config, settings, task)
    weights = weights_folder(text, name, settings.get("weights"))
    data = hub_data(text, settings, config, task, str(weights or name)) if "data" in settings else None

    def make() -> nn.Module:
        # from_config sets the attention of the configuration it is given: let every model have its own.
        own_config = type(config).from_dict(config.to_dict())
        how: dict[str, Any] = {
            "attn_implementation": settings["attn_implementation"],
            "dtype": getattr(torch, settings["dtype"]),
        }
        if weights is not None and torch.get_default_device().type != "meta":
            # A head that is neither trained nor saved must not begin at random.
            how["whole"] = bool(lora) and not task.labelled and not lora["lora_head"]
            return adapted(load_pretrained(transformers, text, task.auto_class, weights, own_config, **how))
        try:
            model: nn.Module = getattr(transformers, task.auto_class).from_config(own_config, **how)
        except (ValueError, ImportError) as error:
            raise GroupSearchError(
                f"transformers could not build {text}: {_paragraph(error)}. Change the setting or the configuration."
            ) from error
        return adapted(model)

    def adapted(model: nn.Module) -> nn.Module:
        return (add_lora(text, model, task_name, lora, str(weights or "")) if lora else model).train()

    workload = Workload(
        name=text,
        build=seeded(make),
        make_batch=lambda batch_size: task.make_batch(config, settings, batch_size),
        loss=task.loss,
        batch_size=settings["batch_size"],
        settings={**settings, "task": task_name},
        save=_saver(found, settings.get("processor", str(weights or name))),
    )
    return workload if data is None else with_data(workload, data, task)


def _read(text: str, given: Mapping[str, Any]) -> dict[str, Any]:
    settings = read_settings(text, given, HUB_SETTINGS)
    for key, choices in _CHOICES.items():
        require_choice(text, key, settings[key], choices)
    for key in ("sequence_length", "num_labels"):
        if settings[key] is not None:
            settings |= read_settings(text, {key: settings[key]}, {key: 1})
    idle = [key for key in DATA_SETTINGS if settings[key] is not None]
    if idle and settings["data"] is None:
        raise GroupSearchError(f"Found {', '.join(idle)} of {text} without data. Give data=FOLDER, or leave it out.")
    folders = {key: str(Path(str(settings[key])).expanduser()) for key in _FOLDERS if settings[key] is not None}
    return settings | folders


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


def _configure(config: Any, settings: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Set a configuration up for training; what it said before of what ends with it."""
    found = {"use_cache": getattr(config, "use_cache", True)}
    config.use_cache = False
    if task.labelled:
        config.num_labels = settings["num_labels"]
    if task.text and task.labelled and getattr(config, "pad_token_id", None) is None and "data" not in settings:
        config.pad_token_id = 0  # decoders look for the last token before the padding; the made-up batches have none
    if settings["dropout"] == "off":
        for key, value in config.to_dict().items():
            if ("drop" in key) and isinstance(value, float):
                found[key] = value
                setattr(config, key, 0.0)
    return found


def _saver(found: Mapping[str, Any], processor: str) -> Save:
    """Writes a model with its configuration as it was found, and with what makes tensors of its inputs."""

    def save(model: Any, folder: Path, place: str) -> Saved:
        ours = {key: getattr(model.config, key) for key in found}
        try:
            for key, value in found.items():
                setattr(model.config, key, value)
            saved = save_weights(model, folder, place)
        finally:
            for key, value in ours.items():
                setattr(model.config, key, value)
        copy_processor(processor, folder)
        return saved

    return save


def _transformers(text: str) -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise GroupSearchError(
            f"{text} needs the transformers package, which could not be imported: {error}. "
            "Install it with `pip install 'groupsearch[hf]'`."
        ) from error
    return transformers


def _name(text: str) -> str:
    name = text.removeprefix(HUB_PREFIX)
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _configuration(transformers: ModuleType, text: str, name: str) -> Any:
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
