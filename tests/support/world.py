"""Several processes that talk by gloo, for tests: forked from one that has imported what they need."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from io import BytesIO
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120.0
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "groupsearch.engine", "groupsearch.privacy.accounting", "tests.support.cases"]
)


class World:
    """The processes of one call.

    Attributes:
        processes: by rank.
    """

    def __init__(
        self, size: int, function: Callable[..., Any], arguments: Sequence[Any], store: Path, timeout: float = 60.0
    ) -> None:
        self.processes: list[BaseProcess] = []
        self._ends: list[Connection] = []
        for rank in range(size):
            end, other = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_run, args=(rank, size, function, arguments, str(store), timeout, other))
            process.start()
            other.close()
            self.processes.append(process)
            self._ends.append(end)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def results(self, seconds: float = SECONDS) -> list[Any]:
        """What each rank returned, or the text of what it raised as ``Raised``; None of one that was killed."""
        found: list[Any] = [None] * len(self._ends)
        left, deadline = dict(enumerate(self._ends)), time.monotonic() + seconds
        while left and (ready := wait(list(left.values()), max(0, deadline - time.monotonic()))):
            for rank, end in list(left.items()):
                if end in ready:
                    del left[rank]
                    try:
                        found[rank] = torch.load(BytesIO(end.recv_bytes()), weights_only=False)
                    except EOFError:
                        found[rank] = None
        assert not left, f"ranks {sorted(left)} had not ended after {seconds} s"
        return found


class Raised(str):
    """What a rank raised: its message, and the traceback as ``trace``."""

    trace = ""
    kind = ""


def in_world(size: int, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
    """What ``function(*arguments)`` returns on every rank of a world of that size.

    Raises:
        AssertionError: with the traceback of a rank that raised.
    """
    with TemporaryDirectory() as folder, World(size, function, arguments, Path(folder) / "store") as world:
        found = world.results(seconds)
    for rank, each in enumerate(found):
        assert not isinstance(each, Raised), f"rank {rank} raised:\n{each.trace}"
    return found


def _run(
    rank: int, size: int, function: Callable[..., Any], arguments: Any, store: str, timeout: float, end: Connection
) -> None:
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)})
    shared = dist.FileStore(store, size)
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    try:
        found = function(*arguments)
    except BaseException as error:
        found = Raised(str(error))
        found.trace, found.kind = traceback.format_exc(), type(error).__name__
    sent = BytesIO()
    torch.save(found, sent)
    end.send_bytes(sent.getvalue())
    dist.destroy_process_group()
