"""What the transformers models are asked to do: made-up batches and losses per example.

Shapes: B examples, T positions, V vocabulary. ``model`` is a transformers model whose output has
``logits``; its own ``loss`` is a mean over the batch and is never asked for.

A text batch may have ``attention_mask`` (B, T), 1 for tokens and 0 for the padding that follows them; targets that do
not count are -100.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groupsearch.errors import UnsupportedModelError
from groupsearch.workloads.settings import require_choice
from groupsearch.workloads.workload import Batch, PerExample

IGNORED = -100


@dataclass(frozen=True)
class Task:
    """One kind of head.

    Attributes:
        summary: what it learns, in words.
        auto_class: the class of transformers that builds it from a configuration.
        make_batch: ``make_batch(config, settings, B)``, a mapping of CPU tensors.
        loss: one loss per example.
        accuracy: one score per example, from 0 to 1.
        accuracy_name: what its mean is called.
        text: whether ``sequence_length`` means something.
        labelled: whether ``num_labels`` means something.
    """

    summary: str
    auto_class: str
    make_batch: Callable[[Any, Mapping[str, Any], int], Batch]
    loss: PerExample
    accuracy: PerExample
    accuracy_name: str
    text: bool
    labelled: bool


def _causal_batch(config: Any, settings: Mapping[str, Any], batch_size: int) -> Batch:
    return {"input_ids": _ids(config, settings, batch_size, seed=0)}


def _causal_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the positions that predict a token, (B,); 0 for an example of a single token."""
    targets = _next_tokens(batch)
    return token_losses(_causal_logits(model, batch), targets).sum(1) / _predicted(batch)


def _causal_accuracy(model: nn.Module, batch: Batch) -> Tensor:
    """Share of those positions where the likeliest token is the next one, (B,)."""
    targets = _next_tokens(batch)
    return (_causal_logits(model, batch).argmax(-1) == targets).sum(1) / _predicted(batch)


def _causal_logits(model: nn.Module, batch: Batch) -> Tensor:
    # Positions look back only and padding comes last, so no token sees it: a mask would only cost memory.
    logits: Tensor = model(input_ids=batch["input_ids"]).logits
    own = batch["input_ids"].shape[1]
    return logits if logits.shape[1] == own else logits[:, -own:]  # tokens of an adapter come first


def _next_tokens(batch: Batch) -> Tensor:
    """The token after each position (B, T), ignored where there is none."""
    ids = batch["input_ids"]
    if "attention_mask" in batch:
        ids = ids.masked_fill(batch["attention_mask"] == 0, IGNORED)
    # The last position predicts nothing; ignoring it there spares a copy of the logits without it.
    return F.pad(ids[:, 1:], (0, 1), value=IGNORED)


def _predicted(batch: Batch) -> Tensor | int:
    """How many tokens of each example are predicted, (B,), at least 1."""
    if "attention_mask" in batch:
        return (batch["attention_mask"].sum(1) - 1).clamp(min=1)
    return int(batch["input_ids"].shape[1]) - 1


def _seq2seq_batch(config: Any, settings: Mapping[str, Any], batch_size: int) -> Batch:
    labels = _ids(config, settings, batch_size, seed=1)
    inputs = {"input_ids": _ids(config, settings, batch_size, seed=0)}
    return {**inputs, **targets(labels, config.pad_token_id or 0, decoder_start(config))}


def decoder_start(config: Any) -> int:
    """The token that the decoder of a sequence-to-sequence model begins with."""
    start = config.decoder_start_token_id
    return int(config.pad_token_id or 0) if start is None else int(start)


def targets(labels_BT: Tensor, padding: int, start: int) -> Batch:
    """Labels, and what the decoder is given to predict them: each position's label one further on."""
    ids = F.pad(labels_BT[:, :-1], (1, 0), value=start)
    return {"decoder_input_ids": ids.masked_fill(ids == IGNORED, padding), "labels": labels_BT}


