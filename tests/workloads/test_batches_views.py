"""A batch of slices, of expanded or of shared storage is measured as what a training step would hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from groupsearch.tracer.step import real_copy
from tests.cli.running import ROOT, run

ROWS = torch.arange(64.0).view(16, 4)


@pytest.mark.parametrize(
    "view",
    [
        lambda: ROWS[:4],
        lambda: ROWS[::4],
        lambda: ROWS.t()[:, :4].t(),
        lambda: torch.ones(1, 4).expand(4, 4),
        lambda: torch.ones(1).expand(4, 4),
    ],
    ids=["slice", "stride", "transposed", "row expanded", "number expanded"],
)
def test_a_view_has_a_storage_of_its_own(view: Callable[[], Tensor]) -> None:
    _, batch = real_copy(nn.Linear(4, 4), {"x": view()}, torch.device("cpu"))
    assert batch["x"].untyped_storage().nbytes() == 4 * 4 * 4
    assert torch.equal(batch["x"], view())


def test_what_has_one_is_left_as_it_lies() -> None:
    images = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    _, batch = real_copy(nn.Linear(4, 4), images, torch.device("cpu"))
    assert batch is images


def test_the_example_of_ones_own_task_is_measured_as_it_is_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    place = tmp_path / "profile.json"
    groupings = ("--grouping", "all-layer", "--grouping", "layer-wise")
    assert run("profile", "examples/own_task.py:factory", *groupings, "-o", place).exit_code == 0
    checked = run("verify", place, "--tolerance", "0.5%", "-o", tmp_path / "verify.json")
    assert checked.exit_code == 0, checked.output
