"""Training loops around the engine: what the optimizer sees, over micro-batches, accidents and several steps."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupsearch.engine import make_private
from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import ClipPlan
from tests.engine.loop import CASE, TIED, TOLERANCE, part, plan_of, private, scaled, seen_by
from tests.engine.test_parity import assert_agree
from tests.support.cases import BATCH_SIZE, EVERY_CASE, Case
from tests.support.reference import clipped_sums, per_example_gradients, trainable


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_step_sees_the_clipped_sum_over_the_expected_batch_size(reduction: str) -> None:
    model, optimizer, engine = private(expected_batch_size=7.5, loss_reduction=reduction)
    expected = clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan)
    loss = CASE.loss(model, CASE.batch())
    (loss.mean() if reduction == "mean" else loss.sum()).backward()
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    with seen_by(optimizer, model) as seen:
        optimizer.step()
    assert_agree(seen[0], scaled(expected, 1 / 7.5), TOLERANCE)
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * seen[0][name], rtol=0, atol=1e-14)


@pytest.mark.parametrize("cuts", [(0, 4), (0, 1, 4), (0, 2, 3, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("case", [CASE, TIED], ids=["residual", "tied"])
def test_micro_batches_add_up_to_the_batch(case: Case, cuts: tuple[int, ...]) -> None:
    model, _, engine = private(case, plan_of(case, (1,)))
    for start, stop in pairwise(cuts):
        case.loss(model, part(case.batch(), start, stop)).mean().backward()
    expected = clipped_sums(case.model(), case.batch(), case.loss, engine.plan)
    assert_agree(engine.clipped_sums(), expected, TOLERANCE)


def test_clipped_sums_may_be_read_between_micro_batches() -> None:
    model, _, engine = private()
    for start in range(BATCH_SIZE):
        CASE.loss(model, part(CASE.batch(), start, start + 1)).mean().backward()
        expected = clipped_sums(CASE.model(), part(CASE.batch(), 0, start + 1), CASE.loss, engine.plan)
        assert_agree(engine.clipped_sums(), expected, TOLERANCE)
        assert engine.norms.shape == (1, 2)


@pytest.mark.parametrize("join", ["before the mean", "after the mean"])
def test_two_losses_of_one_forward_pass_are_one_gradient(join: str) -> None:
    def first(output: Tensor) -> Tensor:
        return output.flatten(1).sin().sum(1)

    def second(output: Tensor) -> Tensor:
        return output.flatten(1).square().mean(1)

    def both(model: nn.Module, batch: Any) -> Tensor:
        output = model(batch["x"])
        return first(output) + second(output)

    model, _, engine = private()
    output = model(CASE.batch()["x"])
    if join == "before the mean":
        (first(output) + second(output)).mean().backward()
    else:
        (first(output).mean() + second(output).mean()).backward()
    expected = clipped_sums(CASE.model(), CASE.batch(), both, engine.plan)
    assert_agree(engine.clipped_sums(), expected, TOLERANCE)


def test_noise_is_drawn_once_however_many_micro_batches() -> None:
    noises = []
    for cuts in ((0, 4), (0, 1, 2, 3, 4)):
        model, optimizer, engine = private(noise_multiplier=1.5, generator=torch.Generator().manual_seed(3))
        for start, stop in pairwise(cuts):
            CASE.loss(model, part(CASE.batch(), start, stop)).mean().backward()
        sums = engine.clipped_sums()
        with seen_by(optimizer, model) as seen:
            optimizer.step()
        noises.append({name: seen[0][name] * BATCH_SIZE - sums[name] for name in sums})
    for name, noise in noises[0].items():
        torch.testing.assert_close(noise, noises[1][name], rtol=0, atol=1e-10)
        assert noise.abs().max() > 0


@pytest.mark.parametrize("boundaries", [(), (1,), (1, 2)], ids=str)
def test_noise_has_the_deviation_of_the_sensitivity(boundaries: tuple[int, ...]) -> None:
    case = Case("wide-tied", lambda: _wide_tied(), (3,), tokens=True)
    plan = plan_of(case, boundaries)
    model, optimizer, _ = private(case, plan, noise_multiplier=2.0, generator=torch.Generator().manual_seed(0))
    with seen_by(optimizer, model) as seen:
        optimizer.step()
    for value in seen[0].values():
        deviation = float(value.std()) * BATCH_SIZE
        bound = 4 / (2 * value.numel()) ** 0.5
        assert deviation == pytest.approx(2.0 * plan.sensitivity, rel=bound)


def _wide_tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(30, 50), nn.Linear(50, 50, bias=False), nn.Linear(50, 30, bias=False))
    model[2].weight = model[0].weight
    return model


def test_noise_differs_between_steps_parameters_and_unseeded_engines() -> None:
    draws = []
    for _ in range(2):
        model, optimizer, _ = private(noise_multiplier=1.0)
        with seen_by(optimizer, model) as seen:
            optimizer.step()
            optimizer.step()
        draws += [step["0.weight"] for step in seen] + [seen[0]["4.weight"].flatten()]
    flat = [float(draw.flatten()[0]) for draw in draws]
    assert len(set(flat)) == len(flat)


def test_an_empty_batch_is_a_step_of_noise_alone() -> None:
    model, optimizer, engine = private(noise_multiplier=0.0)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    optimizer.step()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)
    CASE.loss(model, CASE.batch()).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with seen_by(optimizer, model) as seen:
        optimizer.step()
    assert all(not g.any() for g in seen[0].values()), "the step before left something behind"
    assert engine.steps == 3


@pytest.mark.parametrize("set_to_none", [True, False])
def test_steps_do_not_leak_into_each_other(set_to_none: bool) -> None:
    model, optimizer, engine = private()
    for _ in range(3):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer.zero_grad(set_to_none=set_to_none)
        CASE.loss(model, CASE.batch()).mean().backward()
        twin = CASE.model()
        twin.load_state_dict(state)
        expected = clipped_sums(twin, CASE.batch(), CASE.loss, engine.plan)
        assert_agree(engine.clipped_sums(), expected, TOLERANCE)
        optimizer.step()


def test_a_loop_that_never_zeroes_gradients_does_not_accumulate_steps() -> None:
    model, optimizer, engine = private()
    for _ in range(2):
        CASE.loss(model, CASE.batch()).mean().backward()
        expected = scaled(engine.clipped_sums(), 1 / BATCH_SIZE)
        with seen_by(optimizer, model) as seen:
            optimizer.step()
        assert_agree(seen[0], expected, TOLERANCE)


def test_evaluation_between_steps_changes_nothing() -> None:
    model, _, engine = private()
    plain_model = CASE.model()
    CASE.loss(model, part(CASE.batch(), 0, 2)).mean().backward()
    model.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(CASE.loss(model, CASE.batch()), CASE.loss(plain_model, CASE.batch()))
    model.train()
    CASE.loss(model, part(CASE.batch(), 2, 4)).mean().backward()
    expected = clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan)
    assert_agree(engine.clipped_sums(), expected, TOLERANCE)


def test_outputs_are_those_of_the_plain_model() -> None:
    model, _, _ = private()
    torch.testing.assert_close(CASE.loss(model, CASE.batch()), CASE.loss(CASE.model(), CASE.batch()), rtol=0, atol=0)


def test_an_example_is_not_summed_twice() -> None:
    """A second backward through one forward pass would clip an example twice; it is refused or counted once."""
    model, _, engine = private()
    loss = CASE.loss(model, CASE.batch()).mean()
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except (GroupSearchError, RuntimeError):
        return
    expected = clipped_sums(CASE.model(), CASE.batch(), CASE.loss, engine.plan)
    assert_agree(engine.clipped_sums(), expected, TOLERANCE)


@pytest.mark.parametrize("case", [CASE, TIED, EVERY_CASE["class-token"], EVERY_CASE["lora"]], ids=lambda c: c.name)
def test_detach_leaves_the_model_as_it_was(case: Case) -> None:
    plan = plan_of(case, (1,))
    model = case.model()
    before = _appearance(model)
    optimizer = torch.optim.Adam(trainable(model).values(), lr=0.1)
    hooks = _optimizer_hooks(optimizer)
    engine = make_private(model, optimizer, plan, noise_multiplier=0.0, expected_batch_size=BATCH_SIZE)
    asked = [p.requires_grad for p in model.parameters()]
    case.loss(model, case.batch()).mean().backward()
    assert [p.requires_grad for p in model.parameters()] == asked == before[2]
    engine.detach()
    assert all(p.grad is None for p in model.parameters())
    assert _appearance(model) == before
    assert _optimizer_hooks(optimizer) == hooks
    for name, value in case.model().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    case.loss(model, case.batch()).sum().backward()
    expected = per_example_gradients(case.model(), case.batch(), case.loss)
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, sum(example[name] for example in expected))


def _appearance(model: nn.Module) -> tuple[Any, ...]:
    hooks = [
        (name, attribute, len(value))
        for name, module in model.named_modules()
        for attribute, value in sorted(vars(module).items())
        if attribute.endswith("hooks")
    ]
    identities = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    kinds = [(type(module), sorted(vars(module))) for module in model.modules()]
    parameter_hooks = [len(p._backward_hooks or ()) for p in model.parameters()]
    after = [len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in model.parameters()]
    return hooks, identities, [p.requires_grad for p in model.parameters()], kinds, parameter_hooks, after


def _optimizer_hooks(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    return len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)


def test_an_engine_may_follow_another_on_the_same_model() -> None:
    plan = plan_of(CASE)
    model = CASE.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for chosen in (plan, plan_of(CASE, ()), plan_of(CASE, (1, 4, 7))):
        engine = make_private(model, optimizer, chosen, noise_multiplier=0.0, expected_batch_size=BATCH_SIZE)
        CASE.loss(model, CASE.batch()).mean().backward()
        expected = clipped_sums(CASE.model(), CASE.batch(), CASE.loss, chosen)
        assert_agree(engine.clipped_sums(), expected, TOLERANCE)
        engine.detach()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", [CASE, TIED], ids=["residual", "tied"])
def test_several_steps_equal_a_plain_dp_loop(case: Case, optimizer: str) -> None:
    """The same noise is added by hand to the reference's clipped sums; an idle twin tells what it was."""
    plan = plan_of(case, (1,), rule="auto-s")
    model, reference = case.model(), case.model()
    chosen = OPTIMIZERS[optimizer](trainable(model).values())
    engine = make_private(
        model, chosen, plan, noise_multiplier=0.7, expected_batch_size=3, generator=torch.Generator().manual_seed(5)
    )
    noises = _noises(case, plan, steps=4, generator=torch.Generator().manual_seed(5))
    plain_optimizer = OPTIMIZERS[optimizer](trainable(reference).values())
    sizes = [(0, 4), (1, 3), (2, 2), (0, 3)]  # the third batch is empty
    for (start, stop), noise in zip(sizes, noises, strict=True):
        batch = part(case.batch(), start, stop)
        chosen.zero_grad()
        if stop > start:
            case.loss(model, batch).mean().backward()
        chosen.step()
        sums = clipped_sums(reference, batch, case.loss, plan) if stop > start else {}
        for name, parameter in trainable(reference).items():
            parameter.grad = sums.get(name, torch.zeros_like(parameter)) / 3 + noise[name]
        plain_optimizer.step()
    assert engine.steps == 4
    for name, parameter in trainable(reference).items():
        torch.testing.assert_close(trainable(model)[name], parameter, rtol=1e-9, atol=1e-6)


def _noises(case: Case, plan: ClipPlan, steps: int, generator: torch.Generator) -> list[dict[str, Tensor]]:
    model, optimizer, engine = private(case, plan, noise_multiplier=0.7, expected_batch_size=3, generator=generator)
    with seen_by(optimizer, model) as seen:
        for _ in range(steps):
            optimizer.step()
    engine.detach()
    return seen


@pytest.mark.parametrize("name", ["positions-without-batch", "class-token", "llama", "t5", "gpt2"])
def test_a_step_leaves_no_tensor_to_the_garbage_collector(name):
    case = EVERY_CASE[name]
    model, optimizer, _ = private(case, plan_of(case, ()))
    gc.collect()
    gc.disable()
    try:
        alive = []
        for _ in range(4):
            case.loss(model, case.batch()).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            dense = [x for x in gc.get_objects() if type(x) is Tensor and x.layout is torch.strided]
            alive.append(sum(x.untyped_storage().nbytes() for x in dense))
            del dense
    finally:
        gc.enable()
    assert alive[-1] <= alive[0]
