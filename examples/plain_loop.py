"""Differentially private training in a loop of one's own: a small ConvNeXt on scikit-learn's digits.

``python examples/plain_loop.py`` runs it. A number as argument seeds sampling and noise, for tests only: whoever
knows the noise can take it away.
"""

import sys

import torch
from torch.nn import functional
from transformers import ConvNextConfig, ConvNextForImageClassification

import groupsearch as gs
from groupsearch.randomness import Streams

streams = ("sampling", "noise")
sampling, noise = (Streams(int(sys.argv[1])).generator(name) if sys.argv[1:] else None for name in streams)


def loss(model, batch):
    """One number per example, from that example alone."""
    return functional.cross_entropy(model(batch["image"]).logits, batch["label"], reduction="none")


torch.manual_seed(0)
shape = {"patch_size": 2, "num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_scale_init_value": 1.0}
model = ConvNextForImageClassification(ConvNextConfig(num_channels=1, num_labels=10, **shape))
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
data = gs.load_workload("digits-vit").data

batches = gs.PoissonBatches(data.train, expected_batch_size=256, steps=40, physical_batch=64, generator=sampling)
trace = gs.trace_model(model, {name: tensor[:64] for name, tensor in data.train.items()}, loss)
delta = gs.default_delta(data.train_size)
plan = gs.ClipPlan(gs.Grouping.parse(trace, "best:4"), rule="auto-s")
sigma = gs.noise_multiplier_for(8.0, delta, batches.sampling_rate, batches.steps)
engine = gs.make_private(model, optimizer, plan, noise_multiplier=sigma, batches=batches, generator=noise)

for logical in batches:  # one Poisson sample, one step; some are larger, some may be empty
    for batch in logical:  # in pieces that fit into memory
        loss(model, batch).mean().backward()
    optimizer.step()
    optimizer.zero_grad()

with torch.no_grad():
    correct = model(data.validation["image"]).logits.argmax(-1) == data.validation["label"]
print(f"{engine.steps} steps, epsilon {engine.epsilon(delta):.2f}, accuracy {correct.double().mean():.0%}")
