"""transformers' Trainer, private: its loop, its evaluation, its checkpoints, on Poisson samples.

Apart from TRL's trainers, which are made private by the same mixin and need their own library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from groupsearch.engine import PrivateEngine
from groupsearch.engine.truth.comparison import Loss
from groupsearch.errors import GroupSearchError, UnsupportedModelError
from groupsearch.integrations.privacy import MicroBatches, Privacy, engine_state, load_engine_state, mean_loss, refuse
from groupsearch.workloads.tasks import IGNORED, token_losses

STATE = "privacy.pt"  # beside optimizer.pt in a checkpoint

# -- One loss per example ----------------------------------------------------------------------------


def base_model(model: nn.Module) -> Any:
    """The model of transformers that adapters of PEFT are on, or the model itself."""
    inner: Any = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def example_losses(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The losses that transformers' own models have, one per example (B,), of a batch with ``labels``.

    Cross-entropy of a class; its mean over the labelled positions of an example, of the next token for causal language
    models; mean squared error or binary cross-entropy where labels are floating.

    Raises:
        UnsupportedModelError: for labels that fit none of these.
    """
    inner = base_model(model)
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    shift_right = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    if shift_right is not None and labels.dim() == 2:
        inputs.setdefault("decoder_input_ids", shift_right(labels=labels))
    logits = model(**inputs).logits
    if labels.dim() == 1 and logits.dim() == 2 and not labels.is_floating_point():
        return F.cross_entropy(logits.float(), labels, reduction="none")
    if labels.dim() == 2 and logits.dim() == 3:
        shifted = LOSS_MAPPING.get(getattr(inner, "loss_type", "")) is ForCausalLMLoss
        if shifted and not inner.config.is_encoder_decoder:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        logits = logits[:, logits.shape[1] - labels.shape[1] :]  # prompts that were learnt come first
        return token_losses(logits, labels).sum(1) / (labels != IGNORED).sum(1).clamp(min=1)
    if labels.is_floating_point() and logits.numel() == labels.numel():
        several = logits.dim() == 2 and logits.shape[1] > 1
        kind: Any = F.binary_cross_entropy_with_logits if several else F.mse_loss
        return kind(logits.float().view_as(labels), labels.float(), reduction="none").view(len(labels), -1).mean(1)
    raise UnsupportedModelError(
        f"Found no usual loss for labels of shape {tuple(labels.shape)} ({labels.dtype}) and logits of shape "
        f"{tuple(logits.shape)}. Give loss=, a function loss(model, batch) that returns one loss per example, (B,)."
    )


# -- Trainer -----------------------------------------------------------------------------------------


