"""Half precision: autocast, half-precision weights, loss scaling and gradients that are not finite.

The slow truth takes what backward hands to a layer, inputs and output gradients in half precision, as
given, and forms every example's gradient from them in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.engine.mechanism import Mechanism
from groupsearch.errors import GroupSearchError
from groupsearch.options import EngineOptions
from groupsearch.plan.clipping import ClipPlan, clip_factors
from tests.engine.loop import part, plan_of, seen_by
from tests.engine.test_parity import assert_agree
from tests.support.cases import BATCH_SIZE, EVERY_CASE, Case
from tests.support.reference import clipped_sums, trainable

MATRIX = [EVERY_CASE[name] for name in ("linear-2d", "linear-3d", "linear-3d-long", "tied-embedding-head")]
MIXED = [EVERY_CASE[n] for n in ("conv2d-groups", "layernorm", "class-token", "attention", "residual-mlp-3d", "lora")]
REPEATED = [EVERY_CASE[n] for n in ("bare-matmul", "bare-einsum", "prelu", "folded-matmul", "second-matmul", "experts-of-linears")]  # fmt: skip # noqa: E501
HALF = [torch.bfloat16, torch.float16]


def by_case(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def half(batch: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def attach(
    model: nn.Module, plan: ClipPlan, optimizer: torch.optim.Optimizer | None = None, **settings: Any
) -> tuple[torch.optim.Optimizer, PrivateEngine]:
    optimizer = optimizer or torch.optim.SGD(trainable(model).values(), lr=0.1)
    settings = {"noise_multiplier": 0.0, "expected_batch_size": BATCH_SIZE, "loss_reduction": "sum", **settings}
    return optimizer, make_private(model, optimizer, plan, **settings)


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor, list[Tensor]]]]:
    """Every call of a layer: its input, and a list that receives its output gradient."""
    calls: list[tuple[nn.Module, Tensor, list[Tensor]]] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        calls.append((module, args[0].detach(), []))
        output.register_hook(calls[-1][2].append)

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def half_truth(
    model: nn.Module, batch: Any, case: Case, plan: ClipPlan, autocast: Any, norms_BM: Tensor | None = None
) -> dict[str, Tensor]:
    """Clipped sums of a model of Linear and Embedding layers, every site's gradient formed in float64.

    The engine's norms, where given, are held to what it promises, not too short and at most 1e-4 too long
    where much cancels, and then clipped by.
    """
    with _calls(model) as calls, autocast:
        loss = case.loss(model, batch).sum()
    loss.backward()
    names = {id(p): name for name, p in model.named_parameters()}
    owners = {name: m for name, m in model.named_modules()}
    groups: list[dict[str, Tensor]] = [{} for _ in range(plan.grouping.groups)]
    by_layer = {id(module): (a, grads) for module, a, grads in calls}
    for index, site in enumerate(plan.grouping.sites):
        module = owners[site.layer]
        a, (g,) = by_layer[id(module)]
        group = groups[plan.grouping.group_of(index)]
        g_BTp = g.double().reshape(len(g), -1, g.shape[-1])
        if isinstance(module, nn.Embedding):
            a_BTd = nn.functional.one_hot(a, module.num_embeddings).double().reshape(len(a), -1, module.num_embeddings)
            weight = a_BTd.mT @ g_BTp
        else:
            weight = g_BTp.mT @ a.to(g.dtype).double().reshape(len(a), -1, a.shape[-1])
        _add(group, names[id(module.weight)], weight)
        if getattr(module, "bias", None) is not None:
            _add(group, names[id(module.bias)], g_BTp.sum(1))
    sums: dict[str, Tensor] = {}
    for index, (gradients, threshold) in enumerate(zip(groups, plan.thresholds, strict=True)):
        norm_B = torch.stack([x.flatten(1).square().sum(1) for x in gradients.values()]).sum(0).sqrt()
        if norms_BM is not None:
            ratio_B = norms_BM[:, index].double() / norm_B
            assert ratio_B.min() >= 1 - 1e-6  # float32
            assert ratio_B.max() <= 1 + 1e-4
            norm_B = norms_BM[:, index].double()
        for name, gradient in gradients.items():
            factor_B = clip_factors(plan.rule, norm_B, threshold, torch.where)
            _add(sums, name, torch.einsum("b,b...->...", factor_B, gradient))
    return sums


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


@pytest.mark.parametrize("method", ["ghost", "instantiate"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside autocast", "backward inside autocast"])
@by_case(MATRIX)
def test_sums_under_autocast_are_exact(case: Case, inside: bool, dtype: torch.dtype, method: str) -> None:
    plan, batch = plan_of(case, (1,), max_grad_norm=4.0), case.batch(torch.float32)
    model = case.model(torch.float32)
    _, engine = attach(model, plan, options=EngineOptions(norm_method=method))
    with torch.autocast("cpu", dtype=dtype):
        loss = case.loss(model, batch).sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    sums, same = engine.clipped_sums(), torch.autocast("cpu", dtype=dtype)
    expected = half_truth(case.model(torch.float32), batch, case, plan, same, engine.norms)
    assert all(total.dtype is torch.float32 for total in sums.values())
    assert_agree({name: total.double() for name, total in sums.items()}, expected, 1e-5)


@pytest.mark.parametrize("method", ["ghost", "instantiate"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@by_case(MATRIX)
def test_sums_of_half_precision_weights_are_exact(case: Case, dtype: torch.dtype, method: str) -> None:
    plan, batch = plan_of(case, (1,), max_grad_norm=4.0), half(case.batch(), dtype)
    model = case.model(dtype)
    _, engine = attach(model, plan, options=EngineOptions(norm_method=method))
    case.loss(model, batch).sum().backward()
    sums = engine.clipped_sums()
    expected = half_truth(case.model(dtype), batch, case, plan, nullcontext(), engine.norms)
    assert_agree({name: total.double() for name, total in sums.items()}, expected, 1e-5)


@pytest.mark.parametrize("pure", [False, True], ids=["autocast", "half weights"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@by_case(MATRIX + MIXED + REPEATED)
def test_one_example_in_half_precision_stays_within_the_threshold(case: Case, dtype: torch.dtype, pure: bool) -> None:
    plan = plan_of(case, (), max_grad_norm=0.05)
    model, batch = case.model(dtype if pure else torch.float32), case.batch(torch.float32, 1)
    _, engine = attach(model, plan)
    context: AbstractContextManager[Any] = nullcontext() if pure else torch.autocast("cpu", dtype=dtype)
    with context:
        loss = case.loss(model, half(batch, dtype) if pure else batch).sum()
    loss.backward()
    length = sum(float(total.double().square().sum()) for total in engine.clipped_sums().values()) ** 0.5
    assert 0.9 * plan.sensitivity < length <= plan.sensitivity * (1 + 1e-5)


@by_case(MIXED + REPEATED)
def test_sums_under_autocast_are_near_those_in_float32(case: Case) -> None:
    plan, batch = plan_of(case, (), max_grad_norm=4.0), case.batch(torch.float32)
    model = case.model(torch.float32)
    _, engine = attach(model, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = case.loss(model, batch).sum()
    loss.backward()
    expected = clipped_sums(case.model(torch.float32), batch, case.loss, plan)
    assert_agree(engine.clipped_sums(), expected, 0.1)


def test_evaluation_under_the_same_autocast_leaves_no_stale_weights() -> None:
    """Autocast keeps casts of weights until it is left; the engine's own weights must not be mixed up with them."""
    case = EVERY_CASE["linear-3d"]
    plan, batch = plan_of(case, (1,), max_grad_norm=4.0), case.batch(torch.float32)
    model = case.model(torch.float32)
    optimizer, engine = attach(model, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            with torch.no_grad():
                case.loss(model, batch)
            twin = case.model(torch.float32)
            twin.load_state_dict(model.state_dict())
            case.loss(model, batch).sum().backward()
            with torch.autocast("cpu", enabled=False):
                fresh = torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False)
                expected = half_truth(twin, batch, case, plan, fresh)
            assert_agree({k: x.double() for k, x in engine.clipped_sums().items()}, expected, 1e-5)
            optimizer.step()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_micro_batches_of_half_precision_add_up_in_float32(dtype: torch.dtype) -> None:
    """In half precision the two-hundredth micro-batch would hardly move the sum."""
    case = EVERY_CASE["linear-2d"]
    plan, batch = plan_of(case, ()), half(case.batch(), dtype)
    model = case.model(dtype)
    _, engine = attach(model, plan)
    alone = []
    for start, stop in pairwise((0, 1, 2, 3, 4)):
        alone.append(half_truth(case.model(dtype), part(batch, start, stop), case, plan, nullcontext()))
    for _ in range(50):
        for start, stop in pairwise((0, 1, 2, 3, 4)):
            case.loss(model, part(batch, start, stop)).sum().backward()
    expected = {name: 50 * sum(sums[name] for sums in alone) for name in alone[0]}
    assert_agree({name: total.double() for name, total in engine.clipped_sums().items()}, expected, 1e-5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_noise_is_added_before_the_one_rounding(dtype: torch.dtype) -> None:
    case = EVERY_CASE["linear-3d"]
    plan, batch = plan_of(case, (1,), max_grad_norm=4.0), half(case.batch(), dtype)
    model = case.model(dtype)
    optimizer, engine = attach(
        model, plan, noise_multiplier=1.0, expected_batch_size=3.0, generator=torch.Generator().manual_seed(1)
    )
    case.loss(model, batch).sum().backward()
    sums = {name: total.clone() for name, total in engine.clipped_sums().items()}
    with seen_by(optimizer, model) as seen:
        optimizer.step()
    twin = Mechanism(plan, 1.0, torch.Generator().manual_seed(1), 3.0)
    for name, total in sums.items():
        expected = twin.add_noise_(name, total).div_(3.0).to(dtype)
        assert seen[0][name].dtype is dtype
        assert torch.equal(seen[0][name], expected)


NOT_FINITE = [
    EVERY_CASE[name]
    for name in ("linear-2d", "linear-3d", "embedding", "layernorm", "class-token", "parameter-used-twice")
] + MATRIX[3:] + MIXED[:1]  # fmt: skip


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("rule", ["abadi", "auto-s", "auto-v"])
@by_case(NOT_FINITE)
def test_an_example_whose_gradient_is_not_finite_adds_exactly_nothing(case: Case, rule: str, value: float) -> None:
    plan = plan_of(case, () if case is MIXED[0] else (1,), rule=rule)
    model, batch = case.model(), case.batch()
    batch["scale"][1] = value
    optimizer, engine = attach(model, plan)
    case.loss(model, batch).sum().backward()
    others = torch.tensor([0, 2, 3])
    expected = clipped_sums(case.model(), {k: x[others] for k, x in case.batch().items()}, case.loss, plan)
    assert_agree(engine.clipped_sums(), expected, 1e-10)
    assert engine.norms[1].isinf().all()
    assert engine.norms[others].isfinite().all()
    with seen_by(optimizer, model) as seen:
        optimizer.step()
    assert all(g.isfinite().all() for g in seen[0].values())


def test_a_batch_of_nothing_finite_is_a_step_of_noise_alone() -> None:
    case = MATRIX[1]
    model, batch = case.model(), case.batch()
    batch["scale"].fill_(float("nan"))
    _, engine = attach(model, plan_of(case, (1,), max_grad_norm=4.0))
    case.loss(model, batch).sum().backward()
    assert not any(total.any() for total in engine.clipped_sums().values())


# -- loss scaling ----------------------------------------------------------------------------------

SCALE = 2.0**10


def scaler_of(**settings: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": SCALE, "growth_interval": 1000, **settings})


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
}


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscale_"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaled_loop_is_the_loop_without_a_scale_bit_for_bit(name: str, unscale: bool) -> None:
    """A scale that is a power of two changes no float32 number but its exponent."""
    case = EVERY_CASE["residual-mlp-3d"]
    plan, batch, results = plan_of(case, (3,), max_grad_norm=4.0), case.batch(torch.float32), []
    for scaler in (None, scaler_of(), scaler_of(enabled=False)):
        model = case.model(torch.float32)
        optimizer, engine = attach(
            model,
            plan,
            OPTIMIZERS[name](model.parameters()),
            noise_multiplier=0.5,
            generator=torch.Generator().manual_seed(2),
            grad_scaler=scaler,
        )
        for start in (0, 0, 2, 4):  # the last batch is empty
            for rows in ((start, start + 1), (start + 1, 4)):
                if start < 4:
                    loss = case.loss(model, part(batch, *rows)).sum()
                    (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                optimizer.step()
            else:
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        assert engine.steps == 4
        results.append(model.state_dict())
    for found in results[1:]:
        for key, value in found.items():
            assert torch.equal(value, results[0][key]), key


@by_case(MATRIX)
def test_float16_autocast_with_a_scaler_is_exact(case: Case) -> None:
    plan, batch, autocast = (
        plan_of(case, (1,), max_grad_norm=4.0),
        case.batch(torch.float32),
        torch.autocast("cpu", dtype=torch.float16),
    )
    model, scaler = case.model(torch.float32), scaler_of()
    _, engine = attach(model, plan, grad_scaler=scaler)
    with autocast:
        loss = case.loss(model, batch).sum()
    scaler.scale(loss).backward()
    twin = _Scaled(case, SCALE)
    expected = half_truth(case.model(torch.float32), batch, twin, _times(plan, SCALE), autocast)
    assert_agree(
        {name: total.double() for name, total in engine.clipped_sums().items()},
        {name: total / SCALE for name, total in expected.items()},
        1e-5,
    )


class _Scaled:
    """A case whose loss is multiplied by a number."""

    def __init__(self, case: Case, scale: float) -> None:
        self._case, self._scale = case, scale

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self._case.loss(model, batch) * self._scale


def _times(plan: ClipPlan, scale: float) -> ClipPlan:
    return ClipPlan(plan.grouping, plan.max_grad_norm * scale, plan.rule)


def test_an_overflow_adds_zero_lowers_the_scale_and_skips_no_step() -> None:
    case = MATRIX[1]
    plan, batch = plan_of(case, (), max_grad_norm=4.0), case.batch(torch.float32)
    batch["scale"][2] = 1e5  # times 2^10 it is out of float16's range
    model, scaler = case.model(torch.float32), scaler_of()
    optimizer, engine = attach(
        model, plan, noise_multiplier=1.0, generator=torch.Generator().manual_seed(3), grad_scaler=scaler
    )
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    with torch.autocast("cpu", dtype=torch.float16):
        loss = case.loss(model, batch).sum()
    scaler.scale(loss).backward()
    assert engine.norms.isinf().flatten().tolist() == [False, False, True, False]
    others = torch.tensor([0, 1, 3])
    expected = clipped_sums(case.model(torch.float32), {k: x[others] for k, x in batch.items()}, case.loss, plan)
    assert_agree(engine.clipped_sums(), expected, 2e-2)
    scaler.step(optimizer)
    scaler.update()
    assert engine.steps == 1
    assert scaler.get_scale() == SCALE / 2
    for name, parameter in trainable(model).items():
        assert parameter.isfinite().all()
        assert not torch.equal(parameter.detach(), before[name])
    case.loss(model, case.batch(torch.float32)).sum().mul(scaler.get_scale()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2, "one overflow was reported twice"


def test_the_scale_grows_when_nothing_overflows_and_may_be_held() -> None:
    case = MATRIX[1]
    model, scaler = case.model(torch.float32), scaler_of(growth_interval=1)
    optimizer, _ = attach(model, plan_of(case, ()), grad_scaler=scaler)
    for held, expected in ((False, 2 * SCALE), (True, 2 * SCALE)):
        scaler.scale(case.loss(model, case.batch(torch.float32)).sum()).backward()
        scaler.step(optimizer)
        scaler.update(scaler.get_scale() if held else None)
        assert scaler.get_scale() == expected


def test_the_first_batch_may_be_empty() -> None:
    model, scaler = MATRIX[1].model(torch.float32), scaler_of()
    optimizer, engine = attach(model, plan_of(MATRIX[1], ()), grad_scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert engine.steps == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_the_engine_was_not_given_is_refused(fused: bool) -> None:
    case = MATRIX[1]
    model, scaler = case.model(torch.float32), scaler_of()
    optimizer, engine = attach(model, plan_of(case, ()), torch.optim.Adam(model.parameters(), fused=fused))
    scaler.scale(case.loss(model, case.batch(torch.float32)).sum()).backward()
    with pytest.raises(GroupSearchError, match="grad_scaler=scaler"):
        scaler.step(optimizer)
    assert engine.steps == 0
    optimizer.zero_grad()
    optimizer.step()  # the refusal left nothing behind
    assert engine.steps == 1


@pytest.mark.parametrize("other", [False, True], ids=["optimizer.step", "another scaler"])
def test_a_step_past_the_scaler_is_refused(other: bool) -> None:
    case = MATRIX[1]
    model, scaler = case.model(torch.float32), scaler_of()
    optimizer, engine = attach(model, plan_of(case, ()), grad_scaler=scaler)
    scaler.scale(case.loss(model, case.batch(torch.float32)).sum()).backward()
    stranger = scaler_of()
    stranger.scale(torch.ones(()))
    with pytest.raises(GroupSearchError, match=r"grad_scaler\.step"):
        stranger.step(optimizer) if other else optimizer.step()
    assert engine.steps == 0
    scaler.step(optimizer)
    assert engine.steps == 1


@pytest.mark.parametrize("fused", [False, True])
def test_detach_gives_the_optimizer_back_to_the_scaler(fused: bool) -> None:
    model = MATRIX[1].model(torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    before = dict(vars(optimizer))
    _, engine = attach(model, plan_of(MATRIX[1], ()), optimizer, grad_scaler=scaler_of())
    engine.detach()
    assert dict(vars(optimizer)) == before
