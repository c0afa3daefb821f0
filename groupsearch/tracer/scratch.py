"""What no tensor shows: scratch inside operations on the CPU, found by running each once per shape.

Every operation of a step is probed but those of which it is known that they allocate their results and
nothing else (:mod:`groupsearch.tracer.scratch`): it is run on real tensors of the same shapes, in isolation, under
torch's memory profiler. What is counted is the most that is allocated inside at any time, results included, and
the form of the results, which the kernels for fake tensors do not always get right: strides, dtype, storage.

Values are made up (:mod:`groupsearch.tracer.scratch`). An operation that takes none of them, or whose tensors are
too large to be run for this, counts as its results alone, and is named.

On a CUDA device a step is taken on real tensors, so every operation is watched as it runs
(:func:`groupsearch.tracer.allocator.allocated_peak`), and needs no probe.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree

from groupsearch.tracer.allocator import has_storage, profiled_peak

# -- Operations that allocate their results on the CPU and nothing else, and in which form they do so
#
# The list is short and positive: what is not on it is probed (:mod:`groupsearch.tracer.scratch`). Every
# operation on it is held to its word by a test, over shapes, layouts and dtypes.

_FULL = frozenset({torch.float32, torch.float64})
Rule = Callable[[list[Tensor]], bool]
"""Whether an operation that is given these tensors allocates its results alone."""

ELEMENTWISE = frozenset(
    {
        *("abs", "neg", "exp", "log", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "sigmoid", "erf", "relu"),
        *("add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "clamp", "clamp_min", "clamp_max", "lerp"),
        *("addcmul", "addcdiv", "sign", "silu", "silu_backward", "tanh_backward", "sigmoid_backward"),
        *("threshold_backward", "leaky_relu", "leaky_relu_backward", "eq", "ne", "lt", "le", "gt", "ge"),
        *("_fused_adam", "_fused_adamw", "_fused_sgd"),
    }
)
"""Of tensors of one dtype, float32 or float64, in any layout; in place and by lists as well."""
MASKED = frozenset({"where", "masked_fill"})
"""Elementwise as well, of a mask of booleans beside them; all of it contiguous."""
DENSE = frozenset(
    {
        *("gelu", "gelu_backward", "native_layer_norm", "_softmax", "_softmax_backward_data", "_log_softmax"),
        *("_log_softmax_backward_data", "embedding", "embedding_dense_backward", "nll_loss_forward"),
        *("nll_loss_backward", "sum", "mean", "cat", "normal", "uniform"),
    }
)
"""Of contiguous tensors: float32 or float64, with numbers of rows beside them."""
COPIES = frozenset({"clone", "copy", "_to_copy"})
"""From and to tensors without gaps and in one layout, whatever their dtypes."""
PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm"})
"""Of matrices of which rows or columns are contiguous, which is what BLAS takes; others are copied."""
MAKERS = frozenset(
    {
        *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "zeros", "zeros_like", "new_zeros"),
        *("ones", "ones_like", "new_ones", "full", "full_like", "new_full", "scalar_tensor", "fill", "zero"),
        *("arange", "_unsafe_view", "detach", "alias", "lift_fresh", "set", "_local_scalar_dense"),
    }
)
"""Whatever they are given: they make or fill a tensor, or look at one."""


def needs_nothing(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether it is known that an operation allocates its results and no scratch."""
    rule = _rule(func)
    if rule is None or isinstance(rule, bool):
        return bool(rule)
    return rule(_tensors((*args, *kwargs.values())))


@cache
def _rule(func: torch._ops.OpOverload) -> Rule | bool | None:
    """Of an operation: a rule about its tensors, True where none is needed, None where it is not on the list."""
    if func.is_view:
        return True
    space, _, name = func._schema.name.partition("::")
    name = name.removeprefix("_foreach_").rstrip("_")
    if space != "aten" or "out" in func._overloadname:
        return None
    rules: dict[frozenset[str], Rule | bool] = {
        **{MAKERS: True, ELEMENTWISE: _of_one_kind, MASKED: _of_one_kind_but_masks},
        **{DENSE: _contiguous, COPIES: _without_gaps, PRODUCTS: _in_lines},
    }
    return next((rule for names, rule in rules.items() if name in names), None)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, which are nested in lists at most."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _of_one_kind(tensors: list[Tensor]) -> bool:
    kinds = {x.dtype for x in tensors}
    return len(kinds) == 1 and kinds <= _FULL


