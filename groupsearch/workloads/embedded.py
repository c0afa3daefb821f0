"""The workloads of the package: small networks on scikit-learn's digits, and a decoder on Python's own source.

Apart from the catalogue, which loads it only when one of these names is asked for.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupsearch.errors import GroupSearchError
from groupsearch.workloads.batches import first_examples
from groupsearch.workloads.settings import require_multiple
from groupsearch.workloads.workload import Batch, Data, TrainingDefaults, Workload, seeded

# -- digits-vit and digits-cnn: two small classifiers of scikit-learn's 8x8 handwritten digits -----
#
# Shapes: B examples, T tokens, W width.

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


class ImageBlock(nn.Module):
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
        self.blocks = nn.ModuleList(ImageBlock(width, heads) for _ in range(blocks))
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


# -- stdlib-gpt: a small byte-level GPT on the source of Python's own standard library -------------
#
# Shapes: B examples, T positions, W width.

GPT_SETTINGS = {"batch_size": 16, "width": 128, "blocks": 4, "heads": 4, "context": 128}
TRAIN_MODULES = (
    "abc argparse ast base64 bisect calendar cmd codecs codeop configparser contextlib copy csv dataclasses "
    "datetime difflib dis doctest enum filecmp fileinput fnmatch fractions ftplib functools getopt getpass gettext "
    "glob graphlib gzip hashlib heapq hmac inspect io ipaddress keyword linecache locale mailbox mimetypes "
    "netrc ntpath numbers opcode operator optparse os"
)
VALIDATION_MODULES = "statistics string stringprep struct subprocess symtable tabnanny tarfile tempfile textwrap"
_BYTES = 256
_VALIDATION_EXAMPLES = 512


class StdlibGPT(nn.Module):
    """Decoder-only transformer over bytes: ids (B, T) to logits (B, T, 256)."""

    def __init__(self, width: int, blocks: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(_BYTES, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _BYTES, bias=False)
        for embedding in (self.bytes, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits of the next byte at every position."""
        # One row of positions for the whole batch, broadcast in the sum, as the GPTs of transformers do it.
        positions = torch.arange(ids_BT.shape[1], device=ids_BT.device).unsqueeze(0)
        x_BTW = self.bytes(ids_BT) + self.positions(positions)
        for block in self.blocks:
            x_BTW = block(x_BTW)
        return self.head(self.norm(x_BTW))


class TextBlock(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BTW: Tensor) -> Tensor:
        """Attention to earlier positions, then the two-layer perceptron, each added to its input."""
        x_BTW = x_BTW + self._attention(self.norm1(x_BTW))
        return x_BTW + self.mlp(self.norm2(x_BTW))

    def _attention(self, x_BTW: Tensor) -> Tensor:
        batch, positions, width = x_BTW.shape

        def split(projected: Tensor) -> Tensor:
            return projected.view(batch, positions, self.heads, width // self.heads).transpose(1, 2)

        query, key, value = split(self.query(x_BTW)), split(self.key(x_BTW)), split(self.value(x_BTW))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(batch, positions, width))


def stdlib_gpt(name: str, settings: Mapping[str, Any]) -> Workload:
    """The ``stdlib-gpt`` workload; settings as in ``GPT_SETTINGS``."""
    require_multiple(name, settings, "width", of="heads")
    width, blocks, heads, context = (settings[key] for key in ("width", "blocks", "heads", "context"))
    data = stdlib_data(context)
    return Workload(
        name=name,
        build=seeded(lambda: StdlibGPT(width, blocks, heads, context)),
        make_batch=lambda batch_size: first_examples(data.train, batch_size),
        loss=next_byte_loss,
        metric=next_byte_accuracy,
        metric_name="next-byte accuracy",
        metric_is_share=True,
        data=data,
        batch_size=settings["batch_size"],
        training=TrainingDefaults(steps=100, learning_rate=4e-3, sampling_rate=0.005, rule="auto-s"),
        settings=dict(settings),
    )


@cache
def stdlib_data(context: int) -> Data:
    """Windows of ``context`` + 1 bytes of the running Python's own modules, split by module.

    ``tokens`` is (N, context + 1) int64. The modules are fixed; their text is that of the running
    Python, so numbers are the same for the same Python version.

    Raises:
        GroupSearchError: when the standard library has no source files here.
    """
    train = _windows(_source(TRAIN_MODULES), context + 1)
    validation = _windows(_source(VALIDATION_MODULES), context + 1)
    spread = torch.linspace(0, len(validation) - 1, min(_VALIDATION_EXAMPLES, len(validation)), device="cpu")
    return Data({"tokens": train}, {"tokens": validation[spread.long()]})


def next_byte_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over positions of the cross-entropy of the next byte in nats, shape (B,)."""
    tokens = batch["tokens"]
    logits = model(tokens[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(1)


def next_byte_accuracy(model: nn.Module, batch: Batch) -> Tensor:
    """Fraction of positions where the likeliest byte is the next one, shape (B,)."""
    tokens = batch["tokens"]
    return (model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]).float().mean(1)


def _source(modules: str) -> bytes:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{module}.py" for module in modules.split()]
    source = b"".join(path.read_bytes() for path in files if path.is_file())
    if not source:
        raise GroupSearchError(
            f"stdlib-gpt trains on the source of Python's standard library, but {folder} holds none of "
            f"{modules[:12]}... Use a Python that comes with its source, or another workload."
        )
    return source


def _windows(source: bytes, length: int) -> Tensor:
    """Consecutive windows (N, length) int64; the remainder is left out."""
    count = len(source) // length
    return torch.tensor(list(source[: count * length]), dtype=torch.int64, device="cpu").view(count, length)
