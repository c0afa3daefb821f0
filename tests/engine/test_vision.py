"""Models of timm and torchvision, where they are installed and load beside this torch: exact like all others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from tests.engine.test_parity import check_case
from tests.support.case import Case

try:
    import timm
    import torchvision
except (ImportError, RuntimeError) as error:  # a wheel of torchvision for another torch raises the latter
    pytest.skip(f"timm or torchvision does not load: {error}", allow_module_level=True)


def _group_norm(channels: int, **_: object) -> nn.Module:
    return nn.GroupNorm(4, channels)


SMALL = {"img_size": 32, "num_classes": 3}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm vit": lambda: timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=2, **SMALL),
    "timm beit": lambda: timm.create_model("beit_base_patch16_224", embed_dim=24, depth=2, num_heads=2, **SMALL),
    "timm swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        window_size=4,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(2, 2),
        drop_path_rate=0.0,
        **SMALL,
    ),
    "timm convnext": lambda: timm.create_model(
        "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 12, 16), num_classes=3
    ),
    "timm resnet": lambda: timm.create_model("resnet10t", norm_layer=_group_norm, num_classes=3),
    "timm resnetv2": lambda: timm.create_model(
        "resnetv2_50",
        layers=(1, 1, 1, 1),
        channels=(16, 32, 32, 32),
        stem_chs=8,
        num_classes=3,
        norm_layer=partial(timm.layers.GroupNormAct, num_groups=4),
    ),
    "torchvision resnet": lambda: torchvision.models.resnet18(norm_layer=_group_norm, num_classes=3),
    "torchvision vit": lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 24, 48, num_classes=3),
    "torchvision swin": lambda: torchvision.models.SwinTransformer(
        [4, 4], 12, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=3
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_clipped_sums_equal_the_reference(name: str) -> None:
    check_case(Case(name, MODELS[name], (3, 32, 32)), torch.float64, "abadi")
