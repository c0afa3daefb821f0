"""Differentially private training with accelerate, on one device: a small ConvNeXt on scikit-learn's digits.

``python examples/accelerate_loop.py`` runs it. ``prepare_private`` takes the place of ``prepare``, and a batch of the
loop is a list of physical ones. Leave accelerate's clipping of gradients out: it sees none before the step.
A number as argument seeds sampling and noise, for tests only: whoever knows the noise can take it away.
"""

import sys

import torch
from accelerate import Accelerator
from torch.nn import functional
from transformers import ConvNextConfig, ConvNextForImageClassification

import groupsearch as gs
from groupsearch.integrations import Privacy
from groupsearch.integrations.accelerate import prepare_private


def loss(model, batch):
    """One number per example, from that example alone."""
    return functional.cross_entropy(model(batch["image"]).logits, batch["label"], reduction="none")


torch.manual_seed(0)
shape = {"patch_size": 2, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_scale_init_value": 1.0}
model = ConvNextForImageClassification(ConvNextConfig(num_channels=1, num_labels=10, **shape))
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
data = gs.load_workload("digits-vit").data

accelerator = Accelerator(gradient_accumulation_steps=4)
privacy = Privacy("best:4", epsilon=8.0, seed=int(sys.argv[1]) if sys.argv[1:] else None)
batches = privacy.batches(data.train, expected_batch_size=256, steps=40, physical_batch=64)
prepared = prepare_private(accelerator, model, optimizer, batches, loss=loss, privacy=privacy)
model, optimizer, batches, engine = prepared

for micro_batch in batches:
    with accelerator.accumulate(model):
        for batch in micro_batch:
            accelerator.backward(loss(model, batch).mean())
        optimizer.step()
        optimizer.zero_grad()

print(f"{engine.steps} steps, epsilon {engine.epsilon(gs.default_delta(data.train_size)):.2f}")
