"""Operations that are not probed keep their word: none allocates more than its results, in any form they come in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from groupsearch.tracer import scratch as frugal
from groupsearch.tracer.allocator import profiled_peak
from groupsearch.tracer.scratch import needs_nothing

aten = torch.ops.aten
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "last first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}
SHAPES = ((64, 96), (4, 48, 64), (3, 5, 33, 17))
FULL = (torch.float32, torch.float64)
A_NUMBER = 32  # bytes of tensors that hold a number each, which kernels make of numbers among the arguments


def held_to_its_word(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> bool:
    """Whether it is said to need nothing; fails where it is said and is not so."""
    kwargs = kwargs or {}
    if not needs_nothing(func, args, kwargs):
        return False
    given = {x.untyped_storage().data_ptr() for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    made = [x for x in pytree.tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
    results = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in made}
    allowed = sum(size for key, size in results.items() if key not in given)
    del made
    peak_bytes = profiled_peak(lambda: func(*args, **kwargs))
    assert peak_bytes <= allowed + A_NUMBER, (func, [(x.shape, x.stride()) for x in args if isinstance(x, Tensor)])
    return True


def overloads(name: str) -> Iterator[Any]:
    for form in (name, name + "_", "_foreach_" + name, "_foreach_" + name + "_"):
        packet = getattr(aten, form, None)
        for overload in packet.overloads() if packet else ():
            if "out" not in overload:
                yield getattr(packet, overload)


def arguments(func: Any, make: Callable[[], Tensor], mask: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments by what the schema asks for; None where it asks for something else."""
    known: dict[str, Callable[[], Any]] = {
        "Tensor": make,
        "List[Tensor]": lambda: [make(), make()],
        "number": lambda: 0.5,
        "List[number]": lambda: [0.5, 0.25],
        "Optional[number]": lambda: 0.5,
        "Optional[Tensor]": make,
        "float": lambda: 0.5,
        "bool": lambda: False,
    }
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in func._schema.arguments:
        if argument.has_default_value() and argument.name not in ("min", "max"):
            continue
        kind = str(argument.type)
        if kind not in known:
            return None
        value = mask if argument.name in ("mask", "condition") else known[kind]()
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return tuple(args), kwargs


@pytest.mark.parametrize(
    "name", sorted((frugal.ELEMENTWISE | frugal.MASKED) - {x for x in frugal.ELEMENTWISE if "_fused" in x})
)
def test_elementwise_operations_allocate_their_results(name: str) -> None:
    kept = 0
    for func in overloads(name):
        for shape in SHAPES:
            for dtype in FULL:
                for layout in LAYOUTS.values():

                    def make(shape: Any = shape, dtype: Any = dtype, layout: Any = layout) -> Tensor:
                        return layout(torch.rand(shape, dtype=dtype) + 0.1)

                    given = arguments(func, make, torch.rand(shape[-2:]) > 0.5)
                    if given is None:
                        continue
                    try:
                        kept += held_to_its_word(func, *given)
                    except (RuntimeError, TypeError, NotImplementedError):
                        continue  # refuses these arguments: in place on an expanded tensor, say
    assert kept > 10


def test_operations_of_several_layouts_allocate_their_results() -> None:
    for one in LAYOUTS.values():
        for other in LAYOUTS.values():
            x, y = (layout(torch.rand(4, 48, 64)) for layout in (one, other))
            assert held_to_its_word(aten.mul.Tensor, (x, y))
            assert held_to_its_word(aten.add.Tensor, (x, y[0]))
            assert held_to_its_word(aten.addcmul.default, (x, y, y[0]))
            held_to_its_word(aten.where.self, (x > 0.5, x, y))
            held_to_its_word(aten.masked_fill.Scalar, (x, y > 0.5, 0.0))


@pytest.mark.parametrize("name", ["_fused_adam_", "_fused_adamw_", "_fused_sgd_"])
def test_fused_optimizers_allocate_nothing(name: str) -> None:
    def several() -> list[Tensor]:
        return [torch.rand(64, 96), torch.rand(1000)]

    numbers = {"lr": 0.1, "weight_decay": 0.0, "maximize": False, "grad_scale": None, "found_inf": None}
    if name == "_fused_sgd_":
        given: Any = (several(), several(), several())
        numbers |= {"momentum": 0.9, "dampening": 0.0, "nesterov": False, "is_first_step": False}
    else:
        given = (several(), several(), several(), several(), [], [torch.ones(()), torch.ones(())])
        numbers |= {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "amsgrad": False}
    assert held_to_its_word(getattr(aten, name).default, given, numbers)


def row(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, dtype=dtype)


