"""The command `opd`."""

import os
import sys
from collections.abc import Sequence

from flows import terminal
from flows.cli import policies, provenance, runs
from flows.cli.app import app
from flows.pipeline import StageFailed
from flows.prefect_server import server
from vla_opd import mistakes
from vla_opd.machine import checkout

COMMANDS = (runs, provenance, policies)
"""The modules of the commands, which register them as they are imported."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse a command line and run it. Returns the exit code: 0; 1 for what the user is told; 2 for a command line that can't be read."""
    code = _obey(arguments)
    if runs.LOST.is_set():
        server.leave(code)
    return code


def _obey(arguments: Sequence[str] | None) -> int:
    try:
        checkout.require_own_code()
        app(args=list(arguments) if arguments is not None else None, prog_name="opd")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    except StageFailed as failure:
        last = terminal.last_lines(failure.said)
        print(
            f"\n{failure.name} failed; its last lines were\n{last}\n\n  once that is put right, resume with  make run",
            file=sys.stderr,
        )
    except BrokenPipeError:  # the reader of a pipe, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        code = mistakes.exit_code(error)
        if code is None:
            raise
        print(f"\n{mistakes.message(error)}\n", file=sys.stderr)
        return code if code == runs.INTERRUPTED else 1
    return 1
