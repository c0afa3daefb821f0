"""The command line: the only place where errors become exit codes.

0 done; 1 a tolerance or a budget was missed; 2 the request was wrong; 130 interrupted.
Commands are imported when they are run, so that help and everything that reads documents
starts without loading torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

import click

from groupsearch import __version__
from groupsearch.cli.console import print_error
from groupsearch.cli.interrupts import no_interrupt_lost
from groupsearch.errors import GroupSearchError, is_out_of_memory

COMMANDS = ("models", "profile", "fit", "optimize", "verify", "train", "compare", "export", "report")
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
