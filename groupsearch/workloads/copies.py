"""Copies of a model whatever it holds: plain tensors, activations it has kept, tensors on another device."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from groupsearch.errors import UnsupportedModelError, is_out_of_memory

_MACHINERY = ("_parameters", "_buffers", "_modules")


def copy_of(model: nn.Module, make: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """A copy of a model; ties are kept, and parameters and buffers that are views of one storage.

    Tensors that are no leaves (an activation kept from an earlier forward pass, the weight that the old
    ``torch.nn.utils.weight_norm`` computes) are copied without their graph, which ``copy.deepcopy`` refuses.

    Args:
        model: the model, which is left as it is.
        make: what becomes of a tensor, be it a parameter, a buffer or a plain attribute; a copy of it if not given.
            Views of one storage become views of one again by :func:`sharing`.

    Raises:
        UnsupportedModelError: when something on the model cannot be copied; it names the attribute. For ``make``, see
            :func:`check_plain`, too.
    """
    memo: dict[int, Any] = {}
    if make is not None:
        check_plain(model)
    duplicate_view = sharing(lambda tensor: tensor.detach().clone())
    with torch.no_grad():
        for tensor in _views(model) if make is None else (*model.parameters(), *model.buffers()):
            if id(tensor) not in memo:
                made = (make or duplicate_view)(tensor)
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
    own = Tensor.__deepcopy__

    def duplicate(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if make is None and tensor.is_leaf:
            return own(tensor, memo)
        with torch.no_grad():
            return make(tensor) if make is not None else tensor.detach().clone()

    # A generator is copied by way of a tensor of its state, which is none to be replaced.
    generators = {torch.Generator: lambda generator, memo: generator.clone_state()}
    with patch.object(Tensor, "__deepcopy__", duplicate), patch.dict(copy._deepcopy_dispatch, generators):  # type: ignore[attr-defined]
        try:
            duplicated: nn.Module = copy.deepcopy(model, memo)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise _refusal(model, error) from error
    return duplicated


def shapes_of(model: nn.Module) -> nn.Module:
    """A copy with every tensor on the meta device, ties and shared storages kept; copies no data."""
    return copy_of(model, sharing(lambda tensor: torch.empty_like(tensor, device="meta", requires_grad=False)))


def sharing(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same for tensors of their own; of those that are views of one storage one is made, as large as it is.

    ``make`` gives a tensor of the size of the one that it is given.
    """
    storages: dict[int, Tensor] = {}

    def made(tensor: Tensor) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return make(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            length = storage.nbytes() // tensor.element_size()
            whole = tensor if length == tensor.numel() else tensor.detach().as_strided((length,), (1,), 0)
            storages[storage._cdata] = make(whole)
            if whole is tensor:
                return storages[storage._cdata]
        one = storages[storage._cdata]
        if one.dtype != tensor.dtype:
            return make(tensor)
        return one.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return made


def _views(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers whose storage holds more than they do, or another one, which ``copy.deepcopy`` parts."""
    strided = [t for t in (*model.parameters(), *model.buffers()) if t.layout == torch.strided and t.is_leaf]
    storages = {id(t): t.untyped_storage() for t in strided}
    held = Counter(storage._cdata for storage in storages.values())
    return [
        t
        for t in strided
        if held[storages[id(t)]._cdata] > 1 or storages[id(t)].nbytes() != t.numel() * t.element_size()
    ]


def check_plain(model: nn.Module) -> None:
    """Raise for weights that are no tensors of their own: quantized ones that a library packs in a form of its own.

    Integers and scales in buffers, and parts in half precision, are plain.

    Raises:
        UnsupportedModelError: naming the first.
    """
    for module_name, module in model.named_modules():
        where = f"{module_name}." if module_name else ""
        held = [*module._parameters.items(), *module._buffers.items(), *vars(module).items()]
        for name, value in held:
            if isinstance(value, torch.ScriptObject) or (isinstance(value, Tensor) and _is_packed(value)):
                kind = str(value.dtype) if type(value) is Tensor else f"{type(value).__module__}.{type(value).__name__}"
                raise UnsupportedModelError(
                    f"{where}{name} of {type(module).__name__} holds weights in a packed form ({kind}), of which "
                    "neither the bytes can be traced nor the step be checked. Load the weights unquantized, in half "
                    "precision if they are large (dtype=bfloat16), or keep integers and scales in buffers."
                )


def _is_packed(tensor: Tensor) -> bool:
    wrapper: bool = is_traceable_wrapper_subclass(tensor)
    of_torch = type(tensor).__module__.partition(".")[0] == "torch"
    return wrapper or tensor.is_quantized or not (of_torch or tensor.is_floating_point())


def _refusal(model: nn.Module, error: Exception) -> UnsupportedModelError:
    """Names the attribute that cannot be copied, which is found by copying one after another."""
    where = "Something on the model"
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in _MACHINERY and not _is_copied(value):
                where = f"The attribute {f'{name}.{key}' if name else key!s} (a {type(value).__name__})"
    return UnsupportedModelError(
        f"{where} cannot be copied: {str(error).splitlines()[0] if str(error) else type(error).__name__}. A step is "
        "traced and measured on a copy, so that the model stays as it is. Make it where it is used instead of keeping "
        "it on the model, delete it before, or give its class a __deepcopy__."
    )


def _is_copied(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True
