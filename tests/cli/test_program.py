"""What holds for every command: help, names, exit codes, and torch only where it is needed."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from groupsearch import __version__
from groupsearch.cli import COMMANDS, main
from groupsearch.errors import GroupSearchError, ToleranceError
from tests.cli.running import refused, run, spawn


def options_of(name: str) -> set[str]:
    return {text for parameter in main.get_command(None, name).params for text in parameter.opts}


def test_help_lists_every_command_in_the_order_of_the_work():
    text = run("--help").stdout
    places = [text.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name):
    command = main.get_command(None, name)
    assert command.name == name
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"
    text = run(name, "--help").stdout
    assert f"groupsearch {name}" in text.split("Options:")[0].split("Usage:", 1)[1]
    assert all(option in text for option in options_of(name))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_json_and_seed(name):
    assert {"--json", "--seed"} <= options_of(name)


@pytest.mark.parametrize("name", ["profile", "fit", "optimize", "verify", "train", "report"])
def test_every_command_that_writes_takes_output_and_force(name):
    assert {"--output", "-o", "--force"} <= options_of(name)


def test_version():
    assert run("--version").stdout.strip() == f"groupsearch, version {__version__}"


def test_unknown_command_is_answered_with_the_nearest():
    assert "'profile'" in refused("profil", "digits-vit")


def test_unknown_option_is_answered_with_the_nearest():
    assert "'--grouping'" in refused("profile", "digits-vit", "--groping", "best:4")


def test_missing_argument():
    assert "MODEL" in refused("profile")


@pytest.mark.parametrize(("error", "code"), [(GroupSearchError("found x"), 2), (ToleranceError("found x"), 1)])
def test_errors_become_their_exit_code_and_one_line(monkeypatch, error, code):
    @click.command()
    def failing():
        raise error

    monkeypatch.setattr(main, "get_command", lambda context, name: failing)
    result = CliRunner().invoke(main, ["models"])
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "Error: found x\n")


@pytest.mark.parametrize("word", ["", "4 trials are kept."])
def test_an_interrupt_ends_with_130_and_says_what_is_kept(monkeypatch, word):
    @click.command()
    def interrupted():
        raise KeyboardInterrupt(word)

    monkeypatch.setattr(main, "get_command", lambda context, name: interrupted)
    result = CliRunner().invoke(main, ["models"])
    assert result.exit_code == 130
    assert result.stdout == ""
    assert (word or "nothing was written") in result.stderr


def test_a_reader_that_stops_reading_is_no_error():
    command = f"{sys.executable} -m groupsearch models | head -n 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.startswith("digits-vit")
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


@pytest.mark.parametrize(
    "args", [["--help"], ["profile", "--help"], ["optimize", "--help"], ["report", "missing.json"]], ids=" ".join
)
def test_torch_is_not_loaded_without_need(args):
    code = (
        "import sys\nfrom groupsearch.cli import main\n"
        f"try:\n    main({args!r})\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_as_a_module():
    result = spawn("--version")
    assert result.returncode == 0
    assert result.stdout.strip() == f"groupsearch, version {__version__}"
