"""Which layers' parameters a model uses outside of the layers' own forward."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from groupsearch.engine.layers import Layer


class Owners:
    """Tells of an operation whose parameters it is given."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._names: dict[int, list[str]] = {}
        for layer in layers:
            for local in layer.trainable:
                self._names.setdefault(id(layer.module.get_parameter(local)), []).append(layer.name)

    def outside(self, func: Any, arguments: tuple[Any, Any], running: Collection[str]) -> set[str]:
        """Layers that own an operand while none of its owners is among the modules that run.

        What is only asked for its shape or dtype, or used without gradients, is not used.
        """
        if getattr(func, "__name__", "") == "__get__" or not torch.is_grad_enabled():
            return set()
        found = [self._names[id(x)] for x in pytree.tree_leaves(arguments) if id(x) in self._names]
        return {names[0] for names in found if not set(names).intersection(running)}
