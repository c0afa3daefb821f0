"""What libraries of a device keep of its memory from their first call on: found by calling them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


@cache
def workspace_bytes(device: torch.device) -> int:
    """What the libraries of a device keep of its memory once products have been taken there; 0 on the CPU.

    cuBLAS and cuBLASLt each keep a workspace per handle and stream, and a handle is a thread's: the backward
    pass has a thread of its own. What they keep is given up, then found by products in both threads. Where
    torch allocates a workspace anew for every product it is none of this, but inside the operation.
    """
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    _in_both_threads(device, torch._C._cuda_clearCublasWorkspaces)
    before = torch.cuda.memory_allocated(device)
    _in_both_threads(device, lambda: _take_products(device))
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device) - before


def _in_both_threads(device: torch.device, work: Callable[[], object]) -> None:
    """Do it in this thread and in that of the device's backward pass."""

    def there(gradient: Tensor) -> None:
        work()

    work()
    seen = torch.ones((), device=device, requires_grad=True) * 1
    seen.register_hook(there)
    seen.backward()


@torch.no_grad()
def _take_products(device: torch.device) -> None:
    """One product by each of the routines that models take: plain, batched, with a bias added."""
    left, right = torch.ones(2, 128, 128, device=device), torch.ones(2, 128, 128, device=device)
    torch.mm(left[0], right[0])
    torch.bmm(left, right)
    torch.addmm(left[0, 0], left[0], right[0])
