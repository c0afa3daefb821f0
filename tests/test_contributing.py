"""What contributors are told: commands and scripts exist, and hooks, workflow and ``.ci/run`` call the same linters."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import FAST

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
WRITERS = [
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for path in sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
    if re.search(r"^ +(PAGE|README)\.write_text\(", path.read_text(encoding="utf-8"), re.MULTILINE)
]


def test_the_workflow_runs_scripts_that_exist():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    scripts = [step["run"] for step in steps if "run" in step]
    assert scripts == [".ci/run", ".ci/wheel"]
    assert all(os.access(ROOT / script, os.X_OK) for script in scripts)
    assert all("@v" in step["uses"] for step in steps if "uses" in step)


def test_the_files_of_the_fast_tier_exist():
    assert all((ROOT / "tests" / file).is_file() for files in FAST.values() for file in files)


def test_hooks_and_ci_call_the_same_linters():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    hooks = {hook["entry"].removesuffix(" --force-exclude") for hook in repository["hooks"]}
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert hooks == set(re.findall(r"\$lint/bin/((?!pip)[\w-]+(?: [a-z]+)?)", script))
    assert all(each in GUIDE for each in hooks)


@pytest.mark.parametrize("module", WRITERS)
def test_every_command_that_writes_a_page_is_listed(module):
    assert f"`python -m {module}" in GUIDE


def test_commands_of_the_guide_exist():
    assert len(WRITERS) >= 7
    for module in re.findall(r"python -m ([\w.]+)", GUIDE):
        assert "__main__" in (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"), module


def test_the_citation_is_of_this_project_and_names_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["title"], citation["license"]) == (project["name"], project["license"])
    papers = {reference["url"].rpartition("/")[2] for reference in citation["references"]}
    assert papers == {"2310.19215", "2210.00038", "2305.18929"}


def test_every_benchmark_is_in_the_table():
    table = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    programs = [path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert sorted(re.findall(r"python -m benchmarks\.(\w+)", table)) == sorted(path.stem for path in programs)


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md")), ids=lambda path: path.stem)
def test_issue_templates_have_a_head_that_parses(path):
    _, head, body = path.read_text(encoding="utf-8").split("---\n", 2)
    assert {"name", "about"} <= set(yaml.safe_load(head))
    assert "SECURITY.md" in body
