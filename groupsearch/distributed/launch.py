"""The processes that ``torchrun`` started for a command: their process group, and which of them writes.

Apart from the job, which is the same for one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from groupsearch.engine.ranks import Ranks


def is_first() -> bool:
    """Whether this process is the one that prints and writes: rank 0, or one that nobody started with others."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not _started() or os.environ["RANK"] == "0"


def _started() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def launched(device: str) -> Iterator[Ranks | None]:
    """While it lasts the processes that torchrun started are a process group: gloo on CPUs, nccl on GPUs.

    Args:
        device: ``cpu``, or ``cuda`` for the GPU of each process's local rank.

    Yields:
        the ranks; those of a group that there was already, if there was one; None for a process alone.
    """
    if not (_started() and dist.is_available()) or dist.is_initialized():
        yield Ranks.of(None)
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Ranks.of(None)
    finally:
        dist.destroy_process_group()
