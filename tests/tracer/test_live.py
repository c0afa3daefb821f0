"""LiveBytes against a count that looks at every storage there is, and against torch's profiler."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from benchmarks.accuracy import Subject
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer.allocator import profiled_peak
from groupsearch.tracer.live import LiveBytes
from groupsearch.tracer.step import StepSettings, fake_stage, make_stage, real_copy
from groupsearch.workloads import Workload
from tests.support.cases import EVERY_CASE, Wrap


class Walked(LiveBytes):
    """After every operation it also walks the garbage collector's objects and adds up their storages."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[str, int, int]] = []
        self.before = storages()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        counted = self.live_bytes
        walked = sum(size for key, size in storages().items() if key not in self.before)
        self.pairs.append((str(func), counted, walked))
        return out


def storages() -> dict[int, int]:
    """Bytes of every storage that a Python tensor or an autograd graph's tensor has, by identity."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter, FakeTensor)]
    return {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}


@pytest.fixture
def little_garbage() -> Iterator[None]:
    """Whatever was there before is left out of every walk."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("little_garbage")
@pytest.mark.parametrize("name", ["residual-mlp-3d", "attention", "reused-linear-3d", "checkpoint-non-reentrant"])
def test_every_operation_leaves_what_a_walk_over_storages_finds(name: str) -> None:
    case = EVERY_CASE[name]
    mode, stage = fake_stage(case.model(torch.float32), case.batch(torch.float32), case.loss, StepSettings())
    walked = Walked()
    with mode:
        walked.ignore(stage.model.parameters())
        walked.ignore(t for t in pytree.tree_leaves(stage.batch) if isinstance(t, Tensor))
        gc.collect()
        walked.before = storages()
        with walked:
            stage.loss(stage.model, stage.batch).mean().backward()
    differing = [pair for pair in walked.pairs if pair[1] != pair[2]]
    assert len(walked.pairs) > 50
    assert not differing


def nonprivate_peaks(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> tuple[int, int]:
    """Peak of a plain step on fake tensors by LiveBytes, on real ones by the profiler."""
    mode, stage = fake_stage(model, batch, loss, StepSettings())
    with mode:
        counted = stage.counted_step()
    real = make_stage(*real_copy(model, batch, torch.device("cpu")), loss, StepSettings())
    return counted, real.static.total + profiled_peak(real.step)


def _sum_of(branches: int) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.stem(x)
        return torch.stack([getattr(m, f"branch{i}")(y).sum(-1) for i in range(branches)], -1)

    return Wrap(forward, stem=nn.Linear(32, 512), **{f"branch{i}": nn.Linear(512, 4) for i in range(branches)})


@pytest.mark.parametrize("branches", [1, 2, 3, 6])
def test_gradients_that_meet_are_added_in_place_as_autograd_does(branches: int) -> None:
    """Each further gradient of the wide activation is added to the first; nobody holds a third copy."""
    batch = {"x": torch.randn(64, 32)}
    model, loss = _sum_of(branches), lambda m, b: m(b["x"]).flatten(1).sum(1)
    counted, measured = nonprivate_peaks(model, batch, loss)
    assert abs(counted - measured) < 2048  # a copy of the activation is 131072 bytes
    real = make_stage(*real_copy(model, batch, torch.device("cpu")), loss, StepSettings())
    assert abs(real.counted_step() - measured) < 2048  # autograd adds in place only while nobody watches


@pytest.mark.parametrize("lent", [False, True])
def test_gradients_taken_many_at_once_are_not_added_in_place(lent: bool) -> None:
    """A weight divided by its norm is reached by two ways, for all examples at once."""

    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.owner.weight if lent else m.weight
        return m.head(torch.tanh(F.linear(x, weight / weight.norm(dim=1, keepdim=True))))

    def build() -> nn.Module:
        weight = {"owner": nn.Linear(64, 64, bias=False)} if lent else {"weight": nn.Parameter(torch.randn(64, 64))}
        return Wrap(forward, head=nn.Linear(64, 8), **weight)

    def make_batch(size: int) -> dict[str, Tensor]:
        return {"x": torch.randn(size, 64)}

    subject = Subject(Workload("norm", build, make_batch, lambda m, b: m(b["x"]).square().sum(1), batch_size=16))
    for grouping in (Grouping.all_layer(subject.trace), Grouping.layer_wise(subject.trace)):
        assert abs(subject.estimate(grouping) / subject.measure(grouping) - 1) < 2e-3


@pytest.mark.parametrize(
    "name",
    [
        *("residual-mlp-3d", "attention", "branches", "vit", "t5", "bert"),
        "gpt2",
    ],
)
def test_a_fake_step_peaks_where_the_real_one_does(name: str) -> None:
    case = EVERY_CASE[name]
    counted, measured = nonprivate_peaks(case.model(torch.float32), case.batch(torch.float32, 64), case.loss)
    assert counted == pytest.approx(measured, rel=5e-3)


@pytest.mark.parametrize("fake", [False, True])
def test_what_is_allocated_and_released_is_logged(fake: bool) -> None:
    live = LiveBytes()
    with FakeTensorMode() if fake else torch.no_grad(), live:
        one = torch.zeros(100)
        other = one.double()
        view = other[10:]
        del other
        assert live.live_bytes == 400 + 800
        assert live.number(view) == 1
        del view, one
    assert live.log == [400, 1200, 400, 0]
    assert live.sizes == [400, 800]
    assert live.births == [0, 1]
    assert live.deaths == {1: 2, 0: 3}
    assert live.peak_since(0) == 1200
    assert live.peak_since(3) == 400


def test_ignored_tensors_are_counted_once_and_never_live() -> None:
    base = torch.zeros(10)
    live = LiveBytes()
    assert live.ignore([base, base[2:], torch.zeros(3)]) == 40 + 12
    with live:
        base.add_(1)
        base[5:]
    assert live.log == []
    assert live.number(base) is None


@pytest.mark.parametrize("fake", [False, True])
def test_the_state_of_the_random_generator_is_counted_while_it_is_kept(fake: bool) -> None:
    live, asked = LiveBytes(), torch.get_rng_state
    size = asked().nbytes
    with FakeTensorMode() if fake else torch.no_grad(), live:
        state = torch.get_rng_state()
        with torch.random.fork_rng():
            assert live.live_bytes == 2 * size
        assert live.live_bytes == size
    assert torch.get_rng_state is asked
    assert torch.equal(state, torch.get_rng_state())
    del state
    assert live.log == [size, 2 * size, size, 0]


def test_checkpointing_keeps_the_state_of_the_generator_for_every_block() -> None:
    case = EVERY_CASE["checkpoint-non-reentrant"]
    counted, measured = nonprivate_peaks(case.model(torch.float32), case.batch(torch.float32), case.loss)
    assert counted > 2 * torch.get_rng_state().nbytes
    assert counted == pytest.approx(measured, abs=64)


def test_scratch_of_an_operation_is_a_peak_and_nothing_stays() -> None:
    live = LiveBytes(lambda func, args, kwargs, out: (out, 5000 if func is torch.ops.aten.exp.default else 0))
    with live:
        one = torch.ones(25)
        other = one.exp()
    assert live.log == [100, 5100, 200]
    assert len(other) == 25
