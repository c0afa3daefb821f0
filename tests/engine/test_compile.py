"""torch.compile: the model may be compiled, whole or in parts, before or after; its layers' hooks stay outside.

The backend is ``eager``: what is tested is what Dynamo makes of the hooks, and no compiler is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from groupsearch.engine import make_private
from groupsearch.errors import UnsupportedModelError
from tests.engine.loop import CASE, TOLERANCE, plan_of, private, scaled
from tests.engine.test_parity import assert_agree
from tests.support.cases import BATCH_SIZE, EVERY_CASE, Case
from tests.support.reference import clipped_sums, trainable

NAMES = ("tied-embedding-head", "class-token", "positions-without-batch", "gpt2", "checkpoint-non-reentrant")
CASES = [EVERY_CASE[name] for name in NAMES]
pytestmark = [
    # Dynamo tells what it leaves to Python, and looks at .grad of whatever it meets
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _whole(model: nn.Module) -> Callable[..., object]:
    return torch.compile(model, backend="eager")


def _in_place(model: nn.Module) -> Callable[..., object]:
    model.compile(backend="eager")
    return model


def _parts(model: nn.Module) -> Callable[..., object]:
    for module in model.children():
        module.compile(backend="eager")
    return model


def _around(model: nn.Module) -> Callable[..., object]:
    return torch.compile(lambda *args, **kwargs: model(*args, **kwargs), backend="eager")


WAYS = {"torch.compile": _whole, "model.compile": _in_place, "parts": _parts, "a function around": _around}


def _check(case: Case, model: nn.Module, engine: object, call: Callable[..., object]) -> None:
    for times in (1, 2):
        case.loss(call, case.batch()).mean().backward()  # type: ignore[arg-type]
        expected = clipped_sums(case.model(), case.batch(), case.loss, engine.plan)  # type: ignore[attr-defined]
        assert_agree(engine.clipped_sums(), scaled(expected, times), TOLERANCE)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("case", "way"),
    [(CASE, way) for way in WAYS] + [(case, "torch.compile") for case in CASES],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_model_compiled_afterwards_is_exact(case: Case, way: str) -> None:
    model, _, engine = private(case, plan_of(case, (1,)))
    _check(case, model, engine, WAYS[way](model))


@pytest.mark.parametrize("way", ["model.compile", "parts"])
def test_a_model_compiled_in_place_before_is_exact(way: str) -> None:
    model = CASE.model()
    WAYS[way](model)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    engine = make_private(model, optimizer, plan_of(CASE), noise_multiplier=0.0, expected_batch_size=BATCH_SIZE)
    _check(CASE, model, engine, model)


def test_a_module_exchanged_for_its_compiled_self_is_exact() -> None:
    model, _, engine = private(CASE)
    model[2] = torch.compile(model[2], backend="eager")  # type: ignore[index]
    CASE.loss(model, CASE.batch()).mean().backward()
    expected = clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan)
    assert_agree(engine.clipped_sums(), expected, TOLERANCE)


@pytest.mark.parametrize("inner", [False, True], ids=["the model", "a part"])
def test_a_compiled_wrapper_is_refused_with_the_remedy(inner: bool) -> None:
    model = CASE.model()
    wrapped: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    if inner:
        wrapped = nn.Sequential(wrapped)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnsupportedModelError, match=r"OptimizedModule.*_orig_mod.*afterwards"):
        make_private(wrapped, optimizer, plan_of(CASE), noise_multiplier=0.0, expected_batch_size=BATCH_SIZE)


def test_data_parallel_is_refused_with_the_remedy() -> None:
    model = CASE.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"noise_multiplier": 0.0, "expected_batch_size": float(BATCH_SIZE)}
    with pytest.raises(UnsupportedModelError, match=r"DataParallel.*model\.module"):
        make_private(nn.DataParallel(model), optimizer, plan_of(CASE), **settings)
    make_private(model, optimizer, plan_of(CASE), **settings)


@pytest.fixture
def _one_process(tmp_path: object) -> Iterator[None]:
    store = torch.distributed.FileStore(f"{tmp_path}/store", 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed part")
@pytest.mark.usefixtures("_one_process")
def test_sharded_parameters_are_refused_with_the_remedy() -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    wrapped = fully_shard(CASE.model(), mesh=mesh)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    with pytest.raises(UnsupportedModelError, match=r"FSDPModule.*Train data parallel"):
        make_private(wrapped, optimizer, plan_of(CASE), noise_multiplier=0.0, expected_batch_size=BATCH_SIZE)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed part")
@pytest.mark.usefixtures("_one_process")
def test_ddp_of_one_process_is_taken_and_given_back() -> None:
    model, plain = CASE.model(), CASE.model()
    optimizer, batch = torch.optim.SGD(model.parameters(), lr=0.1), CASE.batch()
    wrapped = nn.parallel.DistributedDataParallel(model)
    engine = make_private(wrapped, optimizer, plan_of(CASE), noise_multiplier=0.0, expected_batch_size=BATCH_SIZE)
    for _ in range(2):
        CASE.loss(wrapped, batch).mean().backward()
        assert engine.clipped_sums()["0.weight"].any()
        wrapped.zero_grad()
        assert not engine.clipped_sums()["0.weight"].any()
    engine.detach()
    CASE.loss(wrapped, batch).mean().backward()  # of DDP again
    CASE.loss(plain, batch).mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
