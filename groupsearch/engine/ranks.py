"""Several processes that train one model: what they add up, what they draw together, and what they refuse together.

Every rank clips its own examples. The clipped sums of a group are added up over the ranks while backward goes on; the
noise is drawn after that, the same numbers on every rank, from a generator that rank 0 filled from the operating
system and sent to the others once. What was added up and the weights go over the same wires, so whoever reads those
knows every gradient, noise or not: the wires are inside of what is trusted.

All ranks talk in the same order whatever their batches are: one reduction per bucket, from the output side to the
input side, then one exchange of a few numbers, once a step. A rank without an example adds zeros.

Apart from the engine, which knows of no process but its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from groupsearch.engine.arithmetic import accumulator
from groupsearch.errors import GroupSearchError, LostRankError, UnsupportedModelError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.randomness import SecureStream, Source

ALONE: Any = -100  # torch.distributed.GroupMember.NON_GROUP_MEMBER, also of a torch without that part
"""In place of a process group: this process trains alone, whatever others there are."""

# -- Ranks: the processes, and what they tell each other -------------------------------------------


class Ranks:
    """The processes of a process group, of which this is one.

    Args:
        group: of two processes or more.

    Attributes:
        group: as given.
        rank: number of this process in the group.
        size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._talk = group
        if dist.get_backend(group) != "gloo":  # numbers of the CPU; a GPU need not be waited for to send them
            members = dist.get_process_group_ranks(group)
            self._talk = dist.new_group(members, backend="gloo", use_local_synchronization=True)

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks | None:
        """Those of a process group, or of the default one where that is initialised; None for a process alone."""
        if group == ALONE or not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if group is None else group
        if group is None or dist.get_world_size(group) < 2:
            return None
        return cls(group)

    def alike(self, doing: str, find: Callable[[], Mapping[str, object]]) -> None:
        """Let every rank find out what it was given, and refuse it on all of them unless all of it is the same.

        Args:
            doing: what is refused, for the message.
            find: gives by name what must be the same; what it raises is raised on all ranks.

        Raises:
            GroupSearchError: the same message on every rank.
        """
        failure: Exception | None = None
        mine: dict[str, str] = {}
        try:
            mine = {name: str(value) for name, value in find().items()}
        except Exception as error:
            failure = error
        told = self.gather((_text_of(failure), mine))
        for rank, (text, _) in enumerate(told):
            if text is not None:
                said = f"Rank {rank} of {self.size} refused {doing}: {text}"
                if not isinstance(failure, GroupSearchError):
                    raise GroupSearchError(said) from failure
                failure.args = (said,)
                raise failure
        if (differing := _differing([facts for _, facts in told])) is not None:
            raise GroupSearchError(
                f"Expected the same on all {self.size} ranks for {doing}, found {differing}. Give every rank the same; "
                "weights are the same after DistributedDataParallel(model), or torch.distributed.broadcast of each."
            )

    def exchange(self, numbers: Sequence[int]) -> list[list[int]]:
        """The whole numbers of every rank, which has as many of them, by rank."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        told = [torch.empty_like(mine) for _ in range(self.size)]
        with self.or_lost("the step"):
            dist.all_gather(told, mine, self._talk)
        return [each.tolist() for each in told]

    def share(self, source: Source) -> None:
        """Let all ranks draw the numbers that rank 0 would; a secure stream has no state to be shared."""
        if isinstance(source, SecureStream):
            return
        state = source.get_state()
        with self.or_lost("sharing a generator"):
            dist.broadcast(state, group_src=0, group=self._talk)
        source.set_state(state)

    def tell(self, value: Any) -> Any:
        """What rank 0 has of it."""
        told = [value]
        with self.or_lost("the step"):
            dist.broadcast_object_list(told, group_src=0, group=self._talk)
        return told[0]

    def gather(self, value: Any) -> list[Any]:
        """What every rank has of it, by rank."""
        told: list[Any] = [None] * self.size
        with self.or_lost("the exchange"):
            dist.all_gather_object(told, value, self._talk)
        return told

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of rank 0."""
        with self.or_lost("the step"):
            for work in [dist.broadcast(x, group_src=0, group=self.group, async_op=True) for x in tensors]:
                work.wait()

    def largest_(self, tensor: Tensor) -> None:
        """Overwrite a tensor with the largest over all ranks."""
        with self.or_lost("the step"):
            dist.all_reduce(tensor, dist.ReduceOp.MAX, self.group)

    def start_sum_(self, tensor: Tensor) -> Any:
        """Begin to overwrite a tensor with the sum over all ranks; ``.wait()`` of what is returned ends it."""
        with self.or_lost("the backward pass"):
            return dist.all_reduce(tensor, group=self.group, async_op=True)

    @contextmanager
    def or_lost(self, doing: str) -> Iterator[None]:
        """Say of a collective operation that failed what it means.

        Raises:
            LostRankError: as torch raised.
        """
        try:
            yield
        except RuntimeError as error:
            raise LostRankError(
                f"Rank {self.rank} of {self.size} lost the others in {doing}: {str(error).splitlines()[0]:.200}. One "
                "of them ended, was killed or hangs, so the step under way is not taken anywhere. See the first error "
                "in their output; start all of them again from the last checkpoint."
            ) from error


