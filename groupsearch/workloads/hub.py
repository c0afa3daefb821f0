"""hf:NAME: models of transformers from a configuration, with random weights or those of a folder, without network.

Apart from the catalogue, as it needs transformers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

# -- Adapters on transformers models, by way of the peft package -----------------------------------


@dataclass(frozen=True)
class _Method:
    """A method of peft.

    Attributes:
        config: the class of its configuration.
        size: the field that the setting of the method's name gives; empty where the setting says yes or no.
        example: what to give, in words.
        options: further settings, each called ``{method}_{option}``.
        fixed: fields that make the method what it is.
        known: where peft names layers for types of models, by the field that they belong in.
    """

    config: str
    size: str
    example: str
    options: tuple[str, ...] = ("head",)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, str] = field(default_factory=dict)


_TOKENS = "num_virtual_tokens"
_LOW_RANK = ("alpha", "targets", "dropout", "head")
_LORA_KNOWN = {"target_modules": "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"}
_IA3_KNOWN = {
    "target_modules": "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING",
    "feedforward_modules": "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
}
METHODS: Mapping[str, _Method] = {
    "lora": _Method("LoraConfig", "r", "the rank, as in lora=8", _LOW_RANK, known=_LORA_KNOWN),  # arXiv 2106.09685
    "dora": _Method(  # arXiv 2402.09353
        "LoraConfig", "r", "the rank, as in dora=8", _LOW_RANK, {"use_dora": True}, _LORA_KNOWN
    ),
    "ia3": _Method("IA3Config", "", "ia3=true", ("targets", "head"), known=_IA3_KNOWN),  # arXiv 2205.05638
    "prompt": _Method(  # arXiv 2104.08691
        "PromptTuningConfig", _TOKENS, "the number of tokens, as in prompt=20"
    ),
    "prefix": _Method(  # arXiv 2101.00190
        "PrefixTuningConfig", _TOKENS, "the number of tokens, as in prefix=20"
    ),
}
ADAPTER_SETTINGS = tuple(
    key for name, method in METHODS.items() for key in (name, *(f"{name}_{option}" for option in method.options))
)
_FIELDS = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
_TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
}
_ALL_LINEAR = "all-linear"
_KINDS = ("Linear", "Conv1D", "Conv2d", "Embedding")  # what peft puts adapters on
# Where peft names no layers for a type of model.
_USUAL = (("query", "value"), ("q_proj", "v_proj"), ("q", "v"), ("c_attn",), ("query_key_value",))


def read_adapter(text: str, settings: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """The settings of the method that is asked for, complete; empty where none is.

    Args:
        text: the workload, for errors.
        settings: a key of :data:`METHODS` with its size, and its options: ``_alpha`` (adapters are scaled by
            alpha / rank; the rank if not given), ``_targets`` (names of layers, separated by commas, or
            ``all-linear``), ``_dropout``, and ``_head``, whether the head is trained, too (true for classifiers).
        task: what the model is asked to do.

    Raises:
        GroupSearchError: for a value outside its range, two methods at once, options of another method, one that
            makes tokens for a model that takes none, or no peft.
    """
    given = [key for key in ADAPTER_SETTINGS if settings.get(key) is not None]
    given = [key for key in given if key not in METHODS or METHODS[key].size or settings[key] is not False]
    chosen = [key for key in given if key in METHODS]
    if len(chosen) > 1:
        raise GroupSearchError(f"Found {' and '.join(chosen)} of {text}, which are one method each. Give one of them.")
    for key in given:
        name = key.partition("_")[0]
        if name not in chosen:
            raise GroupSearchError(
                f"Found {key} of {text} without {name}. Give {METHODS[name].example}, or leave it out."
            )
    if not chosen:
        return {}
    name, method = chosen[0], METHODS[chosen[0]]
    if not task.text and "targets" not in method.options:
        raise GroupSearchError(
            f"Found {name} of {text}, which puts tokens before a text, for {task.summary}. Give "
            "lora=8, dora=8 or ia3=true."
        )
    size = read_settings(text, {name: settings[name]}, {name: 1 if method.size else True})[name]
    every = {"alpha": float(size), "targets": "", "dropout": 0.0, "head": task.labelled}
    defaults = {f"{name}_{option}": every[option] for option in method.options}
    asked = {key: settings[key] for key in defaults if settings.get(key) is not None}
    asked |= {key: ",".join(value) for key, value in asked.items() if isinstance(value, (list, tuple))}
    read = read_settings(text, asked, defaults)
    alpha, dropout = read.get(f"{name}_alpha", 1.0), read.get(f"{name}_dropout", 0.0)
    if not 0 < alpha < float("inf"):
        raise GroupSearchError(f"Expected {name}_alpha of {text} to be above zero, found {alpha:g}.")
    if not 0 <= dropout < 1:
        raise GroupSearchError(f"Expected {name}_dropout of {text} to be from 0 to 1, found {dropout:g}.")
    _peft(text, name)
    return {name: size, **{key: None if value == "" else value for key, value in read.items()}}


def add_adapter(text: str, model: Any, task: str, settings: Mapping[str, Any], base: str = "") -> nn.Module:
    """A transformers model with adapters, of which they alone are trained, and the head where it is to be.

    Of classifications the head, with a pooler that belongs to it, is saved with the adapters even where it is frozen:
    it may have begun at random.

    Args:
        text: the workload, for errors.
        model: is changed.
        task: a key of :data:`groupsearch.workloads.tasks.TASKS`.
        settings: of :func:`read_adapter`.
        base: what the weights are called that lie below the adapters; empty where they are random.

    Raises:
        GroupSearchError: when there are no layers of the names asked for, or peft does not know such a model.
    """
    name = next(name for name in METHODS if name in settings)
    method, peft, head = METHODS[name], _peft(text, name), _head(model)
    made = {_FIELDS[option]: settings[f"{name}_{option}"] for option in method.options if option in _FIELDS}
    if method.size:
        made[method.size] = settings[name]
    if "targets" in method.options:
        made |= _targets(text, name, peft, model, head, settings[f"{name}_targets"])
    trains_head = settings[f"{name}_head"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D, of tied heads, of what peft asks transformers
        try:
            config = getattr(peft, method.config)(
                **made,
                **method.fixed,
                modules_to_save=list(head) if task.endswith("classification") or trains_head else None,
                task_type=_TASK_TYPES.get(task),
            )
            adapted: Any = peft.get_peft_model(model, config)
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
            raise GroupSearchError(
                f"peft could not put {name} on {text} ({type(model).__name__}): {_paragraph(error)}. Choose another of "
                f"{', '.join(METHODS)}."
            ) from error
    adapted.active_peft_config.base_model_name_or_path = base
    if not trains_head:
        for parameter_name, parameter in adapted.named_parameters():
            if ".modules_to_save." in parameter_name:
                parameter.requires_grad_(False)
    whole: nn.Module = adapted
    return whole


def _peft(text: str, method: str) -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise GroupSearchError(
            f"{text} with {method} needs the peft package, which could not be imported: {error}. "
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


def _targets(
    text: str, name: str, peft: ModuleType, model: Any, head: Sequence[str], asked: str | None
) -> dict[str, list[str] | str]:
    """The names of the layers to adapt, each of which there is, by the fields of peft's configuration."""
    layers, kind = _layers(model, head), model.config.model_type
    known = {key: getattr(peft.utils, names).get(kind) for key, names in METHODS[name].known.items()}
    targets: Sequence[str] | str
    if asked == _ALL_LINEAR:
        targets = _ALL_LINEAR
    elif asked:
        targets = [target.strip() for target in asked.split(",") if target.strip()]
        missing = [target for target in targets if not any(_is_called(layer, target) for layer in layers)]
        if missing or not targets:
            raise GroupSearchError(
                f"Expected {name}_targets of {text} to name layers below its head, found none called "
                f"{', '.join(missing) or repr(asked)}. {_remedy(name, layers)}"
            )
    else:
        usual = [names for names in (known["target_modules"], *_USUAL) if names and _are_there(names, layers)]
        if not usual:
            raise GroupSearchError(
                f"Expected {name}_targets of {text}, for whose type ({kind}) no layers are usual, found none. "
                f"{_remedy(name, layers)}"
            )
        targets = usual[0] if isinstance(usual[0], str) else list(usual[0])
    parts = {key: [each for each in names or () if each in targets] for key, names in known.items()}
    return {**parts, "target_modules": targets}