class PrivateMixin:
    """Makes a Trainer private: ``class PrivateTrainer(PrivateMixin, Trainer)``.

    A step is on one Poisson sample of ``per_device_train_batch_size`` times ``gradient_accumulation_steps`` examples in
    the mean, in pieces of at most ``per_device_train_batch_size``; an epoch is as many steps as show every example once
    in the mean. The engine is attached when training begins. Checkpoints hold its state; a run that is resumed counts
    what was spent.

    Args:
        privacy: see :class:`groupsearch.integrations.Privacy`.
        loss: ``loss(model, batch)``, one loss per example (B,); :func:`example_losses` if not given. It is the loss of
            evaluation, too.

    Attributes:
        engine: from the beginning of training on, else None.
        micro_batches: likewise.

    Raises:
        GroupSearchError: for settings that cannot be private, and where they cannot be reached.
        UnsupportedModelError: by ``train``, for a model that cannot be private.
    """

    args: Any
    model: Any
    optimizer: Any
    state: Any
    accelerator: Any
    add_callback: Any
    compute_loss_context_manager: Any
    _prepare_inputs: Any

    def __init__(self, *args: Any, privacy: Privacy, loss: Loss | None = None, **kwargs: Any) -> None:
        self.privacy = privacy
        self.example_losses: Loss = loss or example_losses
        self.engine: PrivateEngine | None = None
        self.micro_batches: MicroBatches | None = None
        super().__init__(*args, **kwargs)
        self.check_private()
        self.args.ignore_data_skip = True  # the batches know themselves where they stood
        self.add_callback(_Steps(self))

    def check_private(self) -> None:
        """Refuse settings that cannot be private; TRL's trainers have more of them.

        Raises:
            GroupSearchError: naming them all.
        """
        args, config = self.args, getattr(self.model, "config", None)
        own_loss = getattr(self, "compute_loss_func", None) is not None
        own_loss |= type(self).compute_loss is not PrivateMixin.compute_loss
        one_device = "one process on one device is what the engine serves; start one, with one GPU visible."
        sharded = any(getattr(args, name, None) for name in ("fsdp", "deepspeed", "parallelism_config"))
        refuse(
            "transformers' Trainer",
            {
                "compute_loss": (own_loss, "it returns one number for a batch; give loss=, one loss per example."),
                "label_smoothing_factor": (
                    args.label_smoothing_factor != 0,
                    "it is of the loss of a batch; give loss=, with cross_entropy(..., label_smoothing=).",
                ),
                "fp16": (args.fp16, "its scaler skips steps by a look at gradients; take bf16."),
                "torch_compile": (args.torch_compile, "layers inside cannot be followed; leave it out."),
                "neftune_noise_alpha": (
                    args.neftune_noise_alpha is not None,
                    "its noise depends on the longest example of the batch; leave it out.",
                ),
                "output_router_logits": (
                    bool(getattr(config, "output_router_logits", False)),
                    "the loss that balances experts is of a batch; set it to False in the model's config.",
                ),
                "model_init": (
                    getattr(self, "model_init", None) is not None,
                    "every training would begin with another model, and count from nothing; give model.",
                ),
                "auto_find_batch_size": (
                    args.auto_find_batch_size,
                    "steps before an accident would be taken again; choose the size with groupsearch fit.",
                ),
                "train_sampling_strategy": (
                    getattr(args, "train_sampling_strategy", "random") != "random",
                    "batches are Poisson samples, which epsilon is counted for; leave it out.",
                ),
                "max_grad_norm": (
                    args.max_grad_norm not in (None, 0, 1.0),
                    "it would clip nothing, as the private gradient is made within the optimizer's step; give "
                    "Privacy(max_grad_norm=), which clips every example, and leave it out here.",
                ),
                "several devices": (args.world_size > 1 or args.n_gpu > 1, one_device),
                "fsdp or deepspeed": (sharded, one_device),
            },
        )

    def get_train_dataloader(self) -> Any:
        """Poisson samples of what the Trainer's own loader would shuffle, collated as it would.

        Raises:
            GroupSearchError: for a data set without length, or fewer examples than are expected in a batch.
        """
        if self.micro_batches is None:
            stock = super().get_train_dataloader()  # type: ignore[misc]
            accumulation = self.args.gradient_accumulation_steps
            expected = self.args.per_device_train_batch_size * accumulation
            dataset = stock.dataset
            if isinstance(dataset, torch.utils.data.IterableDataset) or len(dataset) < expected:
                raise GroupSearchError(
                    f"Expected a data set of at least {expected} examples (per_device_train_batch_size times "
                    "gradient_accumulation_steps) that can be indexed, as Poisson samples are drawn by number; found "
                    f"{type(dataset).__name__}. Load it whole, or take smaller batches."
                )
            batches = self.privacy.batches(
                dataset,
                expected_batch_size=expected,
                steps=math.ceil(len(dataset) / expected),
                physical_batch=self.args.per_device_train_batch_size,
                collate_fn=stock.collate_fn,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            )
            self.micro_batches = MicroBatches(batches, accumulation)
        return self.micro_batches

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The Trainer's own, with the engine on it once training begins.

        Raises:
            GroupSearchError: for a second training with the noise of one.
        """
        optimizer = super().create_optimizer(model) if model is not None else super().create_optimizer()  # type: ignore[misc]
        if self.micro_batches is None:
            return optimizer
        if self.engine is None:
            self.model.train()
            batches, steps = self.micro_batches.batches, self.state.max_steps
            self.engine = self.privacy.attach(self.model, self.optimizer, batches, self.example_losses, steps=steps)
        elif self.engine.steps and not self.state.global_step and self.privacy.epsilon is not None:
            raise GroupSearchError(
                f"Found a second training after {self.engine.steps} steps, whose noise was chosen for one: together "
                f"they would cost more than epsilon {self.privacy.epsilon:g}. Give resume_from_checkpoint to go on "
                "with a checkpoint, max_steps for all steps at once, or Privacy(noise_multiplier=) in place of epsilon."
            )
        return optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Backward on the physical batches of a micro-batch, if there are any; its share of the loss, for the log."""
        if self.engine is None or self.micro_batches is None:
            raise GroupSearchError(
                "Expected the batches and the optimizer of a private Trainer, found others: get_train_dataloader or "
                "create_optimizer was overridden. Give train_dataset, data_collator and optimizers=, or call super()."
            )
        total = torch.zeros((), device=self.args.device)
        model.train()
        with self.engine.same_examples():  # row i is example i, however often a loss calls the model
            for batch in inputs:
                with self.compute_loss_context_manager():
                    losses = self.example_losses(model, self._prepare_inputs(batch))
                self.accelerator.backward(losses.mean())
                total += losses.detach().sum()
        return mean_loss(total, self.micro_batches.batches)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean of the examples' losses, and what the model answered last."""
        answers: list[Any] = []
        with model.register_forward_hook(lambda module, given, answer: answers.append(answer)):
            loss = self.example_losses(model, inputs).mean()
        return (loss, answers[-1]) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> Any:
        """Of all physical batches of a micro-batch."""
        one: Any = super().floating_point_ops  # type: ignore[misc]
        return sum(one(batch) for batch in inputs)

    def _get_num_items_in_batch(self, batch_samples: Any, device: torch.device) -> None:
        """No loss is divided by what a batch counts."""
        return

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what was spent in place of ``grad_norm``, which is taken before there is a gradient."""
        logs.pop("grad_norm", None)
        if "loss" in logs and self.engine is not None and self.engine.noise_multiplier:
            assert self.micro_batches is not None
            logs["epsilon"] = self.engine.epsilon(self.privacy.delta_for(self.micro_batches.batches))
        super().log(logs, start_time)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.engine is not None and self.micro_batches is not None:
            state = {"engine": engine_state(self.engine), "batches": self.micro_batches.state_dict()}
            torch.save(state, Path(output_dir) / STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE
        if not path.is_file():
            raise GroupSearchError(
                f"Expected {path}, which says what the steps before cost in privacy, found none. Resume from a "
                "checkpoint that a private Trainer wrote, without save_only_model."
            )
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        assert self.engine is not None
        assert self.micro_batches is not None
        state = torch.load(path, map_location="cpu", weights_only=True)
        load_engine_state(self.engine, state["engine"])
        self.micro_batches.load_state_dict(state["batches"])


class _Steps(TrainerCallback):
    """Sees that every step is private, and says how many epochs were trained, also of a run resumed within one."""

    def __init__(self, trainer: PrivateMixin) -> None:
        self._trainer = trainer
        self._before = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first micro-batch."""
        self._before = 0 if self._trainer.engine is None else self._trainer.engine.steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before anything is logged, evaluated or saved."""
        engine, micro_batches = self._trainer.engine, self._trainer.micro_batches
        if engine is None or micro_batches is None or engine.steps != self._before + 1:
            raise GroupSearchError(
                "Expected one private step of the optimizer, found none: the Trainer stepped another optimizer than "
                "the one the engine is on. Its weights are not private; train a new PrivateTrainer."
            )
        state.epoch = state.global_step / micro_batches.batches.steps


class PrivateTrainer(PrivateMixin, Trainer):
    """transformers' Trainer with the two arguments of :class:`PrivateMixin`."""
