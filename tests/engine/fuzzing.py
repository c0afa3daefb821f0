"""Random small models against the engine: its sums are those of plain autograd, one example at a time, or it refuses.

python -m tests.engine.fuzzing --seeds 0:2000             the table of verdicts
python -m tests.engine.fuzzing --seeds 17 --show          a program, its smallest version, and the verdict
"""

from __future__ import annotations

import random
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import groupsearch as gs
from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.trace import Site
from groupsearch.tracer import observe_sites
from tests.engine.programs import Program, Recipe, generate, write
from tests.engine.writer import MIXED, RIGHT

BATCH, OTHERS = 5, 3
TOLERANCE, HALF_TOLERANCE = 1e-7, 6e-2
Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        verdict: exact, refused, quiet (mixed, accepted, and no sum seen to move), unusable (plain autograd fails),
            or a fault: wrong, moved, leak, crash.
        where: trace or step.
        detail: how far, or the message.
        refusable: whether a refusal would be right.
    """

    verdict: str
    where: str = ""
    detail: str = ""
    refusable: bool = False

    @property
    def fault(self) -> bool:
        """Whether the engine did wrong."""
        return self.verdict in ("wrong", "moved", "leak", "crash")

    @property
    def key(self) -> str:
        """The detail without names and numbers."""
        return re.sub(r"'[^']*'|\d+(\.\d+)?(e-?\d+)?", "_", self.detail)[:110]


def judge(program: Program, whole_trace: bool = False) -> Outcome:
    """Trace, attach and step a program, and compare; ``whole_trace`` records the memory of a step, too."""
    with _quiet(torch.float32 if program.recipe.autocast else torch.float64):
        try:
            truth = _Truth(program)
        except Exception as error:
            return Outcome("unusable", "", f"{type(error).__name__}: {error}")
        if program.recipe.verdict != MIXED and not truth.apart:
            return Outcome("unusable", "", "plain autograd finds the examples mixed")
        refusable = program.recipe.verdict != RIGHT or bool(truth.unused)
        where = "trace"
        try:
            space = program.load()
            model = space["make"]().train()
            space["after"](model)
            batch = space["examples"](BATCH, 1)
            observe = gs.trace_model if whole_trace else observe_sites
            traced = observe(model, batch, space["loss"])
            sites = tuple(traced.sites if whole_trace else traced)
            where = "step"
            if program.recipe.verdict == MIXED:
                return _judge_mixed(program, sites, truth)
            return _judge_apart(program, sites, truth, refusable)
        except GroupSearchError as error:
            return Outcome("refused" if str(error).strip() else "crash", where, str(error), refusable)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            return Outcome(
                "crash", where, f"{type(error).__name__}: {error} [{last.name}, {last.filename.rpartition('/')[2]}]"
            )


def _judge_apart(program: Program, sites: tuple[Site, ...], truth: _Truth, refusable: bool) -> Outcome:
    tolerance = HALF_TOLERANCE if program.recipe.autocast else TOLERANCE
    grouping = _grouping(sites, program.recipe.seed)
    for cuts, taken in (((), slice(None)), ((), slice(1, None)), (grouping, slice(None)), ((), slice(2, 3))):
        plan = ClipPlan(gs.Grouping(cuts, sites), max_grad_norm=truth.threshold)
        found = Private(program, plan).step(take(truth.batch, taken))
        expected = truth.clipped(plan, taken)
        scale = max(float(total.abs().max()) for total in expected.values()) or 1.0
        apart = {name: float((found[name] - expected[name]).abs().max()) / scale for name in expected}
        worst = max(apart, key=lambda name: apart[name])
        if not apart[worst] <= tolerance:
            size = len(truth.batch["y"][taken])
            detail = f"{worst} is off by {apart[worst]:.1e} in a batch of {size}, groups {plan.grouping.groups}"
            return Outcome("wrong", "step", f"{detail}, {_moved(program, sites, truth)}", refusable)
    return Outcome("exact", refusable=refusable)


def _moved(program: Program, sites: tuple[Site, ...], truth: _Truth) -> str:
    plan = ClipPlan(gs.Grouping((), sites), max_grad_norm=truth.threshold)
    try:
        whole, less = (Private(program, plan).step(take(truth.batch, s)) for s in (slice(None), slice(1, None)))
    except Exception as error:
        return type(error).__name__
    return f"one example left out moves the sum by {distance(whole, less) / plan.sensitivity:.2f} of the sensitivity"


def _judge_mixed(program: Program, sites: tuple[Site, ...], truth: _Truth) -> Outcome:
    """The farthest that an example left out, ordinary or extreme, moves this step's sum or a later one."""
    worst, at = 0.0, ""
    for part, loud in ((1.0, 1.0), (0.05, 1.0), (1.0, 20.0), (0.05, 20.0)):
        plan = ClipPlan(gs.Grouping((), sites), max_grad_norm=part * truth.threshold)
        for index in range(BATCH if loud == 1.0 else 2):
            batch = louder(truth.batch, index, loud)
            rest = [k for k in range(BATCH) if k != index]
            runs = []
            for taken in (list(range(BATCH)), rest):
                private = Private(program, plan)
                runs.append((private.step(take(batch, taken)), private.step(truth.later)))
            moved = distance(runs[0][0], runs[1][0]) / plan.sensitivity
            leaked = distance(runs[0][1], runs[1][1]) / plan.sensitivity
            if leaked > 1e-4:
                return Outcome(
                    "leak", "step", f"a step without the example moves by {leaked:.2f} of the sensitivity", True
                )
            if moved > worst:
                worst, at = (
                    moved,
                    f"example {index} times {loud:g} left out moves the sum by {moved:.2f} of the sensitivity",
                )
        if worst > 1 + 1e-4 + (HALF_TOLERANCE if program.recipe.autocast else 0):
            return Outcome("moved", "step", at, True)
    return Outcome("quiet", "step", at, True)


