"""The examples run as they stand and train privately; the three loops do the same."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
import tokenize
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from groupsearch import ClipPlan, Grouping, UnsupportedModelError, make_private, trace_model
from groupsearch.training import TrainSettings, train
from groupsearch.workloads import load_workload
from tests.cli import running
from tests.support import pretrained_page

ROOT = Path(__file__).resolve().parent.parent
PRETRAINED = ROOT / "examples" / "pretrained_to_private.py"
OWN_TASK = ROOT / "examples" / "own_task.py"
LOOPS = [ROOT / "examples" / f"{name}.py" for name in ("plain_loop", "accelerate_loop", "trainer")]
# Runs each script as ``python script seed`` would, in a process of its own in which everything is imported already;
# then keeps what it trained, and what it began with.
RUNNER = """
import os, runpy, sys, warnings
import accelerate, sklearn.datasets, torch, transformers
import groupsearch as gs
gs.load_workload, transformers.Trainer, transformers.ConvNextForImageClassification  # all are imported when asked for

def run(script, result):
    sys.argv[1:] = ["0"]
    names = runpy.run_path(script, run_name="__main__")
    model, engine = names["model"], names["engine"]
    torch.manual_seed(0)
    fresh = type(model)(model.config)
    torch.save({
        "parameters": {name: p.detach() for name, p in model.named_parameters()},
        "initial": {name: p.detach() for name, p in fresh.named_parameters()},
        "steps": engine.steps, "noise_multiplier": engine.noise_multiplier,
    }, result)

def redirect(script, result):
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{result}.{stream}", os.O_CREAT | os.O_WRONLY), number)

warnings.filterwarnings("ignore", ".*use of fork", DeprecationWarning)  # of threads that torch has, idle ones
for script, result in zip(sys.argv[1::2], sys.argv[2::2]):
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        redirect(script, result)
        run(script, result)
        break
"""
Printed = tuple[str, str]


def run(scripts: Sequence[Path], folder: Path) -> dict[str, Printed]:
    """What every script printed on standard output and on standard error; what it trained lies in ``NAME.pt``."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    places = {path: folder / f"{path.stem}.pt" for path in scripts}
    jobs = [str(each) for pair in places.items() for each in pair]
    subprocess.run([sys.executable, "-W", "error", "-c", RUNNER, *jobs], cwd=folder, env=environment, check=True)
    return {
        path.stem: (Path(f"{place}.out").read_text(), Path(f"{place}.err").read_text())
        for path, place in places.items()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, Any]]]:
    """What every example printed, and what it trained."""
    folder = tmp_path_factory.mktemp("examples")
    printed = run(LOOPS, folder)
    return {path.stem: (printed[path.stem][0], result_of(folder, path.stem, printed)) for path in LOOPS}


def result_of(folder: Path, name: str, printed: dict[str, Printed]) -> dict[str, Any]:
    place = folder / f"{name}.pt"
    assert place.exists(), printed[name][1]
    found: dict[str, Any] = torch.load(place)
    return found


def code_lines(path: Path) -> int:
    """Lines that hold code: not blank, no comment, no docstring."""
    text = path.read_text(encoding="utf-8")
    documented = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    strings = [node.body[0] for node in documented if ast.get_docstring(node) is not None]
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in empty]
    lines = {number for token in tokens for number in range(token.start[0], token.end[0] + 1)}
    return len(lines - {number for node in strings for number in range(node.lineno, (node.end_lineno or 0) + 1)})


def test_every_example_is_tested() -> None:
    assert {*LOOPS, OWN_TASK, PRETRAINED} == set((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", [*LOOPS, OWN_TASK], ids=lambda path: path.stem)
def test_an_example_has_fewer_than_40_lines(path: Path) -> None:
    assert 20 < code_lines(path) < 40


@pytest.mark.parametrize("name", [path.stem for path in LOOPS])
def test_an_example_trains_privately(trained: dict[str, tuple[str, dict[str, Any]]], name: str) -> None:
    printed, result = trained[name]
    assert result["steps"] == 40
    assert result["noise_multiplier"] > 0
    last = re.search(r"^40 steps, epsilon ([\d.]+)", printed, re.MULTILINE)
    assert last is not None
    assert 7.5 < float(last[1]) <= 8.0, "the noise was chosen for 8"
    for parameter, value in result["parameters"].items():
        assert torch.isfinite(value).all()
        assert not torch.equal(value, result["initial"][parameter]), f"{parameter} did not move"


def test_the_plain_loop_learns(trained: dict[str, tuple[str, dict[str, Any]]]) -> None:
    accuracy = re.search(r"accuracy (\d+)%", trained["plain_loop"][0])
    assert accuracy is not None
    assert int(accuracy[1]) > 60


@pytest.mark.parametrize("name", [path.stem for path in LOOPS[1:]])
def test_every_loop_trains_what_the_plain_loop_does(trained: dict[str, tuple[str, dict[str, Any]]], name: str) -> None:
    plain, other = trained["plain_loop"][1]["parameters"], trained[name][1]["parameters"]
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[parameter], other[parameter]) for parameter in plain)


def test_the_trainer_logs_a_growing_epsilon(trained: dict[str, tuple[str, dict[str, Any]]]) -> None:
    spent = [float(text) for text in re.findall(r"'loss'.*'epsilon': '([\d.]+)'", trained["trainer"][0])]
    assert len(spent) == 4
    assert spent == sorted(set(spent))


