from __future__ import annotations

import pytest
import torch
from torch import Tensor

from groupsearch import GroupSearchError
from groupsearch.workloads.skewed import DATA, MODELS, PENALTY, Skewed, skewed


def plainly(problem: Skewed, x: Tensor, worker: int, rows: Tensor | None) -> Tensor:
    """A worker's loss by torch's own functions."""
    features, labels = problem.features[worker], problem.labels[worker]
    if rows is not None:
        features, labels = features[rows], labels[rows]
    for part, shape in zip(x.split(problem.sizes), problem.shapes, strict=True):
        weight = part.view(shape)
        features = features @ weight[:-1] + weight[-1]
        features = features.tanh() if shape[1] == problem.hidden else features
    logits = torch.cat([features, torch.zeros(len(features), 1, dtype=x.dtype)], 1)
    return torch.nn.functional.cross_entropy(logits, labels) + PENALTY * (x**2 / (1 + x**2)).sum()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("data", DATA)
def test_gradients_are_those_of_autograd(data: str, model: str) -> None:
    problem = skewed(data, model, 10)
    rows = torch.randint(problem.labels.shape[1], (10, 4), generator=torch.Generator().manual_seed(1))
    points = torch.randn(3, sum(problem.sizes), generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 5
    for chosen in (None, rows):
        found = problem.gradients(points, chosen)
        for s in range(3):
            for i in (0, 7):
                x = points[s].clone().requires_grad_()
                (expected,) = torch.autograd.grad(plainly(problem, x, i, None if chosen is None else chosen[i]), x)
                torch.testing.assert_close(found[s, i], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("data", DATA)
def test_no_two_points_have_gradients_further_apart_than_smoothness_allows(data: str) -> None:
    problem = skewed(data, "logistic", 20)
    assert problem.smoothness is not None
    mean, largest = problem.smoothness
    assert mean <= largest
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(8, sum(problem.sizes), generator=generator, dtype=torch.float64)
    points[1::2] = points[::2] + 1e-3 * points[1::2]
    gradients = problem.gradients(points)
    apart = (points[1::2] - points[::2]).norm(dim=-1)
    assert ((gradients[1::2] - gradients[::2]).mean(1).norm(dim=-1) <= mean * apart).all()
    assert ((gradients[1::2] - gradients[::2]).norm(dim=-1) <= largest * apart[:, None]).all()


def test_workers_have_few_labels_and_as_many_examples() -> None:
    problem = skewed("digits", "network", 20)
    assert problem.features.shape == (20, 89, 64)
    assert max(len(labels.unique()) for labels in problem.labels) <= 3
    assert len(problem.labels.unique()) == 10
    assert problem.start().norm() > 1


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(GroupSearchError, match="breast-cancer"):
        skewed("mnist", "logistic", 10)
    with pytest.raises(GroupSearchError, match="569 workers"):
        skewed("breast-cancer", "logistic", 570)
