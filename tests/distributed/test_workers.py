"""Two and four real processes: the same as the simulation, resumed to the bit, and refused in one voice."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

from groupsearch.distributed.clip21 import METHODS, Crew, Setup, groups_of, simulate
from groupsearch.distributed.workers import ClippedWorkers
from tests.distributed import processes
from tests.distributed.processes import CONSTANTS, LR, NOISE, RUNS, SEED, STEPS, THRESHOLD

WORLD = 4
Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Found:
    """What each process of a group of 4 and of a group of 2 found; started once, also by several test workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "processes"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / f"{WORLD}-0.pt").exists():
            torch.multiprocessing.spawn(processes.main, (WORLD, str(folder), processes.grouping()), nprocs=WORLD)
    return {size: [torch.load(Path(folder) / f"{size}-{rank}.pt") for rank in range(size)] for size in (2, WORLD)}


def simulated(method: str, allocation: str | None, workers: int) -> Tensor:
    """The weights by the simulation, from gradients by autograd on one copy of the model."""
    copy = processes.model()
    named = dict(copy.named_parameters())
    names, thresholds = [tuple(named)], (THRESHOLD,)
    if allocation is not None:
        names, thresholds = groups_of(processes.plan_of(allocation), {n: p.numel() for n, p in named.items()})
    order = [named[name] for group in names for name in group]
    sizes = tuple(sum(named[name].numel() for name in group) for group in names)

    def gradient(x: Tensor, worker: int) -> Tensor:
        nn.utils.vector_to_parameters(x, order)
        value = processes.loss(copy, processes.data(worker)).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, order)])

    ended = simulate(
        method,
        [lambda x, i=i: gradient(x, i) for i in range(workers)],
        nn.utils.parameters_to_vector(order).detach(),
        steps=STEPS,
        step_size=LR,
        threshold=thresholds,
        noise_multiplier=NOISE if METHODS[method].noisy else 0.0,
        seed=SEED,
        sizes=sizes,
        **CONSTANTS,
    )
    nn.utils.vector_to_parameters(ended.points[-1], order)
    return processes.flat(copy)


@pytest.mark.parametrize("workers", [2, WORLD])
@pytest.mark.parametrize(("method", "allocation"), RUNS)
def test_real_processes_are_the_simulation(found: Found, method: str, allocation: str | None, workers: int) -> None:
    expected = simulated(method, allocation, workers)
    weights = [each["runs"][f"{method} {allocation}"]["weights"] for each in found[workers]]
    assert all(torch.equal(each, weights[0]) for each in weights), "the same on all ranks"
    torch.testing.assert_close(weights[0], expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(expected, processes.flat(processes.model()))


@pytest.mark.parametrize("workers", [2, WORLD])
def test_a_resumed_worker_goes_on_to_the_bit(found: Found, workers: int) -> None:
    for each in found[workers]:
        assert len(each["runs"]) == len(RUNS)
        for run in each["runs"].values():
            assert torch.equal(run["weights"], run["resumed"])
            one, two = run["states"]
            assert one["steps"] == two["steps"] == STEPS
            assert torch.equal(one["aggregate"], two["aggregate"])
            assert one["worker"].keys() == two["worker"].keys()
            assert all(torch.equal(one["worker"][name], two["worker"][name]) for name in one["worker"])


@pytest.mark.parametrize("workers", [2, WORLD])
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("threshold", "Expected the same threshold on every rank, found [1.0] on rank 0, [2.0] on rank 1"),
        ("groups", "Expected the same groups on every rank, found 1 on rank 0, 2 on rank 1"),
        ("method", "Expected the same method on every rank, found clip21-gd on rank 0, clip-gd on rank 1"),
        ("seed", "Expected the same seed on every rank, found 1 on rank 0, 2 on rank 1"),
        ("wrong", "Refused on rank 1: Expected finite thresholds > 0, found (-1.0,)."),
        ("weights", "Expected the same weights on every rank"),
        ("state of another", "Refused on rank 1"),
        ("workers", "found workers 7"),
        ("step", "Expected the same steps on every rank, found 0 on rank 0, 3 on rank 1"),
        ("no state", "without a worker's part"),
    ],
)
def test_bad_use_is_refused_on_every_rank_with_one_message(found: Found, workers: int, bad: str, said: str) -> None:
    messages = {each["refused"][bad] for each in found[workers]}
    assert len(messages) == 1
    assert said in messages.pop()


def test_a_gradient_that_is_not_a_number_reaches_nobody(found: Found) -> None:
    first = found[WORLD][0]["not_finite"]
    assert first.isfinite().all()
    assert all(torch.equal(each["not_finite"], first) for each in found[WORLD])


@pytest.fixture
def alone(tmp_path: Path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_secret_noise_is_not_written_down_and_differs_every_time() -> None:
    ends = []
    for _ in range(2):
        copy = processes.model()
        optimizer = ClippedWorkers(copy.parameters(), "dp-clip21-gd", lr=LR, threshold=0.1, noise_multiplier=1.0)
        processes.taken(copy, optimizer, 1)
        assert optimizer.state_dict()["workers"]["noise"] is None
        ends.append(processes.flat(copy))
    assert not torch.equal(*ends)
    assert optimizer.spent(1e-3).steps == 1


@pytest.mark.usefixtures("alone")
def test_noise_has_the_standard_deviation_that_is_stated() -> None:
    weight = nn.Parameter(torch.zeros(20_000, dtype=torch.float64))
    optimizer = ClippedWorkers([weight], "dp-sgd", lr=1.0, threshold=0.3, noise_multiplier=2.0)
    optimizer.step()
    assert float(weight.detach().std()) == pytest.approx(0.6, rel=0.03)


@pytest.mark.usefixtures("alone")
def test_a_closure_is_called_once_and_schedulers_reach_the_step() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = ClippedWorkers([weight], "clip-gd", lr=0.1, threshold=10.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls = []

    def closure() -> float:
        calls.append(1)
        optimizer.zero_grad()
        (weight.square().sum() / 2).backward()
        return 1.0

    for _ in range(2):
        assert optimizer.step(closure) == 1.0
        schedule.step()
    assert len(calls) == 2
    assert float(weight.detach()) == pytest.approx(0.9 * 0.95)


def test_the_mean_of_four_workers_noise_is_half_as_loud() -> None:
    crew = Crew(Setup("dp-sgd", 1.0, noise_multiplier=1.0), torch.zeros(20_000), 4, 1.0, seed=0)
    crew.step(torch.zeros(4, 20_000))
    assert float(crew.points.std()) == pytest.approx(0.5, rel=0.03)
