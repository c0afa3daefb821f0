"""The layers whose gradients have a form of their own, and how a call becomes a book entry.

A rule says which tensors of a call must be saved, and builds the entry from them and the
output gradient g. Layers without a rule are handled operation by operation
(:mod:`groupsearch.engine.meeting`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from groupsearch.engine.entries import (
    Dimensions,
    EmbeddingEntry,
    Entry,
    InstanceEntry,
    MatrixEntry,
    Operands,
    matrix_instances,
)
from groupsearch.engine.grads import embedding_instance
from groupsearch.engine.unfold import unfold_input
from groupsearch.errors import UnsupportedModelError
from groupsearch.options import EngineOptions


@dataclass(frozen=True)
class Layer:
    """A module that owns trainable parameters.

    Attributes:
        name: its qualified name.
        module: itself.
        trainable: canonical name of every trainable parameter it owns, by its own name for it.
        rule: how its gradients are formed; None where it is handled operation by operation.
    """

    name: str
    module: nn.Module
    trainable: Mapping[str, str]
    rule: Rule | None


@dataclass(frozen=True)
class Rule:
    """kind of the site; saved(layer, input) -> tensors; entry(layer, saved, g, options) -> Entry."""

    kind: str
    saved: Callable[[Layer, Tensor], tuple[Tensor, ...]]
    entry: Callable[[Layer, tuple[Tensor, ...], Tensor, EngineOptions], Entry]
    check: Callable[[str, nn.Module], None] = lambda name, module: None


def rule_for(name: str, module: nn.Module) -> Rule | None:
    """The rule of a module, by its class or the class whose forward it inherits unchanged.

    Raises:
        UnsupportedModelError: when the class has a rule but this instance's settings break it.
    """
    for cls in type(module).__mro__:
        rule = _RULES.get(f"{cls.__module__}.{cls.__qualname__}")
        if rule is not None:
            unchanged = all(
                getattr(type(module), m, None) is getattr(cls, m, None) for m in ("forward", "_conv_forward")
            )
            if not unchanged or "forward" in vars(module):
                return None
            rule.check(name, module)
            return rule
    return None


def _saved_input(layer: Layer, x: Tensor) -> tuple[Tensor, ...]:
    return (x,) if "weight" in layer.trainable else ()  # a bias alone needs the output gradient only


def _no_weight(layer: Layer, g: Tensor, features_last: bool) -> Entry:
    # bias-only tuning: the weight is frozen, only the bias (B, p) is left
    bias_Bp = g.reshape(g.shape[0], -1, g.shape[-1]).sum(1) if features_last else g.flatten(2).sum(2)
    dims = Dimensions(g[0].numel() // bias_Bp.shape[1], 0, bias_Bp.shape[1], "direct")
    return InstanceEntry({layer.trainable["bias"]: bias_Bp}, dims)


def _matrix(layer: Layer, a: Tensor, g: Tensor, operands: Operands, options: EngineOptions) -> Entry:
    weight = layer.module.get_parameter("weight")
    transposed = not isinstance(layer.module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)  # transformers' Conv1D
    outputs = weight.shape[1] if transposed else weight.shape[0]
    positions, inputs = g[0].numel() // outputs, weight.numel() // outputs
    ghost = options.use_ghost(positions, inputs, outputs // getattr(layer.module, "groups", 1))
    entry = MatrixEntry(
        layer.trainable["weight"],
        layer.trainable.get("bias"),
        weight.shape,
        transposed,
        a,
        g,
        operands,
        Dimensions(positions, inputs, outputs, "ghost" if ghost else "instantiate"),
    )
    return entry if ghost else InstanceEntry(matrix_instances(entry), entry.dimensions)


def _linear_operands(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    def canonical(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 1, -1, x.shape[-1])

    return canonical(a.to(g.dtype)), canonical(g)


def _linear(layer: Layer, saved: tuple[Tensor, ...], g: Tensor, options: EngineOptions) -> Entry:
    if "weight" not in layer.trainable:
        return _no_weight(layer, g, features_last=True)
    return _matrix(layer, saved[0], g, _linear_operands, options)


def _convolution(layer: Layer, saved: tuple[Tensor, ...], g: Tensor, options: EngineOptions) -> Entry:
    if "weight" not in layer.trainable:
        return _no_weight(layer, g, features_last=False)
    module = layer.module
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)

    def operands(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return unfold_input(module, a.to(g.dtype)), g.flatten(2).unflatten(1, (module.groups, -1)).mT

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
    kind_of_sum: Callable[[nn.Module, Tensor], Tensor],
    normalise: Callable[..., Tensor],
    check: Callable[[str, nn.Module], None] = lambda name, module: None,
) -> Rule:
    """A rule for weight * normalise(x) + bias: both gradients are sums over positions."""

    def entry(layer: Layer, saved: tuple[Tensor, ...], g: Tensor, options: EngineOptions) -> Entry:
        instances = {}
        if "weight" in layer.trainable:
            scaled = normalise(layer.module, saved[0]).mul_(g)
            instances[layer.trainable["weight"]] = kind_of_sum(layer.module, scaled)
        if "bias" in layer.trainable:
            instances[layer.trainable["bias"]] = kind_of_sum(layer.module, g)
        features = next(iter(instances.values()))[0].numel()
        return InstanceEntry(instances, Dimensions(g[0].numel() // features, features, features, "direct"))

    return Rule("norm", _saved_input, entry, check)


def _sum_before_features(module: nn.Module, x: Tensor) -> Tensor:
    shape: tuple[int, ...] = module.normalized_shape  # type: ignore[assignment]
    return x.reshape(x.shape[0], -1, *shape).sum(1)


def _sum_after_channels(module: nn.Module, x: Tensor) -> Tensor:
    return x.flatten(2).sum(2) if x.dim() > 2 else x


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
        _sum_after_channels, lambda m, x: functional.group_norm(x, m.num_groups, eps=m.eps)
    ),
    **dict.fromkeys(
        (f"torch.nn.modules.instancenorm.InstanceNorm{n}d" for n in (1, 2, 3)),
        _normalised(_sum_after_channels, lambda m, x: functional.instance_norm(x, eps=m.eps), _check_instance_norm),
    ),
}