def _seq2seq_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the target positions that count, (B,)."""
    return token_losses(_seq2seq_logits(model, batch), batch["labels"]).sum(1) / _counted(batch)


def _seq2seq_accuracy(model: nn.Module, batch: Batch) -> Tensor:
    """Share of those positions where the likeliest token is the target, (B,)."""
    return (_seq2seq_logits(model, batch).argmax(-1) == batch["labels"]).sum(1) / _counted(batch)


def _seq2seq_logits(model: nn.Module, batch: Batch) -> Tensor:
    # The encoder looks both ways; the decoder back only, and its padding comes last.
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids") if name in batch}
    logits: Tensor = model(**inputs).logits
    return logits


def _counted(batch: Batch) -> Tensor:
    return (batch["labels"] != IGNORED).sum(1).clamp(min=1)


def _sequence_batch(config: Any, settings: Mapping[str, Any], batch_size: int) -> Batch:
    return {"input_ids": _ids(config, settings, batch_size, seed=0), "labels": _labels(config, batch_size)}


def _sequence_logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    return logits.float()


def _sequence_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(_sequence_logits(model, batch), batch["labels"], reduction="none")


def _sequence_accuracy(model: nn.Module, batch: Batch) -> Tensor:
    return (_sequence_logits(model, batch).argmax(-1) == batch["labels"]).float()


def image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model takes."""
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return config.num_channels, height, width


def _image_batch(config: Any, settings: Mapping[str, Any], batch_size: int) -> Batch:
    pixels = torch.randn(batch_size, *image_shape(config), generator=_generator(0), device="cpu")
    return {"pixel_values": pixels.to(getattr(torch, settings["dtype"])), "labels": _labels(config, batch_size)}


def _image_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits.float(), batch["labels"], reduction="none")


def _image_accuracy(model: nn.Module, batch: Batch) -> Tensor:
    return (model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).float()


_CAUSAL = ("next-token prediction", "AutoModelForCausalLM", _causal_batch, _causal_loss, _causal_accuracy)
_SEQ2SEQ = ("sequence to sequence", "AutoModelForSeq2SeqLM", _seq2seq_batch, _seq2seq_loss, _seq2seq_accuracy)
_SEQUENCE = ("sequence classification", "AutoModelForSequenceClassification", _sequence_batch, _sequence_loss)
_IMAGE = ("image classification", "AutoModelForImageClassification", _image_batch, _image_loss, _image_accuracy)

TASKS = {
    "causal-lm": Task(*_CAUSAL, "next-token accuracy", text=True, labelled=False),
    "seq2seq-lm": Task(*_SEQ2SEQ, "token accuracy", text=True, labelled=False),
    "sequence-classification": Task(*_SEQUENCE, _sequence_accuracy, "accuracy", text=True, labelled=True),
    "image-classification": Task(*_IMAGE, "accuracy", text=False, labelled=True),
}


def choose_task(text: str, config: Any, asked: str | None = None) -> str:
    """The task of a model: what is asked for, else what its head was saved for, else what its type is for.

    Decoders predict tokens unless they were saved as classifiers; only they have a choice.

    Raises:
        GroupSearchError: when the model has no head for the task asked for.
        UnsupportedModelError: when it has none for any.
    """
    from transformers.models.auto import modeling_auto as auto

    possible = [_default_task(text, config)]
    if possible == ["causal-lm"] and config.model_type in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        possible.append("sequence-classification")
    if asked is not None:
        require_choice(text, "task", asked, tuple(possible))
        return asked
    saved_as = (config.architectures or [""])[0]
    return possible[-1 if saved_as.endswith("ForSequenceClassification") else 0]


def _default_task(text: str, config: Any) -> str:
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    if kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES and config.is_encoder_decoder:
        return "seq2seq-lm"
    if kind in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "image-classification"
    if kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and kind in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return "sequence-classification"
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "causal-lm"
    heads = "; ".join(task.summary for task in TASKS.values())
    raise UnsupportedModelError(
        f"{text} is of type {kind!r}, for which there is none of these heads: {heads}. Write a factory that returns "
        "(model, batch, loss) and name it as path/to/file.py:factory."
    )


def token_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of every position, (B, T); 0 where the target is ignored."""
    losses = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none", ignore_index=IGNORED
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
