"""Which modules own trainable parameters, and what is refused about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from groupsearch.engine.layers import Layer, rule_for
from groupsearch.engine.layout import Layouts
from groupsearch.errors import OutsideUseError, UnsupportedModelError


def owned_layers(model: nn.Module, layouts: Layouts | None = None) -> tuple[Layer, ...]:
    """The modules of a model that own trainable parameters, with their rules.

    Args:
        model: the model.
        layouts: where layers keep the examples, and which are lent; a module with layout ``whole`` owns every
            parameter inside.

    Raises:
        UnsupportedModelError: for a layer that mixes examples or whose settings break its rule, for a
            parameter that is complex or has hooks, and when nothing is trainable.
    """
    layouts = layouts or Layouts()
    found = layouts.of
    _refuse_parameters(model)
    canonical = {id(p): name for name, p in model.named_parameters()}
    layers: list[Layer] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        refuse_mixing(name, module)
        if any(not outer or name.startswith(outer + ".") for outer in inside) or isinstance(module, _LISTS):
            continue
        whole = found.get(name) == "whole"
        owner = whole or isinstance(module, _OWNERS)
        held = module.named_parameters(remove_duplicate=False) if owner else _held(module)
        trainable = {local: canonical[id(p)] for local, p in held if p.requires_grad}
        if owner:
            inside.append(name)
        if trainable:
            rule = None if owner else rule_for(name, module, trainable)
            layers.append(Layer(name, module, trainable, rule, found.get(name, "first"), name in layouts.lent))
            if rule is None:
                _refuse_own_checkpoint(name, module, whole)
    if not layers:
        raise UnsupportedModelError(
            f"Found no trainable parameter in {type(model).__name__}. Set requires_grad on what is to be trained."
        )
    return tuple(layers)


def _held(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters, those in lists and dictionaries of it included: nobody calls these."""
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield prefix + name, parameter
    for name, child in module._modules.items():
        if isinstance(child, _LISTS):
            yield from _held(child, f"{prefix}{name}.")


def _refuse_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_complex():
            raise UnsupportedModelError(
                f"Parameter {name!r} holds complex numbers, whose clipping and noise are not defined here. Keep their "
                "real and imaginary parts as a real parameter of shape (..., 2) and use torch.view_as_complex of it, "
                "or freeze it with requires_grad_(False)."
            )
        if parameter.requires_grad and parameter._backward_hooks:
            raise UnsupportedModelError(
                f"Parameter {name!r} has a hook on its gradient (Tensor.register_hook), which gradients that are "
                "clipped example by example do not pass. Change them after the noise instead, before the optimizer's "
                "step, or freeze the parameter with requires_grad_(False)."
            )


def _refuse_own_checkpoint(name: str, module: nn.Module, whole: bool) -> None:
    """The hooks of transformers' checkpointed modules lie outside of the checkpoint: the engine sees one run of two."""
    inside = module.modules() if whole else [module]
    hidden = [m for m in inside if any(c.__name__ == "GradientCheckpointingLayer" for c in type(m).__mro__)]
    if any(m.training and getattr(m, "gradient_checkpointing", False) for m in hidden):
        raise UnsupportedModelError(
            f"Module {name!r} or a part of it runs again in backward (transformers' gradient checkpointing), where the "
            "parameters that it holds itself cannot be followed. Call model.gradient_checkpointing_disable(); where "
            "blocks only hold parameters of their own, groupsearch.workloads.blocks.checkpoint_blocks(model) works."
        )


_LISTS = (nn.ParameterList, nn.ParameterDict)
# reads the parameters of a module inside without calling it
_OWNERS = (nn.MultiheadAttention,)


def may_mix(module: nn.Module) -> bool:
    """Whether a module mixes the examples of a batch in some mode."""
    return isinstance(module, nn.modules.batchnorm._NormBase)


def refuse_mixing(name: str, module: nn.Module) -> None:
    """Raise for a layer that mixes the examples of a batch.

    Raises:
        UnsupportedModelError: for batch normalisation that uses batch statistics, and for
            instance normalisation that tracks running statistics.
    """
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    tracking = isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
    if (batch_norm and (module.training or not module.track_running_stats)) or (tracking and module.training):
        raise UnsupportedModelError(
            f"Module {name!r} is a {type(module).__name__}, which mixes the examples of a batch, so that no "
            "per-example gradient exists and clipping protects nobody. Replace it by nn.GroupNorm or nn.LayerNorm, "
            "or call .eval() on it and freeze its parameters."
        )


def refuse_gradient(layer: Layer, name: str, unless: Callable[[], bool] = lambda: False) -> RemovableHandle:
    """Raise, from now on, when autograd gives a layer's parameter a gradient; the handle ends it."""

    def refuse(parameter: Tensor) -> None:
        if unless():
            return
        parameter.grad = None
        raise OutsideUseError(
            f"Parameter {layer.trainable[name]!r} received a gradient of the whole batch: it is used outside the "
            f"forward of its layer {layer.name!r} where that is not followed (a penalty in the loss, a checkpoint with "
            "use_reentrant=True, or a use that the trace did not see). Call the layer itself, use its parameters in "
            "the model's forward on what leads with the batch, or freeze the parameter.",
            layer.name,
        )

    return layer.module.get_parameter(name).register_post_accumulate_grad_hook(refuse)
