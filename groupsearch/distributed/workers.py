"""Clip21 and its relatives on real processes: every process is a worker, messages are averaged by all_reduce.

Apart from the updates, which are those of :mod:`groupsearch.distributed.clip21` and shared with its simulation; it also
says what each method promises.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from groupsearch.distributed.clip21 import Setup, Spent, direction, groups_of, message, noise_of, spent
from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import ClipPlan

_STATE = "workers"
T = TypeVar("T")


class ClippedWorkers(Optimizer):
    """An optimizer that every process makes over its copy of the model: one worker of a distributed method.

    ``backward`` leaves the worker's own gradient in ``.grad``, of its own data and, for methods of gradient descent,
    of all of it. ``step`` sends the bounded message, with noise of its own where there is any, averages those of all
    processes, and moves the weights, which stay the same everywhere. A gradient that is not finite is not sent.

    Every process of the group takes part in every step; one that stops is noticed by the others when the process
    group's timeout is over. The model must not be wrapped in DistributedDataParallel, which would average gradients
    before they are clipped.

    Attributes:
        setup: method and constants.
        steps: taken so far.
        clipped: of the last step, for every group whether this worker's message was shortened. It is exact and about
            private data.

    Raises:
        GroupSearchError: on every process and in the same words, when anything differs between processes (method,
            thresholds, groups, noise, learning rate, weights, whether there is a seed) or is wrong on any of them.
    """

    def __init__(  # noqa: PLR0913  (what a method takes)
        self,
        parameters: Iterable[nn.Parameter] | Sequence[Sequence[nn.Parameter]],
        method: str,
        *,
        lr: float,
        threshold: float | Sequence[float],
        noise_multiplier: float = 0.0,
        seed: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        **constants: float,
    ) -> None:
        """Begin with a worker that has sent nothing.

        Args:
            parameters: all trainable ones; or a list of them for every group, clipped together.
            method: of :data:`~groupsearch.distributed.clip21.METHODS`.
            lr: gamma, the step size.
            threshold: tau, or R_m of every group.
            noise_multiplier: standard deviation of this worker's noise over the bound of its message.
            seed: of noise that can be had again, worker i's from (seed, i); None for noise that nobody can draw again.
            process_group: None for all processes.
            **constants: further fields of :class:`~groupsearch.distributed.clip21.Setup`.
        """
        self._process_group = process_group
        self.workers, self.rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        groups = _grouped(parameters)
        flat = [parameter for group in groups for parameter in group]
        sizes = tuple(sum(p.numel() for p in group) for group in groups)

        def make() -> Setup:
            if not flat or not 0 < lr < math.inf:
                raise GroupSearchError(f"Expected parameters and a finite lr > 0, found {len(flat)} and lr {lr}.")
            if len({(p.dtype, p.device) for p in flat}) > 1:
                raise GroupSearchError("Expected parameters of one dtype on one device, found several.")
            return Setup(method, threshold, sizes, noise_multiplier, **constants)

        def told(setup: Setup) -> dict[str, object]:
            # what differs is said in this order, one thing alone
            return {"groups": len(sizes), **_plain(setup), "lr": lr, "seed": seed, "weights": _digest(flat)}

        self.setup = self._agreed(make, told)
        super().__init__(flat, {"lr": lr})
        self._noise = noise_of(seed, self.rank) if noise_multiplier else None
        self._seeded = seed is not None
        like, count = flat[0].detach(), sum(sizes)
        self._worker = self.setup.state(count, like=like)
        self._aggregate = like.new_zeros(count)
        self.steps = 0
        self.clipped = torch.zeros(len(sizes), dtype=torch.bool)

    @classmethod
    def from_plan(cls, model: nn.Module, plan: ClipPlan, method: str, **options: Any) -> ClippedWorkers:
        """The worker that clips by the groups of a plan, with the thresholds it allots.

        Args:
            model: this process's copy.
            plan: a grouping of the model, ``max_grad_norm`` and an allocation.
            method: of :data:`~groupsearch.distributed.clip21.METHODS`.
            **options: as :class:`ClippedWorkers` takes them.

        Raises:
            GroupSearchError: for a plan that cannot be followed, see
                :func:`~groupsearch.distributed.clip21.groups_of`; and as the class does.
        """
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        names, thresholds = groups_of(plan, {name: p.numel() for name, p in named.items()})
        groups = [[named[name] for name in group] for group in names]
        return cls(groups, method, threshold=thresholds, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Send this worker's message, receive the mean of all, and move the weights; a step of every process.

        Args:
            closure: computes the loss and its gradients again; called once before anything is sent.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        parameters: list[nn.Parameter] = group["params"]
        gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        sent, self.clipped = message(self.setup, self._worker, gradient)
        if self._noise is not None:
            drawn = torch.randn(len(sent), generator=self._noise, dtype=sent.dtype, device=self._noise.device)
            sent = sent + self.setup.noise_multiplier * self.setup.bound * drawn.to(sent.device)
        else:
            sent = sent.clone()
        dist.all_reduce(sent, group=self._process_group)
        moved = direction(self.setup, self._aggregate, sent / self.workers)
        for parameter, part in zip(parameters, moved.split([p.numel() for p in parameters]), strict=True):
            parameter.sub_(group["lr"] * part.view_as(parameter))
        self.steps += 1
        return loss

    def spent(self, delta: float) -> Spent:
        """What the steps so far cost a worker in privacy, per worker and for the whole."""
        return spent(self.setup, workers=self.workers, steps=self.steps, delta=delta)

    def state_dict(self) -> dict[str, Any]:
        """Torch's own, and this worker's shift, momentum and share of the aggregate, which are private data.

        Of noise it has the state of a seeded generator alone: secret noise is not written down.
        """
        known = {"rank": self.rank, "workers": self.workers, "setup": _plain(self.setup), "steps": self.steps}
        tensors = {name: each.clone() for name, each in self._worker.items()}
        noise = self._noise.get_state() if self._noise is not None and self._seeded else None
        mine = {**known, "worker": tensors, "aggregate": self._aggregate.clone(), "noise": noise}
        return {**super().state_dict(), _STATE: mine}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on as the worker that wrote the state; every process loads its own.

        Raises:
            GroupSearchError: on every process and in the same words, when any of them was given the state of another
                rank, another number of workers, another setup or another step.
        """
        found = state_dict.get(_STATE)

        def check() -> Mapping[str, Any]:
            if found is None:
                raise GroupSearchError(
                    "Expected a state that a worker's state_dict() gave, found one without a worker's part."
                )
            expected = {"rank": self.rank, "workers": self.workers, "setup": _plain(self.setup)}
            for name, value in expected.items():
                if found[name] != value:
                    raise GroupSearchError(
                        f"Expected the state of a worker with {name} {value}, found {name} {found[name]}. A worker's "
                        f"shift belongs to its data: go on with as many workers, each with its own state and data, "
                        f"or begin anew."
                    )
            return found

        mine = self._agreed(check, lambda each: {"steps": each["steps"], "aggregate": _digest([each["aggregate"]])})
        super().load_state_dict({name: value for name, value in state_dict.items() if name != _STATE})
        for name, each in self._worker.items():
            each.copy_(mine["worker"][name])
        self._aggregate.copy_(mine["aggregate"])
        self.steps = mine["steps"]
        if self._noise is not None and mine["noise"] is not None:
            self._noise.set_state(mine["noise"])

    def _agreed(self, make: Callable[[], T], told: Callable[[T], Mapping[str, object]]) -> T:
        """What ``make`` gives, once it gave something on every process and they tell the same of it."""
        value, said = None, {}
        try:
            value = make()
            said = dict(told(value))
            error = ""
        except GroupSearchError as refused:
            error = str(refused)
        every: list[Any] = [None] * self.workers
        dist.all_gather_object(every, (error, said), group=self._process_group)
        wrong = [(rank, each) for rank, (each, _) in enumerate(every) if each]
        if wrong:
            ranks = ", ".join(str(rank) for rank, each in wrong if each == wrong[0][1])
            raise GroupSearchError(f"Refused on rank {ranks}: {wrong[0][1]}")
        for name in every[0][1]:
            values = [each[name] for _, each in every]
            if any(each != values[0] for each in values):
                listed = ", ".join(f"{each} on rank {rank}" for rank, each in enumerate(values))
                raise GroupSearchError(f"Expected the same {name} on every rank, found {listed}. Give all the same.")
        assert value is not None
        return value


def _grouped(parameters: Iterable[nn.Parameter] | Sequence[Sequence[nn.Parameter]]) -> list[list[nn.Parameter]]:
    """Lists of parameters, one for each group; a flat one is one group."""
    found: list[Any] = list(parameters)
    if found and not isinstance(found[0], Tensor):
        return [list(group) for group in found]
    return [found]


def _plain(setup: Setup) -> dict[str, object]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(setup).items()}


def _digest(tensors: Sequence[Tensor]) -> str:
    """A word for the numbers: equal for equal bytes."""
    found = hashlib.sha256()
    for each in tensors:
        found.update(each.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]
