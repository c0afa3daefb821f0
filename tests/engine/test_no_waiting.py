"""From backward's begin to the end of the step the engine looks at no number of the device.

Run on the CPU with the habits of a GPU: two modes refuse every operation that would make a program wait there, those
of tensors in Python and those of the dispatcher below.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.engine.arithmetic import CUDA, as_on, habits_of
from groupsearch.engine.loading import PoissonBatches
from groupsearch.options import NORM_METHODS, EngineOptions
from groupsearch.plan.clipping import AdaptiveQuantile, ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer import observe_sites
from tests.engine.test_arithmetic_ieee import WHOLE
from tests.engine.test_parity import assert_agree
from tests.engine.test_precision import NOT_FINITE
from tests.support.case import Case
from tests.support.cases import EVERY_CASE
from tests.support.reference import trainable

_ATEN = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "unique_dim", "_unique2", "masked_select"}
_PYTHON = {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "cpu", "equal", "allclose"}
_PYTHON |= {"nonzero", "argwhere", "is_nonzero", "__contains__", "__format__", "unique", "masked_select"}
_ALLOWED = ("mechanism", "_read")
"""Module and function that may read, once in a step: what the next thresholds are made of."""


class Waited(AssertionError):
    """A program on a GPU would wait here."""


class _Asks(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        by_mask = name in ("__getitem__", "__setitem__") and any(
            isinstance(x, Tensor) and x.dtype is torch.bool
            for x in (args[1] if isinstance(args[1], tuple) else args[1:])
        )
        if name in _PYTHON or by_mask:
            if not self._is_allowed():
                raise Waited(f"Tensor.{name}")
            self.read += 1
        return func(*args, **(kwargs or {}))

    def _is_allowed(self) -> bool:
        frames = [(f.frame.f_globals["__name__"].rpartition(".")[2], f.function) for f in inspect.stack(0)[1:4]]
        return _ALLOWED in frames


class _Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if name in _ATEN or by_mask:
            raise Waited(f"aten.{name}")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[_Asks]:
    """Refuses to read a number of the device, but for the one place, once."""
    with _Dispatches(), _Asks() as asks:
        yield asks
    assert asks.read <= 1


def test_what_would_wait_is_refused() -> None:
    x = torch.ones(3)
    for ask in (
        lambda: bool(x.all()),
        lambda: int(x[0]),
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: torch.equal(x, x),
        lambda: torch.where(x > 0),
        lambda: x.masked_select(x > 0),
    ):
        with pytest.raises((Waited, RuntimeError)), no_waiting():
            ask()


@contextmanager
def attached(case: Case, groups: str, **how: Any) -> Iterator[tuple[nn.Module, torch.optim.Optimizer, PrivateEngine]]:
    """A private model, with the habits of a GPU."""
    dtype = how.pop("dtype", torch.float64)
    model = case.model(dtype)
    sites = observe_sites(case.model(), case.batch(), case.loss)
    cuts = tuple(b for b in range(1, len(sites)) if sites[b].layer != sites[b - 1].layer) if groups != "all" else ()
    cuts = cuts[::2] if groups == "some" else cuts
    plan = ClipPlan(Grouping(cuts, sites), max_grad_norm=0.5, **how.pop("plan", {}))
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    settings = {"noise_multiplier": 1.0, "expected_batch_size": 4, "generator": torch.Generator().manual_seed(3), **how}
    engine = make_private(model, optimizer, plan, **settings)
    with ExitStack() as stack:
        stack.enter_context(as_on("cuda"))
        yield model, optimizer, engine


def step(case: Case, model: nn.Module, optimizer: Any, batches: int = 1, scaler: GradScaler | None = None) -> int:
    """Accumulates some batches and steps; the numbers read."""
    batch, read = case.batch(next(model.parameters()).dtype), 0
    for _ in range(batches):
        loss = case.loss(model, batch).mean()
        loss = loss if scaler is None else scaler.scale(loss)
        with no_waiting() as asks:
            loss.backward()
        read += asks.read
    with no_waiting() as asks:
        optimizer.step() if scaler is None else scaler.step(optimizer)
    return read + asks.read


CASES = ("embedding", "layernorm", "groupnorm", "class-token", "reused-linear-3d")
CASES += ("attention", "checkpoint-reentrant", "checkpoint-non-reentrant", "gpt2", "lora")


METHODS = [(n, m) for m in NORM_METHODS for n in ("linear-3d", "conv2d-groups", "tied-embedding-head")]


@pytest.mark.parametrize(("name", "method"), [*METHODS, *((name, "mixed") for name in CASES)])
def test_a_step_reads_nothing(name: str, method: str) -> None:
    case = EVERY_CASE[name]
    for groups in ("all", "layers"):
        with attached(case, groups, options=EngineOptions(method)) as (model, optimizer, _):
            assert step(case, model, optimizer, batches=2) == 0


def test_a_module_run_whole_reads_nothing_itself() -> None:
    with attached(WHOLE, "all", dtype=torch.float32) as (model, optimizer, _):
        assert step(WHOLE, model, optimizer) == 0


@pytest.mark.parametrize("rule", ["abadi", "auto-s", "auto-v"])
def test_adaptive_thresholds_are_read_once_at_the_end_of_a_step(rule: str) -> None:
    case = EVERY_CASE["residual-mlp-3d"]
    adaptive = AdaptiveQuantile(quantile=0.5, count_noise=4.0)
    with attached(case, "layers", plan={"allocation": adaptive, "rule": rule}) as (model, optimizer, engine):
        before = engine.mechanism.thresholds
        assert step(case, model, optimizer, batches=3) == 1
        assert engine.mechanism.thresholds != before


@pytest.mark.parametrize("on", [True, False])
def test_a_loss_scale_stays_where_it_is(on: bool) -> None:
    case = EVERY_CASE["linear-3d"]
    scaler = GradScaler("cpu", 2.0**10, enabled=on)
    with attached(case, "layers", grad_scaler=scaler, dtype=torch.float32) as (model, optimizer, engine):
        assert step(case, model, optimizer, batches=2, scaler=scaler) == 0
        scaler.update()
        assert engine.steps == 1


def test_batches_with_a_watch_read_nothing_while_a_step_is_under_way() -> None:
    case = EVERY_CASE["linear-3d"]
    data = case.batch(batch_size=12)
    batches = PoissonBatches(data, expected_batch_size=6, steps=3, physical_batch=2, generator=torch.Generator())
    how = {"batches": batches, "loss": case.loss, "expected_batch_size": None, "loss_reduction": "sum"}
    with attached(case, "some", **how) as (model, optimizer, engine):
        for logical in batches:
            for piece in logical:
                loss = case.loss(model, piece).sum()
                with no_waiting():
                    loss.backward()
            with no_waiting():
                optimizer.step()
        assert engine.steps == 3


# -- without a look the result is the same -----------------------------------------------------


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("case", [*NOT_FINITE, WHOLE], ids=lambda case: case.name)
def test_sums_are_those_of_the_habits_of_a_cpu(case: Case, value: float) -> None:
    """An example whose gradient is not finite adds exactly nothing, without being looked for."""
    batch, sums, norms = case.batch(), [], []
    batch["scale"] = torch.where(torch.arange(4) == 1, batch["scale"] + value, batch["scale"])
    for device_type in ("cpu", "cuda"):
        with attached(case, "some", loss_reduction="sum") as (model, _, engine), as_on(device_type):
            case.loss(model, batch).sum().backward()
            sums.append(dict(engine.clipped_sums()))
            norms.append(engine.norms)
    assert torch.equal(norms[0].isinf(), norms[1].isinf())
    assert norms[0].isinf().any() == (value != 0)
    assert_agree(sums[1], sums[0], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_overflow_lowers_the_scale_without_being_looked_at(dtype: torch.dtype) -> None:
    case, found = EVERY_CASE["linear-3d"], []
    for scale in (1.0, float("inf")):
        scaler = GradScaler("cpu", 4.0)
        with attached(case, "layers", dtype=dtype, grad_scaler=scaler, loss_reduction="sum") as (model, optimizer, _):
            batch = case.batch(dtype)
            batch["scale"][2] *= scale
            loss = scaler.scale(case.loss(model, batch).sum())
            with no_waiting():
                loss.backward()
                scaler.step(optimizer)
            scaler.update()
            assert all(p.isfinite().all() for p in model.parameters())
            found.append(scaler.get_scale())
    assert found == [4.0, 2.0]


def test_no_example_at_all_is_finite() -> None:
    for case in (WHOLE, EVERY_CASE["linear-3d"], EVERY_CASE["embedding"]):
        with attached(case, "all") as (model, _, engine):
            batch = case.batch()
            case.loss(model, {**batch, "scale": torch.full((4,), float("nan"), dtype=torch.float64)}).sum().backward()
            assert not any(total.any() for total in engine.clipped_sums().values())


def test_slices_are_larger_on_a_gpu() -> None:
    x = torch.empty(0)
    before = habits_of(x)
    with as_on("cuda"):
        assert habits_of(x) is CUDA
        assert CUDA.slice_bytes >= 8 * before.slice_bytes
    assert habits_of(x) is before
