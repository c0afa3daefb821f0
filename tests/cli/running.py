"""Running the command line in this process or in one of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner, Result

from groupsearch.cli import main

ROOT = Path(__file__).resolve().parents[2]


def run(*args: object) -> Result:
    """The command in this process; an exception that is no exit code is raised here."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*args: object) -> str:
    """The message of a request that must end with exit code 2, in one paragraph, with nothing on standard output."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (message,) = [line for line in result.stderr.strip().splitlines() if line.startswith("Error: ")]
    return message


def spawn(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "groupsearch", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, timeout=120, check=False)
