"""The truth check: the engine held to plain autograd on the user's own model, loss and examples.

Every example's gradient as the engine books it, in batches of one, two and three, with a duplicate
and with an extreme example, is compared with plain autograd on that example alone. NaN in one
example must reach no other, and no pass may leave behind what depends on the data. The model runs
in the mode it is in; random draws are made alike for all examples meanwhile, and products are of IEEE
float32: TF32, which a GPU's convolutions take by default, differs by as much as a fault may.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from groupsearch.engine.arithmetic import ieee
from groupsearch.engine.capture import Capture
from groupsearch.engine.layout import Layouts
from groupsearch.engine.ownership import owned_layers
from groupsearch.engine.passes import Receiver
from groupsearch.engine.truth.comparison import (
    TOLERANCES,
    BookedPass,
    Difference,
    Gradient,
    Loss,
    Truth,
    booked_pass,
    compare,
    compare_losses,
    described,
    first_difference,
    not_linear,
    plain_pass,
    sum_faults,
    tolerance_of,
)
from groupsearch.engine.truth.draws import USUAL, Constants, alike
from groupsearch.engine.truth.leftovers import ModelMemory, left_as_it_was, same_values
from groupsearch.engine.truth.rows import Crowd, PoisonedIds, TriedRows, choose_rows, joined, poisoned
from groupsearch.errors import GroupSearchError, TruthError, UnsupportedModelError, is_out_of_memory
from groupsearch.options import EngineOptions
from groupsearch.plan.checked import Checked
from groupsearch.workloads.batches import count_examples, map_tensors, take_examples

# -- Reading: how the engine reads a model, as one value that whoever attaches a Capture passes on -


@dataclass(frozen=True)
class Reading:
    """What a :class:`~groupsearch.engine.capture.Capture` is told besides the model and its receiver.

    Attributes:
        options: decide the norm method per site.
        layouts: where layers keep the examples of a batch.
    """

    options: EngineOptions = field(default_factory=EngineOptions)
    layouts: Layouts = field(default_factory=Layouts)

    def capture(self, model: nn.Module, receive: Receiver) -> Capture:
        """A capture whose forward passes, until the next backward, are of the same examples."""
        capture = Capture(model, receive, self.options, self.layouts)
        capture.passes.policy = "same"  # a batch is one set of examples, however often the loss calls the model
        return capture

    @contextmanager
    def attached(self, model: nn.Module, receive: Receiver) -> Iterator[None]:
        """A capture for a while."""
        capture = self.capture(model, receive)
        try:
            yield
        finally:
            capture.remove()


# -- check -----------------------------------------------------------------------------------------

Attach = Callable[[nn.Module, Receiver], AbstractContextManager[Any]]


@dataclass(frozen=True)
class CheckSubject:
    """What is checked.

    Attributes:
        model: the model.
        loss: one loss per example.
        attach: attaches the engine's capture to a model for a while.
        shared: parameters that several sites use.
        draws: what random draws are.
    """

    model: nn.Module
    loss: Loss
    attach: Attach
    shared: frozenset[str] = frozenset()
    draws: Constants = USUAL

    @classmethod
    def of(
        cls, model: nn.Module, loss: Loss, reading: Reading, shared: Collection[str], draws: Constants = USUAL
    ) -> CheckSubject:
        """A model without an engine, read as a reading says."""
        return cls(model, loss, reading.attached, frozenset(shared), draws)

    def alone(self, example: Any) -> Truth:
        """An example by plain autograd."""
        losses, gradient = plain_pass(self.model, example, self.loss)
        return Truth(float(losses), gradient)

    def booked(self, batch: Any, examples: Sequence[int] | None = None, factor: float = 1.0) -> BookedPass:
        """A batch through the engine; the sum of all unless some are asked for."""
        return booked_pass(
            self.model, batch, self.loss, lambda r: self.attach(self.model, r), self.shared, examples, factor
        )


@dataclass(frozen=True)
class _Batch:
    """A batch of the check: rows by their number, of which the last may be changed, and how."""

    numbers: tuple[int, ...]
    last: str = ""
    how: str = ""

    def __str__(self) -> str:
        names = ", ".join(map(str, self.numbers))
        return f"row{'s' if len(self.numbers) > 1 else ''} {names}{self.last}{self.how}"


@dataclass(frozen=True)
class _Comparison:
    """A batch with its examples alone, by their number in it, and what plain autograd gives for each.

    ``whole`` says that the sum of the batch is compared too, for which all of its examples are needed.
    """

    name: str
    batch: Any
    examples: Mapping[int, Any]
    truths: Mapping[int, Truth]
    whole: bool = True
    factor: float = 1.0

    def fault(self, subject: CheckSubject, tolerance: float) -> tuple[float, Difference | None]:
        """The largest difference of an example's gradient, and the worst of those that are not allowed."""
        booked = subject.booked(self.batch, None if self.whole else sorted(self.truths), self.factor)
        scaled = {i: Truth(t.loss, t.gradient.times(self.factor)) for i, t in self.truths.items()}
        worst, fault = compare(booked, scaled, tolerance)
        return worst, compare_losses(booked.losses, scaled, tolerance) or fault