def pair() -> tuple[nn.Module, torch.optim.Optimizer, ClipPlan, dict[str, torch.Tensor]]:
    """A model, its optimizer, a plan and a batch."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), {"x": torch.randn(5, 4)}
    trace = trace_model(model, batch, lambda model, batch: model(batch["x"]).flatten())
    return model, torch.optim.SGD(model.parameters(), lr=0.1), ClipPlan(Grouping.layer_wise(trace), 0.1), batch


def step_with_accelerate(attach: str) -> list[torch.Tensor]:
    """Parameters after one step, with the engine attached before preparing, after it, or to what is inside."""
    from accelerate import Accelerator

    model, optimizer, plan, batch = pair()
    settings = {"noise_multiplier": 0.0, "expected_batch_size": 5}
    accelerator = Accelerator(cpu=True)
    if attach == "before":
        make_private(model, optimizer, plan, **settings)
    model, optimizer = accelerator.prepare(model, optimizer)
    if attach != "before":
        make_private(model, optimizer if attach == "after" else optimizer.optimizer, plan, **settings)
    accelerator.backward(model(batch["x"]).mean())
    optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("attach", ["before", "inside"])
def test_an_engine_attached_before_prepare_or_to_the_inner_optimizer_clips(attach: str) -> None:
    before = [p.detach().clone() for p in pair()[0].parameters()]
    after = step_with_accelerate(attach)
    change = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True)))
    assert 0 < change <= 0.1 * 0.1 * (1 + 1e-6), "lr times R, once per example, over the expected batch size"


def test_an_engine_on_the_prepared_optimizer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="it wraps"):
        step_with_accelerate("after")


def test_the_own_task_learns_what_its_model_did_not_know() -> None:
    workload = load_workload(f"{OWN_TASK}:factory")
    assert workload.data is not None
    assert workload.metric is not None
    assert torch.equal(workload.build(1)[0].weight, workload.build(1)[0].weight)  # type: ignore[index]
    with torch.no_grad():
        untrained = workload.metric(workload.build(), workload.data.validation).mean().item()
    trace = trace_model(workload.model, workload.make_batch(64), workload.loss)
    settings = TrainSettings.of(workload, steps=30, physical_batch=512, seed=0)
    result = train(workload, Grouping.parse(trace, "best:2"), settings)
    assert result.metric is not None
    assert result.metric > untrained + 0.1
    assert result.metric_name == "pixel accuracy"
    assert 7.5 < result.epsilon <= 8.0


def test_the_own_tasks_data_are_split_the_same_way_every_time() -> None:
    first, again = (load_workload(f"{OWN_TASK}:factory").data for _ in range(2))
    assert first is not None
    assert again is not None
    assert (first.train_size, first.validation_size) == (1437, 360)
    assert all(torch.equal(first.validation[name], again.validation[name]) for name in ("upper", "lower"))


def test_from_a_pretrained_model_to_private_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way in its small form; the command line in this process, which has imported everything already."""
    pytest.importorskip("peft")
    names, said = runpy.run_path(str(PRETRAINED)), []

    def command(folder: Path, line: str) -> None:
        monkeypatch.chdir(folder)
        result = running.run(*shlex.split(line))
        assert result.exit_code == 0, result.output
        said.append(line.split()[0])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, as in a process of its own
        found = names["main"](tmp_path, names["SMALL"], names["SHORT"], command)
    assert said == ["fit", "optimize", "train"] * 2
    for name, task in found["tasks"].items():
        assert task["loaded"] == task["reported"], "to the last digit"
        document = json.loads((tmp_path / f"{name}.json").read_text())
        searched = json.loads((tmp_path / f"{name}-search.json").read_text())
        assert document["boundaries"] == searched["recommended"]["boundaries"]
        card = json.loads((tmp_path / name / "privacy.json").read_text())
        assert card["search"]["statement"]
        assert card["randomness"]["secret"], "nobody can draw its noise again"
        assert 7.5 < card["epsilon"] <= 8.0


@pytest.mark.slow
def test_peaks_of_the_pretrained_model_are_measured_as_they_are_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of the example of one's own task are, in workloads/test_batches_views.py."""
    pytest.importorskip("peft")
    names = runpy.run_path(str(PRETRAINED))
    names["pretrain"](tmp_path / "pretrained", names["SMALL"])
    names["write_private"](tmp_path / "private", names["SMALL"])
    monkeypatch.chdir(tmp_path)
    for name, (settings, _) in names["TASKS"].items():
        asked = [*shlex.split(names["MODEL"] + settings), "--grouping", "all-layer", "--grouping", "layer-wise"]
        assert running.run("profile", *asked, "-o", f"{name}.json").exit_code == 0
        checked = running.run("verify", f"{name}.json", "--tolerance", "0.5%", "--json")
        assert checked.exit_code == 0, checked.output
        assert len(json.loads(checked.stdout)["rows"]) == 2


def test_the_page_of_a_pretrained_model_has_the_examples_commands_and_numbers() -> None:
    text = pretrained_page.PAGE.read_text(encoding="utf-8")
    assert text == pretrained_page.with_numbers(text)
    assert {name for _, name, _ in pretrained_page.BLOCK.findall(text)} == set(pretrained_page.BLOCKS)
    found = json.loads(pretrained_page.FOUND.read_text(encoding="utf-8"))["tasks"]
    assert all(task["loaded"] == task["reported"] for task in found.values())
    assert found["classifier"]["reported"] > 1.5 * found["classifier"]["before"], "it has learned"
    assert found["language-model"]["reported"] > found["language-model"]["before"] + 0.05
