"""accelerate's loop, private: its accumulation, its saved state; equal to the plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from groupsearch import GroupSearchError
from tests.support.loops import (
    EXPECTED,
    PHYSICAL,
    RATE,
    STEPS,
    assert_close,
    assert_same,
    batches,
    lora,
    loss,
    plainly_trained,
    privacy,
    rows,
    trained,
)

pytestmark = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The whole process has one state of accelerate."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def prepared(drawn: Any = None, accumulation: int = EXPECTED // PHYSICAL, **changes: Any) -> tuple[Any, ...]:
    import accelerate

    from groupsearch.integrations.accelerate import prepare_private

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    for name, value in changes.items():
        setattr(accelerator.state, name, value)
    model = lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    drawn = batches() if drawn is None else drawn
    return accelerator, *prepare_private(accelerator, model, optimizer, drawn, loss=loss, privacy=privacy())


def loop(accelerator: Any, model: Any, optimizer: Any, drawn: Any, engine: Any, folder: Path | None = None) -> Any:
    for micro_batch in drawn:
        with accelerator.accumulate(model):
            for batch in micro_batch:
                accelerator.backward(loss(model, batch).mean())
            optimizer.step()
            optimizer.zero_grad()
        if folder is not None and engine.steps == 3 and accelerator.sync_gradients:
            accelerator.save_state(str(folder))
    return trained(model)


def test_accumulation_and_lora_train_what_the_plain_loop_does_and_resume(tmp_path: Path) -> None:
    weights = loop(*prepared(), folder=tmp_path)
    assert_close(weights, plainly_trained())
    accelerator, model, optimizer, drawn, engine = prepared()
    accelerator.load_state(str(tmp_path))
    assert engine.steps == 3
    assert_same(loop(accelerator, model, optimizer, drawn, engine), weights)
    assert engine.steps == STEPS
    assert engine.report().checked.mode == "training"


def test_without_accumulation_a_batch_is_a_whole_logical_one() -> None:
    parts = prepared(accumulation=1)
    assert_close(loop(*parts), plainly_trained())
    assert parts[-1].steps == STEPS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drawn": DataLoader(rows(), batch_size=8, shuffle=True)}, "a loader of your own: it shuffles"),  # type: ignore[arg-type]
        ({"_mixed_precision": "fp16"}, "mixed_precision='fp16': .*take bf16"),
        ({"distributed_type": "MULTI_GPU"}, "several processes: one process on one device"),
    ],
)
def test_what_cannot_be_private_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GroupSearchError, match=message):
        prepared(**changes)
