"""Workloads of the user's own: path/to/file.py:factory and package.module:factory."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from groupsearch.errors import GroupSearchError, is_out_of_memory
from groupsearch.workloads.batches import count_examples, first_examples
from groupsearch.workloads.copies import shapes_of
from groupsearch.workloads.settings import read_settings, read_value
from groupsearch.workloads.workload import Workload, fixed_seed, seeded

# -- The mode that a model is traced and trained in, and what is said of it ------------------------

_SHOWN = 3


def in_training_mode(model: nn.Module) -> nn.Module:
    """The model in training mode, as a trainer puts it there: ``from_pretrained`` leaves models in evaluation mode.

    A model that is in training mode stays as it is, with the parts that were put into evaluation mode. So do parts that
    their own ``train`` keeps there, and BatchNorm that is frozen.
    """
    if not model.training:
        frozen = [m for m in model.modules() if isinstance(m, _BatchNorm) and not _is_trained(m)]
        model.train()
        for module in frozen:
            module.eval()
    return model


def described(model: nn.Module) -> str:
    """Mode and dropout in words.

    >>> described(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.BatchNorm1d(2).eval()))
    'training mode, but for 2; dropout up to 0.1'
    """
    kept = [name for name, module in model.named_modules() if name and not module.training]
    inner = [name for name in kept if name.rpartition(".")[0] not in kept]
    shown = ", ".join(inner[:_SHOWN]) + (f" and {len(inner) - _SHOWN} more" if len(inner) > _SHOWN else "")
    mode = "evaluation mode" if not model.training else f"training mode{f', but for {shown}' if inner else ''}"
    active = [m for m in model.modules() if m.training]
    shares = [m.p for m in active if isinstance(m, _DropoutNd)]
    shares += [v for m in active for key, v in vars(m).items() if "drop" in key and isinstance(v, float)]
    largest = max(shares, default=0.0)
    return f"{mode}; {f'dropout up to {largest:g}' if largest else 'no dropout'}"


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


# -- factory ---------------------------------------------------------------------------------------

Factory = Callable[..., Any]


def is_factory(text: str) -> bool:
    """Whether a text has the form of a factory.

    >>> [is_factory(text) for text in ("models/mine.py:make", "package.module:make", "mine.py", "digits-vit")]
    [True, True, True, False]
    """
    module, colon, _ = text.rpartition(":")
    if not colon:
        return text.endswith(".py")
    return module.endswith(".py") or all(part.isidentifier() for part in module.split("."))


def load_factory(text: str, settings: Mapping[str, Any]) -> Workload:
    """The workload of ``path/to/file.py:factory`` or ``package.module:factory``.

    The factory is called as ``factory(**settings)``, from seed 0, and returns a :class:`Workload` or
    ``(model, batch, loss)``. For the triple it is called again, from the seed asked for, whenever
    a model is built on a real device; on the meta device the first model is copied by shape.
    ``batch_size`` goes to the factory when it has a parameter of that name, else it overrides
    the size of the batch.

    Raises:
        GroupSearchError: when there is no such file, module or function, when the function does not
            take a setting, raises, or returns something else.
    """
    return workload_of(text, _find(text), settings)


def workload_of(text: str, factory: Factory, settings: Mapping[str, Any]) -> Workload:
    """The workload that a function makes, see :func:`load_factory`; ``text`` is what it is called."""
    values = {key: read_value(value) for key, value in settings.items()}
    batch_size = None if _accepts(factory, "batch_size") else values.pop("batch_size", None)
    _check_signature(text, factory, values)
    with fixed_seed(0):
        result = _call(text, factory, values)
    if isinstance(result, Workload):
        build = _with_a_word(f"The build of {text}", result.build)
        workload = in_mode(replace(result, build=build))
        workload = replace(workload, name=text, settings={**result.settings, **values})
    else:
        workload = _from_triple(text, lambda: _call(text, factory, values), result, values)
    if batch_size is not None:
        size = read_settings(text, {"batch_size": batch_size}, {"batch_size": 1})["batch_size"]
        workload = replace(workload, batch_size=size, settings={**workload.settings, "batch_size": size})
    return workload


def in_mode(workload: Workload) -> Workload:
    """The workload whose models are built in training mode, see :func:`in_training_mode`."""
    return replace(workload, build=lambda *seed, **named: in_training_mode(workload.build(*seed, **named)))


def _from_triple(text: str, again: Callable[[], Any], result: Any, values: Mapping[str, Any]) -> Workload:
    model, batch, loss = _check_triple(text, result)
    in_training_mode(model)
    rebuild = seeded(lambda: in_training_mode(_check_triple(text, again())[0]))

    def build(seed: int = 0) -> nn.Module:
        return shapes_of(model) if torch.get_default_device().type == "meta" else rebuild(seed)

    return Workload(
        name=text,
        build=build,
        make_batch=lambda batch_size: first_examples(batch, batch_size),
        loss=loss,
        batch_size=count_examples(batch),
        settings=dict(values),
    )


def _check_triple(text: str, result: Any) -> tuple[nn.Module, Any, Any]:
    if isinstance(result, tuple) and len(result) == 3 and isinstance(result[0], nn.Module) and callable(result[2]):
        return result
    found = type(result).__name__
    if isinstance(result, tuple):
        found = f"a tuple of ({', '.join(type(part).__name__ for part in result)})"
    raise GroupSearchError(
        f"Expected {text} to return a groupsearch.Workload or (model, batch, loss) with an nn.Module, a batch of "
        f"tensors and a function loss(model, batch) of one loss per example, found {found}."
    )


def _find(text: str) -> Factory:
    place, _, attribute = text.rpartition(":")
    place = place or text
    module = _import_file(text, place) if place.endswith(".py") else _import_module(text, place)
    found = getattr(module, attribute, None) if place != text else None
    if callable(found):
        return found
    names = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]
    missing = f"no function {attribute!r} in {place}" if place != text else f"no function named after {place}"
    choices = f"It has {', '.join(names)}" if names else "It defines no public function"
    raise GroupSearchError(f"Found {missing}. {choices}; name one as in {place}:{names[0] if names else 'factory'}.")


def _import_file(text: str, place: str) -> ModuleType:
    path = Path(place)
    if not path.is_file():
        raise GroupSearchError(
            f"Found no file {place} for the workload {text}. Check the path; it starts at {Path.cwd()}."
        )
    name = f"groupsearch_workload_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _prepend_path(path.resolve().parent)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise GroupSearchError(f"{place} could not be run: {_describe(error)}. Mend the file and try again.") from error
    return module


def _import_module(text: str, place: str) -> ModuleType:
    _prepend_path(Path.cwd())
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise GroupSearchError(
            f"The module {place} of the workload {text} could not be imported: {_describe(error)}. It must be "
            "installed or lie in the current folder."
        ) from error


def _prepend_path(folder: Path) -> None:
    """Siblings of the user's file can be imported, now and when its functions run, as in a script."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _accepts(factory: Factory, key: str) -> bool:
    parameters = inspect.signature(factory).parameters.values()
    return any(parameter.name == key or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _check_signature(text: str, factory: Factory, values: Mapping[str, Any]) -> None:
    signature = inspect.signature(factory)
    for key in values:
        if not _accepts(factory, key):
            known = ", ".join(signature.parameters) or "none"
            raise GroupSearchError(f"{text} has no setting {key!r}. The parameters of the function are: {known}.")
    try:
        signature.bind(**values)
    except TypeError as error:
        raise GroupSearchError(
            f"{text} cannot be called with the settings given: {error}. Its parameters are "
            f"{signature}; give the missing ones as settings."
        ) from error


def _call(text: str, factory: Factory, values: Mapping[str, Any]) -> Any:
    return _with_a_word(text, factory)(**values)


def _with_a_word(text: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The user's function, whose accidents are told in a paragraph."""

    def call(*args: Any, **values: Any) -> Any:
        try:
            return function(*args, **values)
        except Exception as error:
            if isinstance(error, GroupSearchError) or is_out_of_memory(error):
                raise
            raise GroupSearchError(f"{text} raised {_describe(error)}. Mend the function or its settings.") from error

    return call


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
