"""Weights of a transformers model from a local folder; nothing is downloaded, nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from groupsearch.errors import GroupSearchError

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
