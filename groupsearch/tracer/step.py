"""One training step on tensors of any kind, with and without privacy, as it is traced and simulated."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.engine.optimizers import make_optimizer, warm_state
from groupsearch.engine.ranks import ALONE
from groupsearch.errors import GroupSearchError, is_out_of_memory
from groupsearch.options import EngineOptions, checkpoint_interval
from groupsearch.plan.cards import Card
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.plan.trace import StaticBytes, weights_with_choice
from groupsearch.tracer.allocator import Allocator, workspace_bytes
from groupsearch.tracer.fake import FakeTensors, fake_batch, fake_model
from groupsearch.tracer.live import LiveBytes, Scratch
from groupsearch.tracer.scratch import card_scratch
from groupsearch.workloads.batches import check_loss, map_tensors, tensors_of
from groupsearch.workloads.blocks import checkpoint_as
from groupsearch.workloads.copies import copy_of

Loss = Callable[[nn.Module, Any], Tensor]
AUTOCASTS = ("none", "bfloat16", "float16")


@dataclass(frozen=True)
class StepSettings:
    """What decides the cost of a step besides model, batch and grouping.

    Attributes:
        options: of the engine.
        optimizer: a name for :func:`groupsearch.engine.optimizers.make_optimizer`.
        checkpoint: ``none``, ``blocks`` (every repeated block is checkpointed) or ``every:K`` (one in K).
        micro_batches: how many batches are accumulated before the optimizer's step.
        autocast: dtype that forward and loss are cast to by :class:`torch.autocast`, or ``none``.
        noise_multiplier: any positive number; only that noise is drawn matters for cost.
    """

    options: EngineOptions = field(default_factory=EngineOptions)
    optimizer: str = "adam"
    checkpoint: str = "none"
    micro_batches: int = 1
    autocast: str = "none"
    noise_multiplier: float = 1.0

    def __post_init__(self) -> None:
        checkpoint_interval(self.checkpoint)
        if self.micro_batches < 1:
            raise GroupSearchError(f"Expected micro_batches >= 1, found {self.micro_batches}.")
        if self.autocast not in AUTOCASTS:
            raise GroupSearchError(f"Expected autocast to be one of {', '.join(AUTOCASTS)}, found {self.autocast!r}.")

    def to_json(self) -> dict[str, Any]:
        """The settings as they are written into documents."""
        return {
            "norm_method": self.options.norm_method,
            **({"methods": dict(self.options.methods)} if self.options.methods else {}),
            **({} if self.options.replay == "none" else {"replay": self.options.replay}),
            "optimizer": self.optimizer,
            "checkpoint": self.checkpoint,
            "micro_batches": self.micro_batches,
            "autocast": self.autocast,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepSettings:
        """The settings of a document; an older one knows neither micro-batches nor autocast and had neither.

        Raises:
            KeyError: naming what the document lacks.
            GroupSearchError: for a value that is no such setting.
        """
        return cls(
            EngineOptions(data["norm_method"], data.get("methods", {}), data.get("replay", "none")),
            data["optimizer"],
            data["checkpoint"],
            data.get("micro_batches", 1),
            data.get("autocast", "none"),
        )


@dataclass(frozen=True)
class Stage:
    """A model, its optimizer with state, and a batch, ready for a step whose bytes are counted.

    The batch stands for every micro-batch: the next one is taken when the one before is done with.
    ``loss`` casts where the settings say so.
    """

    model: nn.Module
    optimizer: Optimizer
    batch: Any
    loss: Loss
    live: LiveBytes
    named: StaticBytes
    micro_batches: int = 1

    @property
    def static(self) -> StaticBytes:
        """What is alive throughout; constants of model and loss count as buffers once a step has used them."""
        return replace(self.named, buffers=self.named.buffers + self.live.constant_bytes)

    def backward(self) -> None:
        """Forward and backward of one micro-batch.

        Raises:
            UnsupportedModelError: when the loss is not one value per example.
        """
        check_loss(self.model, self.batch, self.loss).mean().backward()

    def step(self) -> None:
        """One whole step; private when an engine is attached. Gradients are none afterwards."""
        for _ in range(self.micro_batches):
            self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def counted_step(self) -> int:
        """One whole step; returns its peak in bytes, static ones included."""
        start = len(self.live.log)
        with self.live:
            self.step()
        return self.live.peak_since(start) + self.static.total


@contextmanager
def made_private(stage: Stage, settings: StepSettings, grouping: Grouping, examples: int) -> Iterator[PrivateEngine]:
    """Inside, the stage's step is private, and every pass of it is of the same examples; of this process alone.

    Raises:
        GroupSearchError: when the options name a method for a weight that no site chooses one for.
    """
    settings.options.check_weights(weights_with_choice(grouping.sites))
    engine = make_private(
        stage.model,
        stage.optimizer,
        ClipPlan(grouping),
        noise_multiplier=settings.noise_multiplier,
        expected_batch_size=examples,
        options=settings.options,
        process_group=ALONE,
    )
    try:
        with engine.same_examples():  # a batch is one set of examples, however often the loss calls the model
            yield engine
    finally:
        engine.detach()


def fake_stage(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    settings: StepSettings,
    scratch: Scratch | None = None,
    allocator: Allocator | None = None,
) -> tuple[FakeTensors, Stage]:
    """A stage of fake tensors; enter what is returned with it to step on it."""
    card = None if allocator is None else allocator.card
    fake, device = FakeTensors(card), torch.device("cpu")
    duplicate = fake_model(model, fake.mode, device, moved=card is not None)
    examples = fake_batch(batch, fake, device)
    live = LiveBytes(scratch, allocator)
    fake.mode.met = lambda tensor: live.ignore([tensor])  # what it stands for is counted
    with fake:
        return fake, make_stage(duplicate, examples, loss, settings, live, card.workspace_bytes if card else 0)


def card_stage(
    model: nn.Module, batch: Any, loss: Loss, settings: StepSettings, card: Card
) -> tuple[FakeTensors, Stage]:
    """A stage of fake tensors as a card that is not there would take its step; see :func:`fake_stage`.

    Optimizers of no variant take theirs by lists, as torch does there.
    """
    optimizer = settings.optimizer if ":" in settings.optimizer else f"{settings.optimizer}:foreach"
    settings = replace(settings, optimizer=optimizer)
    return fake_stage(model, batch, loss, settings, card_scratch, Allocator.of_card(card))


def real_stage(  # noqa: PLR0913 - what a stage is made of
    model: nn.Module,
    batch: Any,
    loss: Loss,
    settings: StepSettings,
    device: torch.device,
    scratch: Scratch | None = None,
    copy_model: bool = True,
) -> Stage:
    """A stage on a copy of a model (or the model itself) and of a batch on a device, counted as its allocator does.

    A CUDA device has taken one step: its libraries are loaded, and their workspaces are among the static bytes.
    Its operations are watched as they run, those of the CPU are probed by ``scratch``.

    Raises:
        GroupSearchError: when the device is not there.
    """
    moved = real_copy(model, batch, device, copy_model)
    workspaces = workspace_bytes(device)
    stage = make_stage(*moved, loss, settings, LiveBytes(scratch, Allocator.of(device)), workspaces)
    if device.type == "cuda":
        stage.step()
    return stage


def make_stage(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    settings: StepSettings,
    live: LiveBytes | None = None,
    workspaces: int = 0,
) -> Stage:
    """A stage on the model's own tensors. The optimizer's state is allocated, gradients are none.

    Of many micro-batches it takes two: each after the second allocates and finds what the second did.

    Args:
        model: the model.
        batch: the batch.
        loss: one loss per example.
        settings: how the step is taken.
        live: counts its bytes; one that knows of no scratch and no rounding if not given.
        workspaces: bytes that libraries of the device keep.
    """
    checkpoint_as(model, settings.checkpoint)
    optimizer = make_optimizer(settings.optimizer, model.parameters(), 1e-3)
    warm_state(optimizer)
    live = live or LiveBytes()
    if live.allocator.card is not None:
        live.ignore(_on_host(optimizer), elsewhere=True)
    static = StaticBytes(
        weights=live.ignore(model.parameters()),
        buffers=live.ignore(model.buffers()),
        optimizer=live.ignore(t for t in pytree.tree_leaves(_state(optimizer)) if isinstance(t, Tensor)),
        batch=live.ignore(tensors_of(batch)),
        workspaces=workspaces,
    )
    loss = _casting(loss, settings.autocast, next(model.parameters()).device)
    return Stage(model, optimizer, batch, loss, live, static, min(settings.micro_batches, 2))


def real_copy(model: nn.Module, batch: Any, device: torch.device, copy_model: bool = True) -> tuple[nn.Module, Any]:
    """A copy of a model (or the model itself) and of a batch on a device, as a training step would hold it.

    A batch of slices, of expanded or shared storage is then one of its own, as a loader makes it.

    Raises:
        GroupSearchError: when the device is not there.
        UnsupportedModelError: when something on the model cannot be copied; it names the attribute.
    """
    if device.type == "meta":
        raise GroupSearchError(
            "Device 'meta' holds no values to step on. Name a real device, or none to trace without."
        )
    own = copy_of(model) if copy_model else model
    try:
        moved = own.to(device)
        return moved, map_tensors(lambda t: _on_its_own(t.to(device)), batch)
    except (RuntimeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise GroupSearchError(f"Device {str(device)!r} cannot be used: {str(error).splitlines()[0]}.") from error


def _on_its_own(tensor: Tensor) -> Tensor:
    """The tensor, if its storage is all its own, else a copy that has one."""
    if tensor.layout != torch.strided or tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size():
        return tensor
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _casting(loss: Loss, autocast: str, device: torch.device) -> Loss:
    if autocast == "none":
        return loss

    def cast(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast(device.type, getattr(torch, autocast)):
            return loss(model, batch)

    return cast


def _on_host(optimizer: Optimizer) -> Iterator[Tensor]:
    """Step counters, which torch keeps on the CPU unless its step is one kernel."""
    for group in optimizer.param_groups:
        if not group.get("fused"):
            for parameter in group["params"]:
                step = optimizer.state.get(parameter, {}).get("step")
                if isinstance(step, Tensor):
                    yield step


def _state(optimizer: Optimizer) -> list[Mapping[str, Any]]:
    return [dict(state) for state in optimizer.state.values()]


# -- Ctrl-C while operations are watched: held until they are done ---------------------------------


@contextmanager
def held_interrupts() -> Iterator[None]:
    """Hold an interrupt until what runs inside is done, and handle it then; a second one is handled at once.

    A traced step runs Python from within torch at every operation and every release of a tensor. An
    exception raised there by a signal can be swallowed, as in a weak reference's callback, or end the process, as in a
    destructor of C++. A step takes seconds.

    Outside the main thread, and where interrupts are ignored, nothing is changed.

    Raises:
        KeyboardInterrupt: at the end, when there was one, by Python's own handler.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    held = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal held
        if held:
            before(number, frame)
        held = True

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        before(signal.SIGINT, None)
