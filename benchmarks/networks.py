"""Networks of the evidence that are neither built in nor a configuration alone: factories of workloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupsearch.workloads import Workload
from groupsearch.workloads.workload import seeded

_NORM_GROUPS = 32


def resnet50_groupnorm(batch_size: int = 32, image_size: int = 224) -> Workload:
    """ResNet-50 on (B, 3, H, W) images and 1,000 classes, every batch norm a group norm of 32 groups."""
    from transformers import ResNetConfig, ResNetForImageClassification

    def make() -> nn.Module:
        model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                model.set_submodule(name, nn.GroupNorm(_NORM_GROUPS, module.num_features))
        return model

    return _classifier("resnet50-groupnorm", make, "pixel_values", (3, image_size, image_size), batch_size, 1000)


def whisper_small_encoder(batch_size: int = 8) -> Workload:
    """The encoder of Whisper small under a classifier of 35 words, on (B, 80, 3000) spectrograms of 30 seconds."""
    return whisper_encoder("whisper-small-encoder", batch_size, width=768, blocks=12, heads=12, frames=3000)


def whisper_encoder(name: str, batch_size: int, width: int, blocks: int, heads: int, frames: int) -> Workload:
    """An encoder as Whisper has, under a classifier of 35 words, on (B, 80, frames) spectrograms."""
    from transformers import WhisperConfig, WhisperForAudioClassification

    config = WhisperConfig(
        d_model=width,
        encoder_layers=blocks,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        max_source_positions=frames // 2,
        num_labels=35,
        attn_implementation="sdpa",
    )

    def make() -> nn.Module:
        return WhisperForAudioClassification(config)

    return _classifier(name, make, "input_features", (80, frames), batch_size, 35)


def mlp(batch_size: int = 8, layers: int = 1000, width: int = 64) -> Workload:
    """A chain of linear layers of one width with a ReLU after each, and a head of ten classes."""

    def make() -> nn.Module:
        hidden = [part for _ in range(layers - 1) for part in (nn.Linear(width, width), nn.ReLU())]
        return _Chain(nn.Sequential(*hidden, nn.Linear(width, 10)))

    return _classifier("mlp", make, "x", (width,), batch_size, 10)


class _Chain(nn.Module):
    """Calls its layers with a keyword, as the networks of transformers are called."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


def _classifier(
    name: str, make: Callable[[], nn.Module], key: str, shape: tuple[int, ...], batch_size: int, labels: int
) -> Workload:
    def build() -> nn.Module:
        return make().train()

    def make_batch(size: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        return {
            key: torch.randn(size, *shape, generator=draw, device="cpu"),
            "label": torch.randint(labels, (size,), generator=draw, device="cpu"),
        }

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        out = model(**{key: batch[key]})
        return F.cross_entropy(getattr(out, "logits", out), batch["label"], reduction="none")

    return Workload(name, seeded(build), make_batch, loss, batch_size=batch_size, settings={"batch_size": batch_size})
