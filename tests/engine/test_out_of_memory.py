"""A device without memory is not a model that cannot be trained: what torch raised comes through, wherever it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupsearch.cli import main
from groupsearch.engine import make_private
from groupsearch.engine.loading import PoissonBatches
from groupsearch.errors import is_out_of_memory
from groupsearch.fit import Room, Sizes, fit_rows
from groupsearch.tracer import observe_sites, trace_model
from groupsearch.tracer.step import real_copy
from groupsearch.verify import Setup
from tests.engine.loop import plan_of, private
from tests.engine.test_arithmetic_ieee import sorted_rows
from tests.support.case import Case, Wrap

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB."
ERRORS = [torch.OutOfMemoryError(SAID), RuntimeError("CUDA error: out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]  # fmt: skip # noqa: E501


class Memory:
    """When there is none: in a call, forward or backward, of any copy of a layer."""

    def __init__(self) -> None:
        self.at: tuple[int, str] = (-1, "")
        self.calls = 0
        self.error: RuntimeError = ERRORS[0]


MEMORY = Memory()


@pytest.fixture(autouse=True)
def enough() -> None:
    MEMORY.__init__()  # type: ignore[misc]


class Full(nn.Linear):
    """A layer that finds no memory in one of its calls."""

    def forward(self, x: Tensor) -> Tensor:
        """A linear layer's, or an error."""
        number, MEMORY.calls = MEMORY.calls, MEMORY.calls + 1
        out = super().forward(x)
        if MEMORY.at == (number, "forward"):
            raise MEMORY.error
        if MEMORY.at == (number, "backward") and out.requires_grad:
            out.register_hook(raise_it)
        return out


def raise_it(g: Tensor) -> None:
    raise MEMORY.error


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Full(8, 8), nn.Tanh(), nn.Linear(8, 4))


def whole() -> nn.Module:
    return nn.Sequential(Wrap(sorted_rows, a=Full(6, 8), b=nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 4))


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize(("build", "step"), [(chain, 2), (whole, 13)])
def test_no_look_at_a_model_takes_it_for_unsupported(build: Any, step: int, when: str) -> None:
    """The error in the first call, then in later ones, to the last that a look makes."""
    case = Case("full", build, (5, 6))
    model, batch = case.model(torch.float32), case.batch(torch.float32)
    observe_sites(model, batch, case.loss)
    calls, told = MEMORY.calls, 0
    assert calls > 20
    for number in range(0, calls, step):
        MEMORY.at, MEMORY.calls, MEMORY.error = (number, when), 0, ERRORS[number % len(ERRORS)]
        found = None
        try:
            observe_sites(model, batch, case.loss)
        except RuntimeError as error:
            found = error
        assert found in (MEMORY.error, None)
        told += found is not None
    assert told > calls // step // 2 if when == "forward" else told  # not every call has a backward


def test_a_copy_and_a_trace_that_find_no_memory_say_so() -> None:
    case = Case("full", chain, (5, 6))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise ERRORS[0]

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        trace_model(case.model(), case.batch(), loss)

    class Heavy(nn.Linear):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            raise ERRORS[0]

        def __deepcopy__(self, memo: Any) -> Any:
            raise ERRORS[0]

    for copied in (True, False):
        with pytest.raises(torch.OutOfMemoryError):
            real_copy(Heavy(2, 2), {}, torch.device("cpu"), copy_model=copied)


def test_a_private_step_that_finds_no_memory_drops_the_logical_batch_and_says_why() -> None:
    case = Case("full", chain, (5, 6))
    model, optimizer, engine = private(case, plan_of(case, (1,)))
    for when in ("forward", "backward"):
        MEMORY.at = (MEMORY.calls, when)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            case.loss(model, case.batch()).mean().backward()
        assert not any(x.any() for x in engine.clipped_sums().values())
        optimizer.zero_grad()


def test_the_watch_skips_a_batch_that_there_is_no_memory_to_look_at() -> None:
    case = Case("full", chain, (5, 6))
    data, model = case.batch(), case.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = PoissonBatches(data, expected_batch_size=4, steps=1, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"noise_multiplier": 1.0, "batches": batches, "loss": case.loss, "watch": 1.0}
    engine = make_private(model, optimizer, plan_of(case, (1,)), **settings)
    MEMORY.at, MEMORY.error = (MEMORY.calls, "forward"), ERRORS[1]
    for logical in batches:
        for piece in logical:
            case.loss(model, piece).mean().backward()
        optimizer.step()
    watched = engine.report().watched
    assert watched is not None
    assert watched.skipped >= 1


FACTORY = """
import torch
from torch import nn


class Limited(nn.Linear):
    def forward(self, x):
        if len(x) > {most}:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(x)


def make(batch_size=2):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Limited(8, 2))
    batch = {{"x": torch.randn(batch_size, 4)}}
    return model, batch, lambda model, batch: model(batch["x"]).sum(1)
"""


def test_fit_goes_on_with_what_there_is_room_for(tmp_path: Path) -> None:
    (tmp_path / "limited.py").write_text(FACTORY.format(most=20))
    sizes = Sizes(Setup(f"{tmp_path / 'limited.py'}:make", {"batch_size": 2}))
    rows = list(fit_rows(sizes, Room(2**30, limit=64), ("all-layer",)))
    assert {row.size for row in rows} == {20}
    assert all("no room to trace" in text for text in sizes.refused.values())


def test_a_command_that_finds_no_memory_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "limited.py").write_text(FACTORY.format(most=0))
    with pytest.raises(SystemExit) as ended:
        main(["profile", f"{tmp_path / 'limited.py'}:make", "--batch-size", "2"])
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no memory left: CUDA out of memory. Tried to allocate 2.00 GiB. Take a smaller --batch-size" in said


def test_other_errors_are_not_taken_for_it() -> None:
    assert all(
        map(is_out_of_memory, [*ERRORS, MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
    )
    assert not any(map(is_out_of_memory, [RuntimeError("shape '[2]' is invalid"), ValueError("out of memory")]))
