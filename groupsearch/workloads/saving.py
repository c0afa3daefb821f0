"""The weights of a trained model as files, which the libraries they come from can load without groupsearch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from groupsearch.workloads.copies import copy_of
from groupsearch.workloads.pretrained import quiet

STATE = "model.safetensors"
_BASE = "base"


@dataclass(frozen=True)
class Saved:
    """What was written, and how it is loaded again.

    Attributes:
        what: in words.
        library: whose form it has.
        loading: Python that makes ``model`` of it.
        needs_model: whether that changes a ``model`` that the task makes.
        base: of adapters: the name of what lies below them.
    """

    what: str
    library: str
    loading: str
    needs_model: bool = False
    base: str | None = None


Save = Callable[[nn.Module, Path, str], Saved]


def save_weights(model: nn.Module, folder: Path, place: str) -> Saved:
    """Write a model into a folder.

    By ``save_pretrained`` where it is a model of transformers or peft (the adapters alone where nothing else is
    trained, with the weights below them where those have no name), and else a safetensors state dict.

    Args:
        model: is left as it is.
        folder: is there, and empty.
        place: what the folder will be called, for whoever loads it.
    """
    if _is_of(model, "peft", "PeftModel"):
        return _save_adapted(model, folder, place)
    if _is_of(model, "transformers", "PreTrainedModel"):
        _save_pretrained(model, folder)
        return Saved("all weights", "transformers", _from_pretrained("model", model, place))
    return _save_state(model, folder, place)


def _save_adapted(model: Any, folder: Path, place: str) -> Saved:
    import peft

    _save_pretrained(model, folder, save_embedding_layers=False)
    kept = {t.data_ptr() for t in peft.get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    if any(p.requires_grad and p.data_ptr() not in kept for p in model.parameters()):
        return _save_state(model, folder, place)
    config, base = model.peft_config[model.active_adapter], model.get_base_model()
    name = config.base_model_name_or_path or ""
    if not name:
        # Weights that were drawn at random are nowhere else. Taking adapters off changes a model.
        _save_pretrained(copy_of(model).unload(), folder / _BASE)  # type: ignore[operator]
        name = config.base_model_name_or_path = f"{place}/{_BASE}"
        config.save_pretrained(str(folder))
        config.base_model_name_or_path = ""
    if not _is_of(base, "transformers", "PreTrainedModel"):
        made = "# base: the model that the adapters were put on"
    else:
        made = _from_pretrained("base", base, name)
    loading = f'{made}\nmodel = PeftModel.from_pretrained(base, "{place}")'
    return Saved("adapters and what else was trained", "peft", f"from peft import PeftModel\n{loading}", base=name)


def _save_state(model: nn.Module, folder: Path, place: str) -> Saved:
    from safetensors.torch import save_model

    save_model(model, str(folder / STATE))
    loading = f'from safetensors.torch import load_model\n\nload_model(model, "{place}/{STATE}")'
    return Saved("all weights", "safetensors", loading, needs_model=True)


def _save_pretrained(model: Any, folder: Path, **how: Any) -> None:
    transformers: Any = sys.modules.get("transformers")
    silence: AbstractContextManager[None] = nullcontext() if transformers is None else quiet(transformers)
    with silence, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of generation settings and model cards
        model.save_pretrained(str(folder), **how)


def _from_pretrained(name: str, model: Any, place: str) -> str:
    """Python that loads a model of transformers, with what its folder may not say."""
    kind, config = type(model).__name__, model.config
    told = {"dtype": f"torch.{str(model.dtype).removeprefix('torch.')}"}
    if kind.endswith("Classification"):
        told["num_labels"] = str(config.num_labels)
        if getattr(config, "pad_token_id", None) is not None:
            told["pad_token_id"] = str(config.pad_token_id)
        if name == _BASE:  # its head may have another number of labels; the one that was trained takes its place
            told["ignore_mismatched_sizes"] = "True"
    if getattr(config, "_attn_implementation", "sdpa") not in ("sdpa", None):
        told["attn_implementation"] = repr(config._attn_implementation)
    options = ", ".join(f"{key}={value}" for key, value in told.items())
    imports = f"import torch\nfrom {type(model).__module__.split('.')[0]} import {kind}"
    return f'{imports}\n\n{name} = {kind}.from_pretrained("{place}", {options})'


def _is_of(model: nn.Module, package: str, kind: str) -> bool:
    """Whether a model is of a class of a package, which is not imported for that."""
    found = getattr(sys.modules.get(package), kind, None)
    return found is not None and isinstance(model, found)