_FACTOR = 2.0**-6


@dataclass
class _State:
    skipped: list[str] = field(default_factory=list)
    state: list[str] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)
    worst: float = 0.0


@dataclass(frozen=True)
class Tried:
    """Rows that a model takes, together and one by one, and what plain autograd gives for each at some draws."""

    rows: TriedRows
    truths: tuple[Truth, ...]
    draws: Constants


def try_rows(model: nn.Module, batch: Any, loss: Loss, draws: Constants = USUAL) -> Tried:
    """Rows of a batch that the model takes, together and one by one, by plain autograd.

    Raises:
        UnsupportedModelError: for sizes of batch that do not run, and a loss that is not one per example.
        Exception: what the model or the loss raises on the batch as it is given, with a note.
    """
    with left_as_it_was(model) as memory, alike(draws), ieee():
        rows, truths = _Runs(model, loss, memory).on(batch, choose_rows(batch))
    return Tried(rows, truths, draws)


def check_truth(subject: CheckSubject, tried: Tried, allow_state: Collection[str] = ()) -> Checked:
    """Hold the engine to plain autograd on rows of a batch.

    Model, buffers, gradients, modes and random generators are afterwards as they were. It costs about
    75 examples' forward and backward passes, and one of the batch as it was given (six examples at least, 64 at
    most), whose activations are what it needs in memory.

    Args:
        subject: model, loss and how the engine reads them.
        tried: what :func:`try_rows` found, on the model's device.
        allow_state: names of buffers and attributes that may keep what depends on the data.

    Raises:
        TruthError: where the engine is not right, or examples mix.
        UnsupportedModelError: for state that depends on the data.
    """
    with left_as_it_was(subject.model) as memory, alike(subject.draws), ieee():
        return _Check(subject, memory, frozenset(allow_state)).run(tried)


def check_before(
    model: nn.Module, loss: Loss, sample: Any, reading: Reading, shared: Collection[str], allow_state: Collection[str]
) -> Checked:
    """The truth check of a model on a sample of its data, before its first private step.

    Raises:
        UnsupportedModelError: as :func:`check_truth` and :func:`try_rows`.
    """
    owned_layers(model)  # refuses what needs no pass to be seen
    device = next(model.parameters()).device
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        tried = try_rows(model, map_tensors(lambda tensor: tensor.to(device), sample), loss)
        return check_truth(CheckSubject.of(model, loss, reading, shared), tried, allow_state)


