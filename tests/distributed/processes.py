"""What every process of a group of workers does in the tests; started by the fixture, once for all of them."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from groupsearch import ClipPlan, Grouping, GroupSearchError, trace_model
from groupsearch.distributed.clip21 import METHODS
from groupsearch.distributed.workers import ClippedWorkers

STEPS, SAVED_AT, SEED = 6, 3, 11
CONSTANTS = {"worker_momentum": 0.3, "server_momentum": 0.7, "alpha": 0.05}
RUNS = [
    *((method, None) for method in METHODS),
    *((method, kind) for method in ("clip21-gd", "dp-clip21-sgd2m") for kind in ("uniform", "dimension")),
]
"""Methods, and how their thresholds are allotted to two groups; None for one group."""
LR, THRESHOLD, NOISE = 0.2, 0.05, 0.4


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def data(worker: int) -> tuple[Tensor, Tensor]:
    """A worker's examples: most of one label, and as many as it happens to have."""
    rows = torch.Generator().manual_seed(100 + worker)
    count = 5 + worker
    labels = (torch.rand(count, generator=rows) < 0.1 + 0.8 * (worker % 2)).long()
    return torch.randn(count, 4, generator=rows, dtype=torch.float64) + labels[:, None], labels


def loss(of: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(of(batch[0]), batch[1], reduction="none")


def flat(of: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in of.parameters()])


TRACED: list[Grouping] = []


@cache
def grouping() -> Grouping:
    return TRACED[0] if TRACED else Grouping.layer_wise(trace_model(model(), data(0), loss))


def plan_of(allocation: str) -> ClipPlan:
    return ClipPlan(grouping(), THRESHOLD, allocation=allocation)


def worker(name: str, allocation: str | None, copy: nn.Module, group: Any, **other: Any) -> ClippedWorkers:
    given = {"lr": LR, "noise_multiplier": NOISE if METHODS[name].noisy else 0.0, "seed": SEED, "process_group": group}
    given |= CONSTANTS | other
    if allocation is None:
        return ClippedWorkers(copy.parameters(), name, **{"threshold": THRESHOLD} | given)
    return ClippedWorkers.from_plan(copy, plan_of(allocation), name, **given)


def taken(copy: nn.Module, optimizer: ClippedWorkers, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(copy, data(optimizer.rank)).mean().backward()
        optimizer.step()


def runs(group: Any) -> Iterator[tuple[str, Any]]:
    """Weights after every method, and of a worker that was stopped and resumed beside one that was not."""
    for name, allocation in RUNS:
        copy = model()
        optimizer = worker(name, allocation, copy, group)
        taken(copy, optimizer, SAVED_AT)
        middle, weights = deepcopy(optimizer.state_dict()), deepcopy(copy.state_dict())
        taken(copy, optimizer, STEPS - SAVED_AT)
        again = model()
        again.load_state_dict(weights)
        resumed = worker(name, allocation, again, group)
        resumed.load_state_dict(middle)
        taken(again, resumed, STEPS - SAVED_AT)
        ends = [end.state_dict()["workers"] for end in (optimizer, resumed)]
        yield f"{name} {allocation}", {"weights": flat(copy), "resumed": flat(again), "states": ends}


def _own(rank: int, usual: Any, odd: Any) -> Any:
    return odd if rank == 1 else usual


def refusals(group: Any) -> Iterator[tuple[str, str]]:
    """What each bad use is answered with on this process; rank 1 is the one that differs."""
    rank = dist.get_rank(group)
    tries: dict[str, Callable[[nn.Module], object]] = {
        "threshold": lambda copy: worker("clip21-gd", None, copy, group, threshold=_own(rank, 1.0, 2.0)),
        "groups": lambda copy: worker("clip21-gd", _own(rank, None, "uniform"), copy, group),
        "method": lambda copy: worker(_own(rank, "clip21-gd", "clip-gd"), None, copy, group),
        "seed": lambda copy: worker("clip21-gd", None, copy, group, seed=_own(rank, 1, 2)),
        "wrong": lambda copy: worker("clip21-gd", None, copy, group, threshold=_own(rank, 1.0, -1.0)),
        "weights": lambda copy: worker("clip21-gd", None, _own(rank, copy, copy.requires_grad_(True)), group),
        "state of another": lambda copy: _loads(copy, group, lambda state: state["workers"].update(rank=0)),
        "workers": lambda copy: _loads(copy, group, lambda state: state["workers"].update(workers=7)),
        "step": lambda copy: _loads(copy, group, lambda state: state["workers"].update(steps=_own(rank, 0, 3))),
        "no state": lambda copy: _loads(copy, group, lambda state: state.pop("workers")),
    }
    for name, attempt in tries.items():
        copy = model()
        if name == "weights" and rank == 1:
            with torch.no_grad():
                copy[0].bias.add_(1e-12)
        try:
            attempt(copy)
            yield name, "taken"
        except GroupSearchError as error:
            yield name, str(error)


def _loads(copy: nn.Module, group: Any, change: Callable[[dict[str, Any]], object]) -> None:
    optimizer = worker("clip21-gd", None, copy, group)
    state = optimizer.state_dict()
    change(state)
    optimizer.load_state_dict(state)


def not_finite(group: Any) -> Tensor:
    """Weights where rank 1 has a gradient that is not a number in every second step."""
    copy = model()
    optimizer = worker("clip21-sgd2m", None, copy, group)
    for k in range(4):
        optimizer.zero_grad()
        loss(copy, data(optimizer.rank)).mean().backward()
        if optimizer.rank == 1 and k % 2:
            next(copy.parameters()).grad[0, 0] = torch.nan
        optimizer.step()
    return flat(copy)


def main(rank: int, world: int, folder: str, traced: Grouping) -> None:
    """A process of all and, on the first two of four, of a group of two; the grouping was traced once for all."""
    torch.set_num_threads(1)
    TRACED.append(traced)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    try:
        pair = dist.new_group([0, 1])
        for size, group in ((world, None), (2, pair)):
            if rank < size:
                found = {"runs": dict(runs(group)), "refused": dict(refusals(group)), "not_finite": not_finite(group)}
                torch.save(found, Path(folder) / f"{size}-{rank}.pt")
    finally:
        dist.destroy_process_group()
