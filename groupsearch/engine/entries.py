"""What a site leaves in its group's book: enough for its norm, its inner products and its clipped sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from groupsearch.engine import grads, norms
from groupsearch.engine.ieee import in_ieee
from groupsearch.engine.widening import accumulator

Operands = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Dimensions:
    """T positions, d inputs, p outputs of a site, the method its norm is taken by, and its channel groups."""

    positions: int
    inputs: int
    outputs: int
    method: str
    groups: int = 1


class Entry(Protocol):
    """One site's entry in a book."""

    @property
    def dimensions(self) -> Dimensions:
        """T, d, p and the norm method."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Canonical names of the parameters the site uses."""

    @property
    def booked(self) -> tuple[Tensor, ...]:
        """The tensors that the entry keeps alive."""

    def sqnorm(self) -> Tensor:
        """Squared gradient norm per example, (B,)."""

    def instance(self, name: str) -> Tensor:
        """Per-example gradient of one parameter, (B, *shape)."""

    def clipped_sums(self, factor_B: Tensor) -> Mapping[str, Tensor]:
        """Sum over examples of factor times gradient, for every parameter."""


@dataclass(frozen=True)
class MatrixEntry:
    """A linear or convolution site kept as its input and output gradient (ghost norm).

    ``operands`` turns the raw pair into (a_BGTd, g_BGTp); the raw pair is what is booked.
    """

    weight: str
    bias: str | None
    shape: torch.Size
    transposed: bool
    a: Tensor
    g: Tensor
    operands: Operands
    dimensions: Dimensions

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def booked(self) -> tuple[Tensor, ...]:
        return (self.a, self.g)

    def sqnorm(self) -> Tensor:
        return norms.matrix_sqnorm(*self.operands(self.a, self.g), bias=self.bias is not None)

    @in_ieee  # beside sums that are
    def instance(self, name: str) -> Tensor:
        return matrix_instances(self)[name]

    def clipped_sums(self, factor_B: Tensor) -> Mapping[str, Tensor]:
        a_BGTd, g_BGTp = self.operands(self.a, self.g)
        total_Gpd = grads.matrix_clipped_sum(a_BGTd, g_BGTp, factor_B)
        sums = {self.weight: _as_weight(total_Gpd.flatten(0, 1), self.shape, self.transposed)}
        if self.bias is not None:
            sums[self.bias] = grads.instance_clipped_sum(_bias_instances(g_BGTp), factor_B)
        return sums


def matrix_instances(entry: MatrixEntry) -> dict[str, Tensor]:
    """Per-example gradients of a matrix site's weight and bias, each (B, *shape)."""
    a_BGTd, g_BGTp = entry.operands(entry.a, entry.g)
    instance_BGpd = grads.matrix_instance(a_BGTd, g_BGTp)
    if entry.transposed:
        weight = instance_BGpd.flatten(1, 2).mT
    else:
        weight = instance_BGpd.view(len(instance_BGpd), *entry.shape)
    instances = {entry.weight: weight}
    if entry.bias is not None:
        instances[entry.bias] = _bias_instances(g_BGTp)
    return instances


@dataclass(frozen=True)
class EmbeddingEntry:
    """An embedding site: the row indices and the output gradient; padding rows come with zero gradient."""

    weight: str
    rows: int
    ids_BT: Tensor
    g_BTd: Tensor
    dimensions: Dimensions

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.weight,)

    @property
    def booked(self) -> tuple[Tensor, ...]:
        return (self.ids_BT, self.g_BTd)

    def sqnorm(self) -> Tensor:
        return norms.embedding_inner(self.ids_BT, self.g_BTd, self.ids_BT, self.g_BTd)

    def instance(self, name: str) -> Tensor:
        return grads.embedding_instance(self.ids_BT, self.g_BTd, self.rows)

    def clipped_sums(self, factor_B: Tensor) -> Mapping[str, Tensor]:
        return {self.weight: grads.embedding_clipped_sum(self.ids_BT, self.g_BTd, factor_B, self.rows)}


@dataclass(frozen=True)
class InstanceEntry:
    """Per-example gradients themselves, each (B, *shape), by canonical parameter name."""

    instances: Mapping[str, Tensor]
    dimensions: Dimensions

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.instances)

    @property
    def booked(self) -> tuple[Tensor, ...]:
        return tuple(self.instances.values())

    def sqnorm(self) -> Tensor:
        return torch.stack([norms.instance_sqnorm(instance) for instance in self.instances.values()]).sum(0)

    def instance(self, name: str) -> Tensor:
        return self.instances[name]

    def clipped_sums(self, factor_B: Tensor) -> Mapping[str, Tensor]:
        return {name: grads.instance_clipped_sum(inst, factor_B) for name, inst in self.instances.items()}


def inner(one: Entry, other: Entry) -> Tensor:
    """Inner product per example of two sites' gradients over the parameters they share, at least one, (B,).

    Sites of one parameter in one group need it: the norm of a sum is not the sum of the norms.
    """
    shared = [name for name in one.parameters if name in other.parameters]
    if isinstance(one, EmbeddingEntry) and isinstance(other, EmbeddingEntry):
        return norms.embedding_inner(one.ids_BT, one.g_BTd, other.ids_BT, other.g_BTd)
    if isinstance(one, MatrixEntry) and isinstance(other, EmbeddingEntry):
        one, other = other, one
    if isinstance(one, EmbeddingEntry) and isinstance(other, MatrixEntry) and not other.transposed:
        b_BGTd, h_BGTp = other.operands(other.a, other.g)
        return norms.embedding_matrix_inner(one.ids_BT, one.g_BTd, b_BGTd.squeeze(1), h_BGTp.squeeze(1))
    if isinstance(one, MatrixEntry) and isinstance(other, MatrixEntry) and _alike(one, other, shared):
        return norms.matrix_inner(
            *one.operands(one.a, one.g), *other.operands(other.a, other.g), bias=one.bias in shared
        )
    one, other = (entry.alone(slice(None)) if hasattr(entry, "alone") else entry for entry in (one, other))  # run once
    return torch.stack([norms.instance_inner(one.instance(name), other.instance(name)) for name in shared]).sum(0)


def of_examples(entry: Entry, kept_B: Tensor) -> Entry:
    """The entry of some of its examples alone, those where ``kept_B`` is true; copies what it keeps."""

    def rows(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: rows(x) for key, x in value.items()}
        return value[kept_B] if isinstance(value, Tensor) else value

    found: Any = entry
    if hasattr(found, "alone"):  # cannot be run again on some examples only
        return found.alone(kept_B)
    # every other entry is a dataclass whose tensors lead with the examples
    return replace(found, **{field.name: rows(getattr(entry, field.name)) for field in fields(found)})


def _alike(one: MatrixEntry, other: MatrixEntry, shared: list[str]) -> bool:
    same_weight = one.weight == other.weight and one.transposed == other.transposed and one.shape == other.shape
    return same_weight and all(name in (one.weight, one.bias) for name in shared)


def _bias_instances(g_BGTp: Tensor) -> Tensor:
    return g_BGTp.sum(2, dtype=accumulator(g_BGTp.dtype)).flatten(1)


def _as_weight(total_pd: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    return total_pd.mT.contiguous() if transposed else total_pd.view(shape)
