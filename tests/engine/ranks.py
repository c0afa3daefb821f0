"""Trainings that a rank of several runs, and one process alone likewise: what both give must be the same."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.engine.loading import PoissonBatches
from groupsearch.errors import GroupSearchError
from groupsearch.options import EngineOptions
from groupsearch.plan.clipping import AdaptiveQuantile, ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import Site
from groupsearch.tracer.sites import sites_of
from tests.privacy import broken
from tests.support.case import Case
from tests.support.cases import EVERY_CASE
from tests.support.reference import trainable

EXAMPLES = 12
LEARNING_RATE = 0.1


@cache
def sites_for(name: str) -> tuple[Site, ...]:
    """The sites of a case of the catalogue."""
    case = EVERY_CASE[name]
    return sites_of(case.model(), case.batch(), case.loss, EngineOptions())


def grouping_for(name: str, cuts: Sequence[int] | None = ()) -> Grouping:
    """A grouping of a case of the catalogue; layer-wise for no cuts."""
    sites = sites_for(name)
    return Grouping(tuple(range(1, len(sites))) if cuts is None else tuple(cuts), sites)


@dataclass(frozen=True)
class Training:
    """A training that is the same alone and on several ranks.

    Attributes:
        case: name of a case of the catalogue.
        grouping: of its sites.
        adaptive: whether thresholds adapt.
        rule: for clipping.
        dtype: of the model.
        noise: multiplier; drawn from a seed.
        expected: batch size.
        physical: most examples in a pass.
        steps: of the optimizer.
        wrap: whether DDP is around the model.
        secure: whether noise and batches come from a cipher, and from no seed.
        seeds: of the batches and of the noise.
    """

    case: str
    grouping: Grouping
    adaptive: bool = False
    rule: str = "abadi"
    dtype: torch.dtype = torch.float64
    noise: float = 0.7
    expected: float = 6.0
    physical: int | None = 2
    steps: int = 3
    wrap: bool = False
    secure: bool = False
    seeds: tuple[int, int] = (3, 5)

    @property
    def plan(self) -> ClipPlan:
        """The mechanism."""
        return ClipPlan(
            self.grouping, 0.5, self.rule, AdaptiveQuantile(count_noise=2.0) if self.adaptive else "uniform"
        )

    def begin(self) -> tuple[nn.Module, SGD, PrivateEngine, PoissonBatches]:
        """The model as it is called, its optimizer, the engine, and what the loop iterates."""
        case = EVERY_CASE[self.case]
        model, data = case.model(self.dtype), case.batch(self.dtype, EXAMPLES)
        optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, momentum=0.5)
        sampling, noise = (None if self.secure else torch.Generator().manual_seed(seed) for seed in self.seeds)
        batches = PoissonBatches(
            data,
            expected_batch_size=self.expected,
            steps=self.steps,
            physical_batch=self.physical,
            generator=sampling,
            secure=self.secure,
        )
        called: nn.Module = DistributedDataParallel(model) if self.wrap and dist.is_initialized() else model
        engine = make_private(
            called,
            optimizer,
            self.plan,
            noise_multiplier=self.noise,
            batches=batches,
            generator=noise,
            secure=self.secure,
            loss_reduction="sum",
        )
        return called, optimizer, engine, batches

    def run(self) -> dict[str, Any]:
        """The weights after all steps, thresholds, and how many examples each batch had here."""
        case, (model, optimizer, engine, batches) = EVERY_CASE[self.case], self.begin()
        sizes = []
        for logical in batches:
            sizes.append(logical.examples)
            for batch in logical:
                case.loss(model, batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found = {"weights": weights(model), "thresholds": engine.mechanism.thresholds, "sizes": sizes}
        engine.detach()
        return found


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of all that is trained."""
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def run_all(trainings: Sequence[Training]) -> list[dict[str, Any]]:
    """One after the other in the same world."""
    return [training.run() for training in trainings]


# -- What a rank of several does in one test or another ---------------------------------------------


def own_loader(training: Training, shares: Sequence[Sequence[tuple[int, int]]]) -> list[Tensor]:
    """Steps on examples from, to of the data, as every step gives each rank its share; the weights after."""
    case = EVERY_CASE[training.case]
    rank = dist.get_rank() if dist.is_initialized() else None
    model, data = case.model(training.dtype), case.batch(training.dtype, EXAMPLES)
    optimizer = SGD(model.parameters(), lr=0.1)
    noise = torch.Generator().manual_seed(5)
    make_private(
        model, optimizer, training.plan, noise_multiplier=training.noise, expected_batch_size=6.0, generator=noise
    )
    for step in shares:
        own = [step[rank]] if rank is not None else [(min(a for a, _ in step), max(b for _, b in step))]
        for begin, end in own:
            if end > begin:
                case.loss(model, {name: x[begin:end] for name, x in data.items()}).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def traffic(training: Training) -> list[dict[str, Any]]:
    """Per step: bytes and number of reductions, how many of them before the last backward pass, and in it."""
    sent: list[int] = []
    reduce = dist.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *arguments, **options)

    dist.all_reduce = counting
    case, (model, optimizer, _, batches) = EVERY_CASE[training.case], training.begin()
    found = []
    for logical in batches:
        before, passes = [0], 0
        sent.clear()
        for batch in logical:
            case.loss(model, batch).sum().backward()
            before.append(len(sent))
            passes += 1
        optimizer.step()
        found.append({"bytes": sum(sent), "sent": len(sent), "early": before[-2:][0], "overlapped": before[-1]})
        found[-1]["passes"] = passes
    dist.all_reduce = reduce
    return found