def _are_there(names: Sequence[str] | str, layers: Sequence[str]) -> bool:
    # A text is an expression of peft's own.
    return isinstance(names, str) or all(any(_is_called(layer, name) for layer in layers) for name in names)


def _layers(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Qualified names of the layers below the head that an adapter can be put on."""
    found = [name for name, module in model.named_modules() if type(module).__name__ in _KINDS]
    return [name for name in found if not set(name.split(".")) & set(head)]


def _is_called(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _remedy(method: str, layers: Sequence[str]) -> str:
    names = list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
    shown = ", ".join(names) or "none"
    example = ",".join(names[:2]) or "query,value"
    return (
        f"Layers that can be adapted are called {shown}. Give some of them, as in {method}_targets={example}, or "
        f"{method}_targets={_ALL_LINEAR}."
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
    **dict.fromkeys(ADAPTER_SETTINGS),
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
    :func:`groupsearch.workloads.data.hub_data`. With the setting ``lora``, a rank, or another of
    :data:`METHODS`, adapters are trained and the weights are frozen; see :func:`read_adapter`.

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
    adapter = read_adapter(text, settings, task)
    plain = {key: value for key, value in settings.items() if key not in ADAPTER_SETTINGS}
    tokens = sum(adapter.get(name, 0) for name, method in METHODS.items() if method.size == _TOKENS)
    settings = _complete(text, plain, config, task, tokens) | {k: v for k, v in adapter.items() if v is not None}
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
            frozen_head = any(key.endswith("_head") and not trained for key, trained in adapter.items())
            how["whole"] = frozen_head and not task.labelled
            return adapted(load_pretrained(transformers, text, task.auto_class, weights, own_config, **how))
        try:
            model: nn.Module = getattr(transformers, task.auto_class).from_config(own_config, **how)
        except (ValueError, ImportError) as error:
            raise GroupSearchError(
                f"transformers could not build {text}: {_paragraph(error)}. Change the setting or the configuration."
            ) from error
        return adapted(model)

    def adapted(model: nn.Module) -> nn.Module:
        return (add_adapter(text, model, task_name, adapter, str(weights or "")) if adapter else model).train()

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


def _complete(text: str, settings: Mapping[str, Any], config: Any, task: Task, tokens: int) -> dict[str, Any]:
    """Settings left open are filled from the architecture; those without meaning for the task are refused.

    Of the positions that a model has, so many ``tokens`` are taken by an adapter.
    """
    for key, meaningful in (("sequence_length", task.text), ("num_labels", task.labelled)):
        if settings[key] is not None and not meaningful:
            raise GroupSearchError(f"{text} has no setting {key!r}: it means nothing in {task.summary}. Leave it out.")
    settings = {key: value for key, value in settings.items() if value is not None}
    if task.labelled:
        settings.setdefault("num_labels", config.num_labels)
    if task.text:
        positions = _longest(config)
        longest = None if positions is None else positions - tokens
        settings.setdefault("sequence_length", _SEQUENCE_LENGTH if longest is None else min(_SEQUENCE_LENGTH, longest))
        if longest is not None and not 0 < settings["sequence_length"] <= longest:
            besides = f" less the {tokens} of the adapter" if tokens else ""
            raise GroupSearchError(
                f"Expected sequence_length of {text} to be at most {longest}, the positions it has{besides}, "
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
