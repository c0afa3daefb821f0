"""The adversary's search over random and hostile models: what the engine accepts stays below the sensitivity."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer.sites import observe_sites
from tests.engine.programs import SHAPES, Program, generate, recipe
from tests.engine.writer import INGREDIENTS
from tests.privacy.adversary import Arena, search
from tests.support.case import Case

ROUNDING = 1e-6
PER_INGREDIENT, SEARCHED = 1, 3000


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_default_dtype(before)


@cache
def programs() -> dict[str, list[int]]:
    """By ingredient, the first seeds of small programs with it."""
    found: dict[str, list[int]] = {name: [] for name in INGREDIENTS}
    for seed in range(SEARCHED):
        made = recipe(seed)
        if made.autocast or made.root == "table" or len(made.steps) > 3:
            continue
        for name, _ in made.steps:
            if len(found[name]) < PER_INGREDIENT:
                found[name].append(seed)
                break
    return found


def case_of(program: Program) -> Case:
    """A program as the adversary's arena takes it: its label follows from its numbers, its loss is scaled."""
    space = program.load()
    space["P"] = 0.0
    made = program.recipe
    tokens = made.root == "tokens"
    shape = tuple(int(n) for n in SHAPES[made.root].split(","))

    def build() -> nn.Module:
        model = space["make"]()
        space["after"](model)
        return model

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = batch["x"] % 7 if tokens else batch["x"]
        y = (x.flatten(1).double().sum(1).abs().nan_to_num(0, 0, 0).clamp(max=1e6) * 3).long() % 3
        views = dict(zip("apn", x.unbind(1), strict=True)) if made.fold == "triplet" else {"x": x}
        return batch["scale"] * space["loss"](model, {**views, "y": y})

    return Case(f"program {made.seed}", build, (3, *shape) if made.fold else shape, tokens, loss)


@pytest.mark.parametrize("name", INGREDIENTS)
def test_no_example_moves_the_sums_beyond_the_sensitivity(name: str) -> None:
    seeds = programs()[name]
    assert seeds, f"no small program with {name!r}"
    for seed in seeds:
        program = generate(seed)
        try:
            case = case_of(program)
            sites = tuple(observe_sites(case.model(), case.batch(), case.loss))
            for cuts in dict.fromkeys(((), tuple(range(1, len(sites), 2)))):
                arena = Arena(case, ClipPlan(Grouping(cuts, sites), 0.3))
                worst, _ = search(arena, restarts=1, steps=12, seed=seed, ascend=False)
                assert worst <= 1 + ROUNDING, f"{worst:.3f} of the sensitivity:\n{program.source}"
        except GroupSearchError:
            continue  # refused: nobody is trained on
