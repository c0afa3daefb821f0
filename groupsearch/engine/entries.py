"""What a site leaves in its group's book: enough for its norm, its inner products and its clipped sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from groupsearch.engine.arithmetic import accumulator, example_slices, habits_of, in_ieee, is_half, widened, widening

# -- Squared per-example gradient norms and inner products: pure functions on tensors --------------
#
# Shapes: B examples, G channel groups of a convolution (1 elsewhere), T positions, d inputs,
# p outputs, V rows of an embedding. Source: Book-Keeping, arXiv 2210.00038, section 3. Half-precision
# operands are widened (:mod:`~groupsearch.engine.arithmetic`); results are float32 or float64.
#
# Inner products are rounded up. Where the gradients of positions (or of two uses of a weight) cancel,
# what is left of their sum may be smaller than the rounding of its terms, and a norm that is too short
# clips too little. So each inner product is enlarged by ``ROUNDING`` units of rounding of the sizes that
# were added, S = sum over positions of |a_t| |g_t|: the largest error seen, over random, cancelling and
# aligned operands up to 768 x 3072 and 512 positions, was 1.1 of these units. Products are of IEEE float32
# (:mod:`~groupsearch.engine.arithmetic`), whatever matrix units are allowed elsewhere.

ROUNDING = 3


@in_ieee
@widening
def matrix_sqnorm(a_BGTd: Tensor, g_BGTp: Tensor, bias: bool) -> Tensor:
    """Ghost norm: squared norm per example of the weight gradient g^T a, without forming it.

    With ``bias`` the squared norm of the bias gradient (sum of g over T) is included: a bias
    is a weight on a constant input of one, which adds one to every entry of a a^T.

    Returns:
        Tensor (B,). Needs 2 B G T^2 numbers for T > 1.
    """
    if a_BGTd.shape[2] == 1:
        a_BG = _squares(a_BGTd, (2, 3))
        return ((a_BG + 1 if bias else a_BG) * _squares(g_BGTp, (2, 3))).sum(1)
    gram_BGTT = a_BGTd @ a_BGTd.mT
    if bias:
        gram_BGTT += 1
    gram_BGTT *= g_BGTp @ g_BGTp.mT
    total_B = gram_BGTT.sum((1, 2, 3), dtype=accumulator(gram_BGTT.dtype))
    size_BG = gram_BGTT.diagonal(dim1=2, dim2=3).clamp(min=0).sqrt_().sum(2)  # |a_t| |g_t| of every position
    return total_B.add_(size_BG.square().sum(1), alpha=rounding_unit(g_BGTp))


@in_ieee
@widening
def matrix_inner(a_BGTd: Tensor, g_BGTp: Tensor, b_BGSd: Tensor, h_BGSp: Tensor, bias: bool) -> Tensor:
    """Inner product per example of the gradients g^T a and h^T b of one shared weight (and bias).

    Returns:
        Tensor (B,).
    """
    gram_BGTS = a_BGTd @ b_BGSd.mT
    if bias:
        gram_BGTS += 1
    gram_BGTS *= g_BGTp @ h_BGSp.mT
    total_B = gram_BGTS.sum((1, 2, 3), dtype=accumulator(gram_BGTS.dtype))
    del gram_BGTS
    size_BG = matrix_size(a_BGTd, g_BGTp, bias) * matrix_size(b_BGSd, h_BGSp, bias)
    return total_B.add_(size_BG.sum(1), alpha=rounding_unit(g_BGTp))


@in_ieee
@widening
def embedding_inner(ids_BT: Tensor, g_BTd: Tensor, ids_BS: Tensor, h_BSd: Tensor) -> Tensor:
    """Inner product per example of two embedding gradients: pairs of positions with the same row.

    A negative index marks a position without gradient.

    Returns:
        Tensor (B,).
    """
    gram_BTS = g_BTd @ h_BSd.mT
    other_row = (ids_BT.unsqueeze(2) != ids_BS.unsqueeze(1)) | (ids_BT < 0).unsqueeze(2)
    gram_BTS.masked_fill_(other_row, 0)
    total_B = gram_BTS.sum((1, 2), dtype=accumulator(gram_BTS.dtype))
    torch.mul(_lengths(g_BTd).unsqueeze(2), _lengths(h_BSd).unsqueeze(1), out=gram_BTS)
    gram_BTS.masked_fill_(other_row, 0)
    return total_B.add_(gram_BTS.sum((1, 2)), alpha=rounding_unit(g_BTd))


@in_ieee
@widening
def embedding_matrix_inner(ids_BT: Tensor, g_BTd: Tensor, b_BSd: Tensor, h_BSV: Tensor) -> Tensor:
    """Inner product per example of an embedding gradient and the gradient h^T b of a tied output layer.

    Returns:
        Tensor (B,).
    """
    gram_BST = b_BSd @ g_BTd.mT
    picked_BST = h_BSV.gather(2, ids_BT.clamp(min=0).unsqueeze(1).expand(-1, h_BSV.shape[1], -1))
    picked_BST.masked_fill_((ids_BT < 0).unsqueeze(1), 0)
    gram_BST *= picked_BST
    total_B = gram_BST.sum((1, 2), dtype=accumulator(gram_BST.dtype))
    size_BST = picked_BST.abs_().mul_(_lengths(b_BSd).unsqueeze(2)).mul_(_lengths(g_BTd).unsqueeze(1))
    return total_B.add_(size_BST.sum((1, 2)), alpha=rounding_unit(g_BTd))


@widening
def instance_inner(one: Tensor, other: Tensor) -> Tensor:
    """Inner product per example of two per-example gradients (B, ...).

    Returns:
        Tensor (B,).
    """
    total_B = (one * other).unsqueeze(1).flatten(1).sum(1)
    return total_B.add_((instance_sqnorm(one) * instance_sqnorm(other)).sqrt(), alpha=rounding_unit(one))


def instance_sqnorm(instance: Tensor) -> Tensor:
    """Squared norm per example of a per-example gradient (B, ...), without a second copy of it.

    Returns:
        Tensor (B,).
    """
    flat = instance.unsqueeze(1).flatten(1)
    return torch.linalg.vector_norm(flat, dim=1, dtype=accumulator(flat.dtype)).square()


def matrix_size(a_BGTd: Tensor, g_BGTp: Tensor, bias: bool) -> Tensor:
    """S, the sum over positions of |a_t| |g_t|, (B, G); with ``bias`` the input has a further constant of one."""
    lengths_BGT = _lengths(a_BGTd)
    if bias:
        lengths_BGT = torch.hypot(lengths_BGT, torch.ones_like(lengths_BGT))
    return (lengths_BGT * _lengths(g_BGTp)).sum(2)


def _lengths(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=accumulator(x.dtype))


def rounding_unit(x: Tensor) -> float:
    """What an inner product of such numbers is enlarged by, per unit of size."""
    return ROUNDING * torch.finfo(accumulator(x.dtype)).eps


def _squares(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=dims, dtype=accumulator(tensor.dtype)).square()


# -- Clipped sums and per-example gradients: pure functions on tensors (shapes as in :mod:`norms`) -
#
# ``factor_B`` is the clipping factor of every example; where the engine does not look at numbers
# (:mod:`~groupsearch.engine.arithmetic`), one of zero says that an example adds nothing, whatever its numbers
# are. A factor is folded into the smaller
# operand, a few examples at a time, so that no second copy of a large operand is ever made.
# Half-precision operands are widened (:mod:`~groupsearch.engine.arithmetic`): sums and per-example
# gradients come in float32 or float64. Sums are of IEEE float32, as the norms that bound them; an instance is not,
# since its norm and its sum are both taken of the instance itself.


@widening
def matrix_instance(a_BGTd: Tensor, g_BGTp: Tensor) -> Tensor:
    """Per-example weight gradients g^T a, (B, G, p, d)."""
    return g_BGTp.mT @ a_BGTd


@in_ieee
def matrix_clipped_sum(a_BGTd: Tensor, g_BGTp: Tensor, factor_B: Tensor) -> Tensor:
    """Sum over examples of factor * g^T a, (G, p, d), as one matrix product per slice of examples."""
    scale_a = a_BGTd.shape[3] <= g_BGTp.shape[3]
    masks = not habits_of(g_BGTp).looks
    both = masks or is_half(a_BGTd, g_BGTp)
    copied = (a_BGTd, g_BGTp) if both else (a_BGTd if scale_a else g_BGTp,)
    total: Tensor | None = None
    for rows in example_slices(*copied):
        a, g = widened(a_BGTd[rows]), widened(g_BGTp[rows])
        factor = factor_B[rows].to(a.dtype)[:, None, None, None]
        scaled, other = (a * factor, g) if scale_a else (g * factor, a)
        if masks:  # 0 times infinity is not 0
            scaled, other = scaled.masked_fill_(factor == 0, 0), other.masked_fill(factor == 0, 0)
        a, g = (scaled, other) if scale_a else (other, scaled)
        if a.shape[1] == 1:
            left, right = g.flatten(0, 2).mT, a.flatten(0, 2)
            total = (left @ right).unsqueeze(0) if total is None else _addmm(total, left, right)
        else:
            part = torch.einsum("bgtp,bgtd->gpd", g, a)
            total = part if total is None else total.add_(part)
    assert total is not None
    return total


def embedding_clipped_sum(ids_BT: Tensor, g_BTd: Tensor, factor_B: Tensor, rows: int) -> Tensor:
    """Sum over examples of factor times the embedding gradient, (V, d) with V = ``rows``; indices < 0 count nothing."""
    masks = not habits_of(g_BTd).looks
    total = g_BTd.new_zeros(rows, g_BTd.shape[2], dtype=accumulator(g_BTd.dtype))
    for part in example_slices(g_BTd):
        scaled = g_BTd[part] * factor_B[part].to(total.dtype)[:, None, None]
        scaled.masked_fill_((ids_BT[part] < 0).unsqueeze(2), 0)
        if masks:
            scaled.masked_fill_((factor_B[part] == 0)[:, None, None], 0)
        total.index_add_(0, ids_BT[part].clamp(min=0).flatten(), scaled.flatten(0, 1))
    return total


@widening
def embedding_instance(ids_BT: Tensor, g_BTd: Tensor, rows: int) -> Tensor:
    """Per-example embedding gradients, (B, V, d)."""
    instance = g_BTd.new_zeros(g_BTd.shape[0], rows, g_BTd.shape[2])
    g_BTd = g_BTd.masked_fill((ids_BT < 0).unsqueeze(2), 0)
    return instance.scatter_add_(1, ids_BT.clamp(min=0).unsqueeze(2).expand(g_BTd.shape), g_BTd)


@in_ieee
def instance_clipped_sum(instance: Tensor, factor_B: Tensor) -> Tensor:
    """Sum over examples of factor times the per-example gradient (B, ...), of shape (...)."""
    flat = instance.unsqueeze(1).flatten(1)
    masks = not habits_of(flat).looks
    total: Tensor | None = None
    for rows in example_slices(flat) if masks or is_half(flat) else [slice(None)]:
        factor, part = factor_B[rows].to(accumulator(flat.dtype)), widened(flat[rows])
        if masks:
            part = part.masked_fill((factor == 0).unsqueeze(1), 0)
        total = factor @ part if total is None else total.add_(factor @ part)
    assert total is not None
    return total.view(instance.shape[1:])


def _addmm(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    total[0].addmm_(left, right)
    return total


# -- entries ---------------------------------------------------------------------------------------

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
        return matrix_sqnorm(*self.operands(self.a, self.g), bias=self.bias is not None)

    @in_ieee  # beside sums that are
    def instance(self, name: str) -> Tensor:
        return matrix_instances(self)[name]

    def clipped_sums(self, factor_B: Tensor) -> Mapping[str, Tensor]:
        a_BGTd, g_BGTp = self.operands(self.a, self.g)
        total_Gpd = matrix_clipped_sum(a_BGTd, g_BGTp, factor_B)
        sums = {self.weight: _as_weight(total_Gpd.flatten(0, 1), self.shape, self.transposed)}
        if self.bias is not None:
            sums[self.bias] = instance_clipped_sum(_bias_instances(g_BGTp), factor_B)
        return sums


def matrix_instances(entry: MatrixEntry) -> dict[str, Tensor]:
    """Per-example gradients of a matrix site's weight and bias, each (B, *shape)."""
    a_BGTd, g_BGTp = entry.operands(entry.a, entry.g)
    instance_BGpd = matrix_instance(a_BGTd, g_BGTp)
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
        return embedding_inner(self.ids_BT, self.g_BTd, self.ids_BT, self.g_BTd)

    def instance(self, name: str) -> Tensor:
        return embedding_instance(self.ids_BT, self.g_BTd, self.rows)

    def clipped_sums(self, factor_B: Tensor) -> Mapping[str, Tensor]:
        return {self.weight: embedding_clipped_sum(self.ids_BT, self.g_BTd, factor_B, self.rows)}


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
        return torch.stack([instance_sqnorm(instance) for instance in self.instances.values()]).sum(0)

    def instance(self, name: str) -> Tensor:
        return self.instances[name]

    def clipped_sums(self, factor_B: Tensor) -> Mapping[str, Tensor]:
        return {name: instance_clipped_sum(inst, factor_B) for name, inst in self.instances.items()}


