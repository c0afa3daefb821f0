"""What a difference means, where it begins, and what to do: the sentences of the truth check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from groupsearch.engine.truth.comparison import Difference
from groupsearch.engine.truth.signature import signature
from groupsearch.workloads.batches import count_examples

Outputs = list[tuple[str, list[Tensor]]]

MIXING = (
    "Remove what mixes or reorders examples (batch statistics, a mean over the batch, mixup, flips of the first "
    "dimension, a queue of earlier examples), or let it act on one example at a time."
)


def first_difference(
    forward: Callable[[Any], Any], model: nn.Module, batch: Any, alone: Sequence[Any], numbers: Sequence[int] = ()
) -> str | None:
    """Name of the first module whose output for an example is another one in the batch than alone.

    ``numbers`` says which examples of the batch those alone are; all in order if not given.

    None where every module's outputs agree, or they cannot be compared.
    """
    try:
        with torch.no_grad():
            together = _outputs(forward, model, batch, count_examples(batch))
            apart = [_outputs(forward, model, one, 1) for one in alone]
    except Exception:  # a diagnosis must not hide what it is of
        return None
    if any([name for name, _ in one] != [name for name, _ in together] for one in apart):
        return None
    for number, (name, rows) in enumerate(together):
        for i, one in zip(numbers or range(len(alone)), apart, strict=True):
            own = one[number][1]
            row = rows[i] if rows else None
            if (
                row is not None
                and len(own) == 1
                and not torch.allclose(row, own[0], rtol=1e-2, atol=1e-3 * float(own[0].abs().max()))
            ):
                return name
    return None


def _outputs(forward: Callable[[Any], Any], model: nn.Module, batch: Any, size: int) -> Outputs:
    """Signatures of every module's output by example, in the order in which they return."""
    found: Outputs = []
    with _hooked(model, lambda name, out: found.append((name, _rows(out, size)))):
        forward(batch)
    return found


@contextmanager
def _hooked(model: nn.Module, see: Callable[[str, Any], None]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: see(name, out))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(output: Any, size: int) -> list[Tensor]:
    leading = [
        x
        for x in pytree.tree_leaves(output)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() and x.shape[0] == size
    ]
    return [sum((signature(x[i]) for x in leading), torch.zeros(())) for i in range(size)] if leading else []


def described(
    fault: Difference, batch: str, begins: str | None, plain_agrees: bool | None = None, told: bool = True
) -> str:
    """The message of a difference.

    Args:
        fault: the difference.
        batch: which batch, in words.
        begins: see :func:`first_difference`.
        plain_agrees: whether plain autograd on the whole batch gives the sum of the examples' own gradients.
        told: whether numbers may be told; those of an example in training are private.
    """
    place = "In the loss" if not fault.layer and not fault.parameter else f"At layer {fault.layer!r}"
    place = f"{place} (parameter {fault.parameter!r})" if fault.parameter else place
    by = f" by {_percent(fault.found)}" if told else ""
    if fault.what == "loss":
        where = (
            f", from module {begins!r} on" if begins else ", though no module's output does: it is the loss that mixes"
        )
        if begins == "":
            where = ", between the model's parts, in its own forward"
        numbers = f": {fault.engine:.4g} in a batch of {batch}, {fault.truth:.4g} alone" if told else ""
        return (
            f"The loss of an example depends on the other examples of its batch{where}{numbers}. A loss that is "
            f"divided by what the batch counts does so too: divide by what the example counts. {MIXING}"
        )
    if plain_agrees and fault.what != "norm":
        return (
            f"{place} the engine books another gradient than plain autograd on the example alone, different{by}, in a "
            f"batch of {batch}, though the examples do not mix: what the layer is given or returns is changed where "
            "the engine cannot see it, or examples change places. Let the layer be called as a module and its output "
            "be used as it is, or freeze it with requires_grad_(False)."
        )
    if fault.what == "norm":
        numbers = f"{fault.engine:.4g} for the norm of an example's gradient that is {fault.truth:.4g}"
        return (
            f"{place} the engine takes {numbers if told else 'for the norm of an example another than it has'} by "
            f"plain autograd, in a batch of {batch}. Freeze the layer with requires_grad_(False), and report this."
        )
    begun = (
        ""
        if begins is None
        else f" It begins in module {begins!r}."
        if begins
        else " It begins in the model's own forward."
    )
    return (
        f"{place} the gradient of an example depends on the other examples of its batch, or the examples are in "
        f"another order there: it differs{by} from that of the example alone, in a batch of {batch}, and clipping it "
        f"protects nobody.{begun} {MIXING}"
    )


def not_linear(fault: Difference, factor: float) -> str:
    """The message where gradients are not as many times smaller as the losses are."""
    return (
        f"At layer {fault.layer!r} (parameter {fault.parameter!r}) the gradient of an example whose loss is multiplied "
        f"by {factor:g} is not {factor:g} times its gradient, but differs by {_percent(fault.found)}: something "
        "clamps, rounds or normalises gradients on their way (a hook, a function of your own), so that with a mean "
        "over the batch they depend on how many examples it has. Clip nothing on the way; the engine clips what "
        "arrives."
    )


def _percent(found: float) -> str:
    return f"{100 * found:.2g} %" if found < 10 else f"{found:.2g} times the size"
