"""Differentially private training with accelerate, on one device: a small ConvNeXt on scikit-learn's digits.

``python examples/accelerate_loop.py`` runs it. The order counts: place the model, attach the engine, then prepare.
Let accelerate neither accumulate (it would scale losses before they are clipped) nor clip.
A number as argument seeds sampling and noise, for tests only: whoever knows the noise can take it away.
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.nn import functional
from transformers import ConvNextConfig, ConvNextForImageClassification

import groupsearch as gs

sampling, noise = (torch.Generator().manual_seed(int(sys.argv[1]) + k) if sys.argv[1:] else None for k in range(2))


def loss(model, batch):
    """One number per example, from that example alone."""
    return functional.cross_entropy(model(batch["image"]).logits, batch["label"], reduction="none")


torch.manual_seed(0)
shape = {"patch_size": 2, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_scale_init_value": 1.0}
model = ConvNextForImageClassification(ConvNextConfig(num_channels=1, num_labels=10, **shape))
data = gs.load_workload("digits-vit").data
trace = gs.trace_model(model, {name: tensor[:64] for name, tensor in data.train.items()}, loss)
batches = gs.PoissonBatches(data.train, expected_batch_size=256, steps=40, physical_batch=64, generator=sampling)
delta = gs.default_delta(data.train_size)

accelerator = Accelerator()
model.to(accelerator.device)
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
plan = gs.ClipPlan(gs.Grouping.parse(trace, "best:4"), rule="auto-s")
sigma = gs.noise_multiplier_for(8.0, delta, batches.sampling_rate, batches.steps)
engine = gs.make_private(model, optimizer, plan, noise_multiplier=sigma, batches=batches, generator=noise)
model, optimizer = accelerator.prepare(model, optimizer)

for logical in batches:
    for batch in logical:
        accelerator.backward(loss(model, send_to_device(batch, accelerator.device)).mean())
    optimizer.step()
    optimizer.zero_grad()

print(f"{engine.steps} steps, epsilon {engine.epsilon(delta):.2f}")