def _of_one_kind_but_masks(tensors: list[Tensor]) -> bool:
    numbers = [x for x in tensors if x.dtype != torch.bool]
    return _of_one_kind(numbers) and all(x.is_contiguous() for x in tensors)


def _contiguous(tensors: list[Tensor]) -> bool:
    floats = [x for x in tensors if x.dtype != torch.int64]
    return _of_one_kind(floats) and all(x.is_contiguous() for x in tensors)


def _without_gaps(tensors: list[Tensor]) -> bool:
    return all(x.is_contiguous() for x in tensors)


def _in_lines(tensors: list[Tensor]) -> bool:
    return _of_one_kind(tensors) and all(map(_has_lines, tensors))


def _has_lines(matrices: Tensor) -> bool:
    """Whether rows or columns are contiguous and do not overlap; a vector, which is added, is taken as it is."""
    if matrices.dim() < 2:
        return True
    (rows, columns), (down, across) = matrices.shape[-2:], matrices.stride()[-2:]
    return (across == 1 and down >= columns) or (down == 1 and across >= rows)


# -- Values for a probe: whatever an operation may take, so that it can be run at all --------------

_WHOLE = (0, 1)  # 0 is a place in everything; lengths and counts are 1 at least


def attempts(values: Sequence[Any]) -> Iterator[list[Any]]:
    """Arguments of an operation again and again, every time of other values; shapes, strides and dtypes stay.

    Numbers are ones, then a matrix like the unit matrix (which has an inverse and a root), then numbers between
    0 and 1; whole numbers are 0, then 1. Later ones are for operations that refuse those before.
    A generator becomes a new one, which nobody misses.
    """
    fills = (_ones, _unit, _between)
    for whole in _WHOLE if any(_is_whole(value) for value in values) else _WHOLE[:1]:
        for fill in fills:
            yield [_made(value, fill, whole) for value in values]


def _is_whole(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return False
    return not (value.is_floating_point() or value.is_complex())


def _made(value: Any, fill: Any, whole: int) -> Any:
    if isinstance(value, torch.Generator):
        return torch.Generator()
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    if value.dtype == torch.bool:
        return made.fill_(True)
    made = made.fill_(whole) if _is_whole(value) else fill(made)
    made = made.conj() if value.is_conj() else made
    return made._neg_view() if value.is_neg() else made


def _ones(made: Tensor) -> Tensor:
    return made.fill_(1)


def _unit(made: Tensor) -> Tensor:
    made.fill_(1 / 64)
    if made.dim() > 1:
        made.diagonal(dim1=-2, dim2=-1).fill_(2)
    return made


def _between(made: Tensor) -> Tensor:
    return made.fill_(0.5)


# -- scratch ---------------------------------------------------------------------------------------

PROBE_LIMIT_BYTES = 2**30
_FOREIGN = ("prim", "prims", "profiler", "c10d", "_c10d_functional", "rpc")


class OperandForm(NamedTuple):
    """What there is to know of a tensor but its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    storage_bytes: int


class Probed(NamedTuple):
    """What an operation did on real tensors.

    Attributes:
        peak_bytes: the most it had allocated at any time, results included.
        results: of every tensor it returned, or None for one that shares its storage with an argument.
    """

    peak_bytes: int
    results: tuple[OperandForm | None, ...]


class CpuScratch:
    """Probes operations on the CPU, every shape once.

    An operation whose arguments and results exceed :data:`PROBE_LIMIT_BYTES` is not run.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Probed | None] = {}

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[Any, int | None]:
        """What an operation returned, in the form it really has, and the most bytes it allocates at any time.

        The latter include results; 0 where they are all there is, None where that is not known.
        """
        if not isinstance(func, torch._ops.OpOverload) or func.namespace in _FOREIGN:
            return out, 0
        if needs_nothing(func, args, kwargs):
            return out, 0
        if any(isinstance(x, Tensor) and not has_storage(x) for x in pytree.tree_leaves((args, kwargs, out))):
            return out, None
        key = (func, _key(args), *((name, _key(value)) for name, value in kwargs.items()))
        if key not in self._known:
            self._known[key] = _probe(func, args, kwargs, out)
        found = self._known[key]
        return (out, None) if found is None else (_formed(out, found.results), found.peak_bytes)


