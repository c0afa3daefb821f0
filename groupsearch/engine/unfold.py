"""A convolution seen as a matrix layer: its input as patches (im2col)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def unfold_input(module: Convolution, x: Tensor) -> Tensor:
    """Patches of a convolution's input, one row per output position.

    Args:
        module: an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with any stride, dilation,
            groups, padding ('same' and 'valid' included) and padding mode.
        x: input (B, C, ...).

    Returns:
        Tensor (B, G, T, d): G channel groups, T output positions, d = C / G * kernel size, in
        the order of the weight's trailing dimensions.
    """
    pads = list(module._reversed_padding_repeated_twice)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(pads):
        x = functional.pad(x, pads, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    dims = len(module.kernel_size)
    patches = x.unflatten(1, (module.groups, -1))  # (B, G, C/G, *positions, *kernel)
    order = [0, 1, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
    return patches.permute(order).flatten(2 + dims).flatten(2, 1 + dims)
