"""Writes small models as Python text, ingredient by ingredient: what the fuzzer runs.

A trunk ``z`` goes through the ingredients. It is a vector (B, 4), a sequence (B, 3, 4) or a picture (B, 4, 3, 3).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

RIGHT, EITHER, MIXED = "right", "either", "mixed"
ORDER = (RIGHT, EITHER, MIXED)
WIDTH, LENGTH, SIDE, CLASSES = 4, 3, 3, 3


@dataclass
class Writer:
    """The text of a program as far as it is written.

    Attributes:
        draw: the ingredient's own random numbers.
        kind: of the trunk: vec, seq or img.
        top: lines of the module: classes, constants.
        init: lines of the model's ``__init__``.
        forward: lines of its ``forward``, of z.
        after: lines that run once the model is private, of ``model``.
        before: lines of the loss that may change ``x`` before the model sees it.
        terms: lines of the loss that change ``value``, the losses (B,).
    """

    draw: random.Random
    kind: str
    top: list[str] = field(default_factory=list)
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    terms: list[str] = field(default_factory=list)
    names: int = 0

    def name(self, stem: str = "l") -> str:
        """A name that is not taken."""
        self.names += 1
        return f"{stem}{self.names}"

    def pick(self, *options: str) -> str:
        """One of them."""
        return self.draw.choice(options)

    def member(self, expression: str, stem: str = "l") -> str:
        """A member of the model, made by an expression: its name."""
        name = self.name(stem)
        self.init.append(f"self.{name} = {expression}")
        return name

    def add(self, *lines: str) -> None:
        """Lines of forward."""
        self.forward.extend(lines)

    def linear(self, width: int = WIDTH, inputs: int = WIDTH) -> str:
        """A new linear layer: its name."""
        bias = self.pick("", "", ", bias=False")
        return self.member(f"nn.Linear({inputs}, {width}{bias})")

    def norm(self) -> str:
        """A norm over features for what z is: its name."""
        if self.kind == "img":
            return self.member(self.pick("nn.GroupNorm(2, 4)", "nn.GroupNorm(1, 4)"), "n")
        return self.member(self.pick("nn.LayerNorm(4)", "nn.LayerNorm(4)", "nn.RMSNorm(4)"), "n")

    def layer(self, plain: bool = False) -> tuple[str, str]:
        """A new layer that keeps the shape of z: its name and the expression that applies it to z.

        Args:
            plain: only modules whose output is the tensor itself.
        """
        options: dict[str, tuple[str, str]] = {}
        if self.kind == "img":
            options = {
                "nn.Conv2d(4, 4, 3, padding=1)": ("c", "self.{}(z)"),
                "nn.Conv2d(4, 4, 1)": ("c", "self.{}(z)"),
                "nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)": ("c", "self.{}(z)"),
                "nn.GroupNorm(2, 4)": ("n", "self.{}(z)"),
            }
        else:
            options = {
                "nn.Linear(4, 4)": ("l", "self.{}(z)"),
                "nn.Linear(4, 4, bias=False)": ("l", "self.{}(z)"),
                "nn.LayerNorm(4)": ("n", "self.{}(z)"),
                "nn.RMSNorm(4)": ("n", "self.{}(z)"),
            }
        if self.kind == "seq" and not plain:
            options |= {
                "nn.Conv1d(4, 4, 3, padding=1)": ("c", "self.{}(z.mT).mT"),
                "nn.GRU(4, 4, batch_first=True)": ("r", "self.{}(z)[0]"),
                "nn.LSTM(4, 4, batch_first=True)": ("r", "self.{}(z)[0]"),
                "nn.MultiheadAttention(4, 2, batch_first=True)": ("a", "self.{}(z, z, z)[0]"),
            }
        if self.kind == "vec" and not plain:
            options |= {
                "nn.GRUCell(4, 4)": ("r", "self.{}(z)"),
                "nn.Parameter(torch.randn(4, 4) / 2)": ("w", "z @ self.{}"),
            }
        made = self.draw.choice(sorted(options))
        stem, call = options[made]
        name = self.member(made, stem)
        return name, call.format(name)


@dataclass(frozen=True)
class Ingredient:
    """One thing that a program may contain.

    Attributes:
        kinds: of trunks it can be added to.
        verdict: right (examples stay apart), either (exact or refused, both are right), mixed.
        weight: how often it is drawn.
    """

    name: str
    write: Callable[[Writer], None]
    kinds: tuple[str, ...]
    verdict: str
    weight: float


INGREDIENTS: dict[str, Ingredient] = {}


def ingredient(
    kinds: str = "vec seq img", verdict: str = RIGHT, weight: float = 1.0
) -> Callable[[Callable[[Writer], None]], Callable[[Writer], None]]:
    """Put a function that writes an ingredient into the catalogue."""

    def enter(write: Callable[[Writer], None]) -> Callable[[Writer], None]:
        name = write.__name__.strip("_")
        assert name not in INGREDIENTS, name
        INGREDIENTS[name] = Ingredient(name, write, tuple(kinds.split()), verdict, weight)
        return write

    return enter
