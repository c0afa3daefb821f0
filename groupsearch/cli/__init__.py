"""The command line: the only place where errors become exit codes.

0 done; 1 a tolerance or a budget was missed; 2 the request was wrong; 130 interrupted.
Commands are imported when they are run, so that help and everything that reads documents
starts without loading torch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from groupsearch import __version__
from groupsearch.cli.terminal import print_error
from groupsearch.errors import GroupSearchError, is_out_of_memory

COMMANDS = ("models", "profile", "fit", "optimize", "verify", "train", "compare", "export", "report", "study")
INTERRUPTED = 130


class Program(click.Group):
    """``groupsearch``, with its commands in the order of the work and its exit codes in one place."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order of :data:`COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command in the module of its name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"groupsearch.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command, or a refusal that names the nearest one."""
        close = get_close_matches(args[0], COMMANDS, n=1)
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = f" Did you mean {close[0]!r}?" if close else ""
            ctx.fail(f"Found no command {args[0]!r}.{hint} The commands are: {', '.join(COMMANDS)}.")
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Run, and end the process (or raise SystemExit) with the exit code."""
        sys.exit(self._exit_code(args, prog_name or "groupsearch", {**extra, "standalone_mode": False}))

    def _exit_code(self, args: Sequence[str] | None, prog_name: str, extra: dict[str, Any]) -> int:
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler talks on standard error otherwise
        try:
            with no_interrupt_lost():
                result = super().main(args, prog_name, **extra)
        except GroupSearchError as error:
            print_error(f"Error: {error}")
            return error.exit_code
        except click.ClickException as error:
            error.show()
            return GroupSearchError.exit_code
        except click.Abort as abort:
            # click turns KeyboardInterrupt into Abort; the command's own word on what is kept is its cause
            print_error(str(abort.__cause__ or "") or "Interrupted; nothing was written.")
            return INTERRUPTED
        except (RuntimeError, MemoryError) as error:  # after click.Abort, which is one
            if not is_out_of_memory(error):
                raise
            print_error(
                f"Error: There was no memory left: {str(error).splitlines()[0].rstrip('.')}. Take a smaller "
                "--batch-size or --checkpoint blocks; `groupsearch fit` finds what fits."
            )
            return GroupSearchError.exit_code
        return result if isinstance(result, int) else 0


@click.group(
    "groupsearch",
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
    epilog="MODEL: a name that `groupsearch models` lists, hf:NAME, path/to/file.py:factory or package.module:factory.",
)
@click.version_option(__version__, prog_name="groupsearch")
def main() -> None:
    """Find clipping groups for differentially private training: what each costs in memory and accuracy.

    Every command takes --json, which writes its document to standard output and nothing else there.
    Exit codes: 0 done, 1 a tolerance or a budget was missed, 2 the request was wrong, 130 interrupted.
    """


# Where Python prints an exception and goes on: destructors, and what a weak reference calls.
_DESTRUCTOR = "__del__"
_WEAK_FILES = ("weakref.py", "_weakrefset.py", "weak.py")
_LATER_SECONDS = 0.01


@contextmanager
def no_interrupt_lost() -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C, but a moment later where an exception would be swallowed.

    Python calls a signal's handler wherever it is, which may be a destructor, as torch's storages have one:
    an exception that leaves a destructor is printed and forgotten, and the command would go on.

    Outside the main thread, and where interrupts are not raised as KeyboardInterrupt, nothing is changed.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _swallows(frame):
        signal.default_int_handler(number, frame)
    again = threading.Timer(_LATER_SECONDS, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def _swallows(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == _DESTRUCTOR or Path(frame.f_code.co_filename).name in _WEAK_FILES:
            return True
        frame = frame.f_back
    return False
