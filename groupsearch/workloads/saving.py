"""The weights of a trained model as files, which the libraries they come from can load without groupsearch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from groupsearch.errors import GroupSearchError
from groupsearch.workloads.copies import copy_of

# -- Weights of a transformers model from a local folder; nothing is downloaded, nothing is unpickled

RANDOM = "random"
_FILES = ("model.safetensors", "model.safetensors.index.json")
_SHOWN = 3


def weights_folder(text: str, name: str, setting: str | None) -> Path | None:
    """The folder to load weights from, or None for random ones.

    Args:
        text: the workload, for errors.
        name: what follows ``hf:``; where it is a folder that holds weights, those are taken.
        setting: another folder, or ``random``.

    Raises:
        GroupSearchError: when the folder that was asked for holds no weights in safetensors form.
    """
    if setting is None:
        return Path(name) if _holds_weights(Path(name)) else None
    if setting == RANDOM:
        return None
    folder = Path(setting)
    if _holds_weights(folder):
        return folder
    found = "no such folder" if not folder.is_dir() else "a folder without either of them"
    if folder.is_dir() and any(folder.glob("*.bin")):
        found = "weights that were pickled (.bin), which are not loaded because they may run code"
    raise GroupSearchError(
        f"Expected weights={setting} of {text} to be a folder with {' or '.join(_FILES)}, found {found}. Save the "
        f"model there with save_pretrained, or give weights={RANDOM}."
    )


def load_pretrained(
    transformers: ModuleType, text: str, auto_class: str, folder: Path, config: Any, *, whole: bool, **how: Any
) -> nn.Module:
    """A model with the weights of a folder.

    A head that the weights do not have, or have for another number of labels, is left as it was
    initialised at random, unless the ``whole`` model is wanted; what lies below the head must be complete.

    Args:
        transformers: the package.
        text: the workload, for errors.
        auto_class: the class of transformers that chooses the model's class.
        folder: where the weights are, see :func:`weights_folder`.
        config: the model's own configuration.
        whole: whether the head must be there, too.
        **how: further arguments of ``from_pretrained``.

    Raises:
        GroupSearchError: when the weights cannot be read, or are not those of this model.
    """
    try:
        with quiet(transformers):
            model, found = getattr(transformers, auto_class).from_pretrained(
                str(folder),
                config=config,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # of which those below the head are refused here
                output_loading_info=True,
                **how,
            )
    except Exception as error:  # whatever safetensors and transformers think of files that they cannot read
        raise GroupSearchError(
            f"The weights in {folder} could not be loaded for {text}: {_first_line(error)}. Save the model again with "
            f"save_pretrained, or give weights={RANDOM}."
        ) from error
    body = f"{model.base_model_prefix}." if not whole and hasattr(model, model.base_model_prefix) else ""
    # A mismatch is (name, shape in the file, shape in the model).
    lacking = {*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])}
    # A pooler belongs to the head, wherever a model class keeps it.
    lacking = {name for name in lacking if name.startswith(body) and ".pooler." not in name}
    if lacking:
        more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
        raise GroupSearchError(
            f"Expected the weights in {folder} to be those of {text} ({type(model).__name__}); missing or of another "
            f"shape are {', '.join(sorted(lacking)[:_SHOWN])}{more}. Name the folder that the model was saved in, with "
            f"its config.json, or give weights={RANDOM}{', or train the head, too, with lora_head=true' * whole}."
        )
    loaded: nn.Module = model
    return loaded


def _holds_weights(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _FILES)


@contextmanager
def quiet(transformers: ModuleType) -> Iterator[None]:
    """Without the progress bars and reports of loading and saving: the library prints nothing."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n\n")[0].split()).rstrip(".") or type(error).__name__


# -- saving ----------------------------------------------------------------------------------------

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
    config, base = model.peft_config[model.active_adapter], model.get_base_model()
    kept = {t.data_ptr() for t in peft.get_peft_model_state_dict(model, save_embedding_layers=False).values()}
    if config.is_prompt_learning:  # kept is what they make
        kept |= {p.data_ptr() for p in model.prompt_encoder.parameters()}
    if any(p.requires_grad and p.data_ptr() not in kept for p in model.parameters()):
        return _save_state(model, folder, place)
    name = config.base_model_name_or_path or ""
    if not name:
        # Weights that were drawn at random are nowhere else. Taking adapters off changes a model.
        _save_pretrained(_below_adapters(copy_of(model)), folder / _BASE)
        name = config.base_model_name_or_path = f"{place}/{_BASE}"
        config.save_pretrained(str(folder))
        config.base_model_name_or_path = ""
    if not _is_of(base, "transformers", "PreTrainedModel"):
        made = "# base: the model that the adapters were put on"
    else:
        made = _from_pretrained("base", base, name)
    loading = f'{made}\nmodel = PeftModel.from_pretrained(base, "{place}")'
    return Saved("adapters and what else was trained", "peft", f"from peft import PeftModel\n{loading}", base=name)


def _below_adapters(model: Any) -> Any:
    """What a model is without its adapters, which it loses."""
    import peft

    if not model.active_peft_config.is_prompt_learning:
        return model.unload()
    base = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            base.set_submodule(name, module.original_module)
    return base


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
