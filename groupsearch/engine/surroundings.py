"""What can be seen of the loop around the engine: libraries that scale losses or shuffle data by themselves."""

from __future__ import annotations

import sys
from typing import Any

from groupsearch.errors import GroupSearchError


def check_surroundings(*, loss_divisor: float | None, poisson: bool) -> None:
    """Check that no library around this call scales losses, or draws batches, otherwise than the engine was told.

    Args:
        loss_divisor: what the loop was said to divide losses by; None where nothing was said.
        poisson: whether batches of the loop's own were said to be Poisson samples.

    Raises:
        GroupSearchError: naming the library, what it does, and what to say.
    """
    trainer = _running_trainer()
    if loss_divisor is None:
        _refuse_accumulation("accelerate", _accelerate_accumulates())
        if trainer is not None:
            _refuse_accumulation("transformers' Trainer", trainer.args.gradient_accumulation_steps)
    if poisson and trainer is not None and _draws_its_own(trainer):
        raise GroupSearchError(
            "Expected Poisson samples, found transformers' Trainer with its own data loader, which shuffles the data "
            "and cuts them into batches: the epsilon of Poisson sampling is not that of this run. Give "
            "make_private(..., sampling='shuffled') to have its own epsilon, or let get_train_dataloader return "
            "PoissonBatches (see docs/train-with-it.md)."
        )


def _refuse_accumulation(library: str, passes: int) -> None:
    if passes > 1:
        raise GroupSearchError(
            f"Expected losses as they are, found that {library} accumulates gradients over {passes} passes and divides "
            f"the loss of each by {passes} before it is clipped: thresholds would act {passes} times as large. Let it "
            f"not accumulate (PoissonBatches cut a logical batch into passes), or say what losses are divided by with "
            f"make_private(..., loss_divisor={passes}); loss_divisor=1 where this loop divides nothing."
        )


def _accelerate_accumulates() -> int:
    """The passes that accelerate divides losses by; 1 where it is not in use."""
    state: Any = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    return int(state().num_steps) if state is not None and state._shared_state else 1


def _running_trainer() -> Any:
    """The Trainer of transformers that calls this, if one does."""
    trainer_class: Any = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    frame = sys._getframe(1) if trainer_class is not None else None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, trainer_class):
            return owner
        frame = frame.f_back
    return None


def _draws_its_own(trainer: Any) -> bool:
    stock: Any = sys.modules["transformers.trainer"].Trainer
    methods = ("get_train_dataloader", "_get_train_sampler", "_get_dataloader")
    return all(getattr(type(trainer), name, None) is getattr(stock, name, None) for name in methods)
