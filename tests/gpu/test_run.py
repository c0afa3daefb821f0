"""The script of a GPU, rehearsed on the CPU as on a bare machine, and what it says of itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import version_of
from tests.gpu.checks import CHECKS, Skipped, outcome_of
from tests.gpu.lines import Lines

ROOT = Path(__file__).resolve().parents[2]
BARE = """
import sys

for name in "dp_accounting tree opacus pytest hypothesis click rich optuna peft accelerate datasets".split():
    sys.modules[name] = None
"""
FILES = ("checks-cpu.jsonl", "grid-cpu.json", "grid-cpu-expandable.json", "step-cpu.json", "slack-cpu.jsonl")


def bare(folder: Path) -> dict[str, str]:
    """The environment of a process without the packages that such a machine lacks."""
    (folder / "sitecustomize.py").write_text(BARE)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "PYTHONPATH": str(folder)}


def test_every_part_is_loaded_on_a_bare_machine(tmp_path: Path) -> None:
    modules = re.findall(r"(?:tests\.gpu|benchmarks)\.\w+", (ROOT / "tests/gpu/run.sh").read_text())
    assert {"tests.gpu.checks", "tests.gpu.grid", "tests.gpu.slack", "benchmarks.bench_step"} == set(modules)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(modules)}"]
    finished = subprocess.run(command, env=bare(tmp_path), capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
def test_the_dry_run_passes_on_a_bare_machine(tmp_path: Path) -> None:
    """The whole order, in processes of its own, without the packages that such a machine lacks."""
    out = tmp_path / "out"
    environment = bare(tmp_path)
    command = ["bash", "tests/gpu/run.sh", "--dry-run", str(out)]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    assert {path.name for path in out.iterdir()} == set(FILES)
    checks = {row["check"]: row for row in map(json.loads, (out / FILES[0]).read_text().splitlines())}
    assert not [name for name, row in checks.items() if "failed" in row]
    assert "dp_accounting" in checks["one step of training, checkpoint none"]["skipped"]
    grid = json.loads((out / "grid-cpu.json").read_text())
    assert {row["model"] for row in grid["rows"]} == {"digits-cnn", "vit, bfloat16", "vit"}
    assert not grid["failures"]
    step = json.loads((out / "step-cpu.json").read_text())
    assert "does not run" in step["rows"][0]["opacus_note"]
    slack = [json.loads(line) for line in (out / "slack-cpu.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in slack] == ["ran", "ran"]


def test_the_script_refuses_a_part_that_it_does_not_have(tmp_path: Path) -> None:
    command = ["bash", "tests/gpu/run.sh", "--dry-run", str(tmp_path), "nothing"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "found nothing" in finished.stderr


def test_the_page_tells_of_every_part() -> None:
    script, page = (ROOT / "tests/gpu/run.sh").read_text(), (ROOT / "tests/gpu/README.md").read_text()
    (line,) = [line for line in script.splitlines() if line.startswith("#   checks")]
    for part in line[1:].split():
        assert f"| `{part}` |" in page


def test_wheels_are_those_that_the_tests_run_with() -> None:
    def pinned(path: Path) -> set[str]:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        return {line.lower().replace("_", "-") for line in lines}

    assert pinned(ROOT / "tests/gpu/wheels.txt") <= pinned(ROOT / "constraints.txt")


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert version_of("no-such-package") == "not installed"


def test_lines_are_resumed_where_they_are_of_the_same_machine(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = Lines(path, ("check",), "cpu")
    lines.add({"check": "one", "passed": "yes"})
    lines.add({"check": "two", "failed": "no"})
    again = Lines(path, ("check",), "cpu")
    assert again.has(check="one")
    assert not again.has(check="two")
    path.write_text(path.read_text().replace(torch.__version__, "1.0"))
    assert not Lines(path, ("check",), "cpu").has(check="one")


def test_a_check_is_passed_skipped_or_failed() -> None:
    def failing(device: str) -> str:
        raise AssertionError("3 is not 4")

    def skipping(device: str) -> str:
        raise Skipped("no card")

    assert "3 is not 4" in outcome_of(failing, "cpu")["failed"]
    assert outcome_of(skipping, "cpu") == {"skipped": "no card"}


@pytest.mark.parametrize("name", ["noise from the generator", "precision of products", "trace and engine"])
def test_checks_hold_on_the_cpu(name: str) -> None:
    assert "passed" in outcome_of(CHECKS[name], "cpu")
