"""The layers whose gradients have a form of their own, and how a call becomes a book entry.

A rule says which tensors of a call must be saved, and builds the entry from them and the
output gradient g. Layers without a rule are handled operation by operation
(:mod:`groupsearch.engine.bare_parameters`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from groupsearch.engine.arithmetic import accumulator, widened
from groupsearch.engine.entries import (
    Dimensions,
    EmbeddingEntry,
    Entry,
    InstanceEntry,
    MatrixEntry,
    Operands,
    RecomputeEntry,
    embedding_instance,
    matrix_instances,
)
from groupsearch.errors import UnsupportedModelError
from groupsearch.options import EngineOptions

# -- A convolution seen as a matrix layer: its input as patches (im2col) ---------------------------

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def unfold_input(module: Convolution, x: Tensor) -> Tensor:
    """Patches of a convolution's input, one row per output position.

    Args:
        module: an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with any stride, dilation,
            groups, padding ('same' and 'valid' included) and padding mode.
        x: input (B, C, ...).

    Returns:
        Tensor (B, G, T, d): G channel groups, T output positions, d = C / G * kernel size, in
        the order of the weight's trailing dimensions.
    """
    pads = list(module._reversed_padding_repeated_twice)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(pads):
        x = functional.pad(x, pads, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    dims = len(module.kernel_size)
    patches = x.unflatten(1, (module.groups, -1))  # (B, G, C/G, *positions, *kernel)
    order = [0, 1, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
    return patches.permute(order).flatten(2 + dims).flatten(2, 1 + dims)


# -- layers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A module that owns trainable parameters.

    Attributes:
        name: its qualified name.
        module: itself.
        trainable: canonical name of every trainable parameter it owns, by its own name for it.
        rule: how its gradients are formed; None where it is handled operation by operation.
        layout: where it keeps the examples of a batch, see :mod:`groupsearch.engine.layout`.
        lent: whether its parameters are used outside of its own forward, too.
    """

    name: str
    module: nn.Module
    trainable: Mapping[str, str]
    rule: Rule | None
    layout: str = "first"
    lent: bool = False

    @property
    def folded(self) -> bool:
        """Whether it sees several rows of every example, so that its tensors come as (B, k, ...)."""
        return self.layout == "folded"


@dataclass(frozen=True)
class Rule:
    """kind of the site; saved(layer, input) -> tensors; entry(layer, saved, g, options) -> Entry.

    ``entry`` is given its tensors with the examples first, (B, ...), or (B, k, ...) where they are folded.
    """

    kind: str
    saved: Callable[[Layer, Tensor], tuple[Tensor, ...]]
    entry: Callable[[Layer, tuple[Tensor, ...], Tensor, EngineOptions], Entry]
    check: Callable[[str, nn.Module], None] = lambda name, module: None


def rule_for(name: str, module: nn.Module, trainable: Collection[str] = ()) -> Rule | None:
    """The rule of a module, by its class or the class whose forward it inherits unchanged.

    None where it trains others than a weight and a bias: these are made of what it trains (the old weight_norm).

    Raises:
        UnsupportedModelError: when the class has a rule but this instance's settings break it.
    """
    for cls in type(module).__mro__:
        rule = _RULES.get(f"{cls.__module__}.{cls.__qualname__}")
        if rule is not None:
            unchanged = all(
                getattr(type(module), m, None) is getattr(cls, m, None) for m in ("forward", "_conv_forward")
            )
            if not unchanged or "forward" in vars(module) or not {"weight", "bias"}.issuperset(trainable):
                return None
            rule.check(name, module)
            return rule
    return None


def _saved_input(layer: Layer, x: Tensor) -> tuple[Tensor, ...]:
    return (x,) if "weight" in layer.trainable else ()  # a bias alone needs the output gradient only


def _channels_second(layer: Layer, x: Tensor) -> Tensor:
    """(B, C, ...), also where the layer sees images folded with their examples: (B, k, C, ...)."""
    return x.transpose(1, 2) if layer.folded else x


