"""What the transformers models are asked to do: made-up batches and losses per example.

Shapes: B examples, T positions, V vocabulary. ``model`` is a transformers model whose output has
``logits``; its own ``loss`` is a mean over the batch and is never asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupsearch.workloads.workload import Batch, PerExample

_IGNORED = -100


@dataclass(frozen=True)
class Task:
    """One kind of head.

    Attributes:
        summary: what it learns, in words.
        auto_class: the class of transformers that builds it from a configuration.
        make_batch: ``make_batch(config, settings, B)``, a mapping of CPU tensors.
        loss: one loss per example.
        text: whether ``sequence_length`` means something.
        labelled: whether ``num_labels`` means something.
    """

    summary: str
    auto_class: str
    make_batch: Callable[[Any, Mapping[str, Any], int], Batch]
    loss: PerExample
    text: bool
    labelled: bool


def _causal_batch(config: Any, settings: Mapping[str, Any], batch_size: int) -> Batch:
    return {"input_ids": _ids(config, settings, batch_size, seed=0)}


def _causal_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the T - 1 predicted positions, (B,)."""
    ids = batch["input_ids"]
    # The last position predicts nothing; ignoring it there spares a copy of the logits without it.
    targets = F.pad(ids[:, 1:], (0, 1), value=_IGNORED)
    return _token_losses(model(input_ids=ids).logits, targets).sum(1) / (ids.shape[1] - 1)


def _seq2seq_batch(config: Any, settings: Mapping[str, Any], batch_size: int) -> Batch:
    labels = _ids(config, settings, batch_size, seed=1)
    start = config.decoder_start_token_id
    start = config.pad_token_id if start is None else start
    return {
        "input_ids": _ids(config, settings, batch_size, seed=0),
        "decoder_input_ids": F.pad(labels[:, :-1], (1, 0), value=start),
        "labels": labels,
    }


def _seq2seq_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the T target positions, (B,)."""
    output = model(input_ids=batch["input_ids"], decoder_input_ids=batch["decoder_input_ids"])
    return _token_losses(output.logits, batch["labels"]).mean(1)


def _sequence_batch(config: Any, settings: Mapping[str, Any], batch_size: int) -> Batch:
    return {"input_ids": _ids(config, settings, batch_size, seed=0), "labels": _labels(config, batch_size)}


def _sequence_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(input_ids=batch["input_ids"]).logits.float(), batch["labels"], reduction="none")


def _image_batch(config: Any, settings: Mapping[str, Any], batch_size: int) -> Batch:
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = torch.randn(batch_size, config.num_channels, height, width, generator=_generator(0), device="cpu")
    return {"pixel_values": pixels.to(getattr(torch, settings["dtype"])), "labels": _labels(config, batch_size)}


def _image_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits.float(), batch["labels"], reduction="none")


TASKS = {
    "causal-lm": Task("next-token prediction", "AutoModelForCausalLM", _causal_batch, _causal_loss, True, False),
    "seq2seq-lm": Task("sequence to sequence", "AutoModelForSeq2SeqLM", _seq2seq_batch, _seq2seq_loss, True, False),
    "sequence-classification": Task(
        "sequence classification", "AutoModelForSequenceClassification", _sequence_batch, _sequence_loss, True, True
    ),
    "image-classification": Task(
        "image classification", "AutoModelForImageClassification", _image_batch, _image_loss, False, True
    ),
}


def _token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of every position, (B, T); 0 where the target is ignored."""
    losses = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none", ignore_index=_IGNORED
    )
    return losses.view(targets_BT.shape)


def _ids(config: Any, settings: Mapping[str, Any], batch_size: int, seed: int) -> Tensor:
    """Token ids (B, T) that stay clear of the low ids, where padding and other marks lie."""
    shape = (batch_size, settings["sequence_length"])
    lowest = config.vocab_size // 10
    return torch.randint(lowest, config.vocab_size, shape, generator=_generator(seed), device="cpu")


def _labels(config: Any, batch_size: int) -> Tensor:
    return torch.randint(config.num_labels, (batch_size,), generator=_generator(2), device="cpu")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)
