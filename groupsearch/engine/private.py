"""make_private: the one call that makes an existing loop differentially private.

Apart from the package, which names its two classes and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from groupsearch.engine.book import Groups, Ledger
from groupsearch.engine.capture import Capture
from groupsearch.engine.layout import Layouts
from groupsearch.engine.loading import PoissonBatches
from groupsearch.engine.mechanism import Mechanism, added_delta
from groupsearch.engine.ownership import check_covered, check_optimizer_kind, check_plain
from groupsearch.engine.ranks import (
    Ranks,
    Reduction,
    digest,
    fingerprint,
    generator_of,
    refuse_other_wrapper,
    silence,
    speak,
    unwrapped,
    weights_of,
)
from groupsearch.engine.step import LossScale, PrivateStep, ZeroGrad, check_surroundings, nothing_yet
from groupsearch.engine.truth.check import CheckSubject, Reading, check_before
from groupsearch.engine.truth.comparison import Loss
from groupsearch.engine.truth.draws import alike
from groupsearch.engine.truth.watch import RATE, EngineReport, Watch
from groupsearch.errors import GroupSearchError
from groupsearch.options import EngineOptions
from groupsearch.plan.checked import Checked
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.trace import Rows, Site, shared_parameters, weights_with_choice
from groupsearch.privacy import PrivacyStatement
from groupsearch.privacy.sizes import SizesSeen
from groupsearch.randomness import SecureStream, source_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from groupsearch.privacy.accounting import Accountant

# -- The engine's state as plain types and tensors, and what must agree for a run to be resumed ----

VERSION = 2


def describe_plan(plan: ClipPlan) -> dict[str, Any]:
    """Everything of a plan that changes what is clipped and how: two plans do the same if these are equal."""
    settings = {field.name: repr(getattr(plan, field.name)) for field in fields(plan) if field.name != "grouping"}
    sites = [[site.name, _layout(site), *site.parameters] for site in plan.grouping.sites]
    return {"sites": sites, "boundaries": list(plan.grouping.boundaries), **settings}


def check_state(state: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Check that a state is one of an engine with these fixed settings.

    Raises:
        GroupSearchError: naming what is missing or differs.
    """
    if state.get("version") != VERSION or not all(key in state for key in ("steps", "mechanism", "accountant")):
        raise GroupSearchError(
            f"Expected the state of an engine of version {VERSION}, found one with {sorted(map(str, state))}. Give "
            "what engine.state_dict() returned."
        )
    state = {"processes": 1, **state}  # one that was saved before there could be more
    for name, here in fixed.items():
        there = state.get(name)
        if there == here:
            continue
        found = f"{name}={there}, this engine has {here}"
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            differing = [key for key in here if there.get(key) != here[key]]
            found = f"another {name}, which differs in {', '.join(differing)}"
        raise GroupSearchError(
            f"The state was written with {found}. Resume with the same {name}; to go on under another one, start a new "
            "engine and load the accountant's state alone."
        )


def _layout(site: Site) -> str:
    return site.layout if site.rows == Rows() else f"{site.layout}, {site.rows}"


# -- PrivateEngine: the engine as the training loop sees it ----------------------------------------


@dataclass(frozen=True)
class LoopSettings:
    """What the engine must know of the loop, as :func:`~groupsearch.engine.private.make_private` explains it."""

    expected_batch_size: float
    loss_reduction: str = "mean"
    sampling_rate: float | None = None
    batches: PoissonBatches | None = None
    grad_scaler: GradScaler | None = None
    options: EngineOptions = field(default_factory=EngineOptions)
    sampling: str = "poisson"
    loss_divisor: float | None = None
    seeded: bool = False
    loss: Loss | None = None
    watch: float = RATE
    checked: Checked | None = None


