"""The command `opd`."""

import os
import sys
from collections.abc import Sequence

from flows.cli import policies, provenance, runs
from flows.cli.app import app
from flows.prefect_server import server
from vla_opd import mistakes
from vla_opd.machine import checkout

COMMANDS = (runs, provenance, policies)
"""The modules of commands; importing a module registers its commands."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0: success. 1: an error that was explained to the user. 2: the command line is invalid.
    """
    code = _run(arguments)
    if runs.SERVER_LOST.is_set():
        server.exit_now(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        checkout.require_own_code()
        app(args=None if arguments is None else list(arguments), prog_name="opd")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        code = mistakes.exit_code(error)
        if code is None:
            raise
        print(f"\n{mistakes.message(error)}\n", file=sys.stderr)
        if code == runs.INTERRUPTED:
            return code
    return 1
