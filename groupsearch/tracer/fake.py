"""Fake copies: a model's structure with tensors that have shapes and no memory."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import itemgetter
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.backends import cuda
from torch.utils import _pytree as pytree

from groupsearch.engine.arithmetic import as_on
from groupsearch.errors import UnsupportedModelError
from groupsearch.plan.cards import Card
from groupsearch.tracer.allocator import has_storage
from groupsearch.workloads.batches import map_tensors
from groupsearch.workloads.copies import copy_of, sharing

# -- What autocast casts on a CUDA device, on tensors of the CPU, where it casts less to float32 ---
#
# The lists are those of ``aten/src/ATen/autocast_mode.h``; what is cast to the lower type is the same on both, as far
# as models use it.

_KEY = "AutocastCPU"
_LOWER = (torch.float16, torch.bfloat16)
_IN_FLOAT32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh"),
    *("tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm"),
    *("group_norm", "cosine_similarity", "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d"),
    *("hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss"),
    *("multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss", "dist", "pdist"),
    *("binary_cross_entropy_with_logits", "cdist", "renorm", "logsumexp"),
)
_TO_FLOAT32 = (
    *("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "sum", "sum.dim_IntList"),
)
"""These are told to return float32, which kernels may do without a copy of what they are given."""


def cast_as_cuda(library: torch.library.Library) -> None:
    """Register in a library of ``aten`` what a CUDA device casts to float32 and the CPU does not."""
    for names, wrap in ((_IN_FLOAT32, _in_float32), (_TO_FLOAT32, _to_float32)):
        for name in names:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", _KEY):
                library.impl(name, wrap(_overload(name)), _KEY)


def _overload(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return found


def _in_float32(operation: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.float() if x.dtype in _LOWER else x, (args, kwargs))
            return operation(*args, **kwargs)

    return run


def _to_float32(operation: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), None)
        if given is None and x.dtype in _LOWER:
            args = tuple(a for a in args if a is not None)
            kwargs = {**kwargs, "dtype": torch.float32}
        with torch.autocast("cpu", enabled=False):
            return operation(x, *args, **kwargs)

    return run


# -- The kernels that torch would take on a CUDA device, run on fake tensors of the CPU: attention and dropout
#
# ``scaled_dot_product_attention`` chooses by device, dtype and mask, and what it keeps for the backward pass differs.
# On fake tensors of the CPU it would choose the CPU's; here it is told which one by the rules of
# ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``, with the preparations that those kernels need. Dropout
# keeps a mask of one byte for each number there, where the CPU keeps one as large as its input.

_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten
_entered: list[Card] = []


def attention_kernel(
    card: Card, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, shared_heads: bool = False
) -> str:
    """``cudnn``, ``flash``, ``efficient`` or ``math``: what a card takes for such an attention.

    Hopper prefers cuDNN, in half precision. Flash takes no mask and half precision on compute capability 8.0 and
    later; the memory-efficient kernel takes masks and float32; what none of them takes is computed step by step.

    Args:
        card: the card.
        query: (B, H, T, D).
        key: (B, H, T, D), or of fewer heads.
        value: as the key.
        mask: what is added to, or allowed of, the scores.
        shared_heads: whether several heads of the query share one of key and value.
    """
    fits = {"cudnn": _fits_cudnn, "flash": _fits_flash, "efficient": _fits_efficient}
    allowed = {
        "cudnn": cuda.cudnn_sdp_enabled() and card.capability == (9, 0),
        "flash": cuda.flash_sdp_enabled(),
        "efficient": cuda.mem_efficient_sdp_enabled(),
    }
    if query.dim() != 4 or len({query.dtype, key.dtype, value.dtype}) > 1 or 0 in query.shape:
        return "math"
    asked = (card, query, key, value, mask)
    return next((name for name in fits if allowed[name] and fits[name](*asked, shared_heads)), "math")


def _fits_cudnn(card: Card, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shared_heads: bool) -> bool:
    width = max(q.shape[-1], v.shape[-1])
    return q.dtype in _HALF and width <= 128 and q.shape[-1] % 8 == v.shape[-1] % 8 == 0 and q.shape[-2] > 1


def _fits_flash(card: Card, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shared_heads: bool) -> bool:
    width = q.shape[-1]
    if mask is not None or q.dtype not in _HALF or card.capability < (8, 0) or not width == k.shape[-1] == v.shape[-1]:
        return False
    small = card.capability in ((8, 6), (8, 9)) and q.requires_grad and 192 < width <= 224
    return width <= 256 and not small


def _fits_efficient(card: Card, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shared_heads: bool) -> bool:
    if q.dtype not in (torch.float32, *_HALF) or (q.dtype is torch.bfloat16 and card.capability < (8, 0)):
        return False
    unit = 4 if q.dtype is torch.float32 else 8
    return q.shape[-1] % unit == v.shape[-1] % unit == 0 and not (shared_heads and mask is not None)


@contextmanager
def kernels_of(card: Card) -> Iterator[None]:
    """Inside, attention, dropout and what autocast casts are on tensors of the CPU as on a card, whoever calls them.

    It holds for the whole process: step on fake tensors inside, and on nothing else. Inside another one for the same
    card nothing changes.
    """
    if _entered:
        assert _entered[-1] == card, f"inside the kernels of {_entered[-1].name} those of {card.name} cannot be had"
        yield
        return
    _entered.append(card)
    library = torch.library.Library("aten", "IMPL")
    try:
        for key in ("CPU", "AutogradCPU"):
            library.impl("scaled_dot_product_attention", partial(_attend, card), key)
            library.impl("dropout", _dropout, key)
        cast_as_cuda(library)
        yield
    finally:
        library._destroy()
        _entered.clear()


def _attend(
    card: Card,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    kernel = attention_kernel(card, query, key, value, attn_mask, enable_gqa)
    if kernel == "math":
        mask = attn_mask if attn_mask is None or attn_mask.dtype is not torch.bool else _additive(attn_mask, query)
        found: Tensor = _aten._scaled_dot_product_attention_math(
            query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
        return found
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if kernel == "flash":
        return _flash(query, key, value, dropout_p, is_causal, scale)
    kept = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    if kernel == "cudnn":
        found = _aten._scaled_dot_product_cudnn_attention(
            query, key, value, bias, kept, dropout_p, is_causal, False, scale=scale
        )[0]
        return found
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    found = _aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, kept, dropout_p, is_causal, scale=scale
    )[0]
    return found


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:
    if not train or p == 0 or not input.numel():
        return input
    if p == 1:
        return input * torch.zeros_like(input)
    found: Tensor = _aten.native_dropout(input, p, True)[0]
    return found


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout: float, is_causal: bool, scale: float) -> Tensor:
    """Heads whose width is no multiple of 8 are padded to one."""
    width = query.shape[-1]
    if width % 8:
        query, key, value = (F.pad(x, (0, 8 - width % 8)) for x in (query, key, value))
    out: Tensor = _aten._scaled_dot_product_flash_attention(query, key, value, dropout, is_causal, False, scale=scale)[
        0
    ]
    return out[..., :width]


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as the kernels take it: of the query's type, with rows of a multiple of 16, for all examples and heads."""
    if mask.dtype is torch.bool:
        mask = _additive(mask, query)
    length = mask.shape[-1]
    if length % 16:
        mask = F.pad(mask, (0, 16 - length % 16))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """What is allowed, as what is added to the scores."""
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)