class _Runs:
    """Tries which rows run."""

    def __init__(self, model: nn.Module, loss: Loss, memory: ModelMemory) -> None:
        self._model = model
        self._loss = loss
        self._memory = memory

    def on(self, batch: Any, rows: TriedRows) -> tuple[TriedRows, tuple[Truth, ...]]:
        """The rows, or those of the batch alone where others are refused."""
        try:
            self._try(joined(rows.examples))
        except GroupSearchError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if rows.derived:
                return self.on(batch, rows.without_derived(short(error)))
            raise self._of_size(batch, rows, error) from error
        truths = []
        for i, example in enumerate(rows.examples):
            try:
                losses, gradient = self._try(example)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                if i >= len(rows.examples) - rows.derived:
                    return self.on(batch, rows.without_derived(short(error)))
                raise _of_one(error) from error
            truths.append(Truth(float(losses), gradient))
        return rows, tuple(truths)

    def _try(self, batch: Any) -> tuple[Tensor, Gradient]:
        self._memory.put_back()
        return plain_pass(self._model, batch, self._loss)

    def _of_size(self, batch: Any, rows: TriedRows, error: Exception) -> UnsupportedModelError:
        """Some rows do not run: the batch as it was given tells whether their number is the reason."""
        whole = count_examples(batch)
        try:
            self._try(batch)
        except Exception as own:
            own.add_note(
                f"groupsearch ran the loss on the batch of {whole} examples as it was given, in {mode_of(self._model)} "
                "mode; this was raised by the model or the loss itself."
            )
            raise own from None
        return UnsupportedModelError(
            f"A step on {len(rows.examples)} of the examples failed where one on all {whole} runs: {short(error)}. "
            "Poisson sampling draws batches of any size; make the model and the loss run on all of them."
        )