def _channel_sum(layer: Layer, x: Tensor) -> Tensor:
    x = _channels_second(layer, x)
    return x.flatten(2).sum(2, dtype=accumulator(x.dtype)) if x.dim() > 2 else x


def _no_weight(layer: Layer, g: Tensor, features_last: bool) -> Entry:
    # bias-only tuning: the weight is frozen, only the bias (B, p) is left
    bias_Bp = g.reshape(g.shape[0], -1, g.shape[-1]).sum(1) if features_last else _channel_sum(layer, g)
    dims = Dimensions(g[0].numel() // bias_Bp.shape[1], 0, bias_Bp.shape[1], "direct")
    return InstanceEntry({layer.trainable["bias"]: bias_Bp}, dims)


def _matrix(layer: Layer, a: Tensor, g: Tensor, operands: Operands, options: EngineOptions) -> Entry:
    weight = layer.module.get_parameter("weight")
    transposed = not isinstance(layer.module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)  # transformers' Conv1D
    names = layer.trainable["weight"], layer.trainable.get("bias")
    matrix = Matrix(*names, weight.shape, transposed, getattr(layer.module, "groups", 1))
    return matrix_entry(matrix, a, g, operands, options)


@dataclass(frozen=True)
class Matrix:
    """A weight used as a matrix, and its bias: canonical names, shape, and how it lies."""

    weight: str
    bias: str | None
    shape: torch.Size
    transposed: bool = False
    groups: int = 1


def matrix_entry(matrix: Matrix, a: Tensor, g: Tensor, operands: Operands, options: EngineOptions) -> Entry:
    """The entry of a matrix site from its input and output gradient, by the norm method of the options."""
    outputs = matrix.shape[1] if matrix.transposed else matrix.shape[0]
    positions, inputs = g[0].numel() // outputs if len(g) else 0, matrix.shape.numel() // outputs
    method = options.method_of(matrix.weight, positions, inputs, outputs // matrix.groups)
    dims = Dimensions(positions, inputs, outputs, method, matrix.groups)
    form = RecomputeEntry if method == "recompute" else MatrixEntry
    entry = form(matrix.weight, matrix.bias, matrix.shape, matrix.transposed, a, g, operands, dims)
    return InstanceEntry(matrix_instances(entry), dims) if method == "instantiate" else entry


def linear_operands(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Input (B, ..., d) and output gradient (B, ..., p) as (B, 1, T, d) and (B, 1, T, p)."""

    def canonical(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 1, -1, x.shape[-1])

    return canonical(a.to(g.dtype)), canonical(g)


def _linear(layer: Layer, saved: tuple[Tensor, ...], g: Tensor, options: EngineOptions) -> Entry:
    if "weight" not in layer.trainable:
        return _no_weight(layer, g, features_last=True)
    return _matrix(layer, saved[0], g, linear_operands, options)


def _convolution(layer: Layer, saved: tuple[Tensor, ...], g: Tensor, options: EngineOptions) -> Entry:
    if "weight" not in layer.trainable:
        return _no_weight(layer, g, features_last=False)
    module = layer.module
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)

    def operands(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        g_BGTp = _channels_second(layer, g).flatten(2).unflatten(1, (module.groups, -1)).mT
        if not layer.folded:
            return unfold_input(module, a.to(g.dtype)), g_BGTp
        a_BkGTd = unfold_input(module, a.to(g.dtype).flatten(0, 1)).unflatten(0, a.shape[:2])
        return a_BkGTd.transpose(1, 2).flatten(2, 3), g_BGTp

    return _matrix(layer, saved[0], g, operands, options)


def _embedding(layer: Layer, saved: tuple[Tensor, ...], g: Tensor, options: EngineOptions) -> Entry:
    module = layer.module
    assert isinstance(module, nn.Embedding)
    ids_BT = saved[0].reshape(g.shape[0], -1)
    g_BTd = g.reshape(g.shape[0], -1, g.shape[-1])
    if module.padding_idx is not None:  # a negative index marks a position without gradient
        ids_BT = ids_BT.masked_fill(ids_BT == module.padding_idx, -1)
    # the ghost norm unless that costs more space than the instances, whatever method is asked for elsewhere:
    # instances of a vocabulary never pay, and Gram matrices of a relative position table never do
    rows, name = module.num_embeddings, layer.trainable["weight"]
    ghost = 2 * ids_BT.shape[1] ** 2 <= rows * module.embedding_dim
    dims = Dimensions(ids_BT.shape[1], rows, module.embedding_dim, "ghost" if ghost else "instantiate")
    if ghost:
        return EmbeddingEntry(name, rows, ids_BT, g_BTd, dims)
    return InstanceEntry({name: embedding_instance(ids_BT, g_BTd, rows)}, dims)


def _normalised(
    sum_of: Callable[[Layer, Tensor], Tensor],
    normalise: Callable[..., Tensor],
    check: Callable[[str, nn.Module], None] = lambda name, module: None,
) -> Rule:
    """A rule for weight * normalise(x) + bias: both gradients are sums over positions."""

    def entry(layer: Layer, saved: tuple[Tensor, ...], g: Tensor, options: EngineOptions) -> Entry:
        instances = {}
        if "weight" in layer.trainable:
            x = widened(saved[0])
            scaled = normalise(layer.module, x.flatten(0, 1) if layer.folded else x)
            scaled = (scaled.unflatten(0, x.shape[:2]) if layer.folded else scaled).mul_(g)
            instances[layer.trainable["weight"]] = sum_of(layer, scaled)
        if "bias" in layer.trainable:
            instances[layer.trainable["bias"]] = sum_of(layer, g)
        features = next(iter(instances.values())).shape[1:].numel()
        positions = g[0].numel() // features if len(g) else 0
        return InstanceEntry(instances, Dimensions(positions, features, features, "direct"))

    return Rule("norm", _saved_input, entry, check)


def _sum_before_features(layer: Layer, x: Tensor) -> Tensor:
    shape: tuple[int, ...] = layer.module.normalized_shape  # type: ignore[assignment]
    return x.reshape(x.shape[0], -1, *shape).sum(1, dtype=accumulator(x.dtype))


def _check_embedding(name: str, module: nn.Module) -> None:
    assert isinstance(module, nn.Embedding)
    broken = [f for f in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(module, f) not in (None, False)]
    if broken:
        raise UnsupportedModelError(
            f"Embedding {name!r} was made with {', '.join(broken)}, which changes its gradient outside the sight of "
            "per-example clipping. Make it without these options."
        )


def _check_instance_norm(name: str, module: nn.Module) -> None:
    if getattr(module, "track_running_stats", False):
        raise UnsupportedModelError(
            f"Instance normalisation {name!r} tracks running statistics, which mixes the examples of all batches. Make "
            "it with track_running_stats=False."
        )


_LINEAR = Rule("linear", _saved_input, _linear)
_CONVOLUTION = Rule("conv", _saved_input, _convolution)
_RULES: dict[str, Rule] = {
    "torch.nn.modules.linear.Linear": _LINEAR,
    "transformers.pytorch_utils.Conv1D": _LINEAR,
    **{f"torch.nn.modules.conv.Conv{n}d": _CONVOLUTION for n in (1, 2, 3)},
    "torch.nn.modules.sparse.Embedding": Rule("embedding", _saved_input, _embedding, _check_embedding),
    "torch.nn.modules.normalization.LayerNorm": _normalised(
        _sum_before_features, lambda m, x: functional.layer_norm(x, m.normalized_shape, eps=m.eps)
    ),
    "torch.nn.modules.normalization.RMSNorm": _normalised(
        _sum_before_features, lambda m, x: functional.rms_norm(x, m.normalized_shape, eps=m.eps)
    ),
    "torch.nn.modules.normalization.GroupNorm": _normalised(
        _channel_sum, lambda m, x: functional.group_norm(x, m.num_groups, eps=m.eps)
    ),
    **dict.fromkeys(
        (f"torch.nn.modules.instancenorm.InstanceNorm{n}d" for n in (1, 2, 3)),
        _normalised(_channel_sum, lambda m, x: functional.instance_norm(x, eps=m.eps), _check_instance_norm),
    ),
}
