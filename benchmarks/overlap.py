"""What groups hide of the communication between processes: measured over a link that is made slow, and predicted.

``python -m benchmarks.overlap [--model waiting|digits-vit|stdlib-gpt] [--repeats 20]``

Two processes talk by gloo through a process group that takes, for every reduction, the time that a link of the
bandwidth and latency asked for would take (:class:`Throttled`). The bandwidth is chosen so that all communication takes
as long as half of backward. ``waiting`` is a stack of layers whose backward sleeps, as a program that waits for a
device: it does not compete with the link, or with other programs, for the processor.
"""

from __future__ import annotations

import argparse
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _create_work_from_future

from groupsearch.engine import make_private
from groupsearch.engine.loading import PoissonBatches
from groupsearch.engine.ranks import ALONE
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.communication import Link, Overlap, Pace, overlap
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import Trace
from groupsearch.tracer import trace_model
from groupsearch.workloads import load_workload

WORLD = 2
HIDDEN_SHARE = 0.5  # of the time of backward that all communication takes
LATENCY_SECONDS = 1e-3


class Throttled(dist.ProcessGroup):
    """Gloo behind a link: reductions one after the other, each taking what :meth:`Link.seconds` says at the least."""

    link = Link(WORLD, 1e9)

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._inner = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        """In turn, by the thread that is the link."""
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        self._waiting.put((tensors, options, future))
        return _create_work_from_future(future)

    def _serve(self) -> None:
        while True:
            tensors, options, future = self._waiting.get()
            end = time.perf_counter() + self.link.seconds(sum(x.numel() * x.element_size() for x in tensors))
            self._inner.allreduce(tensors, options).wait()
            time.sleep(max(0.0, end - time.perf_counter()))
            future.set_result(tensors)

    def getBackendName(self) -> str:
        """Of the registry."""
        return "throttled"


def throttled(link: Link) -> dist.ProcessGroup:
    """A process group of all ranks over a link."""
    Throttled.link = link
    if "throttled" not in dist.Backend.backend_list:
        dist.Backend.register_backend("throttled", Throttled, devices=["cpu"])
    group: dist.ProcessGroup = dist.new_group(backend="throttled")
    return group


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return g, None


