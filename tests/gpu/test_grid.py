"""The grid of a GPU, taken on the CPU with small models: the same path, so that it runs where a device is at hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from groupsearch.errors import GroupSearchError
from groupsearch.measure import measure_step
from groupsearch.tracer.step import make_stage
from groupsearch.verify import Setup
from groupsearch.workloads import load_workload
from tests.gpu import grid, grid_part
from tests.gpu.grid_part import FRESH, NON_PRIVATE, Part, check_held, held_bytes, rows_of

CPU = torch.device("cpu")
PART = Part("digits-cnn", "digits-cnn", {"batch_size": 16, "width": 8}, "cpu", ("none",), randoms=1)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(rows_of(PART))


def test_every_grouping_has_a_row_with_what_was_measured(rows: list[dict[str, Any]]) -> None:
    names = [row["grouping"] for row in rows]
    assert names == [NON_PRIVATE, "all-layer", "best:2", "best:4", "layer-wise", "best", "random 0"]
    stage = grid_part.stage_of(Setup(PART.workload, PART.settings), CPU)
    assert rows[0]["measured_bytes"] == measure_step(stage, CPU, 1).peak_bytes
    for row in rows:
        assert row["estimate_bytes"] == pytest.approx(row["measured_bytes"], rel=5e-3)
        assert "reserved_bytes" not in row  # nothing is reserved on a CPU


def test_a_row_that_is_there_is_not_measured_again(rows: list[dict[str, Any]]) -> None:
    done = [("none", row["grouping"]) for row in rows if row["grouping"] != "best:2"]
    (again,) = rows_of(replace(PART, done=done))
    first = next(row for row in rows if row["grouping"] == "best:2")
    times = ("seconds", "step_seconds")
    assert {k: v for k, v in again.items() if k not in times} == {k: v for k, v in first.items() if k not in times}


@pytest.mark.slow
def test_no_row_begins_when_the_time_is_over() -> None:
    assert len(list(rows_of(replace(PART, seconds=0.0)))) == 1


@pytest.mark.slow
def test_a_process_that_holds_more_than_before_is_not_measured_in_again() -> None:
    before = held_bytes(CPU)
    check_held(CPU, before, "nothing")
    kept = torch.ones(100)
    with pytest.raises(RuntimeError, match=rf"{before} bytes .* found {before + kept.nbytes}"):
        check_held(CPU, before, "keeping a tensor")


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning")
def test_sparse_tensors_that_others_left_are_no_hindrance() -> None:
    before = held_bytes(CPU)
    kept = torch.eye(3).to_sparse_coo()
    check_held(CPU, before + kept._indices().nbytes + kept._values().nbytes, "keeping a sparse tensor")
    compressed = torch.eye(3).to_sparse_csr()
    assert compressed.is_cpu
    assert held_bytes(CPU) > before


@pytest.mark.slow
def test_a_setting_that_fails_is_told_and_the_next_one_measured() -> None:
    """The network has no blocks to checkpoint."""
    failed, *found = rows_of(replace(PART, checkpoints=("blocks", "none"), done=[("none", "best")], randoms=0))
    assert "block" in failed["failed"]
    assert len(found) == 5


def filled(path: Path, rows: list[dict[str, Any]]) -> grid.Grid:
    document = grid.Grid(path, "cpu")
    grid.run(document, [PART], 60.0, lambda part: iter([dict(row) for row in rows]))
    return document


def test_the_document_is_resumed_and_refused_on_another_device(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    document = filled(path, rows)
    again = grid.Grid(path, "cpu")
    assert again.rows == document.rows
    assert again.done("digits-cnn") == [("none", row["grouping"]) for row in rows]
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "another"'))
    with pytest.raises(GroupSearchError, match="Name another file"):
        grid.Grid(path, "cpu")


def test_errors_are_signed_and_under_estimates_counted(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    more = [{**row, "measured_bytes": row["estimate_bytes"] + 10**6 * (k == 1)} for k, row in enumerate(rows)]
    document = filled(tmp_path / "grid.json", more).document()
    errors = document["summary"]["all"]["estimate/measurement"]
    assert errors["numbers"] == len(rows)
    assert errors["underestimates"] == 1
    assert errors["worst"] == errors["worst_underestimate"] < -grid.WORST_LIMIT
    assert document["missed"]


def test_reserved_stands_beside_and_is_part_of_no_error(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    beside = {"reserved_bytes": 2**40, "fragmentation_bytes": 2**39, "requested_bytes": 1}
    plain = filled(tmp_path / "plain.json", rows).document()["summary"]["all"]["estimate/measurement"]
    document = filled(tmp_path / "beside.json", [{**row, **beside} for row in rows]).document()
    assert document["summary"]["all"]["estimate/measurement"] == plain
    assert document["rows"][0]["reserved_bytes"] == 2**40
    assert not [name for name in document["rows"][0]["errors"] if "reserved" in name]


def test_a_number_that_a_fresh_process_does_not_confirm_is_told(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    fresh = [{**row, "fresh_bytes": row["measured_bytes"] + 1} if row["grouping"] == FRESH else row for row in rows]
    assert "fresh process" in filled(tmp_path / "grid.json", fresh).missed()[0]


def test_a_process_that_dies_is_a_failure(tmp_path: Path) -> None:
    dying = tmp_path / "dying.py"
    dying.write_text("import os\n\nos._exit(3)\n")
    (row,) = grid.in_a_process(replace(PART, workload=f"{dying}:make"))
    assert row == {"model": "digits-cnn", "checkpoint": "any", "failed": "the process ended with exit code 3"}


@pytest.mark.parametrize("name", grid.REALISTIC)
def test_the_realistic_models_are_loaded_by_name_and_have_a_small_one_of_their_kind(name: str) -> None:
    part = grid.realistic_part(name, "cuda")
    assert load_workload(part.workload, **part.settings).batch_size == part.settings["batch_size"]
    assert part.checkpoints == ("none", "blocks")


def test_a_stage_of_the_grid_takes_every_micro_batch() -> None:
    setup = Setup(PART.workload, PART.settings, micro_batches=3)
    assert grid_part.stage_of(setup, CPU).micro_batches == 3
    workload = setup.loaded
    assert make_stage(workload.build(), workload.make_batch(2), workload.loss, setup.step).micro_batches == 2