def _text_of(failure: Exception | None) -> str | None:
    if failure is None or isinstance(failure, GroupSearchError):
        return None if failure is None else str(failure)
    return f"{type(failure).__name__}: {failure}"


def _differing(facts: Sequence[Mapping[str, str]]) -> str | None:
    """What is not the same everywhere, the first three of it; None where all is."""
    found = []
    for name in dict.fromkeys(name for each in facts for name in each):
        values = [each.get(name, "none") for each in facts]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            found.append(f"another {name} ({values[0]:.80} on rank 0, {values[other]:.80} on rank {other})")
    return ", ".join(found[:3]) or None


# -- What must be the same on all ranks, as text that tells little and differs if it does ----------


def digest(*values: object) -> str:
    """A short text that is the same for the same values and for no others."""
    return hashlib.blake2b(repr(values).encode(), digest_size=6).hexdigest()


def fingerprint(tensor: Tensor) -> int:
    """A number that all bits of a tensor decide, the same however it lies in memory; exact, so the same anywhere."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    if tensor.is_complex() or tensor.dtype == torch.bool:
        return fingerprint(torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.to(torch.uint8))
    flat, found = tensor.detach().reshape(-1).view(bits), 0
    for number, part in enumerate(flat.split(2**20)):  # a copy of a part at a time
        weights = torch.arange(1, len(part) + 1, device=part.device)
        found += (number + 1) * int((part.long() * weights).sum())
    return found % 2**62


def weights_of(model: nn.Module) -> str:
    """What tells the numbers in a model from others'."""
    return digest([(name, fingerprint(x)) for name, x in [*model.named_parameters(), *model.named_buffers()]])


def generator_of(generator: torch.Generator | None) -> str:
    """What tells a generator of an experiment from another; one that is secret is rank 0's on all."""
    return "secret" if generator is None else digest(generator.get_state().tolist())


# -- DistributedDataParallel around the model: its own reduction has nothing to add ----------------


