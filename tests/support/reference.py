"""The slow truth of group-wise clipping: one example at a time, plain autograd, no hooks of the engine.

A parameter used at several sites has one gradient per use; each use is given a leaf copy of
the parameter of its own, so that autograd itself tells the uses apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from groupsearch.plan.clipping import AUTO_S_GAMMA, ClipPlan
from groupsearch.plan.trace import Site

Loss = Callable[[nn.Module, Any], Tensor]
SiteGradients = list[dict[tuple[int, str], Tensor]]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by canonical name; a tied one appears once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def batch_size_of(batch: Any) -> int:
    """B of a mapping, a sequence or a tensor."""
    if isinstance(batch, Tensor):
        return len(batch)
    return len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0])


def one_example(batch: Any, index: int) -> Any:
    """Example ``index`` alone, its first dimension kept."""
    if isinstance(batch, Tensor):
        return batch[index : index + 1]
    if isinstance(batch, Mapping):
        return {key: one_example(value, index) for key, value in batch.items()}
    return tuple(one_example(value, index) for value in batch)


def per_example_gradients(model: nn.Module, batch: Any, loss: Loss) -> list[dict[str, Tensor]]:
    """The gradient of each example's loss in every trainable parameter; zero where it has none."""
    parameters = trainable(model)
    return [_gradients(loss(model, one_example(batch, index)), parameters) for index in range(batch_size_of(batch))]


def per_site_gradients(model: nn.Module, batch: Any, loss: Loss, sites: Sequence[Site]) -> SiteGradients:
    """For each example the gradient of every (site index, parameter).

    Raises:
        AssertionError: when the sites miss a trainable parameter, name one that is not, or
            their gradients do not add up to the parameter's.
    """
    parameters = trainable(model)
    users: dict[str, list[int]] = {name: [] for name in parameters}
    for index, site in enumerate(sites):
        for name in site.parameters:
            assert name in users, f"site {site.name} lists {name}, which is not a trainable parameter"
            users[name].append(index)
    missed = [name for name, indices in users.items() if not indices]
    assert not missed, f"no site uses {missed}"
    shared = {name: indices for name, indices in users.items() if len(indices) > 1}
    result = []
    for index in range(batch_size_of(batch)):
        example = one_example(batch, index)
        whole = _gradients(loss(model, example), parameters)
        gradients = {(indices[0], name): whole[name] for name, indices in users.items() if name not in shared}
        gradients.update(_apart(model, example, loss, sites, shared) if shared else {})
        for name, indices in shared.items():
            torch.testing.assert_close(sum(gradients[i, name] for i in indices), whole[name])
        result.append(gradients)
    return result


def group_norms(gradients: SiteGradients, plan: ClipPlan) -> Tensor:
    """The gradient norm of every example in every group, (B, M)."""
    return torch.stack([torch.stack([_norm(group) for group in _groups(example, plan)]) for example in gradients])


def combine(gradients: SiteGradients, plan: ClipPlan) -> dict[str, Tensor]:
    """Every example's group gradients times their clip factors, summed over groups and examples."""
    sums: dict[str, Tensor] = {}
    for name, part in _clipped(gradients, plan):
        sums[name] = sums[name] + part if name in sums else part
    return sums


def magnitudes(gradients: SiteGradients, plan: ClipPlan) -> dict[str, float]:
    """The largest number in any example's clipped gradient of each parameter.

    What examples add may cancel in the sum; rounding is relative to what was added.
    """
    largest: dict[str, float] = {}
    for name, part in _clipped(gradients, plan):
        largest[name] = max(largest.get(name, 0.0), float(part.abs().max()))
    return largest


def clipped_sums(model: nn.Module, batch: Any, loss: Loss, plan: ClipPlan) -> dict[str, Tensor]:
    """The noiseless clipped sum of every trainable parameter under ``plan``."""
    return combine(per_site_gradients(model, batch, loss, plan.grouping.sites), plan)


