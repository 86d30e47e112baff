"""The Typer application `opd`, and what its commands share."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows import projects
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
ProjectFolder = Annotated[
    Path | None,
    typer.Option(
        "--project",
        "-p",
        metavar="FOLDER",
        help="work on the run in this folder, which `opd new` made; paths are relative to it",
    ),
]
Out = Annotated[Path | None, typer.Option("--out", help="write to this file, not to the terminal")]


def on_project(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command on this folder's run the option `-p`, by which it works on a project's."""

    @wraps(command)
    def on_this_project(*, project: Path | None = None, **options: Any) -> None:
        with projects.entered(project):
            command(**options)

    given = signature(command)
    option = Parameter("project", Parameter.KEYWORD_ONLY, default=None, annotation=ProjectFolder)
    parameters = [*given.parameters.values(), option]
    on_this_project.__dict__["__signature__"] = given.replace(parameters=parameters)
    on_this_project.__annotations__ = {**command.__annotations__, "project": ProjectFolder}
    return on_this_project


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
