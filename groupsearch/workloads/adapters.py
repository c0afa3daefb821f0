"""LoRA on transformers models (arXiv 2106.09685), by way of the peft package."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import nn

from groupsearch.errors import GroupSearchError
from groupsearch.workloads.settings import read_settings

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
