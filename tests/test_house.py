"""The house as it stands: few rooms, no circles, a test for each, and nothing large beside the code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.house import HOME, figures

TESTS = Path(__file__).resolve().parent
PROFILES = TESTS.parent / "profiles"
MOST_MODULES = 150
LIMIT_BYTES = 600 * 1024
SMALL_FACE = 60
ELSEWHERE = {
    "__main__": "cli/test_program.py",
    "cli": "cli/test_program.py",
    "cli/compare": "cli/test_documents.py",
    "cli/models": "cli/test_program.py",
    "cli/parameters": "cli/test_program.py",
    "cli/report": "cli/test_documents.py",
    "cli/study": "jobs/test_study.py",
    "cli/terminal": "cli/test_program.py",
    "cli/verify": "cli/test_documents.py",
    "documents/codec": "documents/test_documents.py",
    "documents/kinds": "documents/test_documents.py",
    "documents/rows": "documents/test_documents.py",
    "documents/tables": "documents/test_documents.py",
    "engine/bare_parameters": "engine/test_parity.py",
    "engine/book": "engine/test_parity.py",
    "engine/capture": "engine/test_parity.py",
    "engine/layers": "engine/test_parity.py",
    "engine/ownership": "engine/test_refusals.py",
    "engine/step": "engine/test_loops.py",
    "engine/substitutes": "engine/test_parity.py",
    "engine/truth/check": "engine/test_truth.py",
    "engine/truth/comparison": "engine/test_truth.py",
    "engine/truth/draws": "engine/test_truth.py",
    "engine/truth/leftovers": "engine/test_truth.py",
    "engine/truth/rows": "engine/test_truth.py",
    "engine/truth/watch": "engine/test_watch.py",
    "engine/whole": "engine/test_kinds.py",
    "errors": "cli/test_program.py",
    "fit/sizes": "test_fit.py",
    "jobs/evaluation": "cli/test_varying.py",
    "jobs/events": "jobs/test_door.py",
    "jobs/fit": "jobs/test_door.py",
    "jobs/profile": "jobs/test_door.py",
    "jobs/request": "jobs/test_door.py",
    "jobs/search": "jobs/test_door.py",
    "jobs/stages": "jobs/test_door.py",
    "jobs/train": "jobs/test_door.py",
    "jobs/trackers": "cli/test_trackers.py",
    "jobs/verify": "jobs/test_door.py",
    "jobs/weights": "cli/test_weights.py",
    "jobs/winners": "cli/test_winners.py",
    "plan/checked": "engine/test_truth.py",
    "privacy": "privacy/test_statement.py",
    "report/figures": "report/test_page.py",
    "report/sections": "report/test_profile_sections.py",
    "report/subject": "report/test_info.py",
    "report/tables": "report/test_profile_sections.py",
    "report/words": "report/test_page.py",
    "search/evaluations": "search/test_shared_faults.py",
    "search/exploration": "search/test_run.py",
    "search/proxied": "search/test_run_rungs.py",
    "search/result": "search/test_run.py",
    "search/settings": "search/test_run.py",
    "tracer": "tracer/test_trace_model.py",
    "tracer/record": "tracer/test_trace_model.py",
    "training/checkpoints": "cli/test_resume.py",
    "training/loop": "test_training.py",
    "training/settings": "test_training.py",
    "workloads/saving": "cli/test_weights.py",
    "workloads/settings": "workloads/test_catalogue.py",
    "workloads/tasks": "workloads/test_hub.py",
}
"""Modules without a test file of their name, and the file that tests them: through what they are for."""


def own_tests(module: str) -> list[Path]:
    """The test files of a module's name: ``test_NAME.py``, ``test_NAME_TOPIC.py``."""
    folder, _, name = module.rpartition("/")
    return [*(TESTS / folder).glob(f"test_{name}.py"), *(TESTS / folder).glob(f"test_{name}_*.py")]


def modules() -> list[str]:
    """By path, without the packages whose face only names what is in them."""
    found = []
    for path in sorted(HOME.rglob("*.py")):
        face = path.stem == "__init__"
        if not face or len(path.read_text(encoding="utf-8").splitlines()) > SMALL_FACE:
            found.append(str((path.parent if face else path.with_suffix("")).relative_to(HOME)))
    return [name for name in found if name != "."]  # the door is of jobs/test_door.py


@pytest.mark.parametrize("module", modules())
def test_every_module_has_tests_of_its_name_or_a_stated_exception(module: str) -> None:
    if module in ELSEWHERE:
        assert not own_tests(module), "the exception is none"
        assert (TESTS / ELSEWHERE[module]).is_file()
    else:
        assert own_tests(module)


def test_exceptions_are_of_modules_that_are_there() -> None:
    assert ELSEWHERE.keys() <= set(modules())


def test_the_house_has_few_rooms_and_no_circles() -> None:
    found = figures(HOME)
    assert found["modules"] <= MOST_MODULES
    assert found["circles"] == []


def test_a_module_that_one_other_imports_says_why_it_stands_apart() -> None:
    for name in figures(HOME)["imported_once"]:
        path = HOME.parent / name.replace(".", "/")
        if path.is_dir():
            continue  # a package is a room
        said = ast.get_docstring(ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))) or ""
        assert "Apart from" in said or "alone" in said, name


def test_the_committed_documents_are_summaries_and_not_raw_rows() -> None:
    sizes = {path.name: path.stat().st_size for path in PROFILES.iterdir()}
    assert sum(sizes.values()) <= LIMIT_BYTES, sizes
