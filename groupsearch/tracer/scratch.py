"""What an operation allocates inside itself, out of sight of a trace: probed once per shape.

Convolutions, fused attention and a few reductions on the CPU allocate scratch that never appears
as a tensor; in half precision nearly every operation does, be it for a copy in float32 or in the
layout of its kernel. Each such operation is run once on real tensors of the same shapes, in
isolation, under torch's memory profiler.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree

from groupsearch.tracer.profiled import profiled_peak

_PROBED = (
    "aten::convolution",
    "aten::convolution_backward",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::logsumexp",
    "aten::native_layer_norm_backward",
    "aten::native_group_norm_backward",
)
_HALF = (torch.bfloat16, torch.float16)
PROBE_LIMIT_BYTES = 2**30


class CpuScratch:
    """Probes the CPU operations that are known to allocate scratch, and all in half precision; every shape once.

    An operation whose arguments exceed :data:`PROBE_LIMIT_BYTES` is not run: its scratch counts as
    none, and its name is added to ``skipped``.
    """

    def __init__(self) -> None:
        self.skipped: set[str] = set()
        self._known: dict[Hashable, int] = {}

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """Most bytes the operation allocates at any time, results included; 0 where it has no scratch."""
        if not isinstance(func, torch._ops.OpOverload):
            return 0
        name = func._schema.name
        leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        if name not in _PROBED and not _in_half(func, leaves):
            return 0
        key = (name, str(spec), *(_key(x) for x in leaves))
        if key not in self._known:
            self._known[key] = self._probe(func, leaves, spec)
        return self._known[key]

    def _probe(self, func: Any, leaves: Sequence[Any], spec: pytree.TreeSpec) -> int:
        if sum(x.untyped_storage().nbytes() for x in leaves if isinstance(x, Tensor)) > PROBE_LIMIT_BYTES:
            self.skipped.add(func._schema.name)
            return 0
        # Under a transform such as vmap the operation is seen below it, with plain tensors: so must the probe be.
        with temporarily_clear_interpreter_stack(), unset_fake_temporarily(), torch.no_grad():
            args, kwargs = pytree.tree_unflatten([_real(x) for x in leaves], spec)
            return profiled_peak(lambda: func(*args, **kwargs))


cpu_scratch = CpuScratch()


def _in_half(func: torch._ops.OpOverload, leaves: Sequence[Any]) -> bool:
    """Whether an operation computes on half precision; not if it draws, which would move a generator."""
    if func.is_view or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    return any(isinstance(x, Tensor) and x.dtype in _HALF for x in leaves)


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (tuple(value.shape), tuple(value.stride()), value.dtype)
    return repr(value)


def _real(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).fill_(1)