def clip_factor(rule: str, norm: float, threshold: float) -> float:
    """What one example's group gradient of this norm is multiplied by."""
    if rule == "auto-s":
        return threshold / (norm + AUTO_S_GAMMA)
    if norm == 0.0:
        return 1.0 if rule == "abadi" else 0.0
    return min(1.0, threshold / norm) if rule == "abadi" else threshold / norm


def _gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    assert loss.shape == (1,), f"a loss of one example has shape (1,), this one has {tuple(loss.shape)}"
    found = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if gradient is None else gradient
        for (name, p), gradient in zip(parameters.items(), found, strict=True)
    }


def _clipped(gradients: SiteGradients, plan: ClipPlan) -> Iterator[tuple[str, Tensor]]:
    for example in gradients:
        for group, threshold in zip(_groups(example, plan), plan.thresholds, strict=True):
            factor = clip_factor(plan.rule, float(_norm(group)), threshold)
            for name, gradient in group.items():
                yield name, factor * gradient


def _groups(example: Mapping[tuple[int, str], Tensor], plan: ClipPlan) -> list[dict[str, Tensor]]:
    groups: list[dict[str, Tensor]] = [{} for _ in range(plan.grouping.groups)]
    for (site, name), gradient in example.items():
        group = groups[plan.grouping.group_of(site)]
        group[name] = group[name] + gradient if name in group else gradient
    return groups


def _norm(group: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([gradient.double().square().sum() for gradient in group.values()]).sum().sqrt()


def _apart(
    model: nn.Module, example: Any, loss: Loss, sites: Sequence[Site], shared: Mapping[str, Sequence[int]]
) -> dict[tuple[int, str], Tensor]:
    """The gradient of every use of the shared parameters, each use reading a copy of its own."""
    parameters = trainable(model)
    copies = {
        (site, name): parameters[name].detach().clone().requires_grad_()
        for name, indices in shared.items()
        for site in indices
    }
    with ExitStack() as stack:
        for layer in {sites[site].layer for site, _ in copies}:
            module = _called_module(model, layer)
            uses: dict[int, dict[int, Tensor]] = {}
            for (site, name), copy in copies.items():
                if sites[site].layer == layer:
                    uses.setdefault(_use(sites[site]), {})[id(parameters[name])] = copy
            stack.enter_context(_reading_copies(module, uses))
        value = loss(model, example)
    found = torch.autograd.grad(value.sum(), list(copies.values()), allow_unused=True)
    return {
        key: torch.zeros_like(copy) if gradient is None else gradient
        for (key, copy), gradient in zip(copies.items(), found, strict=True)
    }


def _called_module(model: nn.Module, layer: str) -> nn.Module:
    """The module whose calls are the uses of ``layer``: itself, or the owner of a bare parameter."""
    modules = dict(model.named_modules())
    return modules[layer] if layer in modules else modules[layer.rpartition(".")[0]]


def _use(site: Site) -> int:
    _, mark, number = site.name.rpartition("#")
    return int(number) if mark else 0


@contextmanager
def _reading_copies(module: nn.Module, uses: Mapping[int, Mapping[int, Tensor]]) -> Iterator[None]:
    """While open, the k-th call of ``module`` reads ``uses[k]`` in place of the parameters with those ids."""
    slots = [
        (owner, local, id(p))
        for owner in module.modules()
        for local, p in owner._parameters.items()
        if p is not None and any(id(p) in copies for copies in uses.values())
    ]
    calls = 0
    displaced: list[list[Tensor | None]] = []

    def before(_module: nn.Module, _args: Any) -> None:
        nonlocal calls
        displaced.append([owner._parameters[local] for owner, local, _ in slots])
        for owner, local, key in slots:
            owner._parameters[local] = uses.get(calls, {}).get(key, owner._parameters[local])  # type: ignore[assignment]
        calls += 1

    def after(_module: nn.Module, _args: Any, _output: Any) -> None:
        for (owner, local, _), previous in zip(slots, displaced.pop(), strict=True):
            owner._parameters[local] = previous  # type: ignore[assignment]

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