class _Check:
    def __init__(self, subject: CheckSubject, memory: ModelMemory, allowed: frozenset[str]) -> None:
        self._subject = subject
        self._memory = memory
        self._allowed = allowed
        self._tolerance = tolerance_of(subject.model)
        self._said = _State()
        self._left: dict[str, list[Any]] = {}

    def run(self, tried: Tried) -> Checked:
        rows, known = tried.rows, tried.draws == self._subject.draws
        self._look_back(rows)
        self._truths = tried.truths if known else tuple(self._alone(example) for example in rows.examples)
        for shape in self._shapes(rows):
            self._compare(shape, [rows.examples[i] for i in shape.numbers], [self._truths[i] for i in shape.numbers])
        self._compare_scaled(rows)
        self._compare_extreme(rows)
        self._compare_blank(rows)
        self._compare_shuffled(rows)
        for crowd in rows.crowds:
            self._compare_crowd("a row before four of another", crowd, self._alone(crowd.copied))
        self._compare_whole(rows)
        if not any(truth.gradient.total() for truth in self._truths):
            raise UnsupportedModelError(
                f"Every example's gradient is zero in the {len(self._truths)} examples that were tried, which tells "
                "nothing of others. Give a batch in which they are not, or see why the loss is constant (a weight or a "
                "mask that is zero)."
            )
        self._poison(rows)
        self._refuse_buffers()
        self._tell_of_left()
        said = self._said
        return Checked(
            mode=mode_of(self._subject.model),
            dtype=_name(next(p.dtype for p in self._subject.model.parameters())),
            device=next(self._subject.model.parameters()).device.type,
            batches=tuple(said.batches),
            rows=rows.origin,
            draws=str(self._subject.draws),
            worst=float(f"{said.worst:.1e}"),
            skipped=tuple(said.skipped),
            state=tuple(said.state),
        )

    # -- passes ------------------------------------------------------------------------------

    def _alone(self, example: Any) -> Truth:
        with self._fresh():
            return self._subject.alone(example)

    @contextmanager
    def _fresh(self) -> Iterator[None]:
        """A pass from the state that the check began with; what it leaves is noted."""
        self._memory.put_back()
        yield
        self._note_left()

    def _note_left(self) -> None:
        for name in self._memory.changed():
            self._left.setdefault(name, []).append(self._memory.value(name))

    # -- comparisons -------------------------------------------------------------------------

    def _shapes(self, rows: TriedRows) -> list[_Batch]:
        count = len(rows.examples)
        last, middle = count - 1, min(1, count - 1)
        shapes = [_Batch((0,)), _Batch((middle, 0)), _Batch((0, middle, last)), _Batch((last, last, 0))]
        return list(dict.fromkeys(shapes))

    def _compare(self, shape: _Batch, examples: Sequence[Any], truths: Sequence[Truth], factor: float = 1.0) -> None:
        numbered, known = dict(enumerate(examples)), dict(enumerate(truths))
        self._hold(_Comparison(str(shape), joined(examples), numbered, known, factor=factor))

    def _hold(self, comparison: _Comparison) -> None:
        """Refuse what differs by more than rounding."""
        with self._fresh():
            worst, fault = comparison.fault(self._subject, self._tolerance)
        if fault is not None:
            wide = self._in_double(comparison)
            if wide is None or wide[0] is not None:
                raise TruthError(self._message((wide and wide[0]) or fault, comparison))
            name = comparison.name
            self._say(f"a difference of {fault.found:.1g} in a batch of {name} is rounding: there is none in float64")
            worst = 0.0
        self._said.worst = max(self._said.worst, worst)
        self._said.batches.append(comparison.name)

    def _is_held(self, comparison: _Comparison) -> bool:
        """The same for a batch larger than those that were tried; whether the model takes it."""
        try:
            self._hold(comparison)
        except GroupSearchError:
            raise
        except Exception as error:  # not enough memory, or constants for fewer examples
            self._say(f"a batch of {comparison.name}: the model does not take it ({short(error)})")
            return False
        return True

    def _in_double(self, comparison: _Comparison) -> tuple[Difference | None] | None:
        self._memory.put_back()

        def again(subject: CheckSubject, convert: Callable[[Any], Any]) -> Difference | None:
            examples = {i: convert(example) for i, example in comparison.examples.items()}
            truths = {i: subject.alone(example) for i, example in examples.items()}
            wide = replace(comparison, batch=convert(comparison.batch), examples=examples, truths=truths)
            # what computes in float32 whatever it is given rounds as that does
            return wide.fault(subject, self._tolerance / 10)[1]

        return in_double(self._subject, again)

    def _message(self, fault: Difference, comparison: _Comparison) -> str:
        subject, numbers = self._subject, list(comparison.examples)
        examples = list(comparison.examples.values())
        self._memory.put_back()
        begins = first_difference(
            lambda b: subject.loss(subject.model, b), subject.model, comparison.batch, examples, numbers
        )
        if comparison.factor != 1:
            return not_linear(fault, comparison.factor)
        agrees = self._plain_agrees(examples) if comparison.whole else None
        return described(fault, comparison.name, begins, agrees)

    def _plain_agrees(self, examples: Sequence[Any]) -> bool | None:
        subject = self._subject
        try:
            self._memory.put_back()
            _, together = plain_pass(subject.model, joined(examples), subject.loss)
            truths = []
            for example in examples:
                self._memory.put_back()
                truths.append(subject.alone(example))
        except Exception:
            return None
        booked = BookedPass(torch.zeros(len(truths)), {}, together, {}, {})
        return not sum_faults(booked, [t.gradient for t in truths], self._tolerance)

    def _compare_extreme(self, rows: TriedRows) -> None:
        if not rows.extremes:
            self._say("an extreme example: the inputs have no numbers to multiply, or only whole ones")
        for crowd, factor in zip(rows.extremes, ("30", "-30"), strict=False):
            try:
                truth = self._alone(crowd.copied)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self._say(f"an extreme example: the model does not take it alone ({short(error)})")
                continue
            if not all(map(_is_finite, (truth.loss, truth.gradient.total()))):
                self._say("an extreme example: its gradient is not finite")
                continue
            self._compare_crowd(f"a row before four of row {len(rows.examples) - 1} times {factor}", crowd, truth)

    def _compare_crowd(self, name: str, crowd: Crowd, copied: Truth) -> None:
        """The first of a crowd, and the last."""
        last = count_examples(crowd.batch) - 1
        examples, truths = {0: crowd.first, last: crowd.copied}, {0: self._alone(crowd.first), last: copied}
        self._is_held(_Comparison(name, crowd.batch, examples, truths, whole=False))

    def _compare_last(self, rows: TriedRows, example: Any, truth: Truth, what: str) -> None:
        """The rows with another one for the last."""
        count = len(rows.examples)
        numbers = tuple(range(count - 1)) if count > 1 else (0,)
        examples = [*(rows.examples[i] for i in numbers), example]
        truths = [*(self._truths[i] for i in numbers), truth]
        self._compare(_Batch((*numbers, count - 1), last=what), examples, truths)

    def _compare_scaled(self, rows: TriedRows) -> None:
        """Gradients are as many times smaller as the loss is, which a mean over the batch makes of it."""
        numbers = tuple(range(len(rows.examples)))
        shape = _Batch(numbers, how=f", losses times {_FACTOR:g}")
        self._compare(shape, rows.examples, self._truths, _FACTOR)

    def _compare_blank(self, rows: TriedRows) -> None:
        """What a batch counts (positions that are not padding, classes that are weighed) is no matter of others."""
        if rows.blank is None:
            return
        try:
            truth = self._alone(rows.blank)
        except Exception as error:
            self._say(f"an example with zeros for half its whole numbers: the model does not take it ({short(error)})")
            return
        if not all(map(_is_finite, (truth.loss, truth.gradient.total()))):
            self._say("an example with zeros for half its whole numbers: its gradient is not finite")
            return
        self._compare_last(rows, rows.blank, truth, " of row 1 with zeros for half its whole numbers")

    def _compare_shuffled(self, rows: TriedRows) -> None:
        """All sets that the model takes, at once where that needs no more memory than the batch as it was given."""
        sets = [found for examples in rows.shuffled if (found := self._made(examples))]
        if sum(len(examples) for examples, _ in sets) <= 1.5 * count_examples(rows.whole):
            together = [[row for part in parts for row in part] for parts in zip(*sets, strict=True)]
            if not sets or self._is_held(self._of_shuffled(*together)):
                return
        for examples, truths in sets:
            self._hold(self._of_shuffled(examples, truths))

    def _of_shuffled(self, examples: Sequence[Any], truths: Sequence[Truth]) -> _Comparison:
        shape = _Batch(tuple(range(len(truths))), how=" with shuffled numbers")
        return _Comparison(str(shape), joined(examples), dict(enumerate(examples)), dict(enumerate(truths)))

    def _made(self, examples: Sequence[Any]) -> tuple[Sequence[Any], list[Truth]] | None:
        """Examples that were made up, and the truth of each; None where the model does not take them alone."""
        try:
            truths = [self._alone(example) for example in examples]
        except Exception as error:
            self._say(f"shuffled numbers: the model does not take them alone ({short(error)})")
            return None
        if not all(_is_finite(x) for truth in truths for x in (truth.loss, truth.gradient.total())):
            self._say("shuffled numbers: a gradient is not finite")
            return None
        return examples, truths

    def _compare_whole(self, rows: TriedRows) -> None:
        """Its own rows and the last in the batch as it was given: what depends on its size or on the others shows."""
        size = count_examples(rows.whole)
        numbered = dict(zip(rows.places, rows.examples, strict=False))
        truths = dict(zip(rows.places, self._truths, strict=False))
        name = f"rows {', '.join(map(str, range(len(numbered))))} and the last among {size}"
        if size - 1 not in numbered:  # which goes without what earlier ones have used up
            numbered[size - 1] = take_examples(rows.whole, (size - 1,))
            truths[size - 1] = self._alone(numbered[size - 1])
        self._is_held(_Comparison(name, rows.whole, numbered, truths, whole=False))

    def _poison(self, rows: TriedRows) -> None:
        """NaN in the last of three examples reaches neither loss nor gradient of the others."""
        examples = [rows.examples[i] for i in (0, min(1, len(rows.examples) - 1), len(rows.examples) - 1)]
        batch, changed = poisoned(joined(examples))
        ids = PoisonedIds(batch)
        try:
            with self._fresh(), ids:
                booked = self._subject.booked(batch, examples=(0, 1))
        except GroupSearchError as error:
            self._say(f"NaN in one example: the engine does not take it ({short(error)})")
            return
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._say(f"NaN in one example: the model does not take it ({short(error)})")
            return
        if not (changed or ids.reached):
            self._say("NaN in one example: it has no numbers and no embedded ids to put it in")
            return
        for i in (0, 1):
            gradient = booked.examples[i]
            if _is_finite(float(booked.losses[i])) and _is_finite(gradient.total()):
                continue
            bad = [name for name in gradient.signatures if not _is_finite(gradient.size(name))]
            reached = f"the gradient of another at layer {booked.places[bad[0]]!r}" if bad else "the loss of another"
            raise TruthError(
                f"NaN in the inputs of one example reaches {reached}: an example's gradient depends on the other "
                "examples of its batch, though a factor of zero hides it from the numbers here. Select instead of "
                "multiplying by zero (torch.where, indexing), and remove what mixes examples."
            )
        self._said.batches.append("NaN in one of three")

    # -- what is left behind -----------------------------------------------------------------

    def _look_back(self, rows: TriedRows) -> None:
        """A pass leaves nothing behind that depends on its data and that the next one uses."""
        examples = rows.examples
        if len(examples) == 1:
            self._say("whether a step depends on the one before: there are no two different examples")
            return
        found = []
        for earlier in (examples[1], examples[-1] if len(examples) > 2 else examples[0]):
            self._memory.put_back()
            self._subject.loss(self._subject.model, earlier)
            self._note_left()
            self._memory.put_back(only=self._allowed)
            found.append(self._subject.alone(examples[0]))
        with self._fresh():
            self._subject.loss(self._subject.model, joined(examples[:2]))
        self._refuse_buffers()
        if self._differ(*found):
            names = [name for name in self._dependent() if name not in self._memory.buffers]
            raise UnsupportedModelError(
                "The gradient of an example depends on the batch before its own: a forward pass keeps something "
                f"({_listed(names) or 'outside of the model'}) that the next one uses, so that an example has part in "
                "more than one step. Make the model without such memory, or clear it before every step; where it may, "
                "allow it by name with allow_state."
            )

    def _differ(self, one: Truth, other: Truth) -> bool:
        booked = BookedPass(torch.tensor([one.loss]), {0: one.gradient}, Gradient(), {}, {})
        fault = compare(booked, {0: other}, self._tolerance)[1]
        return (compare_losses(booked.losses, {0: other}, self._tolerance) or fault) is not None

    def _dependent(self) -> list[str]:
        return [name for name, values in self._left.items() if not _all_alike(values)]

    def _refuse_buffers(self) -> None:
        buffers = [name for name in self._dependent() if name in self._memory.buffers and name not in self._allowed]
        if buffers:
            raise UnsupportedModelError(
                f"A forward pass leaves what depends on its examples in {_listed(buffers)}: it is saved with the "
                "weights, and later steps may use it, all without noise. Call .eval() on the module, or make it "
                f"without such state; or allow it by name, as allow_state={tuple(buffers)!r}, and treat it as private "
                "data."
            )

    def _tell_of_left(self) -> None:
        for name in self._dependent():
            allowed = " (allowed by name) tells of the examples without noise: treat it as private data"
            kept = " holds what depends on the last batch, and no result uses it: do not save it with the model"
            self._said.state.append(name + (allowed if name in self._allowed else kept))

    def _say(self, text: str) -> None:
        self._said.skipped.append(text)


