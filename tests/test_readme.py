"""The README keeps its word: commands, options, numbers and code are what the package has."""

from __future__ import annotations

import re
import subprocess

import pytest

from groupsearch.cli import COMMANDS, main
from tests.support.readme_numbers import README, ROOT, readme_with_numbers

TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_two_commands_do_all_the_setting_up():
    commands = [block.strip() for block in blocks("bash")]
    assert len(commands) == 2
    assert all(len(command.splitlines()) == 1 for command in commands)
    assert "groupsearch optimize" in commands[0]
    assert commands[1].endswith("/pytest")


def test_ci_runs_the_commands_of_the_readme():
    listed = subprocess.run([ROOT / ".ci" / "run", "--list"], capture_output=True, text=True, check=True, cwd="/")
    assert listed.stdout.splitlines() == [block.strip() for block in blocks("bash")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_table(name):
    assert f"| `groupsearch {name}" in TEXT


def test_the_table_has_no_command_or_option_that_is_not_there():
    for name, cell in re.findall(r"^\| `groupsearch (\w+)(.*)$", TEXT, re.MULTILINE):
        command = main.get_command(None, name)
        assert command is not None, name
        known = {text for parameter in command.params for text in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", cell)) <= known


def test_numbers_come_from_the_committed_documents():
    assert readme_with_numbers(TEXT) == TEXT, "run `python -m tests.support.readme_numbers`"


def test_code_runs():
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["optimizer"].state, "the optimizer took no step"
