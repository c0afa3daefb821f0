"""What no tensor shows: scratch inside operations, probed once per shape, and workspaces, probed once per device.

Convolutions, fused attention and a few reductions on the CPU allocate scratch that never appears
as a tensor; others do where an operand's layout is not their kernel's, and copy it; in half precision
nearly every operation does, be it for a copy in float32 or in the layout of its kernel. Each such
operation is run once on real tensors of the same shapes, in isolation, under torch's memory profiler.

On a CUDA device a step is taken on real tensors, so every operation is watched as it runs
(:func:`groupsearch.tracer.profiled.allocated_peak`), and needs no probe. What cuBLAS and cuBLASLt keep from
their first call on is none of an operation's: it is found by calling them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cache
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
    "aten::upsample_nearest2d",
    "aten::upsample_bilinear2d",
)
# Copy tensors that are not contiguous.
_COPYING = (
    "aten::native_layer_norm",
    "aten::_softmax",
    "aten::_softmax_backward_data",
    "aten::_log_softmax",
    "aten::_log_softmax_backward_data",
    "aten::embedding_dense_backward",
    "aten::index_select",
    "aten::im2col",
    "aten::max_pool2d_with_indices",
    "aten::avg_pool2d",
    "aten::_adaptive_avg_pool2d",
)
# Copy matrices of which neither the rows nor the columns are contiguous, as those of expanded tensors are not.
_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
# Arguments that are means and deviations, and the weight whose dtype they have where input and weight differ in it:
# fake kernels (torch 2.11 to 2.13) give them that of the input, with which the real one refuses them.
_STATISTICS = {"aten::native_layer_norm_backward": (3, 4, 5), "aten::native_group_norm_backward": (2, 3, 4)}
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
        if not _is_probed(func, args, kwargs):
            return 0
        key = (func, _key(args), *((name, _key(value)) for name, value in kwargs.items()))
        if key not in self._known:
            self._known[key] = self._probe(func, args, kwargs)
        return self._known[key]

    def _probe(self, func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        leaves, spec = pytree.tree_flatten((_with_real_statistics(func, args), dict(kwargs)))
        if sum(x.untyped_storage().nbytes() for x in leaves if isinstance(x, Tensor)) > PROBE_LIMIT_BYTES:
            self.skipped.add(func._schema.name)
            return 0
        # Under a transform such as vmap the operation is seen below it, with plain tensors: so must the probe be.
        with temporarily_clear_interpreter_stack(), unset_fake_temporarily(), torch.no_grad():
            real_args, real_kwargs = pytree.tree_unflatten([_real(x) for x in leaves], spec)
            return profiled_peak(lambda: func(*real_args, **real_kwargs))


cpu_scratch = CpuScratch()


@cache
def workspace_bytes(device: torch.device) -> int:
    """What the libraries of a device keep of its memory once products have been taken there; 0 on the CPU.

    cuBLAS and cuBLASLt each keep a workspace per handle and stream, and a handle is a thread's: the backward
    pass has a thread of its own. What they keep is given up, then found by products in both threads. Where
    torch allocates a workspace anew for every product it is none of this, but inside the operation.
    """
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    _in_both_threads(device, torch._C._cuda_clearCublasWorkspaces)
    before = torch.cuda.memory_allocated(device)
    _in_both_threads(device, lambda: _take_products(device))
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device) - before


def _in_both_threads(device: torch.device, work: Callable[[], object]) -> None:
    """Do it in this thread and in that of the device's backward pass."""

    def there(gradient: Tensor) -> None:
        work()

    work()
    seen = torch.ones((), device=device, requires_grad=True) * 1
    seen.register_hook(there)
    seen.backward()


@torch.no_grad()
def _take_products(device: torch.device) -> None:
    """One product by each of the routines that models take: plain, batched, with a bias added."""
    left, right = torch.ones(2, 128, 128, device=device), torch.ones(2, 128, 128, device=device)
    torch.mm(left[0], right[0])
    torch.bmm(left, right)
    torch.addmm(left[0, 0], left[0], right[0])


def _is_probed(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    name = func._schema.name
    if name in _PROBED:
        return True
    if name in _COPYING and any(isinstance(x, Tensor) and not x.is_contiguous() for x in args):
        return True
    if name in _PRODUCTS and not all(_has_lines(x) for x in args if isinstance(x, Tensor) and x.dim() > 1):
        return True
    return _may_be_half(func) and (_any_half(args) or _any_half(kwargs.values()))


@cache
def _may_be_half(func: torch._ops.OpOverload) -> bool:
    """Whether an operation is probed in half precision: not if it draws, which would move a generator."""
    return not func.is_view and torch.Tag.nondeterministic_seeded not in func.tags


def _has_lines(matrices: Tensor) -> bool:
    """Whether rows or columns are contiguous and do not overlap, which is what BLAS takes."""
    (rows, columns), (down, across) = matrices.shape[-2:], matrices.stride()[-2:]
    return (across == 1 and down >= columns) or (down == 1 and across >= rows)


def _any_half(values: Iterable[Any]) -> bool:
    """Whether a tensor among the arguments is of half precision; arguments are nested in lists at most."""
    for value in values:
        if isinstance(value, Tensor):
            if value.dtype in _HALF:
                return True
        elif isinstance(value, list | tuple) and _any_half(value):
            return True
    return False


def _with_real_statistics(func: torch._ops.OpOverload, args: Sequence[Any]) -> tuple[Any, ...]:
    mean, deviation, weight = _STATISTICS.get(func._schema.name, (0, 0, 0))
    if not isinstance(args[weight], Tensor) or not weight:
        return tuple(args)
    dtype = args[weight].dtype
    return tuple(x.to(dtype) if place in (mean, deviation) else x for place, x in enumerate(args))


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (tuple(value.shape), tuple(value.stride()), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return repr(value)


def _real(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return made.fill_(value.dtype.is_floating_point or value.dtype == torch.bool)  # 0 is a place in everything
