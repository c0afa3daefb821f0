"""Command lines: the one that made a document, and the next one with the lines for a loop of one's own.

Apart from the kinds, which it knows nothing of: options and boundaries are all that it writes down.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from groupsearch.documents.codec import Part
from groupsearch.units import format_number

Options = Mapping[str, tuple[str, ...]]
"""Options of the command line and the texts that each was given; none for one that is a flag."""

STEP = (
    *("batch-size", "setting", "dtype", "device", "checkpoint", "optimizer", "norm-method"),
    *("micro-batches", "autocast"),
)
TRAINING = (
    *STEP,
    *("epsilon", "delta", "steps", "learning-rate", "sampling-rate", "rule", "max-grad-norm", "watch", "allow-state"),
)


@dataclass(frozen=True, kw_only=True)
class Next(Part):
    """What to do with what was found.

    Attributes:
        command: to paste into a terminal; None where there is none, as for a model that has no name.
        python: lines for a loop of one's own, or that load the weights; none where there are none.
        note: what else one should know before the command is run; empty where nothing.
    """

    command: str | None
    python: tuple[str, ...]
    note: str = ""


def command_line(command: str, subject: str, asked: Options) -> str:
    """A command as it is typed.

    >>> command_line("train", "digits-vit", {"grouping": ("3,9",), "secure": (), "setting": ("width=16", "blocks=2")})
    'groupsearch train digits-vit --grouping 3,9 --secure --setting width=16 --setting blocks=2'
    """
    words = ["groupsearch", command, subject]
    for name, texts in asked.items():
        words += [f"--{name}"] if not texts else [word for text in texts for word in (f"--{name}", text)]
    return shlex.join(words)


def only(asked: Options, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Those of the options that have one of the names."""
    wanted = set(names)
    return {name: texts for name, texts in asked.items() if name in wanted}


def own_loop(
    boundaries: tuple[int, ...], noise_multiplier: float | None, expected_batch_size: float, **plan: object
) -> tuple[str, ...]:
    """The two lines that make a loop private with a grouping, after their imports.

    Args:
        boundaries: of the grouping.
        noise_multiplier: None where nobody has said how much privacy there is to be.
        expected_batch_size: in examples.
        plan: what else the plan is made with.
    """
    cuts = f"({boundaries[0]},)" if len(boundaries) == 1 else str(tuple(boundaries))
    told = "".join(f", {name}={value!r}" for name, value in plan.items())
    noise = "noise_multiplier_for(epsilon, delta, sampling_rate, steps)"
    noise = noise if noise_multiplier is None else repr(noise_multiplier)
    names = [*("ClipPlan", "Grouping", "make_private"), *(["noise_multiplier_for"] if noise_multiplier is None else [])]
    return (
        f"from groupsearch import {', '.join((*names, 'trace_model'))}",
        f"plan = ClipPlan(Grouping.from_boundaries(trace_model(model, batch, loss), {cuts}){told})",
        f"make_private(model, optimizer, plan, noise_multiplier={noise}, "
        f"expected_batch_size={format_number(expected_batch_size, 9)})",
    )
