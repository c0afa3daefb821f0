"""Case: a small model, the shape of one of its examples, and a loss per example; what catalogues are made of.

Shapes: B examples. B is 4 unless a test asks otherwise.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Batch = Mapping[str, Tensor]
BATCH_SIZE = 4
VOCABULARY = 11


def readout(model: nn.Module, batch: Batch) -> Tensor:
    """A loss (B,) that any output has: bounded, and larger by ``scale`` for some examples than for others."""
    output = model(batch["x"])
    flat = output.flatten(1) if output.dim() > 1 else output.unsqueeze(1)
    weights = torch.cos(torch.arange(flat.shape[1], dtype=flat.dtype, device=flat.device))
    return batch["scale"] * (flat.sin() * weights).sum(1)


@dataclass(frozen=True, eq=False)
class Case:
    """A model, the shape of one example and a loss.

    Attributes:
        build: makes the model; its parameters are then moved off their special initial values.
        shape: shape of one example's ``x``.
        tokens: whether ``x`` holds ids below ``VOCABULARY`` (with repeats) instead of numbers.
        loss: one loss per example, shape (B,).
        tolerance: the relative tolerance of each dtype; a model that computes in float32 whatever
            it is given cannot keep the tighter one.
        opacus: whether Opacus' per-example gradients cover the model.
        whole: parameters used several times within one call of their owner, whose uses the
            reference cannot tell apart; their sites are kept in one group.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: bool = False
    loss: Callable[[nn.Module, Any], Tensor] = readout
    tolerance: Mapping[torch.dtype, float] = field(default_factory=lambda: {torch.float32: 1e-5, torch.float64: 1e-10})
    opacus: bool = False
    whole: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        """The same for every run, another for every case."""
        return zlib.crc32(self.name.encode())

    @cached_property
    def _prototype(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.build().double()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model in training mode, with no parameter at 0 or 1 as initialisation leaves it."""
        return deepcopy(self._prototype).to(dtype).train()

    def batch(self, dtype: torch.dtype = torch.float64, batch_size: int = BATCH_SIZE) -> dict[str, Tensor]:
        """``batch_size`` examples; the first ones are the same whatever the size."""
        generator = torch.Generator().manual_seed(self.seed)
        examples = []
        for _ in range(batch_size):
            if self.tokens:
                examples.append(torch.randint(VOCABULARY, self.shape, generator=generator))
            else:
                examples.append(torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype))
        scale = torch.linspace(0.5, 3.0, BATCH_SIZE, dtype=torch.float64)[torch.arange(batch_size) % BATCH_SIZE]
        return {"x": torch.stack(examples), "scale": scale.to(dtype)}


def plain(model: nn.Module) -> nn.Module:
    """A copy that recomputes nothing: activation checkpointing off."""
    copy = deepcopy(model)
    for module in copy.modules():
        if isinstance(module, Checkpointed):
            module.kind = "none"
        elif hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    return copy


class Wrap(nn.Module):
    """Modules by name, and a forward given as a function of this module and x."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **members: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self._function = forward

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the function makes of x."""
        return self._function(self, x)


class Checkpointed(nn.Module):
    """A module whose activations are kept (``none``) or recomputed (``reentrant``, ``non-reentrant``)."""

    def __init__(self, module: nn.Module, kind: str) -> None:
        super().__init__()
        self.module = module
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """The module's output."""
        if self.kind == "none":
            return self.module(x)
        result: Tensor = checkpoint(self.module, x, use_reentrant=self.kind == "reentrant")
        return result