def unwrapped(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """The module inside of DDP, and DDP where there is one."""
    return (model.module, model) if isinstance(model, DistributedDataParallel) else (model, None)


def silence(wrapper: DistributedDataParallel) -> tuple[bool, bool]:
    """Let DDP reduce no gradients, of which there are none, and send no buffers: forward passes are not of one number.

    Returns:
        What to give to :func:`speak` to undo it.
    """
    before = wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync
    wrapper.require_backward_grad_sync = wrapper.require_forward_param_sync = False
    return before


def speak(wrapper: DistributedDataParallel, before: tuple[bool, bool]) -> None:
    """Undo :func:`silence`."""
    wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync = before


def refuse_other_wrapper(wrapper: DistributedDataParallel | None) -> None:
    """Raise where the forward pass that runs comes through a DDP that the engine was not given.

    Raises:
        UnsupportedModelError: with the remedy.
    """
    active = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if active is not None and active is not wrapper:
        raise UnsupportedModelError(
            "The model is called through a DistributedDataParallel that the engine was not given, which would wait for "
            "gradients that nobody forms. Give make_private that DistributedDataParallel in place of the module, or "
            "call the module itself."
        )


# -- Reduction: the clipped sums of all ranks, added up while backward goes on ---------------------

TOGETHER = 2**16
"""Tensors of fewer numbers are sent together: sending takes as long for 10 numbers as for 10,000."""


class Reduction:
    """The clipped sums of one logical batch, added up over the ranks in one bucket per group.

    A parameter is in the bucket of the last group that closes of those that use it. Buckets are sent in the order in
    which backward closes groups, each as soon as all groups up to it are closed, and exactly once between two
    :meth:`finish`, whatever becomes of the backward pass: one that raised and is taken again adds nothing to what was
    sent, which had each example of this rank once.

    Large tensors are sent as they are, small ones are copied into one.

    Args:
        ranks: whose sums are added up.
        plan: the groups.
        parameters: by name.
    """

    def __init__(self, ranks: Ranks, plan: ClipPlan, parameters: Mapping[str, Tensor]) -> None:
        grouping = plan.grouping
        self._ranks = ranks
        self._parameters = parameters
        last: dict[str, int] = {}
        for index, site in enumerate(grouping.sites):
            for name in site.parameters:
                last[name] = min(last.get(name, grouping.groups), grouping.group_of(index))
        self.buckets = [[name for name in parameters if last[name] == m] for m in range(grouping.groups)]
        self._reset()

    def _reset(self) -> None:
        self._next = len(self.buckets) - 1
        self._closed: set[int] = set()
        self._sent: list[tuple[Any, Tensor, list[str]]] = []

    @property
    def begun(self) -> bool:
        """Whether a bucket has been sent since the last :meth:`finish`."""
        return self._next < len(self.buckets) - 1

    def close(self, group: int, sums: dict[str, Tensor]) -> None:
        """All sites of a group are in the sums, of the last backward pass, too; what can be sent is taken and sent."""
        self._closed.add(group)
        while self._next in self._closed:
            self._send_next(sums)

    def send_rest(self, sums: dict[str, Tensor]) -> None:
        """Send every bucket that has not been; nothing is left in the sums."""
        while self._next >= 0:
            self._send_next(sums)
        sums.clear()

    def finish(self) -> dict[str, Tensor]:
        """The sums over all ranks by parameter name; the next logical batch begins."""
        sent = self._sent
        self._reset()
        found: dict[str, Tensor] = {}
        with self._ranks.or_lost("the step"):
            for work, flat, names in sent:
                work.wait()
                if len(names) == 1:
                    found[names[0]] = flat
                    continue
                parts = flat.split([self._parameters[name].numel() for name in names])
                found |= {n: part.view(self._parameters[n].shape) for n, part in zip(names, parts, strict=True)}
        return found

    def _send_next(self, sums: dict[str, Tensor]) -> None:
        for names in self._pieces(self.buckets[self._next]):
            taken = [self._take(name, sums) for name in names]
            flat = taken[0].contiguous() if len(taken) == 1 else torch.cat([x.reshape(-1) for x in taken])
            del taken
            self._sent.append((self._ranks.start_sum_(flat), flat, names))
        self._next -= 1

    def _take(self, name: str, sums: dict[str, Tensor]) -> Tensor:
        parameter = self._parameters[name]
        total = sums.pop(name, None)
        dtype = accumulator(parameter.dtype)
        return torch.zeros_like(parameter, dtype=dtype) if total is None else total.to(dtype)

    def _pieces(self, names: Sequence[str]) -> list[list[str]]:
        """Parameters that are sent together, the same on every rank."""
        small: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        alone = []
        for name in names:
            parameter = self._parameters[name]
            if parameter.numel() >= TOGETHER:
                alone.append([name])
            else:
                small.setdefault((accumulator(parameter.dtype), parameter.device), []).append(name)
        return [*alone, *small.values()]
