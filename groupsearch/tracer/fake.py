"""Fake copies: a model's structure with tensors that have shapes and no memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree


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