# -- What an operation on fake tensors returns, remembered by what it was given --------------------
#
# A network repeats itself: most operations of a step have run before on tensors of the same shapes.
# Working out anew what they return was most of the time a trace took.

Recipe = Callable[[Sequence[Any]], Any]
"""Given an operation's arguments, those by name last: what it returns."""
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})


class _UnclearError(Exception):
    """What is returned depends on more than can be written into a key."""


def call_key(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """Equal for calls that return tensors of the same form; None where that cannot be said."""
    if type(func) is not torch._ops.OpOverload or torch.is_inference_mode_enabled():
        return None
    try:
        named = tuple([(name, _outline(value)) for name, value in kwargs.items()])
        return (func, torch.get_default_dtype(), _outline(args), named)
    except _UnclearError:
        return None


def find_recipe(mode: FakeTensorMode, out: Any, args: Sequence[Any]) -> Recipe | None:
    """How to make once more what an operation returned, for arguments of the same key; None if unknown.

    It is known for what is, or is a view of, one of the arguments, and for tensors of their own storage.
    """
    if out is None:
        return lambda args: None
    if isinstance(out, FakeTensor):
        return _tensor_recipe(mode, out, args)
    if type(out) not in (tuple, list):
        return None
    kind, parts = type(out), [find_recipe(mode, part, args) for part in out]
    storages = [id(part.untyped_storage()) for part in out if isinstance(part, Tensor)]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len(set(storages)) < len(storages):
        return None
    return lambda args: kind([part(args) for part in known])


def _outline(value: Any) -> Hashable:
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.layout is not torch.strided or value.dtype.is_complex:
            raise _UnclearError
        return (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
    if kind in _PLAIN:
        return (kind, value)  # 1 and 1.0 are equal, and do not give the same dtype
    if kind is tuple or kind is list:
        return (kind, *[_outline(part) for part in value])
    if kind is torch.Generator:
        return (kind,)
    raise _UnclearError


def _tensor_recipe(mode: FakeTensorMode, out: FakeTensor, args: Sequence[Any]) -> Recipe | None:
    if out.constant is not None or out.layout is not torch.strided or out.dtype.is_complex or out.requires_grad:
        return None
    for place, value in enumerate(args):
        if value is out:
            return itemgetter(place)
    shape, stride, offset = out.shape, out.stride(), out.storage_offset()
    dtype, device, storage = out.dtype, out.fake_device, out.untyped_storage()
    places = [i for i, value in enumerate(args) if isinstance(value, Tensor) and value.untyped_storage() is storage]

    def fresh(args: Sequence[Any]) -> FakeTensor:
        with in_kernel_invocation_manager(mode):
            made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return FakeTensor(mode, made, device)

    def view(args: Sequence[Any]) -> FakeTensor:
        with in_kernel_invocation_manager(mode):
            made = torch.empty(0, dtype=dtype, device="meta")
            made.set_(args[places[0]].untyped_storage(), offset, shape, stride)
        return FakeTensor(mode, made, device)

    if places:
        return view
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    alone = not offset and all(leaf.untyped_storage() is not storage for leaf in tensors)
    return fresh if alone and fresh(args).untyped_storage().nbytes() == storage.nbytes() else None


# -- fake ------------------------------------------------------------------------------------------

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
_DEVICE = torch.ops.prim.device.default
_ONES = ("aten::ones", "aten::ones_like", "aten::new_ones")
_COPIES = ("aten::_to_copy", "aten::clone")
_LIFTED = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift.default)
_GROUPED_MM = torch.ops.aten._grouped_mm.default


class _FakeMode(FakeTensorMode):
    """Fake tensors of which it is known which hold nothing but ones.

    A real tensor that an operation is given was made outside: a constant of the loss, a tensor in a
    closure. In its place the operation gets a fake one, always the same.

    Attributes:
        met: is told of every such fake tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met: Callable[[Tensor], object] = lambda tensor: None
        self._stand_ins: dict[int, tuple[Tensor, Tensor]] = {}
        self._ones: dict[int, weakref.ref[Any]] = {}
        self._recipes: dict[Hashable, Recipe] = {}

    def mark(self, tensor: Tensor) -> None:
        """It is all ones."""
        storage = tensor.untyped_storage()
        key = id(storage)
        self._ones[key] = weakref.ref(storage, lambda _: self._ones.pop(key, None))

    def marked(self, tensor: Tensor | None) -> bool:
        """Whether it is known to be all ones."""
        return tensor is not None and id(tensor.untyped_storage()) in self._ones

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # asked for more often than anything else
            return args[0].fake_device
        kwargs = kwargs or {}
        if func not in _LIFTED:
            args, kwargs = self._with_stand_ins(args, kwargs)
        key = call_key(func, args, kwargs)
        recipe = self._recipes.get(key)
        if recipe is not None:
            out = recipe((*args, *kwargs.values()))
        else:
            out = self._work_out(key, func, types, args, kwargs)
        if self._ones and func._schema.is_mutable:
            for written in pytree.tree_leaves((args, kwargs)):
                if has_storage(written):
                    self._ones.pop(id(written.untyped_storage()), None)
        elif func._schema.name in _ONES or (func._schema.name in _COPIES and self.marked(args[0])):
            self.mark(out)
        return out

    def _with_stand_ins(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for value in (*args, *kwargs.values()):
            if isinstance(value, list | tuple):
                outside = any(isinstance(x, Tensor) and not isinstance(x, FakeTensor) for x in value)
            else:
                outside = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
            if outside:
                args, kwargs = pytree.tree_map_only(Tensor, self._stand_in, (args, kwargs))
                return args, kwargs
        return args, kwargs

    def _stand_in(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in self._stand_ins:
            device = torch.device("cpu") if tensor.is_meta else tensor.device
            with self:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            self._stand_ins[id(tensor)] = tensor, fake  # as long as the one is kept no other has its number
            self.met(fake)
        return self._stand_ins[id(tensor)][1]

    def _work_out(self, key: Hashable, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is _GROUPED_MM:  # its own fake kernel knows one type of numbers, the real one several
            return _grouped_product(*args, **kwargs)
        out: Any = super().__torch_dispatch__(func, types, args, kwargs)
        if key is not None and key == call_key(func, args, kwargs):  # it has not changed the form of an argument
            recipe = find_recipe(self, out, (*args, *kwargs.values()))
            if recipe is not None:
                self._recipes[key] = recipe
        return out


def _grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """What ``aten._grouped_mm`` allocates: rows, columns or both matrices in groups, rows of 16 bytes and multiples."""
    dtype = out_dtype or a.dtype
    groups = (a.shape[0],) if a.dim() == 3 else offs.shape if offs is not None else ()
    batched = a.dim() == b.dim()
    shape = (*(groups if batched else ()), a.shape[-2], b.shape[-1])
    padded = -(-shape[-1] * dtype.itemsize // 16) * 16 // dtype.itemsize
    return a.new_empty((*shape[:-1], padded), dtype=dtype)[..., : shape[-1]]


class ValuesNeededError(UnsupportedModelError):
    """A model that does not run on fake tensors."""


class FakeTensors:
    """Enter it to compute on fake tensors; may be entered again after it was left.

    Where transformers looks at values to choose a path, fake tensors have none, and it takes the
    dearer one. Inside, a batch counts as one sequence per row, not several packed into one, and for
    an attention mask of ones, made by the model or part of the batch, no dense mask is made, as on real tensors.

    Args:
        card: a CUDA device whose kernels are taken where they keep other things than the CPU's.
    """

    def __init__(self, card: Card | None = None) -> None:
        self.mode = _FakeMode()
        self._card = card
        self._entered: list[ExitStack] = []

    def __enter__(self) -> FakeTensors:
        stack = ExitStack()
        masking = sys.modules.get("transformers.masking_utils")
        if hasattr(masking, "find_packed_sequence_indices"):
            stack.enter_context(patch.object(masking, "find_packed_sequence_indices", lambda position_ids: None))
        for name in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"):
            if hasattr(masking, name):
                stack.enter_context(patch.object(masking, name, self._reading(getattr(masking, name))))
        stack.enter_context(self.mode)
        if self._card is not None:
            stack.enter_context(kernels_of(self._card))
            stack.enter_context(as_on("cuda"))
        self._entered.append(stack)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trail: object) -> None:
        self._entered.pop().close()
        if isinstance(error, NEEDS_VALUES):
            raise ValuesNeededError(
                "The model's path depends on values (tokens routed to experts, packed sequences, early exits), which "
                "fake tensors do not have. Give it with its weights, not on the meta device; it is then traced and "
                "measured with real tensors, and not simulated."
            ) from error

    def _reading(self, may_skip: Callable[..., bool]) -> Callable[..., bool]:
        """What decides whether a dense mask is needed, told that there is no mask where it would read ones."""

        def skip(padding_mask: Tensor | None, *args: Any, **kwargs: Any) -> bool:
            return may_skip(None if self.mode.marked(padding_mask) else padding_mask, *args, **kwargs)

        return skip


def fake_model(model: nn.Module, mode: FakeTensorMode, device: torch.device, moved: bool = False) -> nn.Module:
    """A copy of a model with fake tensors on ``device``; ties are kept, no weight is copied.

    Works for models on the meta device as well as for real ones, which are left as they are. Views of one storage stay
    views of one, but where the model is ``moved`` to another device, which gives each tensor a storage of its own.

    Raises:
        UnsupportedModelError: when something on the model cannot be copied; it names the attribute.
    """

    def make(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    return copy_of(model, make if moved else sharing(make))


def fake_batch(batch: Any, fake: FakeTensors, device: torch.device) -> Any:
    """A batch of fake tensors with the shapes and dtypes of a real one; what is all ones in it is known to be."""

    def copied(tensor: Tensor) -> Tensor:
        with fake.mode:
            duplicate = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if not tensor.is_meta and bool((tensor == 1).all()):
            fake.mode.mark(duplicate)
        return duplicate

    return map_tensors(copied, batch)
