"""Lightning's loop, private: a LightningModule that takes Lightning's steps on Poisson samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from groupsearch.engine import PrivateEngine
from groupsearch.engine.loading import PoissonBatches
from groupsearch.engine.truth.comparison import Loss
from groupsearch.errors import GroupSearchError
from groupsearch.integrations.privacy import MicroBatches, Privacy, engine_state, load_engine_state, mean_loss, refuse

_STATE = "groupsearch"


class PrivateModule(LightningModule):
    """Derive from it, write ``configure_optimizers``, and ``fit`` it without training data.

    A step is on one Poisson sample; Lightning's own accumulation, schedulers, evaluation and checkpoints stay.

    Args:
        model: what is trained.
        loss: ``loss(model, batch)``, one loss per example (B,).
        batches: Poisson samples; ``privacy.batches(...)`` makes them. One iteration over them is an epoch.
        privacy: see :class:`groupsearch.integrations.Privacy`.

    Attributes:
        engine: from the beginning of training on, else None.
    """

    def __init__(self, model: nn.Module, loss: Loss, batches: PoissonBatches, privacy: Privacy) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.batches = batches
        self.privacy = privacy
        self.engine: PrivateEngine | None = None
        self._resumed: Mapping[str, Any] | None = None

    def train_dataloader(self) -> MicroBatches:
        """The Poisson samples, as Lightning accumulates."""
        return MicroBatches(self.batches, self.trainer.accumulate_grad_batches)

    def on_train_start(self) -> None:
        """Attach the engine, as it was where training is resumed."""
        trainer, one = self.trainer, "one process on one device, and one optimizer; set devices=1."
        loader = trainer.train_dataloader
        refuse(
            "Lightning's Trainer",
            {
                "several processes or optimizers": (trainer.world_size > 1 or len(trainer.optimizers) != 1, one),
                "precision": (str(trainer.precision).startswith("16"), "its scaler skips steps; take 'bf16-mixed'."),
                "gradient_clip_val": (
                    bool(trainer.gradient_clip_val),
                    "it would clip nothing; give Privacy(max_grad_norm=), which clips every example.",
                ),
                "a second fit": (
                    self.engine is not None,
                    "the steps before would not be counted; make a new module, and give fit ckpt_path to go on.",
                ),
                "a checkpoint without the engine's state": (
                    trainer.ckpt_path is not None and self._resumed is None,
                    "what the steps before cost is not known; go on with one that a PrivateModule wrote.",
                ),
                "a loader given to fit": (
                    not isinstance(loader, MicroBatches) or loader.batches is not self.batches,
                    "it shuffles, or draws otherwise than is accounted; set batches, and give fit none.",
                ),
            },
        )
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise GroupSearchError("Expected a number of steps, found none. Give the Trainer max_steps or max_epochs.")
        optimizer: Any = trainer.optimizers[0]
        optimizer.register_step_pre_hook(_run_closure)  # before the engine's own, which makes the gradient private
        self.engine = self.privacy.attach(self.model, optimizer, self.batches, self.loss, steps=int(steps))
        if self._resumed is not None:
            load_engine_state(self.engine, self._resumed)
            saving: Any
            for saving in trainer.checkpoint_callbacks:
                saving._last_global_step_saved = trainer.global_step  # or they save again after one micro-batch

    def training_step(self, pieces: Any, batch_idx: int) -> Tensor:
        """Backward on every physical batch of a micro-batch; the loss for the log, from which nothing is derived."""
        if self.engine is None or self.engine.steps != self.trainer.global_step:
            raise GroupSearchError(
                f"Expected {self.trainer.global_step} private steps so far, found "
                f"{0 if self.engine is None else self.engine.steps}. Call super() in an on_train_start of your own, "
                "and let Lightning alone step the optimizer."
            )
        total = torch.zeros((), device=self.device)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.trainer.optimizers[0].zero_grad()
        with self.engine.same_examples():
            for piece in pieces:
                losses = self.loss(self.model, piece)
                losses.mean().backward()
                total += losses.detach().sum()
        self.log("loss", mean_loss(total, self.batches), batch_size=1)
        return mean_loss(total, self.batches)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Done in :meth:`training_step`, for one physical batch after the other."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Done before; Lightning's comes when the sums of a micro-batch are there."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The engine's state; Lightning has that of the loader itself."""
        if self.engine is not None:
            checkpoint[_STATE] = engine_state(self.engine)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep it until the engine is there."""
        self._resumed = checkpoint.get(_STATE)


def _run_closure(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Lightning's closure runs forward and backward within the step, where a gradient must be there already."""
    closure = kwargs.pop("closure", None) or (args[1] if len(args) > 1 else None)
    if closure is not None:
        with torch.enable_grad():
            closure()
    return args[:1], kwargs
