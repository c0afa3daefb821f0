"""A task of one's own for groupsearch: complete an image, from its upper half to its lower half.

``groupsearch profile examples/own_task.py:factory`` and its sisters call ``factory``. Model, data, loss and metric are
all that they need to know.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from groupsearch.workloads import Data, TrainingDefaults, Workload


def build(seed=0):
    """The model; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = [nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()) for _ in range(3)]
        return nn.Sequential(nn.Linear(32, 64), *hidden, nn.Linear(64, 32))


def loss(model, batch):
    """One number per example, from that example alone: the mean over its own pixels."""
    return functional.mse_loss(model(batch["upper"]), batch["lower"], reduction="none").mean(1)


def metric(model, batch):
    """One score per example; up is better: the share of its pixels that are right within a quarter of the range."""
    return ((model(batch["upper"]) - batch["lower"]).abs() <= 0.25).float().mean(1)


def load_data():
    """Rows to train on and rows to judge by, the same ones every time."""
    pixels = torch.tensor(load_digits().data, dtype=torch.float32) / 16  # the range is known, not taken from the data
    halves = {"upper": pixels[:, :32], "lower": pixels[:, 32:]}
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    train, validation = ({name: half[part] for name, half in halves.items()} for part in (order[360:], order[:360]))
    return Data(train, validation)


def factory():
    """What groupsearch calls."""
    data = load_data()
    return Workload(
        name="own-task",
        build=build,
        make_batch=lambda batch_size: {name: tensor[:batch_size] for name, tensor in data.train.items()},
        loss=loss,
        metric=metric,
        metric_name="pixel accuracy",
        metric_is_share=True,
        data=data,
        batch_size=256,
        training=TrainingDefaults(steps=60, learning_rate=4e-3, sampling_rate=0.2, epsilon=8.0),
    )
