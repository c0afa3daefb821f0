"""digits-vit and digits-cnn: two small classifiers of scikit-learn's 8x8 handwritten digits.

Shapes: B examples, T tokens, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupsearch.workloads.batches import first_examples
from groupsearch.workloads.settings import require_multiple
from groupsearch.workloads.workload import Batch, Data, TrainingDefaults, Workload, seeded

VIT_SETTINGS = {"batch_size": 288, "width": 32, "blocks": 4, "heads": 4}
CNN_SETTINGS = {"batch_size": 288, "width": 16}
_PATCH = 2
_CLASSES = 10
_NORM_GROUPS = 4


class Embeddings(nn.Module):
    """Image (B, 1, 8, 8) to tokens (B, 17, W): 2x2 patches behind a class token, plus positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(_PATCH * _PATCH, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + (8 // _PATCH) ** 2, width) * 0.02)

    def forward(self, image: Tensor) -> Tensor:
        """Tokens of every image."""
        patches = F.unfold(image, kernel_size=_PATCH, stride=_PATCH).transpose(1, 2)
        tokens = self.projection(patches)
        return torch.cat([self.class_token.expand(len(image), -1, -1), tokens], dim=1) + self.positions


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, W) to (B, T, W), whose output starts at zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = _zero_linear(width, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        """Every token attends to every token of its image."""
        batch, tokens, width = x_BTW.shape
        qkv = self.qkv(x_BTW).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Pre-norm transformer block that starts as the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), _zero_linear(4 * width, width))

    def forward(self, x_BTW: Tensor) -> Tensor:
        """Attention, then the two-layer perceptron, each added to its input."""
        x_BTW = x_BTW + self.attention(self.norm1(x_BTW))
        return x_BTW + self.mlp(self.norm2(x_BTW))


class DigitsViT(nn.Module):
    """Vision transformer (arXiv 2010.11929) for 8x8 images, with a head that keeps positions.

    With mean pooling and ordinary initialisation it stays near chance on 1,437 images; residual
    branches that start at zero (arXiv 1901.09321) and a head over all tokens learn in seconds.
    """

    def __init__(self, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width * (1 + (8 // _PATCH) ** 2), _CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 1, 8, 8)."""
        x_BTW = self.embeddings(image)
        for block in self.blocks:
            x_BTW = block(x_BTW)
        return self.head(self.norm(x_BTW).flatten(1))


class DigitsCNN(nn.Module):
    """Four convolutions (one strided, one depthwise) with GroupNorm, then a linear head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GroupNorm(_NORM_GROUPS, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.Conv2d(width, 2 * width, 1),
            nn.GroupNorm(_NORM_GROUPS, 2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(_NORM_GROUPS, 2 * width),
            nn.ReLU(),
        )
        self.head = nn.Linear(2 * width * 4 * 4, _CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 1, 8, 8)."""
        return self.head(self.features(image).flatten(1))


def digits_vit(name: str, settings: Mapping[str, Any]) -> Workload:
    """The ``digits-vit`` workload; settings as in ``VIT_SETTINGS``."""
    require_multiple(name, settings, "width", of="heads")
    width, blocks, heads = settings["width"], settings["blocks"], settings["heads"]
    training = TrainingDefaults(steps=50, learning_rate=8e-3)
    return _classifier(name, lambda: DigitsViT(width, blocks, heads), settings, training)


def digits_cnn(name: str, settings: Mapping[str, Any]) -> Workload:
    """The ``digits-cnn`` workload; settings as in ``CNN_SETTINGS``."""
    require_multiple(name, settings, "width", of=_NORM_GROUPS)
    training = TrainingDefaults(steps=50, learning_rate=8e-3, rule="auto-s")
    return _classifier(name, lambda: DigitsCNN(settings["width"]), settings, training)


@cache
def digits_data() -> Data:
    """scikit-learn's 1,797 digits: 1,437 to train on, 360 to validate, stratified, always the same split.

    ``image`` is (N, 1, 8, 8) float32 in [-1, 1], ``label`` is (N,) int64.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(digits.images, digits.target, test_size=360, stratify=digits.target, random_state=0)
    train_images, validation_images, train_labels, validation_labels = parts

    def tensors(images: Any, labels: Any) -> Batch:
        image = torch.as_tensor(images, dtype=torch.float32, device="cpu").unsqueeze(1) / 8 - 1
        return {"image": image, "label": torch.as_tensor(labels, dtype=torch.int64, device="cpu")}

    return Data(tensors(train_images, train_labels), tensors(validation_images, validation_labels))


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each example, shape (B,)."""
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def classification_metric(model: nn.Module, batch: Batch) -> Tensor:
    """1.0 where the largest logit is the label, else 0.0, shape (B,)."""
    return (model(batch["image"]).argmax(-1) == batch["label"]).float()


def _classifier(
    name: str, make: Callable[[], nn.Module], settings: Mapping[str, Any], training: TrainingDefaults
) -> Workload:
    data = digits_data()
    return Workload(
        name=name,
        build=seeded(make),
        make_batch=lambda batch_size: first_examples(data.train, batch_size),
        loss=classification_loss,
        metric=classification_metric,
        metric_is_share=True,
        data=data,
        batch_size=settings["batch_size"],
        training=training,
        settings=dict(settings),
    )


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
