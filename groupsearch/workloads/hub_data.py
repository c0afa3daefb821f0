"""What a transformers model is trained on and judged by, when it is given a data set of a local folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from groupsearch.errors import GroupSearchError
from groupsearch.workloads.batches import first_examples
from groupsearch.workloads.columns import ImageReader, Reader, TextReader, load_tokenizer
from groupsearch.workloads.local_data import DataRequest, read_data, training_defaults
from groupsearch.workloads.settings import require_choice
from groupsearch.workloads.tasks import Task, image_shape
from groupsearch.workloads.workload import Batch, Data, Workload

DATA_SETTINGS = ("processor", "validation", "metric")
_METRICS = ("accuracy", "negative-loss")


def hub_data(text: str, settings: Mapping[str, Any], config: Any, task: Task, saved: str) -> Data:
    """The data of the folder ``settings["data"]``, as tensors that the model takes.

    Args:
        text: the workload, for errors.
        settings: ``data``, and maybe ``processor`` (folder of the tokenizer or image processor),
            ``validation`` (share of the rows to judge by) and ``metric`` (accuracy or negative-loss).
        config: the model's configuration; gets the padding token where it has none and needs one.
        task: what the model is asked to do.
        saved: folder where the tokenizer or image processor is when no other is given.

    Raises:
        GroupSearchError: for a setting without sense, for a task that needs columns of its own, and see
            :func:`groupsearch.workloads.local_data.read_data`.
    """
    require_choice(text, "metric", settings.get("metric", _METRICS[0]), _METRICS)
    share = settings.get("validation")
    if share is not None and not (isinstance(share, (int, float)) and 0 < share < 1):
        raise GroupSearchError(f"Expected validation of {text} to be a share between 0 and 1, found {share!r}.")
    labels = int(settings["num_labels"]) if task.labelled else 0
    request = DataRequest(text, settings["data"], share, labels)
    return read_data(request, _reader(text, settings, config, task, settings.get("processor", saved)))


def with_data(workload: Workload, data: Data, task: Task) -> Workload:
    """The workload with data to train on, whose batches are those data, and with what judges it."""
    metric = workload.settings.get("metric", "accuracy" if task.labelled else "negative-loss")

    def negative_loss(model: nn.Module, batch: Batch) -> Tensor:
        return -task.loss(model, batch)

    return replace(
        workload,
        make_batch=lambda batch_size: first_examples(data.train, batch_size),
        metric=task.accuracy if metric == "accuracy" else negative_loss,
        metric_name=task.accuracy_name if metric == "accuracy" else "negative loss",
        metric_is_share=metric == "accuracy",
        data=data,
        training=training_defaults(data.train_size),
        settings={**workload.settings, "metric": metric},
    )


def _reader(text: str, settings: Mapping[str, Any], config: Any, task: Task, processor: str) -> Reader:
    if not task.text:
        return ImageReader(text, image_shape(config), settings["dtype"], processor)
    if task.auto_class == "AutoModelForSeq2SeqLM":
        raise GroupSearchError(
            f"Found data={settings['data']} for {text}, which maps sequences to sequences: which columns are which is "
            "not known. Write a factory that returns a Workload with data, and name it as path/to/file.py:factory."
        )
    padding = _padding(text, config, processor)
    if padding is None and task.labelled:
        raise GroupSearchError(
            f"Expected a padding token for {text}, found none in its configuration nor in a tokenizer in {processor}. "
            "Set pad_token_id in config.json, or tokenizer.pad_token (to tokenizer.eos_token, say), and save it again."
        )
    if task.labelled:
        config.pad_token_id = padding
    # Where tokens are predicted, padding comes after all that counts, and any token will do.
    return TextReader(text, settings["sequence_length"], config.vocab_size, processor, padding or 0)


def _padding(text: str, config: Any, processor: str) -> int | None:
    if getattr(config, "pad_token_id", None) is not None:
        return int(config.pad_token_id)
    try:
        found = load_tokenizer(text, processor).pad_token_id
    except GroupSearchError:  # tokens may be in the data already, and then none is needed
        return None
    return None if found is None else int(found)
