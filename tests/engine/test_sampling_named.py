"""A loop's own loader: how it draws batches is named, accounted as what it is, and refused where it visibly is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from groupsearch.engine import PrivateEngine, make_private
from groupsearch.engine.loading import PoissonBatches
from groupsearch.errors import GroupSearchError
from groupsearch.plan.clipping import ClipPlan
from groupsearch.plan.grouping import Grouping
from groupsearch.privacy.accounting import epsilon
from groupsearch.tracer.sites import observe_sites

SIZE = 96
X = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(0))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).flatten().square()


def attached(**settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, PrivateEngine]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = ClipPlan(Grouping((), observe_sites(model, {"x": X[:4]}, loss)), max_grad_norm=0.1)
    settings = {"noise_multiplier": 1.0, "expected_batch_size": 8, "sampling_rate": 8 / SIZE, **settings}
    return model, optimizer, make_private(model, optimizer, plan, **settings)


def train(run: tuple[nn.Module, torch.optim.Optimizer, PrivateEngine], epochs: int) -> None:
    model, optimizer, _ = run
    for _ in range(epochs):
        for (x,) in DataLoader(TensorDataset(X), batch_size=8, shuffle=True):
            loss(model, {"x": x}).mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_shuffling_loader_is_refused_unless_it_is_named() -> None:
    run = attached()
    with pytest.raises(GroupSearchError, match=r"same size again and again.*sampling='shuffled'"):
        train(run, 3)
    named = attached(sampling="shuffled")
    train(named, 3)
    assert named[2].epsilon(1e-4) == epsilon(1.0, 8 / SIZE, 36, 1e-4, sampling="shuffled") > run[2].epsilon(1e-4)


def test_batches_of_a_fixed_size_have_their_own_epsilon() -> None:
    run = attached(sampling="fixed-size", noise_multiplier=4.0)
    train(run, 1)
    assert run[2].epsilon(1e-4) == epsilon(4.0, 8 / SIZE, 12, 1e-4, sampling="fixed-size")
    loss(run[0], {"x": X[:7]}).mean().backward()
    with pytest.raises(GroupSearchError, match="a batch of another size"):
        run[1].step()


def test_poisson_samples_of_a_loader_of_ones_own_pass() -> None:
    model, optimizer, engine = attached()
    rng = np.random.default_rng(0)
    for _ in range(60):
        taken = torch.from_numpy(rng.random(SIZE) < 8 / SIZE)
        if taken.any():
            loss(model, {"x": X[taken]}).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.steps == 60


def test_sizes_are_of_logical_batches_not_of_passes() -> None:
    model, optimizer, engine = attached()
    rng = np.random.default_rng(1)
    for size in rng.binomial(SIZE, 8 / SIZE, 30):
        for _ in range(size):  # passes of one example each: all of the same size
            loss(model, {"x": X[:1]}).mean().backward()
        optimizer.step()
    assert engine.steps == 30


def test_batches_given_up_are_counted_where_they_cannot_be_refused() -> None:
    model, optimizer, engine = attached()
    for _ in range(3):
        loss(model, {"x": X[:8]}).mean().backward()
        optimizer.zero_grad()
        optimizer.zero_grad()
    assert engine.given_up == 3
    assert "3 logical batches were summed and given up" in str(engine.statement(1e-4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": "cyclic"}, "poisson, fixed-size, shuffled, found 'cyclic'"),
        ({"sampling": "shuffled", "sampling_rate": None}, "without a sampling_rate"),
        ({"loss_divisor": 0.0}, "finite loss_divisor > 0"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GroupSearchError, match=message):
        attached(**settings)


def test_poisson_batches_are_not_called_otherwise() -> None:
    batches = PoissonBatches({"x": X}, expected_batch_size=8, steps=2)
    with pytest.raises(GroupSearchError, match="PoissonBatches are Poisson samples"):
        attached(batches=batches, expected_batch_size=None, sampling_rate=None, sampling="shuffled")


def sums(divisor: float, **settings: Any) -> dict[str, Tensor]:
    model, _, engine = attached(**settings)
    for start in (0, 4):
        (loss(model, {"x": X[start : start + 4]}).mean() / divisor).backward()
    return engine.clipped_sums()


def test_what_losses_are_divided_by_is_taken_out_before_clipping() -> None:
    right, divided, named = sums(1.0), sums(64.0), sums(64.0, loss_divisor=64.0)
    assert all(torch.allclose(right[name], named[name], rtol=1e-5, atol=1e-8) for name in right)
    assert not all(torch.allclose(right[name], divided[name], rtol=1e-2) for name in right)


@pytest.fixture
def accelerator() -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset() -> None:
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        GradientState._reset_state()

    reset()
    yield lambda passes: Accelerator(cpu=True, gradient_accumulation_steps=passes)
    reset()


def test_accumulation_by_accelerate_is_refused_or_named(accelerator: Any) -> None:
    for divisor, refused in ((None, True), (4, False)):
        model, optimizer, engine = attached(loss_divisor=divisor)
        with (accelerate := accelerator(4)).accumulate(model):
            pass
        for start in range(0, 8, 2):
            accelerate.backward(loss(model, {"x": X[start : start + 2]}).mean())
        if refused:
            with pytest.raises(GroupSearchError, match=r"accelerate accumulates.*over 4 passes.*loss_divisor=4"):
                optimizer.step()
            continue
        plain, _, other = attached()
        loss(plain, {"x": X[:8]}).mean().backward()
        for name, value in other.clipped_sums().items():
            torch.testing.assert_close(engine.clipped_sums()[name], value)
        optimizer.step()


def test_accelerate_without_accumulation_is_left_alone(accelerator: Any) -> None:
    model, optimizer, engine = attached()
    accelerator(1).backward(loss(model, {"x": X[:8]}).mean())
    optimizer.step()
    assert engine.steps == 1


class Rows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": X[index]}


def trainer_of(folder: Any, settings: dict[str, Any], **arguments: Any) -> tuple[Any, PrivateEngine]:
    from transformers import Trainer, TrainingArguments

    class Own(Trainer):
        """Has a loss for each example, and the stock data loader."""

        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Tensor:
            return loss(model, inputs).mean()

    model, optimizer, engine = attached(**settings)
    given = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        max_steps=4,
        report_to="none",
        save_strategy="no",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    return Own(model, given, train_dataset=Rows(), optimizers=(optimizer, None)), engine


def test_a_stock_trainer_is_refused_at_its_first_step_unless_shuffling_is_named(tmp_path: Any) -> None:
    trainer, engine = trainer_of(tmp_path, {})
    with pytest.raises(GroupSearchError, match=r"Trainer with its own data loader.*sampling='shuffled'"):
        trainer.train()
    assert engine.steps == 0
    trainer, engine = trainer_of(tmp_path, {"sampling": "shuffled"})
    trainer.train()
    assert engine.steps == 4


def test_accumulation_by_the_trainer_is_refused_unless_it_is_named(tmp_path: Any) -> None:
    settings = {"sampling": "shuffled", "expected_batch_size": 16, "sampling_rate": 16 / SIZE}
    trainer, _ = trainer_of(tmp_path, settings, gradient_accumulation_steps=2)
    with pytest.raises(GroupSearchError, match=r"Trainer accumulates.*over 2 passes.*loss_divisor=2"):
        trainer.train()
    trainer, engine = trainer_of(tmp_path, {**settings, "loss_divisor": 2}, gradient_accumulation_steps=2)
    trainer.train()
    assert engine.steps == 4
