"""What no tensor shows: scratch inside operations on the CPU, found by running each once per shape.

Every operation of a step is probed but those of which it is known that they allocate their results and
nothing else (:mod:`groupsearch.tracer.frugal`): it is run on real tensors of the same shapes, in isolation, under
torch's memory profiler. What is counted is the most that is allocated inside at any time, results included, and
the form of the results, which the kernels for fake tensors do not always get right: strides, dtype, storage.

Values are made up (:mod:`groupsearch.tracer.made_up`). An operation that takes none of them, or whose tensors are
too large to be run for this, counts as its results alone, and is named.

On a CUDA device a step is taken on real tensors, so every operation is watched as it runs
(:func:`groupsearch.tracer.profiled.allocated_peak`), and needs no probe.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree

from groupsearch.tracer.allocator import has_storage
from groupsearch.tracer.frugal import needs_nothing
from groupsearch.tracer.made_up import attempts
from groupsearch.tracer.profiled import profiled_peak

PROBE_LIMIT_BYTES = 2**30
_FOREIGN = ("prim", "prims", "profiler", "c10d", "_c10d_functional", "rpc")


class Form(NamedTuple):
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
    results: tuple[Form | None, ...]


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


def _forms(result: Any, given: Sequence[Any]) -> tuple[Form | None, ...]:
    storages = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
    return tuple(
        None if x.untyped_storage().data_ptr() in storages else _form(x)
        for x in pytree.tree_leaves(result)
        if isinstance(x, Tensor)
    )


def _form(x: Tensor) -> Form:
    return Form(tuple(x.shape), tuple(x.stride()), x.dtype, x.untyped_storage().nbytes())


def _formed(out: Any, forms: Sequence[Form | None]) -> Any:
    """Fake results as the real ones are; whatever else there is stays."""
    leaves, spec = pytree.tree_flatten(out)
    places = [place for place, x in enumerate(leaves) if isinstance(x, FakeTensor)]
    if len(places) != len(forms):
        return out
    changed = {
        place: _made(form)
        for place, form in zip(places, forms, strict=True)
        if form is not None and form.shape == tuple(leaves[place].shape) and form != _form(leaves[place])
    }
    return pytree.tree_unflatten([changed.get(place, x) for place, x in enumerate(leaves)], spec) if changed else out


def _made(form: Form) -> Tensor:
    storage = torch.empty(form.storage_bytes // form.dtype.itemsize, dtype=form.dtype)
    return storage.as_strided(form.shape, form.stride)


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg())
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return repr(value)