class PrivateEngine:
    """What :func:`~groupsearch.engine.private.make_private` attached to a model and its optimizer.

    A logical batch is all that is backpropagated between two steps; every example may be in it once.
    What was summed of it is dropped

    * by ``zero_grad`` of the optimizer or the model;
    * after a backward pass that raised: all micro-batches before the accident are dropped with it,
      whatever they summed. (A forward pass that raised adds nothing and drops nothing.)

    Take the batch again from its beginning then: every batch that was drawn must be stepped on. One that is left out
    because of what was seen of it (a loss that is not finite, say) tells of its examples without any noise, which no
    epsilon counts; with ``batches`` the next one is refused, with a loader of the loop's own it can only be counted
    (``given_up``). Whether an accident happens is not covered by the guarantee: let it not depend on the data.

    Attributes:
        plan: the clip plan.
        mechanism: clips and adds noise.
        settings: what was said of the loop.
        accountant: counts the steps; None where no sampling rate was given.
        given_up: logical batches of the loop's own loader that were summed and dropped by ``zero_grad``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        mechanism: Mechanism,
        settings: LoopSettings,
        accountant: Accountant | None = None,
    ) -> None:
        self.plan: ClipPlan = mechanism.plan
        self.mechanism = mechanism
        self.settings = settings
        self.accountant = accountant
        self._model = model
        self.given_up = 0
        self._sizes = None if accountant is None or settings.batches is not None else SizesSeen(*self._population())
        grouping = self.plan.grouping
        groups = Groups(grouping.sites, grouping.group_of, grouping.groups)
        layouts = Layouts.of_sites(grouping.sites)
        self._ledger = Ledger(
            groups, mechanism.clip, self._scale_of, lambda: self._capture.passes.current, mechanism.abandon
        )
        self._capture = Capture(model, self._ledger.receive, settings.options, layouts)
        self._capture.passes.on_begin = self._begin
        self._loss_scale = LossScale(optimizer, settings.grad_scaler)
        self._step = PrivateStep(
            model, optimizer, mechanism, self._ledger, settings.expected_batch_size, self._loss_scale, self._settle
        )
        self._watch = self._new_watch(Reading(settings.options, layouts))
        self._step.on_check = self._check_step
        if settings.batches is not None:
            settings.batches.private = True
        self._step.on_release = self._released
        self._zero_grads = [ZeroGrad(owner, self._discard) for owner in (optimizer, model)]
        self._ranks: Ranks | None = None
        self._reduction: Reduction | None = None
        self._wrapper: tuple[DistributedDataParallel, tuple[bool, bool]] | None = None

    def _join(self, ranks: Ranks) -> None:
        """Clip this rank's examples and step on the sums of all ranks from now on; to be called on all of them."""
        self._ranks = ranks
        self._reduction = reduction = Reduction(ranks, self.plan, self._step.parameters)
        ranks.share(self.mechanism.source)
        if self.settings.batches is not None:
            self.settings.batches.spread(ranks)
        self._ledger.on_close = self._reduce
        self._loss_scale.on_found = ranks.largest_
        self._step.together = self._meet
        self._step.take = reduction.finish
        if isinstance(self.mechanism.source, SecureStream):  # whose numbers one process alone has
            self._step.add_noise = self._noise_of_rank_0

    def _described(self, generator: torch.Generator | None) -> dict[str, object]:
        """What must be the same on all ranks, the most telling first."""
        plan, told, optimizer = self.plan, self.settings, self._step.optimizer
        layout = [(name, tuple(x.shape), x.dtype) for name, x in self._model.state_dict(keep_vars=True).items()]
        groups = [{key: value for key, value in each.items() if key != "params"} for each in optimizer.param_groups]
        batches = {} if told.batches is None else told.batches.described()
        return {
            "number of groups": plan.grouping.groups,
            "grouping": ",".join(map(str, plan.grouping.boundaries)) or "all-layer",
            "model": f"{type(self._model).__name__} {digest(layout)}",
            "plan": f"{plan.rule}, {plan.allocation}, {digest(describe_plan(plan))}",
            "noise_multiplier": self.noise_multiplier,
            "expected_batch_size": self.expected_batch_size,
            "sampling": f"{told.sampling} at rate {told.sampling_rate}",
            "loss_reduction": f"{told.loss_reduction} over {told.loss_divisor or 1}",
            "grad_scaler": self._loss_scale.enabled,
            "noise generator": generator_of(generator),
            "secure": isinstance(self.mechanism.source, SecureStream),
            **batches,
            "optimizer": f"{type(optimizer).__name__} {groups}",
            "weights": weights_of(self._model),
        }

    def _silence(self, wrapper: DistributedDataParallel) -> None:
        """Take the part of a DDP around the model."""
        self._wrapper = wrapper, silence(wrapper)
        self._zero_grads.append(ZeroGrad(wrapper, self._discard))

    def report(self) -> EngineReport:
        """How every site is clipped, what was checked of the model and how, and what the watch has seen."""
        watched = None if self._watch is None else self._watch.watched
        return EngineReport.of(self.plan, self.settings.options.methods, self.settings.checked, watched)

    @property
    def steps(self) -> int:
        """Noisy gradients handed to the optimizer so far."""
        return self._step.count

    @property
    def noise_multiplier(self) -> float:
        """Sigma of the whole release of a step."""
        return self.mechanism.noise_multiplier

    @property
    def expected_batch_size(self) -> float:
        """What the noisy sum is divided by."""
        return self.settings.expected_batch_size

    @property
    def norms(self) -> Tensor:
        """Gradient norms before clipping, (B, M), of the last forward pass that backward has reached.

        Infinite where an example's gradient was not finite; such an example adds nothing to the group's sum.
        """
        norms = self._ledger.norms
        return torch.stack([norms[m] for m in sorted(norms)], dim=1)

    def clipped_sums(self) -> dict[str, Tensor]:
        """The clipped sums of the logical batch so far, without noise, by parameter name; not private.

        Those of this rank's examples, where there are several.

        Raises:
            GroupSearchError: when some of them are on their way to the other ranks.
        """
        self._settle()
        if self._reduction is not None and self._reduction.begun:
            raise GroupSearchError(
                "The clipped sums of this logical batch are being added up over the ranks and are no longer this "
                "rank's own. Look at them before its last backward pass, or at .grad after optimizer.step()."
            )
        return {name: self._ledger.sums.get(name, nothing_yet(p)) for name, p in self._step.parameters.items()}

    def on_close(self, called: Callable[[int], None]) -> None:
        """Have ``called`` told of every group whose clipped sums are formed, in a process that trains alone."""
        if self._ranks is None:
            self._ledger.on_close = lambda group, alone: called(group)

    def same_examples(self) -> AbstractContextManager[None]:
        """Inside ``with``: several forward passes before one backward, row i of each being the same example.

        An example's gradient is that of all passes together, clipped once, as in a contrastive loss.
        The plan must come from a trace of a loss that makes as many passes. Rows that are not the same example
        void the guarantee.
        """
        return self._with_passes("same")

    def different_examples(self) -> AbstractContextManager[None]:
        """Inside ``with``: several forward passes before one backward, no example being in two of them.

        Every pass is clipped by itself, as micro-batches are. An example that is in two passes voids the guarantee.
        """
        return self._with_passes("different")

    @contextmanager
    def _with_passes(self, passes: str) -> Iterator[None]:
        self._settle()
        before, self._capture.passes.policy = self._capture.passes.policy, passes
        self._capture.passes.current = (
            None  # a forward pass from before, perhaps of other examples, is not gone on with
        )
        try:
            yield
        finally:
            self._capture.passes.policy = before

    def epsilon(self, delta: float) -> float:
        """Epsilon at ``delta`` of all steps so far, by the accountant.

        Raises:
            GroupSearchError: when the engine has no accountant.
        """
        if self.accountant is None:
            raise GroupSearchError(
                "Expected a sampling rate to account with, found none. Give make_private(..., sampling_rate=...): the "
                "probability with which each example enters a logical batch, under Poisson sampling."
            )
        return self.accountant.epsilon(delta)

    def statement(self, delta: float) -> PrivacyStatement:
        """Epsilon at ``delta`` of all steps so far and all that belongs to it; ``print`` it to read it.

        Raises:
            GroupSearchError: when the engine has no accountant.
        """
        self.epsilon(delta)
        assert self.accountant is not None
        _, examples, _ = self._population()
        return self.accountant.statement(delta, examples, seeded=self.settings.seeded, given_up=self.given_up)

    @property
    def added_delta(self) -> float:
        """What all steps so far add to delta because noise ends somewhere: no epsilon of any accountant has it.

        A bound, see :func:`groupsearch.engine.mechanism.added_delta`; infinite noise would add nothing, none adds 1.
        """
        if not self.steps:
            return 0.0
        if not self.noise_multiplier:
            return 1.0
        adaptive = 0 if self.plan.adaptive is None else self.plan.grouping.groups
        return added_delta(self._step.numbers + adaptive, self.noise_multiplier, self.steps)

    def state_dict(self, *, exact: bool = False) -> dict[str, Any]:
        """Steps, accountant and thresholds, for ``torch.save``; loads with ``weights_only=True``.

        Args:
            exact: whether to save the state of the noise's generator, too. With the states of the model, the
                optimizer, the batches (saved with ``exact``; and of a GradScaler and torch's own generators where
                they are used) a run that is resumed with ``exact`` goes on as if it had not stopped, bit for bit
                on the CPU. **Whoever reads such a state can take all noise away**, that of the steps before
                included: it is for experiments.

        Raises:
            GroupSearchError: in the middle of a logical batch, whose sums are not saved, or when the state of
                a secure stream is asked for, which has none.
        """
        self._check_between_steps("saved")
        return {
            "version": VERSION,
            **self._fixed(),
            "steps": self.steps,
            "mechanism": self.mechanism.state_dict(exact=exact),
            "accountant": None if self.accountant is None else self.accountant.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, exact: bool = False) -> None:
        """Go on where the engine that wrote the state stood, with fresh noise.

        The generator, also one that ``make_private`` was given, is filled anew from the operating system.

        Args:
            state: what :meth:`state_dict` returned.
            exact: whether to go on with the noise of the run that saved, bit for bit. **Epsilon holds for one
                continuation alone**: two with the same noise show by their difference what no noise hides.

        Raises:
            GroupSearchError: when the state is of another plan, noise, sampling rate or expected batch size,
                or in the middle of a logical batch, or holds no generator to go on with.
        """
        self._check_between_steps("loaded")
        if self._ranks is None:
            check_state(state, self._fixed())
        else:
            self._ranks.alike("the state to go on with", lambda: self._state_facts(state, exact))
        self.mechanism.load_state_dict(state["mechanism"], exact=exact)
        if self._ranks is not None:
            self._ranks.share(self.mechanism.source)
        if self.accountant is not None:
            self.accountant.load_state_dict(state["accountant"])
        self._step.count = int(state["steps"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """An engine belongs to one model and its optimizer, and is neither copied nor pickled.

        Raises:
            GroupSearchError: always.
        """
        raise GroupSearchError(
            "An engine can be neither copied nor pickled: noise would be drawn twice. Save engine.state_dict(); a copy "
            "of the model is a plain model, which can be made private by itself."
        )

    def detach(self) -> None:
        """Take the engine away; model and optimizer are as they were."""
        self._capture.remove()
        self._step.remove()
        for zero_grad in self._zero_grads:
            zero_grad.remove()
        self._loss_scale.detach()
        if self.settings.batches is not None:
            self.settings.batches.private = False
            self.settings.batches.on_piece = lambda piece: None
        self._ledger.abandon()
        self._ledger.norms = {}
        self._ledger.on_close = lambda group, alone: None
        if self._wrapper is not None:
            speak(*self._wrapper)

    def _state_facts(self, state: Mapping[str, Any], exact: bool) -> dict[str, object]:
        check_state(state, self._fixed())
        told = {key: value for key, value in state["mechanism"].items() if key != "generator"}
        facts = {"number of steps": state["steps"], "mechanism": told, "exact": exact}
        return facts | ({"generator": digest(state["mechanism"].get("generator").tolist())} if exact else {})

    def _reduce(self, group: int, alone: bool) -> None:
        """A group is closed; if that is the last time in this logical batch its sums can be on their way."""
        batches = self.settings.batches
        if self._reduction is not None and alone and batches is not None and batches.is_whole(self._ledger.examples):
            self._reduction.close(group, self._ledger.sums)

    def _meet(self, check: Callable[[], None]) -> None:
        """Before a step: all ranks check what is theirs, send what is left to send, and step together or not at all."""
        assert self._ranks is not None
        assert self._reduction is not None
        failure: list[Exception] = []
        try:
            check()
        except Exception as error:
            failure.append(error)
        self._reduction.send_rest(self._ledger.sums)
        within, seen = self.mechanism.counts or ([], [])
        mine = [len(failure), self.steps, self._fingerprint(), self._ledger.examples, *within, *seen]
        told = self._ranks.exchange(mine)

        def agree() -> dict[str, object]:
            if failure:
                raise failure[0]
            self._check_sizes(sum(each[3] for each in told))
            return {"number of steps": mine[1], "weights in the course of training": mine[2]}

        alike = all(each[:3] == [0, *mine[1:3]] for each in told)
        try:
            agree() if alike else self._ranks.alike("the step", agree)  # which sizes there are is the same everywhere
        except BaseException:
            self._reduction.finish()
            self._ledger.abandon()
            raise
        if within:
            totals = [sum(column) for column in zip(*(each[4:] for each in told), strict=True)]
            self.mechanism.counts = totals[: len(within)], totals[len(within) :]

    def _fingerprint(self) -> int:
        """Of the weights of one parameter, another at every step; a GPU, which must be waited for, is asked seldom."""
        names = list(self._step.parameters)
        parameter = self._step.parameters[names[self.steps % len(names)]]
        return 0 if parameter.is_cuda and self.steps % _ASKED_EVERY else fingerprint(parameter)

    def _noise_of_rank_0(self, sums: Mapping[str, Tensor]) -> None:
        assert self._ranks is not None
        if self._ranks.rank == 0:
            self.mechanism.add_noises_(sums)
        self._ranks.copy_(list(sums.values()))

    def _released(self) -> None:
        """A noisy gradient is out: it is accounted for; thresholds that a cipher's noise moved are rank 0's."""
        if (
            self._ranks is not None
            and self.plan.adaptive is not None
            and isinstance(self.mechanism.source, SecureStream)
        ):
            self.mechanism.in_force = self.plan.with_thresholds(self._ranks.tell(self.mechanism.thresholds))
        if self.accountant is not None:
            self.accountant.step()

    def _new_watch(self, reading: Reading) -> Watch | None:
        batches, loss = self.settings.batches, self.settings.loss
        if batches is None or loss is None or not self.settings.watch:
            return None
        shared = shared_parameters(self.plan.grouping.sites)
        subject = CheckSubject(self._model, loss, lambda model, receive: self._capture.turned_to(receive), shared)
        mode = self.settings.checked.mode if self.settings.checked else None
        watch = Watch(subject, self._capture.set_aside, reading, self.settings.watch, mode)
        batches.on_piece = watch.see
        return watch

    def _fixed(self) -> dict[str, Any]:
        return {
            "plan": describe_plan(self.plan),
            "noise_multiplier": float(self.noise_multiplier),
            "expected_batch_size": float(self.expected_batch_size),
            "sampling_rate": self.settings.sampling_rate,
            "processes": 1 if self._ranks is None else self._ranks.size,
        }

    def _check_between_steps(self, what: str) -> None:
        self._settle()
        if not self._ledger.empty:
            raise GroupSearchError(
                f"The engine's state cannot be {what} in the middle of a logical batch: its clipped sums are no part "
                "of it. Do it after optimizer.step(), or give the batch up with optimizer.zero_grad()."
            )

    def _scale_of(self, batch_size: int) -> float | Tensor:
        if self.settings.batches is not None:
            self.settings.batches.check_handed_out(self._ledger.examples)
        divisor = self.settings.loss_divisor or 1.0
        return self._loss_scale.over((batch_size if self.settings.loss_reduction == "mean" else 1.0) * divisor)

    def _population(self) -> tuple[str, int, float]:
        """How batches are drawn, from how many examples, at which rate."""
        rate = self.settings.sampling_rate
        assert rate is not None
        return self.settings.sampling, round(self.expected_batch_size / rate), rate

    def _check_step(self, examples: int) -> None:
        """Refuse a step that the watch objects to, or on a batch not drawn or scaled as the engine was told."""
        if self._watch is not None:
            self._watch.check()
        check_surroundings(
            loss_divisor=self.settings.loss_divisor,
            poisson=self._sizes is not None and self.settings.sampling == "poisson",
        )
        if self.settings.batches is not None:
            self.settings.batches.check_step(examples)
        if self._ranks is None:
            self._check_sizes(examples)

    def _check_sizes(self, examples: int) -> None:
        wrong = None if self._sizes is None else self._sizes.add(examples)
        if wrong is not None:
            raise GroupSearchError(
                f"Expected batches drawn by {self.settings.sampling} sampling at the rate that was given, found "
                f"{wrong}: epsilon would be that of another run. Name what the loader does with make_private(..., "
                "sampling='shuffled') or 'fixed-size', give its rate and expected batch size, or take PoissonBatches."
            )

    def _begin(self) -> None:
        """A forward pass begins."""
        refuse_other_wrapper(None if self._wrapper is None else self._wrapper[0])
        self._settle()

    def _settle(self) -> None:
        self._ledger.settle(self._capture.passes.open)
        self._capture.check_replays()

    def _discard(self) -> None:
        self._settle()
        if self.settings.batches is None and not self._ledger.empty:
            self.given_up += 1
        self._ledger.abandon()


# -- private ---------------------------------------------------------------------------------------

REDUCTIONS = ("mean", "sum")
_SHOWN = 16
_ASKED_EVERY = 50


def make_private(  # noqa: PLR0913, PLR0915 - what a loop may say, by name, and its checks in order
    model: nn.Module,
    optimizer: Optimizer,
    plan: ClipPlan,
    *,
    noise_multiplier: float,
    batches: PoissonBatches | None = None,
    expected_batch_size: float | None = None,
    sampling_rate: float | None = None,
    sampling: str = "poisson",
    loss_reduction: str = "mean",
    loss_divisor: float | None = None,
    grad_scaler: GradScaler | None = None,
    options: EngineOptions | None = None,
    generator: torch.Generator | None = None,
    loss: Loss | None = None,
    sample: Any = None,
    watch: float = RATE,
    allow_state: Collection[str] = (),
    secure: bool = False,
    process_group: ProcessGroup | None = None,
) -> PrivateEngine:
    """Make the steps of an existing loop differentially private (Book-Keeping with groups).

    ``loss.backward()`` and ``optimizer.step()`` stay as they are. Backward forms the clipped
    sums of every group of the plan in one pass (arXiv 2210.00038, 2310.19215); step adds
    Gaussian noise once, divides by ``expected_batch_size`` and hands the result to the
    optimizer as ``.grad``. Several backward passes before a step add up (micro-batches); a
    step without a backward is the step of an empty batch: noise alone.

    Norms and sums are formed in float32 at least, also under autocast and for half-precision
    weights; noise is added before the one rounding to the parameter's dtype. An example whose
    gradient is not finite adds nothing.

    In several processes (``torch.distributed`` initialised, as ``torchrun`` has it done) each gives its own part of a
    logical batch, steps as often as the others, and has the same weights after every step: those that one process
    with all examples would have. Sums are added up over the processes group by group, and noise is added once
    (:mod:`groupsearch.engine.ranks`). What is refused in one process is then refused in all, with one message.

    Args:
        model: the model, or DistributedDataParallel around it; every trainable parameter must be covered by the plan's
            sites.
        optimizer: holds exactly the model's trainable parameters.
        plan: groups, thresholds and clip rule, made from a trace of this model.
        noise_multiplier: sigma >= 0; the noise of a parameter has sigma times ``plan.noise_scales`` as its
            deviation (``plan.sensitivity`` where noise is allocated globally), with the thresholds in force
            (``engine.mechanism.thresholds``).
        batches: what the loop iterates. The expected batch size and the sampling rate are then theirs,
            and a step that is not on exactly one whole logical batch is refused.
        expected_batch_size: sampling rate times data set size, > 0; never the batch's own size.
        sampling_rate: probability with which each example enters a logical batch (else the batch size over the
            number of examples); with it ``engine.epsilon(delta)`` tells what the steps so far cost.
        sampling: what the loop's own loader does: ``poisson``, ``shuffled`` or ``fixed-size``, each with an epsilon
            of its own (:mod:`groupsearch.privacy.accounting`). Batches that are visibly drawn otherwise are refused:
            see :class:`~groupsearch.privacy.sizes.SizesSeen`, also for what that may tell of private sizes.
        loss_reduction: "mean" when the loss is the mean of per-example losses over the
            micro-batch, "sum" when it is their sum.
        loss_divisor: what the loop divides that mean or sum by before backward, as libraries do that accumulate
            gradients: thresholds would act so many times as large. None where it divides by nothing, which
            is then held against what accelerate and transformers' Trainer say of themselves.
        grad_scaler: the ``torch.amp.GradScaler`` of a float16 loop, which stays as it is. No step
            is skipped: an overflow adds zero, and lowers the scale at ``update()``. The scale then
            depends on whether any example overflowed, which no noise hides, and so does the rounding of
            all others: the guarantee is strict for a scale that does not adapt
            (``scaler.update(scaler.get_scale())``), or with bfloat16, which needs none.
        options: choices of cost only.
        generator: draws the noise, for experiments alone: epsilon holds for nobody who knows its seed. By default
            one that the operating system's entropy fills, see :mod:`groupsearch.randomness`.
        loss: ``loss(model, batch)``, one loss per example (B,). With it the engine is held to plain autograd before
            the first step, on the model in the mode it is in (:mod:`groupsearch.engine.truth`): on the sample, or on
            the first examples of the batches' data. It costs about 25 examples' forward and backward passes.
        sample: a batch to check on, as ``loss`` takes it.
        watch: with ``loss`` and ``batches``, the part of physical batches that the watch in training looks at
            (:mod:`groupsearch.engine.truth.watch`); 0 for none. A difference refuses the step.
        allow_state: names of buffers and attributes that a forward pass may leave data in; they are not private.
        secure: draw the noise from a cipher, see :class:`groupsearch.randomness.SecureStream`.
        process_group: the processes that train together; those of DistributedDataParallel or of the default group if
            None. ``torch.distributed.GroupMember.NON_GROUP_MEMBER`` makes this process train alone.

    Returns:
        The engine. ``engine.detach()`` takes it away again; ``engine.report()`` says what was checked.

    Raises:
        UnsupportedModelError: for a layer that mixes examples, a wrapped model or an optimizer that
            cannot be served, or a trainable parameter that no site of the plan covers or that the optimizer
            does not hold; where the check finds that examples mix or the engine is not right.
        GroupSearchError: for a number outside its range, batches together with what they say, or a generator
            where the noise is to be secure.
    """
    module, wrapper = unwrapped(model)

    def make() -> PrivateEngine:  # noqa: PLR0915 - all that is refused, in order
        nonlocal expected_batch_size, sampling_rate, options, sample
        if loss_reduction not in REDUCTIONS:
            raise GroupSearchError(
                f"Expected loss_reduction to be one of {', '.join(REDUCTIONS)}, found {loss_reduction!r}."
            )
        if loss_divisor is not None and not 0 < loss_divisor < math.inf:
            raise GroupSearchError(f"Expected a finite loss_divisor > 0, found {loss_divisor}.")
        if batches is not None:
            if sampling != "poisson":
                raise GroupSearchError(
                    f"Found batches and also sampling={sampling!r}: PoissonBatches are Poisson samples. Leave one out."
                )
            if expected_batch_size is not None or sampling_rate is not None:
                raise GroupSearchError(
                    "Found batches and also expected_batch_size or sampling_rate, which are the batches' own. Give "
                    "either."
                )
            expected_batch_size, sampling_rate = batches.expected_batch_size, batches.sampling_rate
        if expected_batch_size is None:
            raise GroupSearchError("Expected batches or an expected_batch_size, found neither. Give one of the two.")
        if not (0 <= noise_multiplier < math.inf and 0 < expected_batch_size < math.inf):
            raise GroupSearchError(
                f"Expected finite noise_multiplier >= 0 and expected_batch_size > 0, found {noise_multiplier} and "
                f"{expected_batch_size}."
            )
        options = options or EngineOptions()
        options.check_weights(weights_with_choice(plan.grouping.sites))
        check_plain(module)
        check_optimizer_kind(optimizer)
        check_covered(module, plan, optimizer)
        if sampling_rate is None and sampling != "poisson":
            raise GroupSearchError(f"Found sampling={sampling!r} without a sampling_rate to account with. Give both.")
        accountant = None
        if sampling_rate is not None:
            from groupsearch.privacy.accounting import Accountant  # its libraries take as long to load as torch does

            accountant = Accountant(noise_multiplier, sampling_rate, sampling)
        seeded = generator is not None or (batches is not None and batches.seeded)
        device = next(p.device for p in module.parameters() if p.requires_grad)
        mechanism = Mechanism(plan, noise_multiplier, source_of(device, generator, secure), expected_batch_size)
        checked = None
        if loss is not None and (sample is not None or batches is not None):
            sites = plan.grouping.sites
            if sample is None and batches is not None:
                with alike():  # what loading draws is no part of the training
                    sample = batches.first(_SHOWN)
            reading = Reading(options, Layouts.of_sites(sites))
            checked = check_before(module, loss, sample, reading, shared_parameters(sites), allow_state)
        settings = LoopSettings(
            expected_batch_size,
            loss_reduction,
            sampling_rate,
            batches,
            grad_scaler,
            options,
            sampling=sampling,
            loss_divisor=loss_divisor,
            seeded=seeded,
            loss=loss,
            watch=watch,
            checked=checked,
        )
        return PrivateEngine(module, optimizer, mechanism, settings, accountant)

    ranks = Ranks.of(process_group if wrapper is None or process_group is not None else wrapper.process_group)
    engine = make() if ranks is None else _made_on_all(ranks, make, generator)
    if wrapper is not None:
        engine._silence(wrapper)
    return engine


def _made_on_all(ranks: Ranks, make: Callable[[], PrivateEngine], generator: torch.Generator | None) -> PrivateEngine:
    """The engine of this rank, when those of all ranks are there and fit each other."""
    made: list[PrivateEngine] = []

    def facts() -> dict[str, object]:
        made.append(make())
        return made[0]._described(generator)

    try:
        ranks.alike("make_private", facts)
        made[0]._join(ranks)
    except BaseException:
        for engine in made:
            engine.detach()
        raise
    return made[0]