ids = torch.arange(48) % 11
weight = torch.tensor(48.0)
DENSE: dict[str, Callable[[torch.dtype], tuple[Any, ...]]] = {
    "gelu.default": lambda d: (row(64, 96, dtype=d),),
    "gelu_backward.default": lambda d: (row(64, 96, dtype=d), row(64, 96, dtype=d)),
    "native_layer_norm.default": lambda d: (row(4, 48, 64, dtype=d), [64], row(64, dtype=d), row(64, dtype=d), 1e-5),
    "_softmax.default": lambda d: (row(4, 48, 64, dtype=d), -1, False),
    "_softmax_backward_data.default": lambda d: (row(4, 48, 64, dtype=d), row(4, 48, 64, dtype=d), -1, d),
    "_log_softmax.default": lambda d: (row(4, 48, 64, dtype=d), 2, False),
    "_log_softmax_backward_data.default": lambda d: (row(4, 48, 64, dtype=d), row(4, 48, 64, dtype=d), 2, d),
    "embedding.default": lambda d: (row(11, 64, dtype=d), ids),
    "embedding_dense_backward.default": lambda d: (row(48, 64, dtype=d), ids, 11, -1, False),
    "nll_loss_forward.default": lambda d: (row(48, 11, dtype=d), ids, None, 0, -100),
    "nll_loss_backward.default": lambda d: (row(48, dtype=d), row(48, 11, dtype=d), ids, None, 0, -100, weight.to(d)),
    "sum.dim_IntList": lambda d: (row(4, 48, 64, dtype=d), [1]),
    "mean.dim": lambda d: (row(4, 48, 64, dtype=d), [0, 2]),
    "cat.default": lambda d: ([row(4, 48, 64, dtype=d), row(4, 3, 64, dtype=d)], 1),
    "normal_.default": lambda d: (row(64, 96, dtype=d),),
    "uniform_.default": lambda d: (row(64, 96, dtype=d),),
}


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize("name", DENSE)
def test_operations_on_dense_tensors_allocate_their_results(name: str, dtype: torch.dtype) -> None:
    packet, overload = name.split(".")
    func, args = getattr(getattr(aten, packet), overload), DENSE[name](dtype)
    assert held_to_its_word(func, args)
    for dimension in range(3):
        if packet.startswith(("_softmax", "_log_softmax")):
            tensors = [x for x in args if isinstance(x, Tensor)]
            held_to_its_word(func, (*tensors, dimension, *args[len(tensors) + 1 :]))
    gaps = pytree.tree_map_only(Tensor, lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.dim() > 1 else x, args)
    assert not needs_nothing(func, gaps, {})


def test_every_dense_operation_has_its_arguments_here() -> None:
    assert {name.partition(".")[0].rstrip("_") for name in DENSE} == frugal.DENSE


@pytest.mark.parametrize(
    "source", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float64]
)
def test_copies_without_gaps_allocate_their_results(source: torch.dtype) -> None:
    for target in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float64):
        x = torch.ones(4, 48, 64, dtype=source)
        assert held_to_its_word(aten._to_copy.default, (x,), {"dtype": target})
        assert held_to_its_word(aten.copy_.default, (torch.empty(4, 48, 64, dtype=target), x))
    assert held_to_its_word(aten.clone.default, (x,))


def test_products_in_lines_allocate_their_results() -> None:
    for one in LAYOUTS.values():
        for other in LAYOUTS.values():
            for dtype in FULL:
                x, y = one(row(4, 48, 64, dtype=dtype)), other(row(4, 64, 48, dtype=dtype))
                held_to_its_word(aten.bmm.default, (x, y))
                held_to_its_word(aten.mm.default, (x[1], y[1]))
                held_to_its_word(aten.addmm.default, (row(48, dtype=dtype), x[1], y[1]))
                held_to_its_word(aten.addmm.default, (one(row(4, 48, 48, dtype=dtype))[1], x[1], y[1]))
                held_to_its_word(aten.baddbmm.default, (other(row(4, 48, 48, dtype=dtype)), x, y))
    assert held_to_its_word(aten.bmm.default, (row(4, 48, 64).mT, row(4, 32, 48).mT))
    assert not needs_nothing(aten.mm.default, (row(48, 128)[:, ::2], row(64, 32)), {})


MAKERS: tuple[tuple[Any, tuple[Any, ...]], ...] = (
    *((getattr(aten, name).default, (row(64, 96),)) for name in ("zeros_like", "ones_like", "empty_like", "detach")),
    *((getattr(aten, name).default, (row(64, 96), [5, 7])) for name in ("new_zeros", "new_ones", "new_empty")),
    *((getattr(aten, name).default, (row(64, 96), 2.0)) for name in ("full_like",)),
    *((getattr(aten, name).memory_format, ([64, 96],)) for name in ("empty",)),
    *((getattr(aten, name).default, ([64, 96],)) for name in ("zeros", "ones")),
    (aten.full.default, ([64, 96], 2.0)),
    (aten.new_full.default, (row(3), [64, 96], 2.0)),
    (aten.empty_strided.default, ([64, 96], [96, 1])),
    (aten.new_empty_strided.default, (row(3), [64, 96], [1, 64])),
    (aten.scalar_tensor.default, (2.0,)),
    (aten.fill_.Scalar, (row(64, 96).mT, 2.0)),
    (aten.zero_.default, (row(64, 96)[:, ::2],)),
    (aten.arange.start_step, (0, 1000, 2)),
    (aten._unsafe_view.default, (row(64, 96), [96, 64])),
    (aten.alias.default, (row(64, 96),)),
    (aten.lift_fresh.default, (row(64, 96),)),
    (aten.set_.source_Tensor, (torch.empty(0), row(64, 96))),
    (aten._local_scalar_dense.default, (row(1)[0],)),
)


@pytest.mark.parametrize(("func", "args"), MAKERS, ids=[str(func) for func, _ in MAKERS])
def test_makers_allocate_what_they_make(func: Any, args: tuple[Any, ...]) -> None:
    assert held_to_its_word(func, args)


def test_every_maker_has_its_arguments_here() -> None:
    assert {func._schema.name.removeprefix("aten::").rstrip("_") for func, _ in MAKERS} == frugal.MAKERS


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.mul.Tensor, (torch.ones(64, 96), torch.ones(64, 96, dtype=torch.bool))),
        (aten.add.Tensor, (torch.ones(64, 96), torch.ones(64, 96, dtype=torch.float64))),
        (aten.cumsum.default, (torch.ones(64, 96), 0)),
        (aten.mul.Tensor, (torch.ones(64, 96).bfloat16(), torch.ones(64, 96).bfloat16())),
    ],
)
def test_what_is_not_known_is_probed(func: Any, args: tuple[Any, ...]) -> None:
    assert not needs_nothing(func, args, {})
