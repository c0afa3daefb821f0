"""Differentially private training with transformers' Trainer: a small ConvNeXt on scikit-learn's digits.

``python examples/trainer.py`` runs it. A step of the Trainer is one Poisson sample of 64 x 4 examples in the mean. Its
logs show the loss of private data: keep them as safe as the data.
A number as argument seeds sampling and noise, for tests only: whoever knows the noise can take it away.
"""

import sys

import torch
from transformers import ConvNextConfig, ConvNextForImageClassification, TrainingArguments

import groupsearch as gs
from groupsearch.integrations import Privacy
from groupsearch.integrations.transformers import PrivateTrainer


def rows(batch):
    """The examples as the Trainer takes them."""
    return [{"pixel_values": x, "labels": y} for x, y in zip(batch["image"], batch["label"], strict=True)]


torch.manual_seed(0)
shape = {"patch_size": 2, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_scale_init_value": 1.0}
model = ConvNextForImageClassification(ConvNextConfig(num_channels=1, num_labels=10, **shape))
data = gs.load_workload("digits-vit").data
train, validation = rows(data.train), rows(data.validation)

size = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 4, "max_steps": 40}
how = {"optim": "adamw_torch", "learning_rate": 5e-3, "lr_scheduler_type": "constant", "logging_steps": 10}
quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
arguments = TrainingArguments("build/trainer", eval_strategy="steps", eval_steps=20, **size, **how, **quiet)
privacy = Privacy("best:4", epsilon=8.0, seed=int(sys.argv[1]) if sys.argv[1:] else None)
trainer = PrivateTrainer(model, arguments, train_dataset=train, eval_dataset=validation, privacy=privacy)
trainer.train()

engine = trainer.engine
print(f"{engine.steps} steps, epsilon {engine.epsilon(gs.default_delta(len(train))):.2f}")
