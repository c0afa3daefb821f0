"""What the engine can make private: a plain model, and an optimizer that holds what the plan covers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from groupsearch.clipping import ClipPlan
from groupsearch.errors import UnsupportedModelError

_WRAPPERS = {
    "DataParallel": "its replicas would each be clipped as a whole. Give the engine the module inside (`model.module`)",
    "DistributedDataParallel": "its processes would each add noise and never meet. Give the engine the module inside "
    "(`model.module`) and train in one process",
    "FullyShardedDataParallel": "no process sees a whole gradient. Give the engine the unwrapped module",
    "FSDPModule": "no process sees a whole gradient. Give the engine the module before fully_shard",
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
