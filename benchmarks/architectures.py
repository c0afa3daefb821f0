"""The models that estimates are held against: scaled down to run in a second on one thread."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import whisper_encoder
from groupsearch.workloads import Workload, load_workload
from groupsearch.workloads.workload import seeded

_BERT = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
_TEXT = {"vocab_size": 500, "max_position_embeddings": 64}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 500, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "gpt-neox": {"model_type": "gpt_neox", **_TEXT, **_BERT},
    "llama": {"model_type": "llama", **_TEXT, "num_key_value_heads": 2, **_BERT},
    "bert": {"model_type": "bert", **_TEXT, **_BERT},
    "roberta": {"model_type": "roberta", "vocab_size": 500, "max_position_embeddings": 66, **_BERT},
    "distilbert": {"model_type": "distilbert", **_TEXT, "dim": 64, "n_layers": 4, "n_heads": 4, "hidden_dim": 256},
    "albert": {"model_type": "albert", **_TEXT, "embedding_size": 32, **_BERT},
    "vit": {"model_type": "vit", "image_size": 32, "patch_size": 4, **_BERT},
    "t5": {"model_type": "t5", "vocab_size": 500, "d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2}
    | {"num_heads": 4, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    "bart": {"model_type": "bart", **_TEXT, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2}
    | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
    | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2},
}
"""Architectures of transformers: tied heads (gpt2, t5, bart), parallel residuals (gpt-neox), one layer used
four times (albert), an encoder and a decoder (t5, bart)."""
_LAYERS = ("n_layer", "n_layers", "num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers")
BUILT_IN = {"digits-vit": 128, "digits-cnn": 128, "stdlib-gpt": 16}
"""The built-in workloads and a batch size for each."""
CONVOLUTIONS = ("digits-cnn", "resnet", "inception")


class _Residual(nn.Module):
    """Two 3x3 convolutions with group norms beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.GroupNorm(4, width), nn.GroupNorm(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.second(F.relu(self.norm1(self.first(x))))))


class _Branches(nn.Module):
    """Three branches of unequal depth side by side, two of which end in one and the same layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(width, width, 1)
        self.wide = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.wider = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, width, 5, padding=2))
        self.shared = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.narrow(x) + self.shared(self.wide(x)) + self.shared(self.wider(x)))


def _network(block: type[nn.Module], blocks: int) -> nn.Module:
    stages = [block(32) for _ in range(blocks)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Sequential(*stages), *head)


def _image_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["image"]), batch["label"], reduction="none")


def _convolutional(name: str, block: type[nn.Module], blocks: int) -> Workload:
    def make_batch(size: int) -> dict[str, Tensor]:
        pixels = torch.randn(size, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        return {"image": pixels, "label": torch.arange(size) % 10}

    return Workload(name, seeded(lambda: _network(block, blocks)), make_batch, _image_loss, batch_size=16)


_BLOCKS: dict[str, type[nn.Module]] = {"resnet": _Residual, "inception": _Branches}
WHISPER = "whisper"
"""The encoder of Whisper: two convolutions over frames, then attention."""
ARCHITECTURES = (*BUILT_IN, *_BLOCKS, *CONFIGURATIONS, WHISPER)
WITHOUT_BLOCKS = ("digits-cnn", "albert")
"""Those that cannot be checkpointed: one has no repeated blocks, the other has one that it repeats."""


def small_workload(name: str, folder: Path, blocks: int | None = None, **settings: Any) -> Workload:
    """One of ``ARCHITECTURES``; where transformers builds it, its ``config.json`` is written below ``folder``.

    Args:
        name: of the architecture.
        folder: an existing one.
        blocks: how many blocks to have, where it has any; by default as many as it says.
        settings: further settings of the workload.
    """
    if name in _BLOCKS:
        return _convolutional(name, _BLOCKS[name], blocks or 3)
    if name in BUILT_IN:
        chosen = {"blocks": blocks} if blocks and name != "digits-cnn" else {}
        return load_workload(name, batch_size=BUILT_IN[name], **chosen, **settings)
    if name == WHISPER:
        return whisper_encoder(name, batch_size=8, width=64, blocks=blocks or 4, heads=4, frames=96)
    configuration = dict(CONFIGURATIONS[name])
    if blocks is not None:
        configuration |= {key: blocks for key in _LAYERS if key in configuration}
    place = folder / f"{name}-{blocks or 'all'}"
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text(json.dumps(configuration))
    length = {} if name == "vit" else {"sequence_length": 48}
    return load_workload(f"hf:{place}", batch_size=8, **length, **settings)
