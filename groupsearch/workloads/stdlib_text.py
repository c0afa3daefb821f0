"""stdlib-gpt: a small byte-level GPT on the source of Python's own standard library.

Shapes: B examples, T positions, W width.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
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
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
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


class Block(nn.Module):
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