def after_an_accident(training: Training) -> dict[str, Any]:
    """As :meth:`Training.run`, but backward on the last rank's first logical batch fails half-way and is redone."""
    case, (model, optimizer, engine, batches) = EVERY_CASE[training.case], training.begin()
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    sent = 0
    for number, logical in enumerate(batches):
        pieces = list(logical)
        if last and not number:
            for batch in pieces[:-1]:
                case.loss(model, batch).sum().backward()
            first = next(iter(model.children()))
            handle = first.register_forward_hook(lambda module, inputs, output: output.register_hook(_raise) and None)
            try:
                case.loss(model, pieces[-1]).sum().backward()
            except ZeroDivisionError:
                sent = 0 if engine._reduction is None else engine._reduction.begun
            handle.remove()
            optimizer.zero_grad()
        for batch in pieces:
            case.loss(model, batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": weights(model), "sent": sent}


def _raise(gradient: Tensor) -> Tensor:
    raise ZeroDivisionError


def differing(training: Training) -> dict[str, tuple[str, str]]:
    """Kind and message of what is raised where the last rank is given something else, by what that is."""
    last, case = dist.get_rank() == dist.get_world_size() - 1, EVERY_CASE[training.case]
    other = {
        "number of groups": {"grouping": grouping_for(training.case, (1, 2, 3))},
        "grouping": {"grouping": grouping_for(training.case, tuple(b + 1 for b in training.grouping.boundaries))},
        "plan": {"rule": "auto-s"},
        "noise": {"noise": 2.0},
        "noise generator": {"seeds": (3, 6)},
        "batches' generator": {"seeds": (4, 5)},
        "data": {"expected": 5.0},
        "optimizer": {},
        "weights": {},
        "refused on one": {},
    }
    found = {}
    for name, changes in other.items():
        given = replace(training, **changes) if last else training
        try:
            with _spoiled(name if last else "", case.name):
                given.begin()
        except GroupSearchError as error:
            found[name] = type(error).__name__, str(error)
    training.begin()  # nothing is left on a model or in a group
    return found


@contextmanager
def _spoiled(name: str, case: str) -> Iterator[None]:
    """While it lasts a rank builds another model, or one with other weights."""
    build = Case.model

    def model(self: Case, dtype: torch.dtype = torch.float64) -> nn.Module:
        made = build(self, dtype)
        if name == "weights":
            next(made.parameters()).data[0] += 1e-9
        if name == "refused on one":
            next(made.parameters()).requires_grad_(False)
        return made

    learning_rate = 0.2 if name == "optimizer" else 0.1
    with patch.object(Case, "model", model), patch(f"{__name__}.LEARNING_RATE", learning_rate):
        yield


def refused_step(training: Training) -> str:
    """What every rank is told when the last one steps in the middle of a logical batch."""
    case, (model, optimizer, _, batches) = EVERY_CASE[training.case], training.begin()
    last = dist.get_rank() == dist.get_world_size() - 1
    for logical in batches:
        for batch in logical:
            case.loss(model, batch).sum().backward()
            if last:
                break
        try:
            optimizer.step()
        except GroupSearchError as error:
            return str(error)
    return ""


def diverged(training: Training) -> str:
    """What every rank is told when weights were changed on one of them."""
    case, (model, optimizer, _, batches) = EVERY_CASE[training.case], training.begin()
    for number, logical in enumerate(batches):
        for batch in logical:
            case.loss(model, batch).sum().backward()
        if number == 1 and dist.get_rank() == 1:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.view(-1)[0] += 1e-7
        try:
            optimizer.step()
        except GroupSearchError as error:
            return str(error)
        optimizer.zero_grad()
    return ""


def wrapped_later(training: Training) -> str:
    """What is said where DDP is put around a model that has an engine."""
    case, (model, *_, batches) = EVERY_CASE[training.case], training.begin()
    outside = DistributedDataParallel(model)
    try:
        case.loss(outside, batches.first(3)).sum().backward()
    except GroupSearchError as error:
        return str(error)
    return ""


def scaled() -> tuple[float, list[Tensor]]:
    """The loss scale after an example of rank 0 alone overflowed, and the weights."""
    training = Training("residual-mlp-3d", grouping_for("residual-mlp-3d", (3,)), dtype=torch.float32)
    case = EVERY_CASE[training.case]
    model, data = case.model(torch.float32), case.batch(torch.float32)
    optimizer, scaler = SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    settings = {"noise_multiplier": 0.5, "expected_batch_size": 4.0, "grad_scaler": scaler}
    make_private(model, optimizer, training.plan, **settings)
    if dist.get_rank() == 0:
        data["scale"] = data["scale"].clone()
        data["scale"][0] = torch.inf
    scaler.scale(case.loss(model, data).mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), weights(model)


# -- Checkpoints, kills and worlds of another size --------------------------------------------------


def states(training: Training) -> dict[str, Any]:
    """A step, and the states after it."""
    case, (model, optimizer, engine, batches) = EVERY_CASE[training.case], training.begin()
    logical = next(iter(batches))
    for batch in logical:
        case.loss(model, batch).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "engine": engine.state_dict(), "batches": batches.state_dict()}