class Waiting(nn.Module):
    """A linear layer whose backward takes time and no processor."""

    def __init__(self, width: int, seconds: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        """Of the layer."""
        return _Sleep.apply(self.linear(x).tanh(), self.seconds)


class Subject:
    """A model with data and a loss."""

    def __init__(self, name: str, width: int = 128, seconds: float = 0.1, layers: int = 8) -> None:
        torch.manual_seed(0)
        if name == "waiting":
            self.model: nn.Module = nn.Sequential(*(Waiting(width, seconds) for _ in range(layers)))
            self.data = {"x": torch.randn(8, width)}
            self.loss: Callable[[nn.Module, Any], Tensor] = lambda model, batch: model(batch["x"]).square().sum(1)
        else:
            workload = load_workload(name)
            self.model, self.loss = workload.build(), workload.loss
            self.data = dict(workload.make_batch(32))

    def part(self, rank: int) -> dict[str, Tensor]:
        """What one rank has of the data."""
        return {name: x[rank::WORLD] for name, x in self.data.items()}


def attached(subject: Subject, grouping: Grouping, group: Any, data: dict[str, Tensor]) -> tuple[Any, ...]:
    """An engine whose every step is on all of the data."""
    size = len(next(iter(data.values())))
    batches = PoissonBatches(data, expected_batch_size=size, steps=10**6)
    optimizer = torch.optim.SGD(subject.model.parameters(), lr=0.0)
    engine = make_private(
        subject.model,
        optimizer,
        ClipPlan(grouping),
        noise_multiplier=1.0,
        batches=batches,
        process_group=group,
    )
    return engine, optimizer, iter(batches)


def step(subject: Subject, optimizer: torch.optim.Optimizer, batches: Any) -> float:
    """Seconds of one step."""
    dist.barrier()
    begin = time.perf_counter()
    for batch in next(batches):
        subject.loss(subject.model, batch).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - begin


def pace_here(subject: Subject, trace: Trace, rank: int, repeats: int) -> Pace:
    """When sites are closed in a step that waits for nobody, while the other ranks take theirs."""
    every = Grouping.from_boundaries(trace, range(1, trace.length))
    engine, optimizer, batches = attached(subject, every, ALONE, subject.part(rank))
    taken: list[tuple[float, list[float]]] = []
    for _ in range(repeats + 1):
        closes, begin = [0.0] * trace.length, [0.0]

        def closed(site: int, closes: list[float] = closes) -> None:
            closes[site] = time.perf_counter()

        engine.on_close(closed)
        begin[0] = time.perf_counter()
        seconds = step(subject, optimizer, batches)
        end = time.perf_counter()
        taken.append((seconds, [close - (end - seconds) for close in closes]))
    engine.detach()
    rows = taken[1:]
    closes = tuple(median(closes[site] for _, closes in rows) for site in range(trace.length))
    return Pace(median(seconds for seconds, _ in rows), closes)


def best(trace: Trace, groups: int, pace: Pace, link: Link) -> Grouping:
    """The grouping of so many groups with the shortest predicted step, of all of them."""
    cuts = combinations(range(1, trace.length), groups - 1)
    return Grouping.from_boundaries(trace, min(cuts, key=lambda cut: overlap(trace, cut, pace, link).step_seconds))


def compare(name: str, repeats: int) -> dict[str, tuple[float, Overlap]]:
    """Measured seconds of a step, and the prediction, by grouping; to be called on every rank."""
    subject, rank = Subject(name), dist.get_rank()
    trace = trace_model(subject.model, subject.part(rank), subject.loss)
    told = [pace_here(subject, trace, rank, repeats)]
    dist.broadcast_object_list(told, 0)
    pace = told[0]
    size_bytes = sum(4 * p.numel() for p in subject.model.parameters() if p.requires_grad)
    backward = pace.closes_seconds[0] - pace.closes_seconds[-1]
    link = Link(WORLD, size_bytes / (HIDDEN_SHARE * backward), LATENCY_SECONDS)
    group = throttled(link)
    chosen = {
        "all-layer": Grouping.all_layer(trace),
        "layer-wise": Grouping.layer_wise(trace),
        "best 4 groups": best(trace, 4, pace, link),
    }
    found = {}
    for text, grouping in chosen.items():
        engine, optimizer, batches = attached(subject, grouping, group, subject.data)
        seconds = [step(subject, optimizer, batches) for _ in range(repeats + 1)][1:]
        engine.detach()
        found[text] = median(seconds), overlap(trace, grouping.boundaries, pace, link)
    return found


def in_two(name: str, repeats: int, seconds: float = 500) -> dict[str, tuple[float, Overlap]]:
    """What rank 0 of two new processes finds."""
    context = get_context("spawn")
    end, other = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, folder, name, repeats, other) for rank in range(WORLD)]
        started = [context.Process(target=_run, args=each, daemon=True) for each in arguments]
        for process in started:
            process.start()
        if not end.poll(seconds):
            raise TimeoutError(f"Expected two processes to be done after {seconds} s.")
        found: dict[str, tuple[float, Overlap]] = end.recv()
        for process in started:
            process.join()
    return found


def _run(rank: int, folder: str, name: str, repeats: int, end: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    found = compare(name, repeats)
    if rank == 0:
        end.send(found)
    dist.barrier()
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="waiting")
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args(arguments)
    found = in_two(given.model, given.repeats)
    alone = next(iter(found.values()))[1].alone_seconds
    sys.stdout.write(f"{given.model}, 2 processes, a step alone {1000 * alone:.1f} ms\n")
    sys.stdout.write("grouping        groups  on the link ms  predicted ms  measured ms  error  hidden (measured)\n")
    for text, (seconds, predicted) in found.items():
        hidden = 1 - (seconds - alone) / predicted.link_seconds
        numbers = [1000 * each for each in (predicted.link_seconds, predicted.step_seconds, seconds)]
        error = predicted.step_seconds / seconds - 1
        sys.stdout.write(
            f"{text:14} {len(predicted.starts_seconds):7} {numbers[0]:15.1f} {numbers[1]:13.1f} {numbers[2]:12.1f} "
            f"{error:+6.1%} {hidden:18.0%}\n"
        )


if __name__ == "__main__":
    main()
