"""hf:NAME: models of transformers from a configuration, with random weights or those of a folder, without network.

Apart from the catalogue, as it needs transformers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
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
from groupsearch.workloads.data import DATA_SETTINGS, copy_processor, hub_data, with_data
from groupsearch.workloads.saving import Save, Saved, load_pretrained, save_weights, weights_folder
from groupsearch.workloads.settings import read_settings, require_choice
from groupsearch.workloads.tasks import TASKS, Task, choose_task
from groupsearch.workloads.workload import Workload, seeded

# -- LoRA on transformers models (arXiv 2106.09685), by way of the peft package --------------------

LORA_SETTINGS = ("lora_alpha", "lora_targets", "lora_dropout", "lora_head")
_TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
}
_ALL_LINEAR = "all-linear"
_KINDS = ("Linear", "Conv1D", "Conv2d", "Embedding")  # what peft puts LoRA on
# Where peft names no layers for a type of model.
_USUAL = (("query", "value"), ("q_proj", "v_proj"), ("q", "v"), ("c_attn",), ("query_key_value",))


def read_lora(text: str, settings: Mapping[str, Any], *, labelled: bool) -> dict[str, Any]:
    """The settings that begin with ``lora``, complete; empty where ``lora`` is not given.

    Args:
        text: the workload, for errors.
        settings: ``lora``, the rank; ``lora_alpha`` (adapters are scaled by alpha / rank; the rank if not given),
            ``lora_targets`` (names of layers, separated by commas, or ``all-linear``), ``lora_dropout``, and
            ``lora_head``, whether the head is trained, too.
        labelled: whether the head is of a classification, and then trained if nothing is said.

    Raises:
        GroupSearchError: for a value outside its range, settings of an adapter without its rank, or no peft.
    """
    given = [key for key in LORA_SETTINGS if settings.get(key) is not None]
    if settings.get("lora") is None:
        if given:
            raise GroupSearchError(
                f"Found {', '.join(given)} of {text} without lora. Give the rank, as in lora=8, or leave it out."
            )
        return {}
    rank = read_settings(text, {"lora": settings["lora"]}, {"lora": 1})["lora"]
    defaults = {"lora_alpha": float(rank), "lora_targets": "", "lora_dropout": 0.0, "lora_head": labelled}
    targets = settings.get("lora_targets")
    asked = {"lora_targets": ",".join(targets)} if isinstance(targets, (list, tuple)) else {}
    read = read_settings(text, {key: settings[key] for key in given} | asked, defaults)
    if not 0 < read["lora_alpha"] < float("inf"):
        raise GroupSearchError(f"Expected lora_alpha of {text} to be above zero, found {read['lora_alpha']:g}.")
    if not 0 <= read["lora_dropout"] < 1:
        raise GroupSearchError(f"Expected lora_dropout of {text} to be from 0 to 1, found {read['lora_dropout']:g}.")
    _peft(text)
    return {"lora": rank, **read, "lora_targets": read["lora_targets"] or None}


def add_lora(text: str, model: Any, task: str, settings: Mapping[str, Any], base: str = "") -> nn.Module:
    """A transformers model with adapters, of which they alone are trained, and the head where it is to be.

    Of classifications the head, with a pooler that belongs to it, is saved with the adapters even where it is frozen:
    it may have begun at random.

    Args:
        text: the workload, for errors.
        model: is changed.
        task: a key of :data:`groupsearch.workloads.tasks.TASKS`.
        settings: of :func:`read_lora`.
        base: what the weights are called that lie below the adapters; empty where they are random.

    Raises:
        GroupSearchError: when there are no layers of the names asked for.
    """
    peft = _peft(text)
    head = _head(model)
    labelled = task.endswith("classification")
    targets = _targets(text, peft, model, head, settings["lora_targets"])
    config = peft.LoraConfig(
        r=settings["lora"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
        target_modules=targets,
        modules_to_save=list(head) if labelled or settings["lora_head"] else None,
        task_type=_TASK_TYPES.get(task),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D, of tied heads, of what peft asks transformers
        adapted: Any = peft.get_peft_model(model, config)
    adapted.active_peft_config.base_model_name_or_path = base
    if not settings["lora_head"]:
        for name, parameter in adapted.named_parameters():
            if ".modules_to_save." in name:
                parameter.requires_grad_(False)
    made: nn.Module = adapted
    return made


def _peft(text: str) -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise GroupSearchError(
            f"{text} with lora needs the peft package, which could not be imported: {error}. "
            "Install it with `pip install 'groupsearch[peft]'`."
        ) from error
    return peft


def _head(model: Any) -> tuple[str, ...]:
    """Names of what lies above the body: its own modules with parameters, and a pooler wherever it is kept."""
    if hasattr(model, model.base_model_prefix):
        own = [name for name, child in model.named_children() if name != model.base_model_prefix]
    else:  # encoder and decoder lie side by side with what tells tokens
        own = [name for name, child in model.named_children() if child is model.get_output_embeddings()]
    own = [name for name in own if any(True for _ in model.get_submodule(name).parameters())]
    poolers = [name.rpartition(".")[2] for name, _ in model.named_modules() if name.endswith(".pooler")]
    return tuple(dict.fromkeys((*own, *poolers)))


def _targets(text: str, peft: ModuleType, model: Any, head: Sequence[str], asked: str | None) -> list[str] | str:
    """The names of the layers to adapt, each of which there is."""
    layers = _layers(model, head)
    if asked == _ALL_LINEAR:
        return _ALL_LINEAR
    if asked:
        wanted = [name.strip() for name in asked.split(",") if name.strip()]
        missing = [name for name in wanted if not any(_is_called(layer, name) for layer in layers)]
        if wanted and not missing:
            return wanted
        raise GroupSearchError(
            f"Expected lora_targets of {text} to name layers below its head, found none called "
            f"{', '.join(missing) or repr(asked)}. {_remedy(layers)}"
        )
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    for names in (known, *_USUAL):
        if isinstance(names, str):
            return names  # an expression of peft's own
        if names and all(any(_is_called(layer, name) for layer in layers) for name in names):
            return list(names)
    raise GroupSearchError(
        f"Expected lora_targets of {text}, for whose type ({model.config.model_type}) no layers are usual, found none. "
        f"{_remedy(layers)}"
    )


def _layers(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Qualified names of the layers below the head that an adapter can be put on."""
    found = [name for name, module in model.named_modules() if type(module).__name__ in _KINDS]
    return [name for name in found if not set(name.split(".")) & set(head)]


def _is_called(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _remedy(layers: Sequence[str]) -> str:
    names = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
    shown = ", ".join(names) or "none"
    example = ",".join(names[:2]) or "query,value"
    return (
        f"Layers that can be adapted are called {shown}. Give some of them, as in lora_targets={example}, or "
        f"lora_targets={_ALL_LINEAR}."
    )


# -- hub -------------------------------------------------------------------------------------------

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
    :func:`groupsearch.workloads.data.hub_data`. With the setting ``lora``, a rank, adapters are trained and the
    weights are frozen; see :func:`groupsearch.workloads.hub.read_lora`.

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
