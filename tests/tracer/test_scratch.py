"""Scratch inside operations: what a probe says is what the profiler sees of the same operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from groupsearch.tracer import scratch
from groupsearch.tracer.allocator import profiled_peak
from groupsearch.tracer.live import LiveBytes
from groupsearch.tracer.scratch import CpuScratch

aten = torch.ops.aten
_CONVOLUTION = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
OPERATIONS: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "convolution": (
        aten.convolution.default,
        lambda: (torch.randn(4, 3, 16, 16), torch.randn(8, 3, 3, 3), torch.randn(8), *_CONVOLUTION),
    ),
    "convolution backward": (
        aten.convolution_backward.default,
        lambda: (
            *(torch.randn(4, 8, 16, 16), torch.randn(4, 3, 16, 16), torch.randn(8, 3, 3, 3), [8]),
            *(*_CONVOLUTION, [True, True, True]),
        ),
    ),
    "flash attention": (
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        lambda: tuple(torch.randn(2, 4, 64, 16) for _ in range(3)),
    ),
    "logsumexp": (aten.logsumexp.default, lambda: (torch.randn(64, 100), [1])),
    "layer norm backward": (
        aten.native_layer_norm_backward.default,
        lambda: (
            *(torch.randn(64, 32), torch.randn(64, 32), [32], torch.randn(64, 1), torch.rand(64, 1) + 1),
            *(torch.randn(32), torch.randn(32), [True, True, True]),
        ),
    ),
}


def transposed(*shape: int) -> torch.Tensor:
    return torch.randn(*shape[:-2], shape[-1], shape[-2]).mT


COPYING: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "layer norm": (aten.native_layer_norm.default, lambda: (transposed(8, 48, 64), [64], None, None, 1e-5)),
    "softmax": (aten._softmax.default, lambda: (transposed(8, 48, 64), -1, False)),
    "log softmax": (aten._log_softmax.default, lambda: (transposed(8, 48, 64), -1, False)),
    "softmax backward": (
        aten._softmax_backward_data.default,
        lambda: (torch.ones(()).expand(8, 48, 64), torch.randn(8, 48, 64), -1, torch.float32),
    ),
    "log softmax backward": (
        aten._log_softmax_backward_data.default,
        lambda: (transposed(8, 48, 64), torch.randn(8, 48, 64), -1, torch.float32),
    ),
    "embedding backward": (
        aten.embedding_dense_backward.default,
        lambda: (transposed(384, 64), torch.zeros(384, dtype=torch.int64), 1, -1, False),
    ),
    "index select": (aten.index_select.default, lambda: (transposed(8, 48, 64), 1, torch.zeros(5, dtype=torch.int64))),
    "max pooling": (aten.max_pool2d_with_indices.default, lambda: (torch.randn(2, 4, 8, 16)[..., ::2], [2, 2])),
    "product of every other column": (aten.mm.default, lambda: (torch.randn(384, 128)[:, ::2], torch.randn(64, 32))),
    "product of an expanded matrix": (
        aten.bmm.default,
        lambda: (torch.randn(8, 1, 64).expand(8, 48, 64), torch.randn(8, 64, 32)),
    ),
}


def faked(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    mode = FakeTensorMode()
    return pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)


def probed(operation: Any, arguments: tuple[Any, ...], probe: CpuScratch | None = None) -> tuple[Any, int | None]:
    """What an operation is said to return and to allocate, on fake tensors like these."""
    fake = faked(arguments)
    return (probe or CpuScratch())(operation, fake, {}, operation(*fake))


def bytes_of(result: Any) -> int:
    return sum(t.untyped_storage().nbytes() for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_probe_says_what_the_profiler_sees(name: str) -> None:
    operation, make = OPERATIONS[name]
    arguments = make()
    expected = profiled_peak(lambda: operation(*arguments))
    assert probed(operation, arguments)[1] == expected
    assert expected > 0


@pytest.mark.parametrize("name", COPYING)
def test_operands_in_another_layout_are_copied_and_that_is_seen(name: str) -> None:
    operation, make = COPYING[name]
    arguments = make()
    results = sum(t.nbytes for t in pytree.tree_leaves(operation(*arguments)) if isinstance(t, torch.Tensor))
    expected = profiled_peak(lambda: operation(*arguments))
    assert probed(operation, arguments)[1] == expected > results
    contiguous = pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, arguments)
    assert probed(operation, contiguous)[1] in (0, bytes_of(operation(*contiguous)))


def test_a_transposed_matrix_is_what_products_take() -> None:
    arguments = (transposed(8, 48, 64), transposed(8, 64, 32))
    assert profiled_peak(lambda: aten.bmm.default(*arguments)) == 8 * 48 * 32 * 4
    assert probed(aten.bmm.default, arguments)[1] == 0


def test_attention_and_convolution_take_more_than_their_results() -> None:
    for name in ("convolution", "flash attention"):
        operation, make = OPERATIONS[name]
        arguments = make()
        results = sum(t.nbytes for t in pytree.tree_leaves(operation(*arguments)) if isinstance(t, torch.Tensor))
        assert (probed(operation, arguments)[1] or 0) > results


def test_a_shape_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[int] = []

    def counting(work: Callable[[], object]) -> int:
        probes.append(profiled_peak(work))
        return probes[-1]

    monkeypatch.setattr(scratch, "profiled_peak", counting)
    probe = CpuScratch()
    operation, make = OPERATIONS["logsumexp"]
    assert probed(operation, make(), probe)[1] == probed(operation, make(), probe)[1] == probes[0]
    assert len(probes) == 1
    probed(operation, (torch.randn(65, 100), [1]), probe)
    assert len(probes) == 2


def test_other_operations_have_none() -> None:
    assert probed(aten.add.Tensor, (torch.ones(8), torch.ones(8)))[1] == 0


def test_what_is_too_large_is_not_run_but_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "PROBE_LIMIT_BYTES", 1000)
    probe = CpuScratch()
    operation, make = OPERATIONS["logsumexp"]
    assert probed(operation, make(), probe)[1] is None
    live = LiveBytes(probe)
    with FakeTensorMode(), live:
        torch.ones(64, 100).logsumexp(1)
    assert live.unprobed == {"aten::logsumexp"}


HALF: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "product": (aten.mm.default, lambda: (torch.randn(64, 128).bfloat16().mT, torch.randn(64, 32).bfloat16())),
    "mixed sum": (aten.add.Tensor, lambda: (torch.randn(8, 512), torch.randn(8, 512).bfloat16())),
    "mixed sum in place": (aten.add_.Tensor, lambda: (torch.randn(8, 512), torch.randn(8, 512).bfloat16())),
}


@pytest.mark.parametrize("name", HALF)
def test_half_precision_takes_more_than_its_results(name: str) -> None:
    operation, make = HALF[name]
    arguments = make()
    expected = profiled_peak(lambda: operation(*arguments))
    result = operation(*make())
    assert probed(operation, arguments)[1] == expected
    assert expected > (0 if name.endswith("in place") else result.nbytes)


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (lambda x, w: aten.native_layer_norm(x, [8], w, w, 1e-5), aten.native_layer_norm_backward.default),
        (lambda x, w: aten.native_group_norm(x, w, w, 64, 8, 1, 2, 1e-5), aten.native_group_norm_backward.default),
    ],
)
def test_norms_of_half_precision_inputs_by_float32_weights_are_probed(forward: Any, backward: Any) -> None:
    """Fake kernels say that their statistics are of half precision; the real ones are not, and want them so."""
    found: list[tuple[int | None, tuple[Any, ...]]] = []
    probe = CpuScratch()

    def scratch_of(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[Any, int | None]:
        formed, size = probe(func, args, kwargs, out)
        found.extend([(size, tuple(args))] if func is backward else [])
        return formed, size

    with FakeTensorMode(), LiveBytes(scratch_of):
        x, w = torch.ones(64, 8, dtype=torch.bfloat16, requires_grad=True), torch.ones(8, requires_grad=True)
        forward(x, w)[0].backward(torch.ones(64, 8, dtype=torch.bfloat16))
    [(size, args)] = found
    real_x, real_w = torch.ones(64, 8, dtype=torch.bfloat16), torch.ones(8)
    statistics = forward(real_x, real_w)[1:]
    asked = [x for x in args if isinstance(x, torch.Tensor)]
    assert {x.dtype for x in statistics} == {torch.float32}
    real = {id(x): y for x, y in zip(asked, (real_x, real_x, *statistics, real_w, real_w), strict=False)}
    assert size == profiled_peak(lambda: backward(*(real.get(id(x), x) for x in args)))


def test_a_probe_under_a_transform_is_that_of_what_runs_below_it() -> None:
    """Per-example gradients of functions are taken by vmap, where an operation sees the whole batch."""
    found: list[int | None] = []
    probe = CpuScratch()

    def scratch_of(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[Any, int | None]:
        formed, size = probe(func, args, kwargs, out)
        found.extend([size] if func is aten.bmm.default else [])
        return formed, size

    def product(x: torch.Tensor) -> torch.Tensor:
        return x.mT @ x

    with FakeTensorMode(), LiveBytes(scratch_of):
        torch.vmap(product)(torch.ones(4, 64, 128, dtype=torch.bfloat16))
    real = torch.ones(4, 64, 128, dtype=torch.bfloat16)
    assert found == [profiled_peak(lambda: torch.bmm(real.mT, real))]


def test_what_a_probe_draws_is_not_missed() -> None:
    before = torch.get_rng_state()
    given, state = torch.Generator(), torch.Generator().get_state()
    for operation, arguments in ((aten.bernoulli_.float, (0.5,)), (aten.native_dropout.default, (0.5, True))):
        half = torch.ones(64, dtype=torch.bfloat16)
        expected = profiled_peak(lambda o=operation, a=arguments, x=half: o(x, *a))
        torch.set_rng_state(before)
        assert probed(operation, (half, *arguments))[1] == expected
    fake = faked((torch.ones(64, dtype=torch.bfloat16),))
    CpuScratch()(aten.normal_.default, fake, {"generator": given}, fake[0])
    assert torch.equal(given.get_state(), state)
    assert torch.equal(before, torch.get_rng_state())


INPUTS: dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]] = {
    "an index in range": (
        aten.gather.default,
        lambda: (torch.randn(9, 5), 1, torch.arange(5).expand(9, 5).contiguous()),
    ),
    "a matrix that has a root": (aten.linalg_cholesky_ex.default, lambda: (torch.eye(8).expand(64, 8, 8).clone(),)),
    "lengths": (
        aten._pack_padded_sequence.default,
        lambda: (torch.randn(4, 6, 8), torch.tensor([1, 1, 1, 1]), True),
    ),
    "places where bags begin": (
        aten._embedding_bag.default,
        lambda: (torch.randn(9, 64), torch.arange(8), torch.tensor([0, 4])),
    ),
    "complex numbers": (aten.bmm.default, lambda: (torch.randn(4, 8, 8, dtype=torch.cfloat).conj(),) * 2),
}


@pytest.mark.parametrize("name", INPUTS)
def test_values_are_made_that_an_operation_takes(name: str) -> None:
    operation, make = INPUTS[name]
    arguments = make()
    if name == "lengths":  # whose values say how large the result is, so that no fake kernel has it
        fake = faked(arguments)
        assert CpuScratch()(operation, fake, {}, ())[1] is not None
        return
    assert probed(operation, arguments)[1] == profiled_peak(lambda: operation(*arguments))


@torch.library.custom_op("groupsearch_tests::sevens", mutates_args=())
def sevens(x: torch.Tensor) -> torch.Tensor:
    if not bool((x == 7).all()):
        raise ValueError("Expected sevens.")
    return x.cumsum(0)


@sevens.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_an_operation_that_takes_no_made_up_values_is_not_known() -> None:
    operation = torch.ops.groupsearch_tests.sevens.default
    live = LiveBytes(CpuScratch())
    with FakeTensorMode(), live:
        operation(torch.full((64,), 7.0))
    assert live.unprobed == {"groupsearch_tests::sevens"}


def test_results_have_the_form_that_the_real_kernel_gives_them() -> None:
    """The kernel for fake tensors says float16 for the statistics of a norm over mixed types."""
    x, weight = torch.randn(8, 64).to(torch.float16), torch.randn(64)
    arguments = (x, [64], weight, weight, 1e-5)
    fake = faked(arguments)
    wrong = aten.native_layer_norm.default(*fake)
    right, _ = CpuScratch()(aten.native_layer_norm.default, fake, {}, wrong)
    real = aten.native_layer_norm.default(*arguments)
    assert [t.dtype for t in right] == [t.dtype for t in real] != [t.dtype for t in wrong]
    assert [(t.shape, t.stride()) for t in right] == [(t.shape, t.stride()) for t in real]
    assert bytes_of(right) == bytes_of(real)