cpu_scratch = CpuScratch()


def _probe(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Probed | None:
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    everything = [x for x in (*leaves, *pytree.tree_leaves(out)) if isinstance(x, Tensor)]
    if sum(x.untyped_storage().nbytes() for x in everything) > PROBE_LIMIT_BYTES:
        return None
    with _alone(func):
        for made in attempts(leaves):
            real_args, real_kwargs = pytree.tree_unflatten(made, spec)
            try:
                forms = _forms(func(*real_args, **real_kwargs), made)
            except Exception:  # whatever a kernel says of values that it does not take
                continue
            return Probed(profiled_peak(partial(func, *real_args, **real_kwargs)), forms)
    return None


@contextmanager
def _alone(func: torch._ops.OpOverload) -> Iterator[None]:
    """Inside, operations run as they do by themselves, and what they draw is not missed afterwards.

    Under a transform such as vmap an operation is seen below it, with plain tensors: so must its probe be.
    """
    draws = torch.Tag.nondeterministic_seeded in func.tags
    state = torch.default_generator.get_state() if draws else None
    with temporarily_clear_interpreter_stack(), unset_fake_temporarily(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            if state is not None:
                torch.default_generator.set_state(state)


def _forms(result: Any, given: Sequence[Any]) -> tuple[OperandForm | None, ...]:
    storages = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
    return tuple(
        None if x.untyped_storage().data_ptr() in storages else _form(x)
        for x in pytree.tree_leaves(result)
        if isinstance(x, Tensor)
    )


def _form(x: Tensor) -> OperandForm:
    return OperandForm(tuple(x.shape), tuple(x.stride()), x.dtype, x.untyped_storage().nbytes())


def _formed(out: Any, forms: Sequence[OperandForm | None]) -> Any:
    """Fake results as the real ones are; whatever else there is stays."""
    leaves, spec = pytree.tree_flatten(out)
    places = [place for place, x in enumerate(leaves) if isinstance(x, FakeTensor)]
    if len(places) != len(forms):
        return out
    changed = {
        place: _real_form(form)
        for place, form in zip(places, forms, strict=True)
        if form is not None and form.shape == tuple(leaves[place].shape) and form != _form(leaves[place])
    }
    return pytree.tree_unflatten([changed.get(place, x) for place, x in enumerate(leaves)], spec) if changed else out


def _real_form(form: OperandForm) -> Tensor:
    storage = torch.empty(form.storage_bytes // form.dtype.itemsize, dtype=form.dtype)
    return storage.as_strided(form.shape, form.stride)


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg())
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return repr(value)


# -- What operations on a named card need inside themselves, as far as that is known without one ---

_aten = torch.ops.aten
_FLASH_BACKWARD = _aten._scaled_dot_product_flash_attention_backward.default
_UNKNOWN = {
    _aten.convolution.default,
    _aten.convolution_backward.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_cudnn_attention_backward.default,
}


def card_scratch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> tuple[Any, int | None]:
    """A probe, as :class:`groupsearch.tracer.live.LiveBytes` asks for one, that runs nothing.

    The backward pass of flash attention adds the query's gradient up in float32 and keeps a number for every row, with
    rows and columns rounded up to its tiles (``flash_api.cpp``). What cuDNN takes is for cuDNN to say: not known.
    """
    if func in _UNKNOWN:
        return out, None
    if func is not _FLASH_BACKWARD:
        return out, 0
    query = args[1]
    rows = query.shape[0] * query.shape[1] * -(-query.shape[2] // 128) * 128
    columns = -(-query.shape[3] // 32) * 32
    results = sum(x.nbytes for x in out if isinstance(x, torch.Tensor))
    return out, results + 4 * rows * (columns + 1)
