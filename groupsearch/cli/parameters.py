"""Types of values and the options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from groupsearch.errors import GroupSearchError
from groupsearch.options import NORM_METHODS, checkpoint_interval
from groupsearch.plan.clipping import RULES
from groupsearch.plan.joint import JOINT
from groupsearch.units import parse_bytes

# of engine.optimizers and tracer.step, without loading torch for --help
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
OPTIMIZER_VARIANTS = ("loop", "foreach", "fused")
AUTOCASTS = ("none", "bfloat16", "float16")
F = TypeVar("F", bound=Callable[..., Any])


class Positive(click.ParamType[float]):
    """A finite number above zero."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number of the text."""
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            self.fail(f"Expected a number above zero, found {value!r}.", param, ctx)
        return number


class Size(click.ParamType[int]):
    """Bytes, as in 12GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of the text."""
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(value)
        except GroupSearchError as error:
            self.fail(str(error), param, ctx)


class Share(click.ParamType[float]):
    """A fraction, as in 2% or 0.02."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The fraction of the text."""
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            share = float(text.rstrip("%").strip()) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < float("inf"):
            self.fail(f"Expected a share such as 2% or 0.02, found {text!r}.", param, ctx)
        return share


class Checkpointing(click.ParamType[str]):
    """Which blocks are checkpointed, as in every:2."""

    name = "none|blocks|every:K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, once it makes sense."""
        try:
            checkpoint_interval(value)
        except GroupSearchError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class KeyValue(click.ParamType[tuple[str, str]]):
    """A setting, as in width=64."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Key and text of the value."""
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not (equals and key.strip().isidentifier()):
            self.fail(f"Expected key=value, such as width=64, found {value!r}.", param, ctx)
        return key.strip(), text


def model_options(command: F) -> F:
    """What a step depends on: settings of the workload, batch, device, checkpointing, optimizer, norms."""
    for option in reversed(
        (
            click.option(
                "--batch-size", type=click.IntRange(min=1), help="Physical batch size. [default: the model's]"
            ),
            click.option("--setting", type=KeyValue(), multiple=True, help="A setting of the workload; repeatable."),
            click.option(
                "--dtype", help="Same as --setting dtype=..., for the models that have it: bfloat16, float32."
            ),
            click.option(
                "--device",
                default="cpu",
                help="Where to run: cpu, cuda, cuda:1. profile and fit also estimate for a card that is not there: "
                "cuda:h100, cuda:a100, cuda:l4, cuda:rtx4090, ...",
            ),
            click.option(
                "--checkpoint",
                type=Checkpointing(),
                default="none",
                help="Activation checkpointing: none, of all repeated blocks, or of one block in K.",
            ),
            click.option(
                "--optimizer",
                type=click.Choice([*OPTIMIZERS, *(f"{o}:{v}" for o in OPTIMIZERS for v in OPTIMIZER_VARIANTS)]),
                metavar=f"[{'|'.join(OPTIMIZERS)}][:{'|:'.join(OPTIMIZER_VARIANTS)}]",
                help="The optimizer, and how its step is taken where torch is not to choose. "
                "[default: the model's, else adam]",
            ),
            click.option(
                "--norm-method",
                type=click.Choice([*NORM_METHODS, JOINT]),
                default="mixed",
                help="How per-example norms are taken; joint, in profile alone, chooses per weight with the grouping.",
            ),
        )
    ):
        command = option(command)
    return command


def step_options(command: F) -> F:
    """What else the memory of a step depends on."""
    for option in reversed(
        (
            click.option(
                "--micro-batches",
                type=click.IntRange(min=1),
                help="Batches accumulated before the optimizer's step. [default: 1; in training as many as the "
                "sampling rate and the batch size make it]",
            ),
            click.option(
                "--autocast", type=click.Choice(AUTOCASTS), default="none", help="What forward and loss are cast to."
            ),
        )
    ):
        command = option(command)
    return command


def training_options(command: F) -> F:
    """How a model is trained with privacy; what is not given is the model's own."""
    for option in reversed(
        (
            click.option("--epsilon", type=Positive(), help="Privacy budget of one training run."),
            click.option("--delta", type=Positive(), help="The other half of the budget."),
            click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps."),
            click.option("--learning-rate", type=Positive(), help="Constant over the steps."),
            click.option("--sampling-rate", type=Positive(), help="Probability of each example to be in a batch."),
            click.option("--rule", type=click.Choice(RULES), help="Clip rule."),
            click.option(
                "--max-grad-norm", type=Positive(), help="Norm that the groups' thresholds are allotted from."
            ),
            click.option(
                "--watch",
                type=click.FloatRange(0, 1),
                help="Part of the batches of which one example is taken alone and compared. [default: 0.01]",
            ),
            click.option(
                "--allow-state",
                multiple=True,
                metavar="NAME",
                help="A buffer or attribute that a forward pass may leave data in, without noise; can be repeated.",
            ),
        )
    ):
        command = option(command)
    return command


def output_options(command: F) -> F:
    """Where the document goes."""
    for option in reversed(
        (
            click.option(
                "-o",
                "--output",
                type=click.Path(),
                help="Where to write the document. [default: named after the model]",
            ),
            click.option("--force", is_flag=True, help="Overwrite what is there."),
            json_option,
        )
    ):
        command = option(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Write the document to standard output only.")
private_seed_option = click.option(
    "--seed",
    type=click.IntRange(min=0),
    help="Make it an experiment that can be repeated: noise and batches come from this seed, and epsilon holds for "
    "nobody who knows it. [default: none; the operating system's entropy]",
)
secure_option = click.option(
    "--secure", is_flag=True, help="Draw noise and batches from a cipher (AES-256 in counter mode)."
)
seed_option = click.option("--seed", type=int, default=0, help="Seed of everything that is random.")
fail_over_option = click.option(
    "--fail-over", type=Share(), help="Exit 1 where a check is further off its estimate, either way, as in 1%."
)
no_seed_option = click.option(
    "--seed", type=int, expose_value=False, help="Taken by every command; nothing here is random."
)
