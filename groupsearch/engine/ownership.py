"""Which modules own trainable parameters, and what is refused about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from groupsearch.engine.layers import Layer, rule_for
from groupsearch.engine.layout import Layouts
from groupsearch.errors import OutsideUseError, UnsupportedModelError
from groupsearch.plan.clipping import ClipPlan


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


# -- What the engine can make private: a plain model, and an optimizer that holds what the plan covers

_SHARDED = (
    "no process has whole parameters, and the norm of an example's gradient in what one has is too small. Train data "
    "parallel: sums are added up over the processes group by group, and activation checkpointing saves the memory "
    "of activations"
)
_WRAPPERS = {
    "DataParallel": "its replicas would each be clipped as a whole. Give the engine the module inside (`model.module`)",
    "DistributedDataParallel": "only a model as a whole can be. Wrap the model, or give the engine the module without",
    "FullyShardedDataParallel": f"{_SHARDED}. Give every process the unwrapped module",
    "FSDPModule": f"{_SHARDED}. Give every process the module without fully_shard",
    "OptimizedModule": "the engine needs the module itself. Give make_private the module that was compiled "
    "(`model._orig_mod`), and call torch.compile afterwards",
}
_OPTIMIZERS = {
    "LBFGS": "evaluates a closure several times a step, each of which would be a release of its own",
    "SparseAdam": "takes sparse gradients only, and noise is never sparse",
}


def check_plain(model: nn.Module) -> None:
    """Check that neither the model nor a part of it is wrapped for another way of running it.

    Raises:
        UnsupportedModelError: naming the wrapped module, the wrapper and the remedy.
    """
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__module__.startswith("torch.") and cls.__name__ in _WRAPPERS:
                raise UnsupportedModelError(
                    f"Module {name or 'given'!r} is wrapped in {cls.__name__}: {_WRAPPERS[cls.__name__]}."
                )


def check_optimizer_kind(optimizer: Optimizer) -> None:
    """Check that the optimizer takes one dense gradient per step and tells the engine when it steps.

    Raises:
        UnsupportedModelError: naming its class and the remedy.
    """
    kind = type(optimizer)
    for cls in kind.__mro__:
        if cls.__module__.startswith("torch.optim") and cls.__name__ in _OPTIMIZERS:
            raise UnsupportedModelError(
                f"The optimizer is a {cls.__name__}, which {_OPTIMIZERS[cls.__name__]}. Take one that steps on a "
                "gradient it is given, such as SGD or Adam."
            )
    if not getattr(getattr(kind, "step", None), "hooked", False):
        raise UnsupportedModelError(
            f"The optimizer is a {kind.__module__}.{kind.__name__}, which runs no step hooks: the engine would never "
            "be asked for noise. Give the torch.optim.Optimizer that it wraps, or call super().__init__ in its "
            "constructor."
        )


def check_covered(model: nn.Module, plan: ClipPlan, optimizer: Optimizer) -> None:
    """Check that what the model trains, what the plan covers and what the optimizer holds are the same parameters.

    Raises:
        UnsupportedModelError: naming those that are not in all three.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _check_plan(trainable, plan)
    _check_optimizer(trainable, optimizer)


def _check_plan(trainable: Mapping[str, Tensor], plan: ClipPlan) -> None:
    covered = {name for site in plan.grouping.sites for name in site.parameters}
    missing, unknown = sorted(trainable.keys() - covered), sorted(covered - trainable.keys())
    if missing:
        raise UnsupportedModelError(
            f"Trainable parameters without a site in the plan: {', '.join(missing)}. They took no part in the traced "
            "step. Freeze them with requires_grad_(False), or trace the model as it is trained. To unfreeze in the "
            "middle of training, detach the engine and make the model private again with a plan of a new trace."
        )
    if unknown:
        raise UnsupportedModelError(
            f"The plan covers parameters that this model does not train: {', '.join(unknown)}. Trace this model, with "
            "the same parameters frozen, and make the plan from that trace. To freeze in the middle of training, "
            "detach the engine and make the model private again with that plan."
        )


def _check_optimizer(trainable: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    asking = {id(p) for p in held if p.requires_grad}
    names = {id(p): name for name, p in trainable.items()}
    if missing := sorted(name for i, name in names.items() if i not in asking):
        raise UnsupportedModelError(
            f"Trainable parameters that the optimizer does not hold: {', '.join(missing)}. Give them to the optimizer, "
            "or freeze them with requires_grad_(False)."
        )
    if foreign := len(asking - names.keys()):
        raise UnsupportedModelError(
            f"The optimizer holds {foreign} trainable parameters that are not the model's: they would be updated "
            "without privacy. Give it model.parameters() only."
        )
    if stale := sum(p.grad is not None for p in held if not p.requires_grad):
        raise UnsupportedModelError(
            f"The optimizer holds {stale} frozen parameters with a gradient from before, which it would apply in "
            "every step without privacy. Set their .grad to None."
        )