def resumed(training: Training, state: dict[str, Any]) -> tuple[str, list[Tensor]]:
    """What is said to a state, or the weights after going on with it to the end."""
    case, (model, optimizer, engine, batches) = EVERY_CASE[training.case], training.begin()
    try:
        model.load_state_dict(state["model"])
        engine.load_state_dict(state["engine"])
        batches.load_state_dict(state["batches"])
    except GroupSearchError as error:
        return str(error), []
    for logical in batches:
        for batch in logical:
            case.loss(model, batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return f"{engine.steps} steps", weights(model)


def killed(training: Training, folder: str, how: str) -> tuple[str, str, float]:
    """Rank 0's error and how long it took to come when rank 1 is killed, or hangs, in its second step."""
    case, (model, optimizer, engine, batches) = EVERY_CASE[training.case], training.begin()
    rank, begin = dist.get_rank(), 0.0
    for number, logical in enumerate(batches):
        if number == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else time.sleep(6)
            return "", "", 0.0
        begin = time.monotonic()
        try:
            for batch in logical:
                case.loss(model, batch).sum().backward()
            optimizer.step()
        except GroupSearchError as error:
            return type(error).__name__, str(error), time.monotonic() - begin
        optimizer.zero_grad()
        if rank == 0:
            parts = {"model": model, "engine": engine, "batches": batches}
            torch.save({name: part.state_dict() for name, part in parts.items()}, f"{folder}/checkpoint.pt")
    return "", "", 0.0


# -- The audit across ranks -------------------------------------------------------------------------

DAMAGES = ("none", "noise on every rank", "no noise on a part", "norms of a part", "one rank unclipped")


def audited(damage: str, steps: int) -> dict[str, Any]:
    """What an audit sees: noise in deviations of it, (steps, D), and how far an example moves the sums, over the claim.

    The examples of the noise's steps are none at all; the sums of all ranks are released without noise with and
    without a loud example of each rank's.
    """
    case, grouping = EVERY_CASE["residual-mlp-3d"], grouping_for("residual-mlp-3d", (3, 6))
    training = Training("residual-mlp-3d", grouping)

    def attached(noise: float) -> tuple[nn.Module, SGD]:
        model = case.model()
        optimizer = SGD(model.parameters(), lr=0.0)
        engine = make_private(model, optimizer, training.plan, noise_multiplier=noise, expected_batch_size=1.0)
        _damage(engine, damage)
        return model, optimizer

    names = list(trainable(case.model()))
    model, optimizer = attached(0.7)
    drawn = []
    for _ in range(steps):
        optimizer.step()
        scales = training.plan.noise_scales
        noise = [trainable(model)[n].grad.flatten() / (0.7 * scales[n]) for n in names]
        drawn.append(torch.cat(noise))
    model, optimizer = attached(0.0)
    batch = case.batch(batch_size=4)
    batch["scale"][-1] = 1e4

    def released(without: int | None) -> Tensor:
        own = batch if without != dist.get_rank() else {name: x[:-1] for name, x in batch.items()}
        case.loss(model, own).mean().backward()
        optimizer.step()
        found = torch.cat([trainable(model)[n].grad.flatten() for n in names])
        optimizer.zero_grad()
        return found

    whole = released(None)
    moved = [(whole - released(rank)).norm().item() for rank in range(dist.get_world_size())]
    return {"noise": torch.stack(drawn), "moved": max(moved) / training.plan.sensitivity}


def _damage(engine: PrivateEngine, damage: str) -> None:
    if damage == "noise on every rank":
        send, mechanism = engine._reduction.send_rest, engine.mechanism

        def with_noise(sums: dict[str, Tensor]) -> None:
            for name, parameter in engine._step.parameters.items():
                sums.setdefault(name, torch.zeros_like(parameter))
            mechanism.add_noises_(sums)
            send(sums)

        engine.mechanism.source.manual_seed(dist.get_rank())
        engine._reduction.send_rest = with_noise
        engine._step.add_noise = lambda sums: None
    elif damage == "no noise on a part":
        broken.silent(["0.weight", "0.bias"])(engine)
    elif damage == "norms of a part":
        broken.norms_of_a_part(dist.get_rank(), dist.get_world_size())(engine)
    elif damage == "one rank unclipped" and dist.get_rank() == 1:
        broken.unclipped("0.weight")(engine)
