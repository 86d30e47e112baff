"""The Typer application `opd`, and what its commands share."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vla_opd.params.load import load

if TYPE_CHECKING:  # torch, DuckDB and the libraries of exports take seconds: commands import them
    from vla_opd.lineage.store import Artifact, Store

app = typer.Typer(
    help="Run the pipeline, and query where artifacts came from. Also `python -m flows`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ArtifactName = Annotated[
    str,
    typer.Argument(
        metavar="ARTIFACT",
        help="a path, the end of a name (checkpoints/it003) or the beginning of a digest",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="write to this file, not to the terminal")]


def find_artifact(store: "Store", name: str) -> "Artifact":
    """Return the artifact of that name; if several runs have one, that of params.yaml's run."""
    run = load().run.name if Path("params.yaml").is_file() else ""
    return store.find(name, run)


@contextmanager
def needs_lineage_extra(command: str) -> Generator[None]:
    """Raise a ValueError that names the extra `lineage` if one of its libraries is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{command} needs the extra `lineage`: pip install 'vla-opd[lineage]' "
            f"({error.name} is not installed)"
        ) from error