def in_double(
    subject: CheckSubject, again: Callable[[CheckSubject, Callable[[Any], Any]], Difference | None]
) -> tuple[Difference | None] | None:
    """What a comparison finds on a copy of the model in float64, where rounding cannot be the reason.

    Args:
        subject: the model in less precision.
        again: makes the comparison, given the copy and what brings a batch to float64.

    Returns:
        The difference, in a tuple of one; None where the model has float64 or does not run in it.
    """
    if tolerance_of(subject.model) <= TOLERANCES[torch.float64]:
        return None
    try:
        wide = replace(subject, model=copy.deepcopy(subject.model).double())
        return (again(wide, lambda b: map_tensors(lambda t: t.double() if t.is_floating_point() else t, b)),)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None


def _of_one(error: Exception) -> UnsupportedModelError:
    found = str(error).rstrip(".") if isinstance(error, GroupSearchError) else short(error)
    return UnsupportedModelError(
        f"A step on one example alone failed where one on several runs: {found}. Poisson sampling draws batches of any "
        "size, also of one. Where squeeze() takes the dimension of the batch away, name the dimension it is to take; "
        "where the model needs several examples (batch statistics in training), it mixes them: replace that by "
        "nn.GroupNorm or nn.LayerNorm."
    )


def _all_alike(values: Sequence[Any]) -> bool:
    return all(same_values(value, values[0]) for value in values)


def mode_of(model: nn.Module) -> str:
    """The mode a model is in."""
    modules = list(model.modules())
    training = sum(m.training for m in modules)
    if training in (0, len(modules)):
        return "training" if training else "evaluation"
    return f"mixed ({training} of {len(modules)} modules in training)"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_finite(number: float) -> bool:
    return number - number == 0


def short(error: Exception) -> str:
    """The first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}".rstrip(".")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
