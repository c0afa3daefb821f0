"""The workloads there are, and the one function that finds any of them by its text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from groupsearch.errors import GroupSearchError
from groupsearch.workloads.embedded import CNN_SETTINGS, GPT_SETTINGS, VIT_SETTINGS, digits_cnn, digits_vit, stdlib_gpt
from groupsearch.workloads.factory import is_factory, load_factory
from groupsearch.workloads.hub import HUB_PREFIX, HUB_SETTINGS, known_architectures, load_hub
from groupsearch.workloads.settings import read_settings
from groupsearch.workloads.tasks import TASKS
from groupsearch.workloads.workload import Workload


@dataclass(frozen=True)
class WorkloadInfo:
    """One line of ``groupsearch models``.

    Attributes:
        name: the text to pass as MODEL.
        summary: what it is, in one line.
        task: what it learns and how that is judged.
        has_data: whether it can be trained and searched, not only profiled.
        settings: names and defaults of its settings; None as default: left to the architecture.
    """

    name: str
    summary: str
    task: str
    has_data: bool
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class _BuiltIn:
    make: Callable[[str, Mapping[str, Any]], Workload]
    info: WorkloadInfo


_BUILT_IN = {
    built_in.info.name: built_in
    for built_in in (
        _BuiltIn(
            digits_vit,
            WorkloadInfo(
                "digits-vit",
                "small vision transformer on scikit-learn's 8x8 digits",
                "image classification, accuracy",
                True,
                VIT_SETTINGS,
            ),
        ),
        _BuiltIn(
            digits_cnn,
            WorkloadInfo(
                "digits-cnn",
                "convolutions and GroupNorm on scikit-learn's 8x8 digits",
                "image classification, accuracy",
                True,
                CNN_SETTINGS,
            ),
        ),
        _BuiltIn(
            stdlib_gpt,
            WorkloadInfo(
                "stdlib-gpt",
                "byte-level GPT on the source of Python's standard library",
                "language modelling, next-byte accuracy",
                True,
                GPT_SETTINGS,
            ),
        ),
    )
}


def list_workloads() -> tuple[WorkloadInfo, ...]:
    """Every workload that can be named without a file: the built-in ones, then the ``hf:`` ones.

    >>> [info.name for info in list_workloads() if info.has_data]
    ['digits-vit', 'digits-cnn', 'stdlib-gpt']
    """
    hub = tuple(
        WorkloadInfo(HUB_PREFIX + name, architecture.summary, TASKS[architecture.task].summary, False, HUB_SETTINGS)
        for name, architecture in known_architectures().items()
    )
    return tuple(built_in.info for built_in in _BUILT_IN.values()) + hub


def load_workload(text: str, **settings: Any) -> Workload:
    """The workload that a text names.

    Args:
        text: ``digits-vit``, ``digits-cnn``, ``stdlib-gpt``; ``hf:NAME`` for a transformers model
            with random weights, ``hf:FOLDER`` for a saved one; ``path/to/file.py:factory`` or
            ``package.module:factory`` for a function that returns a :class:`Workload` or ``(model, batch, loss)``.
        **settings: settings of that workload, as values or as the text of the command line.

    Returns:
        The workload; its model is not built yet, except by a factory that returns one.

    Raises:
        GroupSearchError: for a name or setting that is not known, and for a factory that fails.

    >>> load_workload("digits-vit", width="16").settings["width"]
    16
    """
    if text in _BUILT_IN:
        built_in = _BUILT_IN[text]
        return built_in.make(text, read_settings(text, settings, built_in.info.settings))
    if text.startswith(HUB_PREFIX):
        return load_hub(text, settings)
    if is_factory(text):
        return load_factory(text, settings)
    names = [info.name for info in list_workloads()]
    close = get_close_matches(text, names, n=3) or get_close_matches(HUB_PREFIX + text, names, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise GroupSearchError(
        f"Found no workload named {text!r}.{hint} Run `groupsearch models` for those that are built in; a "
        "transformers model is hf:NAME, a model of your own is path/to/file.py:factory or package.module:factory."
    )
