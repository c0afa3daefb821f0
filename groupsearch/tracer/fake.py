"""Fake copies: a model's structure with tensors that have shapes and no memory."""

from __future__ import annotations

import copy
import sys
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree


class FakeTensors:
    """Enter it to compute on fake tensors; may be entered again after it was left.

    Where transformers looks at values to choose a path, fake tensors have none, and it takes the
    dearer one. Inside, a batch counts as what it nearly always is: one sequence per row, not
    several packed into one, so that no dense attention mask is made.
    """

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self._entered: list[ExitStack] = []

    def __enter__(self) -> FakeTensors:
        stack = ExitStack()
        masking = sys.modules.get("transformers.masking_utils")
        if hasattr(masking, "find_packed_sequence_indices"):
            stack.enter_context(patch.object(masking, "find_packed_sequence_indices", lambda position_ids: None))
        stack.enter_context(self.mode)
        self._entered.append(stack)
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.pop().close()


def fake_model(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> nn.Module:
    """A copy of a model with fake parameters and buffers on ``device``; ties are kept, no weight is copied.

    Works for models on the meta device as well as for real ones, which are left as they are.
    """
    memo: dict[int, Any] = {}
    with mode:
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in memo:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                memo[id(tensor)] = (
                    nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
                )
    duplicate: nn.Module = copy.deepcopy(model, memo)
    return duplicate


def fake_batch(batch: Any, mode: FakeTensorMode, device: torch.device) -> Any:
    """A batch of fake tensors with the shapes and dtypes of a real one."""
    with mode:
        return pytree.tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), batch)
