"""Scratch inside operations: what a probe says is what the profiler sees of the same operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from groupsearch.tracer import scratch
from groupsearch.tracer.live import LiveBytes
from groupsearch.tracer.profiled import profiled_peak
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


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_probe_says_what_the_profiler_sees(name: str) -> None:
    operation, make = OPERATIONS[name]
    arguments = make()
    expected = profiled_peak(lambda: operation(*arguments))
    assert CpuScratch()(operation, faked(arguments), {}) == expected
    assert expected > 0


@pytest.mark.parametrize("name", COPYING)
def test_operands_in_another_layout_are_copied_and_that_is_seen(name: str) -> None:
    operation, make = COPYING[name]
    arguments = make()
    results = sum(t.nbytes for t in pytree.tree_leaves(operation(*arguments)) if isinstance(t, torch.Tensor))
    expected = profiled_peak(lambda: operation(*arguments))
    assert CpuScratch()(operation, faked(arguments), {}) == expected > results
    contiguous = pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, arguments)
    assert CpuScratch()(operation, faked(contiguous), {}) == 0


def test_a_transposed_matrix_is_what_products_take() -> None:
    arguments = (transposed(8, 48, 64), transposed(8, 64, 32))
    assert profiled_peak(lambda: aten.bmm.default(*arguments)) == 8 * 48 * 32 * 4
    assert CpuScratch()(aten.bmm.default, faked(arguments), {}) == 0


def test_attention_and_convolution_take_more_than_their_results() -> None:
    for name in ("convolution", "flash attention"):
        operation, make = OPERATIONS[name]
        arguments = make()
        results = sum(t.nbytes for t in pytree.tree_leaves(operation(*arguments)) if isinstance(t, torch.Tensor))
        assert CpuScratch()(operation, faked(arguments), {}) > results


def test_a_shape_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[int] = []

    def counting(work: Callable[[], object]) -> int:
        probes.append(profiled_peak(work))
        return probes[-1]

    monkeypatch.setattr(scratch, "profiled_peak", counting)
    probe = CpuScratch()
    operation, make = OPERATIONS["logsumexp"]
    assert probe(operation, faked(make()), {}) == probe(operation, faked(make()), {}) == probes[0]
    assert len(probes) == 1
    probe(operation, faked((torch.randn(65, 100), [1])), {})
    assert len(probes) == 2


def test_other_operations_have_none() -> None:
    assert CpuScratch()(aten.add.Tensor, faked((torch.ones(8), torch.ones(8))), {}) == 0


def test_what_is_too_large_is_not_run_but_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "PROBE_LIMIT_BYTES", 1000)
    probe = CpuScratch()
    operation, make = OPERATIONS["logsumexp"]
    assert probe(operation, faked(make()), {}) == 0
    assert probe.skipped == {"aten::logsumexp"}


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
    assert CpuScratch()(operation, faked(arguments), {}) == expected
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
    found: list[tuple[int, tuple[Any, ...]]] = []
    probe = CpuScratch()

    def scratch_of(func: Any, args: Any, kwargs: Any) -> int:
        size = probe(func, args, kwargs)
        found.extend([(size, tuple(args))] if func is backward else [])
        return size

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
    found: list[int] = []
    probe = CpuScratch()

    def scratch_of(func: Any, args: Any, kwargs: Any) -> int:
        size = probe(func, args, kwargs)
        found.extend([size] if func is aten.bmm.default else [])
        return size

    def product(x: torch.Tensor) -> torch.Tensor:
        return x.mT @ x

    with FakeTensorMode(), LiveBytes(scratch_of):
        torch.vmap(product)(torch.ones(4, 64, 128, dtype=torch.bfloat16))
    real = torch.ones(4, 64, 128, dtype=torch.bfloat16)
    assert found == [profiled_peak(lambda: torch.bmm(real.mT, real))]


def test_drawing_is_not_probed() -> None:
    """A probe draws from the generator, which the step would miss."""
    before = torch.get_rng_state()
    for operation, arguments in ((aten.bernoulli_.float, (0.5,)), (aten.native_dropout.default, (0.5, True))):
        half = torch.ones(64, dtype=torch.bfloat16)
        assert CpuScratch()(operation, (*faked((half,)), *arguments), {}) == 0
    assert torch.equal(before, torch.get_rng_state())
