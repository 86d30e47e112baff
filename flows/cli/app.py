"""The command `opd`: its application, and what its commands have in common."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vla_opd.params.load import load

if (
    TYPE_CHECKING
):  # heavy imports are inside the commands: torch, DuckDB and the exports' libraries take seconds
    from vla_opd.lineage.store import Artifact, Store

HELP = "Bring a run up to date, and ask where things came from. Also `python -m flows`."
app = typer.Typer(
    help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

Wanted = Annotated[
    str,
    typer.Argument(
        metavar="ARTIFACT",
        help="a path, the end of a name (checkpoints/it003) or the beginning of a digest",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="write to this file, not to the terminal")]


def find_artifact(there: "Store", name: str) -> "Artifact":
    """Return the artifact of that name; where several runs have one, the present run's."""
    return there.find(name, load().run.name if Path("params.yaml").is_file() else "")