class _Truth:
    """One example at a time, plain autograd.

    Attributes:
        batch: of 5 examples.
        later: of 3 others.
        apart: whether the gradient of the batch is the sum of its examples'.
        unused: parameters that no example reaches.
        threshold: about the median norm, so that some examples are clipped.
    """

    def __init__(self, program: Program) -> None:
        space = program.load()
        self.batch, self.later = space["examples"](BATCH, 2), space["examples"](OTHERS, 3)
        together = _plain(program, self.batch)
        try:
            self._gradients = [_plain(program, take(self.batch, slice(i, i + 1))) for i in range(BATCH)]
        except ValueError:  # batch statistics of one example
            if program.recipe.verdict != MIXED:
                raise
            self._gradients = [together]
        self.unused = [n for n, g in together.items() if g is None and all(x[n] is None for x in self._gradients)]
        self.gradients = [{n: _or_zero(g, n, program) for n, g in one.items()} for one in self._gradients]
        total = {n: sum(g[n] for g in self.gradients) for n in together}
        scale = max(float(t.abs().max()) for t in total.values())
        off = max(float((_or_zero(together[n], n, program) - total[n]).abs().max()) for n in total)
        self.apart = off <= (HALF_TOLERANCE if program.recipe.autocast else 1e-8) * scale
        norms = sorted(_norm(g.values()) for g in self.gradients)
        self.threshold = max(norms[len(norms) // 2], 1e-3)

    def clipped(self, plan: ClipPlan, taken: slice) -> Sums:
        """The sum of the examples taken, clipped by a plan whose groups share no parameter."""
        total = {name: torch.zeros_like(g) for name, g in self.gradients[0].items()}
        groups = [set[str]() for _ in range(plan.grouping.groups)]
        for index, site in enumerate(plan.grouping.sites):
            groups[plan.grouping.group_of(index)] |= set(site.parameters)
        for gradient in self.gradients[taken]:
            for names, threshold in zip(groups, plan.thresholds, strict=True):
                norm = _norm(gradient[name] for name in names)
                for name in names:
                    total[name] += min(1.0, threshold / norm if norm else 1.0) * gradient[name]
        return total


def _plain(program: Program, batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
    space, model = _fresh(program)
    space["after"](model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(0)
    value = space["loss"](model, batch)
    assert value.shape == (len(batch["y"]),)
    value.sum().backward()
    return {name: p.grad for name, p in parameters.items()}


def _or_zero(gradient: Tensor | None, name: str, program: Program) -> Tensor:
    return torch.zeros_like(_fresh(program)[1].get_parameter(name)).detach() if gradient is None else gradient


def _fresh(program: Program) -> tuple[dict[str, Any], nn.Module]:
    """The program's names and its model in training mode, with nothing dropped at random."""
    space = program.load()
    space["P"] = 0.0
    return space, space["make"]().train()


class Private:
    """A program's model, private without noise."""

    def __init__(self, program: Program, plan: ClipPlan) -> None:
        self._space, self._model = _fresh(program)
        self._parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.SGD(self._parameters.values(), lr=0.0)
        gs.make_private(self._model, self._optimizer, plan, noise_multiplier=0.0, expected_batch_size=1)
        self._space["after"](self._model)

    def step(self, batch: dict[str, Tensor]) -> Sums:
        """What the optimizer saw."""
        torch.manual_seed(0)
        self._space["loss"](self._model, batch).mean().backward()
        self._optimizer.step()
        return {name: p.grad.detach().clone() for name, p in self._parameters.items() if p.grad is not None}


def take(batch: dict[str, Tensor], which: Any) -> dict[str, Tensor]:
    """Some examples of a batch."""
    return {name: value[which] for name, value in batch.items()}


def louder(batch: dict[str, Tensor], index: int, times: float) -> dict[str, Tensor]:
    """A batch with the numbers of one example multiplied, but not its ids."""
    changed = {name: value.clone() for name, value in batch.items()}
    for value in changed.values():
        if value.is_floating_point() and value.shape[-1] == 4:
            value[index] *= times
        elif value.is_floating_point():
            value[index, ..., 1:] *= times
    return changed


def distance(one: Sums, other: Sums) -> float:
    """The length of the difference."""
    return _norm(one[name] - other[name] for name in one)


def _norm(tensors: Any) -> float:
    return sum(float(x.double().square().sum()) for x in tensors) ** 0.5


def _grouping(sites: Sequence[Site], seed: int) -> tuple[int, ...]:
    """Random cuts that part no parameter's sites."""
    spans: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        for name in site.parameters:
            spans.setdefault(name, []).append(index)
    cuts = [b for b in range(1, len(sites)) if not any(span[0] < b <= span[-1] for span in spans.values())]
    draw = random.Random(seed)
    return tuple(sorted(draw.sample(cuts, draw.randint(min(1, len(cuts)), len(cuts)))))


@contextmanager
def _quiet(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def smallest(recipe: Recipe, alike: Callable[[Outcome], bool]) -> Recipe:
    """A recipe from which no ingredient can be dropped without changing what becomes of it."""
    for fewer in recipe.smaller():
        if alike(judge(write(fewer))):
            return smallest(fewer, alike)
    return recipe


def verdict_of(seed: int) -> Outcome:
    """What becomes of the program of a seed; every eighth is traced in full."""
    return judge(generate(seed), whole_trace=seed % 8 == 0)


if __name__ == "__main__":
    from tests.engine.fuzz_table import main

    main()
