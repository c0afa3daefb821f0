"""``torchrun -m groupsearch train``: one document, one folder, the weights of one process, going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

import groupsearch as gs
from groupsearch.distributed.launch import is_first, launched
from groupsearch.training import loop
from tests.cli.test_resume import DROPOUT
from tests.support.world import World, in_world

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed part")
SETTINGS: dict[str, Any] = {"grouping": "best:2", "steps": 4, "seed": 3, "checkpoint_every": 2, "evaluate_every": 2}


def trained(folder: str, kill: bool = False, resume: bool = False) -> tuple[dict[str, Any], list[str]]:
    """The document, and what the job told of itself here."""
    step, told = loop._Run.step, []

    def stepping(run: Any, number: int, logical: Any) -> float:
        if kill and number == 4 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(run, number, logical)

    with patch.object(loop._Run, "step", stepping):
        asked = {"model": f"{folder}/mine.py:factory", "save": Path(folder) / "weights", "resume": resume}
        document = gs.train(notify=lambda event: told.append(str(event)), **asked, **SETTINGS)
    return document.to_json(), told


def place(folder: Path, dropout: float) -> str:
    """A folder with a small model of one's own in it."""
    folder.mkdir()
    (folder / "mine.py").write_text(DROPOUT.replace("Dropout(0.3)", f"Dropout({dropout})"), encoding="utf-8")
    return str(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "weights" / "model.safetensors")


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    here, _ = trained(place(alone, 0.0))
    (first, told), (second, silent) = in_world(2, trained, place(both, 0.0))
    assert first["settings"]["processes"] == 2
    assert first["curve"] == second["curve"]
    assert told
    assert not silent
    assert first["privacy"] == here["privacy"]
    for name, found in weights(both).items():
        torch.testing.assert_close(found, weights(alone)[name], rtol=1e-5, atol=1e-5)


def test_two_processes_go_on_after_a_kill_bit_for_bit(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (first, _), _ = in_world(2, trained, place(whole, 0.3))
    with World(2, trained, (place(killed, 0.3), True), tmp_path / "store") as world:
        said = world.results()[0]
    assert said.kind == "LostRankError"
    assert (killed / "weights.checkpoint").is_file()
    assert not (killed / "weights").exists()
    (again, _), _ = in_world(2, trained, str(killed), False, True)
    assert again["curve"] == first["curve"]
    for name, found in weights(killed).items():
        torch.testing.assert_close(found, weights(whole)[name], rtol=0, atol=0)


def in_group(port: int) -> tuple[int, bool, bool]:
    """The size of the group that a started process finds, and whether it is the first, there and afterwards."""
    dist.destroy_process_group()
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with launched("cpu") as ranks:
        assert ranks is not None
        found = ranks.size, is_first()
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # what the world ends
    with launched("cpu") as ranks:
        assert ranks is None
    return *found, is_first()


def test_processes_that_torchrun_started_find_each_other() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert in_world(2, in_group, port) == [(2, True, True), (2, False, True)]


def page_run() -> list[torch.Tensor]:
    """The weights after the snippet of the page, on a rank of several."""
    from tests.test_docs import ROOT, snippets

    names: dict[str, Any] = {"__name__": "__main__"}
    for code, _ in snippets(ROOT / "docs" / "distributed.md"):
        exec(code, names)
    return [p.detach() for p in names["model"].parameters()]


def test_the_page_runs_on_two_processes_too() -> None:
    first, second = in_world(2, page_run)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.slow
def test_torchrun_trains_and_one_process_writes(tmp_path: Path) -> None:
    place = tmp_path / "train.json"
    arguments = ["train", "digits-cnn", "--grouping", "best:2", "--steps", "2", "-o", str(place)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "groupsearch", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Wrote") == 1
    assert json.loads(place.read_text())["settings"]["processes"] == 2
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert again.returncode == 1  # torchrun's own
    assert "exists" in again.stderr