def inner(one: Entry, other: Entry) -> Tensor:
    """Inner product per example of two sites' gradients over the parameters they share, at least one, (B,).

    Sites of one parameter in one group need it: the norm of a sum is not the sum of the
    """
    shared = [name for name in one.parameters if name in other.parameters]
    if isinstance(one, EmbeddingEntry) and isinstance(other, EmbeddingEntry):
        return embedding_inner(one.ids_BT, one.g_BTd, other.ids_BT, other.g_BTd)
    if isinstance(one, MatrixEntry) and isinstance(other, EmbeddingEntry):
        one, other = other, one
    if isinstance(one, EmbeddingEntry) and isinstance(other, MatrixEntry) and not other.transposed:
        b_BGTd, h_BGTp = other.operands(other.a, other.g)
        return embedding_matrix_inner(one.ids_BT, one.g_BTd, b_BGTd.squeeze(1), h_BGTp.squeeze(1))
    if isinstance(one, MatrixEntry) and isinstance(other, MatrixEntry) and _alike(one, other, shared):
        return matrix_inner(*one.operands(one.a, one.g), *other.operands(other.a, other.g), bias=one.bias in shared)
    one, other = (entry.alone(slice(None)) if hasattr(entry, "alone") else entry for entry in (one, other))  # run once
    return torch.stack([instance_inner(one.instance(name), other.instance(name)) for name in shared]).sum(0)


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


