"""Data of several workers that do not agree: splits by label, and the gradients of all workers at once.

Apart from the embedded models, as there is no torch module here: a problem is a function of one flat vector, in
float64, and its gradients are written out, so that many settings run side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from groupsearch.errors import GroupSearchError

DATA = ("breast-cancer", "digits")
MODELS = ("logistic", "network")
PENALTY = 1e-3
HIDDEN = 8


@dataclass(frozen=True, eq=False)
class Skewed:
    """n workers with m examples each, sorted by label, and a loss over them: f_i is the mean over worker i's.

    ``logistic`` is (multinomial) logistic regression, the last class the reference, with the regulariser
    penalty sum x_j^2 / (1 + x_j^2), which is not convex; ``network`` has one hidden layer of tanh units before it.

    Attributes:
        features: (n, m, p), float64, of mean 0 and variance 1 over all.
        labels: (n, m).
        classes: C.
        hidden: units of the network; 0 for logistic regression.
    """

    features: Tensor
    labels: Tensor
    classes: int
    hidden: int

    @property
    def workers(self) -> int:
        """The number of workers, n."""
        return self.features.shape[0]

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Inputs (one more for the bias) and outputs of every layer."""
        inputs, outputs = self.features.shape[-1] + 1, self.classes - 1
        return ((inputs, self.hidden), (self.hidden + 1, outputs)) if self.hidden else ((inputs, outputs),)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Coordinates of every layer."""
        return tuple(rows * columns for rows, columns in self.shapes)

    def start(self) -> Tensor:
        """A point to begin at, (d,): zeros, and a fixed draw for the network, whose zero is stationary."""
        if not self.hidden:
            return torch.zeros(sum(self.sizes), dtype=torch.float64)
        drawn = torch.randn(sum(self.sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return torch.cat([w / rows**0.5 for w, (rows, _) in zip(drawn.split(self.sizes), self.shapes, strict=True)])

    def gradients(self, points: Tensor, rows: Tensor | None = None) -> Tensor:
        """The workers' gradients (S, n, d) at S points (S, d).

        Args:
            points: one for each setting.
            rows: (n, B), the examples that each worker's gradient is of; None for all of them.
        """
        inputs_nmp, onehot_nmc = self._inputs, self._onehot
        if rows is not None:
            inputs_nmp = torch.take_along_dim(inputs_nmp, rows[..., None], 1)
            onehot_nmc = torch.take_along_dim(onehot_nmc, rows[..., None], 1)
        n, m, p = inputs_nmp.shape
        weights = [part.view(-1, *shape) for part, shape in zip(points.split(self.sizes, -1), self.shapes, strict=True)]
        hidden = torch.matmul(inputs_nmp.reshape(n * m, p), weights[0]).unflatten(1, (n, m))
        if self.hidden:
            hidden = hidden.tanh()
            logits = torch.matmul(hidden.flatten(1, 2), weights[1][:, :-1]).unflatten(1, (n, m))
            logits = logits + weights[1][:, None, None, -1]
        else:
            logits = hidden
        # the reference class has the logit 0
        error = (logits - torch.logaddexp(logits.logsumexp(-1, keepdim=True), logits.new_zeros(()))).exp()
        error = (error - onehot_nmc) / m
        found = []
        if self.hidden:
            both = torch.cat([hidden, hidden.new_ones(*hidden.shape[:-1], 1)], -1)
            found = [torch.matmul(both.transpose(-1, -2), error).flatten(-2)]
            back = torch.matmul(error.flatten(1, 2), weights[1][:, :-1].transpose(-1, -2)).unflatten(1, (n, m))
            error = back * (1 - hidden.square())
        s, c = error.shape[0], error.shape[-1]
        side = error.permute(1, 2, 0, 3).reshape(n, m, s * c)
        first = torch.matmul(inputs_nmp.transpose(-1, -2), side).unflatten(-1, (s, c)).permute(2, 0, 1, 3).flatten(-2)
        regular = 2 * PENALTY * points / (1 + points.square()).square()
        return torch.cat([first, *found], -1) + regular[:, None]

    @cached_property
    def smoothness(self) -> tuple[float, float] | None:
        """L of the mean and the largest L_i, upper bounds; None for a network, which has none."""
        if self.hidden:
            return None
        curvature = 0.25 if self.classes == 2 else 0.5
        n, m, p = self._inputs.shape
        whole = torch.linalg.matrix_norm(self._inputs.reshape(n * m, p), 2) ** 2 / (n * m)
        single = torch.linalg.matrix_norm(self._inputs, 2) ** 2 / m
        return curvature * float(whole) + 2 * PENALTY, curvature * float(single.max()) + 2 * PENALTY

    @cached_property
    def _inputs(self) -> Tensor:
        return torch.cat([self.features, self.features.new_ones(*self.features.shape[:-1], 1)], -1)

    @cached_property
    def _onehot(self) -> Tensor:
        return torch.nn.functional.one_hot(self.labels, self.classes)[..., :-1].double()


def skewed(data: str, model: str, workers: int) -> Skewed:
    """A problem on scikit-learn's breast-cancer or digits data, shuffled once, sorted by label and cut into pieces.

    The examples that are left when all workers have equally many are dropped. Features are scaled by what all of the
    data say, which no private training may do.

    Raises:
        GroupSearchError: for data or a model that is not known, or more workers than examples.
    """
    if data not in DATA or model not in MODELS:
        raise GroupSearchError(
            f"Expected data of {', '.join(DATA)} and a model of {', '.join(MODELS)}, found {data!r} and {model!r}."
        )
    from sklearn.datasets import load_breast_cancer, load_digits

    found = load_breast_cancer() if data == "breast-cancer" else load_digits()
    features, labels = torch.from_numpy(found.data).double(), torch.from_numpy(found.target).long()
    each = len(labels) // workers if workers > 0 else 0
    if each < 1:
        raise GroupSearchError(f"Expected from 1 to {len(labels)} workers, found {workers}.")
    features = (features - features.mean(0)) / features.std(0).clip(min=1e-6)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: each * workers]
    order = order[labels[order].argsort(stable=True)]
    shape = workers, each
    hidden = HIDDEN if model == "network" else 0
    return Skewed(features[order].unflatten(0, shape), labels[order].view(shape), int(labels.max()) + 1, hidden)
