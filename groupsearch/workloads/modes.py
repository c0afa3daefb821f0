"""The mode that a model is traced and trained in, and what is said of it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

_SHOWN = 3


def in_training_mode(model: nn.Module) -> nn.Module:
    """The model in training mode, as a trainer puts it there: ``from_pretrained`` leaves models in evaluation mode.

    A model that is in training mode stays as it is, with the parts that were put into evaluation mode. So do parts that
    their own ``train`` keeps there, and BatchNorm that is frozen.
    """
    if not model.training:
        frozen = [m for m in model.modules() if isinstance(m, _BatchNorm) and not _is_trained(m)]
        model.train()
        for module in frozen:
            module.eval()
    return model


def described(model: nn.Module) -> str:
    """Mode and dropout in words.

    >>> described(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.BatchNorm1d(2).eval()))
    'training mode, but for 2; dropout up to 0.1'
    """
    kept = [name for name, module in model.named_modules() if name and not module.training]
    inner = [name for name in kept if name.rpartition(".")[0] not in kept]
    shown = ", ".join(inner[:_SHOWN]) + (f" and {len(inner) - _SHOWN} more" if len(inner) > _SHOWN else "")
    mode = "evaluation mode" if not model.training else f"training mode{f', but for {shown}' if inner else ''}"
    active = [m for m in model.modules() if m.training]
    shares = [m.p for m in active if isinstance(m, _DropoutNd)]
    shares += [v for m in active for key, v in vars(m).items() if "drop" in key and isinstance(v, float)]
    largest = max(shares, default=0.0)
    return f"{mode}; {f'dropout up to {largest:g}' if largest else 'no dropout'}"


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