# -- Norms from per-example gradients that are not kept: a few examples at a time, formed again when sums are
#
# Costs two products B T d p where the ghost norm costs B T^2 (d + p) and one of them, and needs the
# space of one slice where that needs 2 B T^2 numbers; the book keeps what it keeps for the ghost norm.


@dataclass(frozen=True)
class RecomputeEntry(MatrixEntry):
    """A matrix site kept as its input and output gradient, its norm taken from instances that are dropped."""

    def sqnorm(self) -> Tensor:
        """Squared gradient norm per example, (B,)."""
        return sliced_sqnorm(*self.operands(self.a, self.g), bias=self.bias is not None)


def sliced_sqnorm(a_BGTd: Tensor, g_BGTp: Tensor, bias: bool) -> Tensor:
    """Squared norm per example of the weight gradient g^T a, and of the bias gradient with ``bias``, (B,).

    As many instances are alive at once as fit into a slice of the device, one at least. Rounded up as the
    ghost norm is: the clipped sum comes from another product, whose rounding is not that of the instance.
    """
    return torch.cat(
        [_sqnorm(widened(a_BGTd[rows]), widened(g_BGTp[rows]), bias) for rows in _instance_slices(a_BGTd, g_BGTp)]
    )


@in_ieee
def _sqnorm(a_BGTd: Tensor, g_BGTp: Tensor, bias: bool) -> Tensor:
    total_B = instance_sqnorm(matrix_instance(a_BGTd, g_BGTp))
    if bias:
        total_B += instance_sqnorm(g_BGTp.sum(2))
    size_BG = matrix_size(a_BGTd, g_BGTp, bias)
    return total_B.add_(size_BG.square().sum(1), alpha=rounding_unit(g_BGTp))


def _instance_slices(a_BGTd: Tensor, g_BGTp: Tensor) -> list[slice]:
    examples, groups = a_BGTd.shape[:2]
    example_bytes = groups * a_BGTd.shape[3] * g_BGTp.shape[3] * accumulator(g_BGTp.dtype).itemsize
    width = max(1, habits_of(g_BGTp).slice_bytes // max(1, example_bytes))
    return [slice(start, start + width) for start in range(0, examples, width)] or [slice(0, 0)]
