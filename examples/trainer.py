"""Differentially private training with transformers' Trainer: a small ConvNeXt on scikit-learn's digits.

``python examples/trainer.py`` runs it. A step of the Trainer is one logical batch, so leave its own gradient
accumulation and clipping off. Its logs show the loss of private data: keep them as safe as the data.
A number as argument seeds sampling and noise, for tests only: whoever knows the noise can take it away.
"""

import sys

import torch
from torch.nn import functional
from transformers import ConvNextConfig, ConvNextForImageClassification, Trainer, TrainingArguments

import groupsearch as gs

sampling, noise = (torch.Generator().manual_seed(int(sys.argv[1]) + k) if sys.argv[1:] else None for k in range(2))


def loss(model, batch):
    """One number per example, from that example alone."""
    return functional.cross_entropy(model(batch["image"]).logits, batch["label"], reduction="none")


class PrivateTrainer(Trainer):
    """Takes a step on every Poisson sample, in physical batches, and logs what it has cost so far."""

    def get_train_dataloader(self):
        """The Poisson samples."""
        return self.train_dataset

    def training_step(self, model, logical, num_items_in_batch=None):
        """Backward on the physical batches, if there are any; the loss for the log."""
        total = torch.zeros((), device=self.args.device)
        model.train()
        for batch in logical:
            losses = loss(model, self._prepare_inputs(batch))
            self.accelerator.backward(losses.mean())
            total += losses.detach().sum()
        return total / self.train_dataset.expected_batch_size

    def log(self, logs, start_time=None):
        """Log epsilon, too."""
        super().log({**logs, "epsilon": engine.epsilon(delta)}, start_time)


torch.manual_seed(0)
shape = {"patch_size": 2, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_scale_init_value": 1.0}
model = ConvNextForImageClassification(ConvNextConfig(num_channels=1, num_labels=10, **shape))
data = gs.load_workload("digits-vit").data
trace = gs.trace_model(model, {name: tensor[:64] for name, tensor in data.train.items()}, loss)
batches = gs.PoissonBatches(data.train, expected_batch_size=256, steps=40, physical_batch=64, generator=sampling)
delta = gs.default_delta(data.train_size)

off = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none"}
arguments = TrainingArguments("build/trainer", max_steps=batches.steps, logging_steps=10, disable_tqdm=True, **off)
optimizer = torch.optim.Adam(model.to(arguments.device).parameters(), lr=5e-3)
plan = gs.ClipPlan(gs.Grouping.parse(trace, "best:4"), rule="auto-s")
sigma = gs.noise_multiplier_for(8.0, delta, batches.sampling_rate, batches.steps)
engine = gs.make_private(model, optimizer, plan, noise_multiplier=sigma, batches=batches, generator=noise)
PrivateTrainer(model=model, args=arguments, train_dataset=batches, optimizers=(optimizer, None)).train()
print(f"{engine.steps} steps, epsilon {engine.epsilon(delta):.2f}")
