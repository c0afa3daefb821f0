"""Products in IEEE float32: what the user set is put back, and no example exceeds its bound where units cut."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from groupsearch.engine import entries as grads
from groupsearch.engine import entries as norms
from groupsearch.engine.arithmetic import ieee
from groupsearch.engine.entries import sliced_sqnorm
from groupsearch.engine.truth import check
from groupsearch.options import NORM_METHODS, EngineOptions
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.tracer import observe_sites
from groupsearch.tracer.sites import examine
from tests.engine.test_precision import attach
from tests.support.case import Case, Wrap
from tests.support.emulated import MatrixUnits, cut

PARTS = [("generic", "all")] + [(b, kind) for b in ("cuda", "mkldnn") for kind in ("all", "matmul", "conv", "rnn")]
_set, _get = torch._C._set_fp32_precision_setter, torch._C._get_fp32_precision_getter


def settings() -> list[str]:
    found = [_get(*part) for part in PARTS]
    try:
        return [*found, torch.get_float32_matmul_precision()]
    except RuntimeError:
        return [*found, "the two interfaces disagree"]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    legacy, before = torch.get_float32_matmul_precision(), [_get(*part) for part in PARTS]
    yield
    torch.set_float32_matmul_precision(legacy)
    for part, value in zip(PARTS, before, strict=True):
        _set(*part, value)


def everywhere() -> None:
    torch.backends.fp32_precision = "tf32"


def by_operation() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def both_ways() -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


WAYS = [
    lambda: None,
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: torch.set_float32_matmul_precision("medium"),
    everywhere,
    by_operation,
    both_ways,
]
IDS = ["default", "high", "medium", "everywhere", "by-operation", "both-ways"]


@pytest.mark.parametrize("say", WAYS, ids=IDS)
def test_settings_are_put_back_also_when_the_product_raises(say: Callable[[], None]) -> None:
    say()
    before = settings()
    with pytest.raises(ZeroDivisionError), ieee():  # noqa: PT012
        assert {_get(*part) for part in PARTS if part[1] not in ("all",)} <= {"ieee", "none"}
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        with ieee():
            pass
        assert _get("cuda", "matmul") in ("ieee", "none")
        raise ZeroDivisionError
    assert settings() == before
    a, g = torch.randn(2, 1, 5, 3), torch.randn(2, 1, 5, 4)
    norms.matrix_sqnorm(a, g, bias=True)
    with pytest.raises(RuntimeError):
        grads.matrix_clipped_sum(a, g[..., :3, :], torch.ones(2))
    assert settings() == before


def test_what_is_set_for_all_goes_on_being_followed() -> None:
    with ieee():
        pass
    torch.backends.fp32_precision = "tf32"
    assert _get("cuda", "matmul") == _get("mkldnn", "conv") == "tf32"


def test_threads_that_overlap_put_back_what_was_before_the_first() -> None:
    torch.set_float32_matmul_precision("high")
    before, inside, done = settings(), threading.Event(), threading.Event()

    def other() -> None:
        with ieee():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    with ieee():
        thread.start()
        inside.wait(10)
    assert _get("cuda", "matmul") == "ieee"
    done.set()
    thread.join()
    assert settings() == before


# -- sums and the norms that bound them --------------------------------------------------------

T, D, P, BOUND = 512, 24, 16, 1.0


def random_operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 1, T, n, generator=generator) for n in (D, P))  # type: ignore[return-value]


def aligned() -> tuple[Tensor, Tensor]:
    a, g = random_operands()
    return a[:, :, :1].abs().expand_as(a).contiguous(), g[:, :, :1].abs().expand_as(g).contiguous()


def cancelling() -> tuple[Tensor, Tensor]:
    """Nearly half of the positions take back what the others give, in numbers of which half a bit is cut."""
    a, g = (cut(x) for x in aligned())
    g[:, :, T // 2 + 1 :] *= -1
    a[:, :, T // 2 + 1 :] *= 1 + 2.0**-11
    return a, g


OPERANDS = [random_operands, aligned, cancelling]


@pytest.mark.parametrize("make", OPERANDS)
@pytest.mark.parametrize("say", [WAYS[1], everywhere, both_ways], ids=["high", "everywhere", "both-ways"])
def test_a_sum_never_exceeds_its_bound_where_matrix_units_cut(
    say: Callable[[], None], make: Callable[[], tuple[Tensor, Tensor]]
) -> None:
    say()
    a, g = make()
    with MatrixUnits() as units:
        factor = BOUND / norms.matrix_sqnorm(a, g, bias=False).sqrt()
        for i in range(len(a)):
            alone = torch.where(torch.arange(len(a)) == i, factor, 0.0)
            total = grads.matrix_clipped_sum(a, g, alone).double()
            assert float(torch.linalg.vector_norm(total)) <= BOUND * (1 + 1e-6)
        assert units.cut == 0
        torch.randn(2, 2) @ torch.randn(2, 2)
        assert units.cut == (say is not both_ways)  # the emulation is in force


def test_a_sum_of_cut_operands_would_exceed_its_bound() -> None:
    """What the context is for: the operands of the test above, cut."""
    a, g = cancelling()
    factor = BOUND / norms.matrix_sqnorm(a, g, bias=False).sqrt()
    torch.set_float32_matmul_precision("high")
    with MatrixUnits():
        total = (cut(g * factor[:, None, None, None])[0, 0].T @ cut(a)[0, 0]).double()
    assert float(torch.linalg.vector_norm(total)) > 1.03 * BOUND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [197, 512])
def test_norms_are_at_most_one_per_cent_long(size: int, dtype: torch.dtype) -> None:
    """Of random operands, whose gradients of positions cancel for the most part; half precision pays no more."""
    torch.set_float32_matmul_precision("high")
    a, g = (x[:, :, :size].to(dtype) for x in random_operands())
    true = torch.linalg.vector_norm((g.double().mT @ a.double()).flatten(1), dim=1)
    with MatrixUnits():
        for method in (norms.matrix_sqnorm, sliced_sqnorm):
            found = method(a, g, bias=False).double().sqrt()
            assert (found >= true).all()
            assert (found <= 1.01 * true).all()


# -- whole models ------------------------------------------------------------------------------


def sorted_rows(m: Wrap, x: Tensor) -> Tensor:
    """Rows leave their examples and come back, so that the module is differentiated as one."""
    h = m.a(x)
    order = h.flatten(1).sum(1).argsort()
    return m.b(h[order].tanh())[order.argsort()]


def convolutions() -> nn.Module:
    return Wrap(sorted_rows, a=nn.Conv2d(2, 6, 3), b=nn.Conv2d(6, 4, 3))


CONV = Case("convolutions", lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3)), (2, 7, 7))
WHOLE = Case("whole-convolutions", lambda: nn.Sequential(convolutions(), nn.Tanh()), (2, 7, 7))
TEXT = Case("linear-long", lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6)), (64, 8))


@pytest.mark.parametrize("method", NORM_METHODS)
@pytest.mark.parametrize("case", [CONV, WHOLE, TEXT], ids=lambda case: case.name)
def test_an_example_adds_no_more_than_its_threshold_where_units_cut(case: Case, method: str) -> None:
    """All but one example have a loss of zero, so that what is summed is that of one, in a run on all of them."""
    everywhere()
    sites = observe_sites(case.model(torch.float32), case.batch(torch.float32), case.loss)
    assert (sites[0].layout == "whole") == (case is WHOLE)
    plan = ClipPlan(Grouping((), sites), max_grad_norm=1e-3)
    model, batch = case.model(torch.float32), case.batch(torch.float32)
    _, engine = attach(model, plan, options=EngineOptions(method))
    for i in range(4):
        with MatrixUnits(larger=1 + 2.0**-18) as units:
            losses = case.loss(model, {**batch, "scale": torch.where(torch.arange(4) == i, batch["scale"], 0.0)})
            losses.sum().backward()
        assert units.cut > 0  # forward, and what backward hands on
        total = torch.cat([x.double().flatten() for x in engine.clipped_sums().values()])
        assert 0.99 < float(torch.linalg.vector_norm(total)) / 1e-3 <= 1 + 1e-6
        model.zero_grad()


@pytest.mark.parametrize("case", [CONV, WHOLE], ids=lambda case: case.name)
def test_the_check_is_not_misled_by_units_that_cut(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere()
    found = []
    for _ in range(2):
        with MatrixUnits():
            found.append(examine(case.model(torch.float32), case.batch(torch.float32), case.loss).checked)
        monkeypatch.setattr(check, "ieee", nullcontext)
    (asked, unasked) = found
    assert asked is not None
    assert unasked is not None
    assert asked.worst < 1e-5
    assert "rounding" not in str(asked)
    assert unasked.worst > 1e-5 or "rounding" in str(unasked)
