"""Matrix units of a GPU emulated on the CPU: operands cut to TF32's 10 bits wherever the settings allow it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BITS_CUT = 13
_PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "mv", "addmv", "dot"}
_CONVOLUTIONS = {"convolution", "convolution_backward", "mkldnn_convolution", "thnn_conv2d"}


def cut(x: Any) -> Any:
    """A float32 tensor without its last 13 bits, anything else as it is."""
    if not (isinstance(x, Tensor) and x.dtype is torch.float32):
        return x
    return (x.contiguous().view(torch.int32) & -(1 << BITS_CUT)).view(torch.float32).view(x.shape)


class MatrixUnits(TorchDispatchMode):
    """Products as a CUDA device takes them: ``cuda.matmul`` and ``cuda.conv`` say whether operands are cut.

    Attributes:
        cut: products whose operands were cut.
        larger: what gradients of convolutions on several examples are multiplied by: a kernel for another size.
    """

    def __init__(self, larger: float = 1.0) -> None:
        super().__init__()
        self.cut = 0
        self.larger = larger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        kind = "matmul" if name in _PRODUCTS else "conv" if name in _CONVOLUTIONS else ""
        if kind and torch._C._get_fp32_precision_getter("cuda", kind) == "tf32":
            self.cut += 1
            kept = 1 if name in ("addmm_", "addmm", "baddbmm", "addmv") else 0  # what is added to is no operand
            args = (*args[:kept], *map(cut, args[kept:]))
        found = func(*args, **(kwargs or {}))
        if name == "convolution_backward" and len(args[0]) > 1:
            found = tuple(x if x is None else x * self.larger for x in found)
        return found
