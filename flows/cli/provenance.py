"""Commands on artifacts: show lineage, compare, verify, query, sign, remove what is not needed."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.app import ArtifactName, Out, app, find_artifact, needs_lineage_extra, on_project
from vla_opd.machine.host import METRICS, require_equal_bits, resolve_host
from vla_opd.params.load import load

if TYPE_CHECKING:
    from vla_opd.lineage.garbage import Garbage
    from vla_opd.lineage.history import History
    from vla_opd.lineage.store import Artifact, Store


class Form(StrEnum):
    """The formats of a history."""

    tree = "tree"
    mermaid = "mermaid"
    html = "html"
    prov = "prov"
    openlineage = "openlineage"
    in_toto = "in-toto"


@app.command("lineage")
@on_project
def show_lineage(
    artifact: ArtifactName,
    form: Annotated[Form, typer.Option("--as")] = Form.tree,
    out: Out = None,
) -> None:
    """Show what an artifact came from: parents, settings, seeds, code, versions, executions."""
    _write(_format(_read_history(artifact), form), out)


def _format(artifact_history: "History", form: Form) -> str:
    from flows.cli import answers
    from vla_opd.lineage import history

    match form:
        case Form.tree:
            return answers.history(artifact_history)
        case Form.mermaid:
            return history.mermaid(artifact_history)
        case Form.html:
            return history.page(artifact_history)
        case _:
            with needs_lineage_extra(f"opd lineage --as {form.value}"):
                from vla_opd.lineage.exports import EXPORTS
            return EXPORTS[form.value](artifact_history)


@app.command("diff")
@on_project
def show_differences(first: ArtifactName, second: ArtifactName) -> None:
    """Show in what the histories of two artifacts differ."""
    from flows.cli import answers
    from vla_opd.lineage.history import diff

    differences = list(diff(_read_history(first), _read_history(second)))
    print(answers.differences(differences))


@app.command("compare")
@on_project
def compare_evaluations(
    first: ArtifactName,
    second: ArtifactName,
    horizon: Annotated[
        int | None,
        typer.Option(min=1, help="end every episode after this many control steps"),
    ] = None,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999)] = 0.95,
) -> None:
    """Compare two evaluations of the same initial states, episode by episode.

    Shows every task, the difference with its interval, and the p value of McNemar's exact test.
    """
    from flows.cli import answers
    from vla_opd.lineage.store import read_store

    store = read_store()
    before = answers.open_evaluation(find_artifact(store, first), horizon)
    after = answers.open_evaluation(find_artifact(store, second), horizon)
    print(answers.comparison(before, after, confidence, horizon))


@app.command("verify")
@on_project
def verify_artifacts(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ARTIFACT]...", help="all artifacts if none are named"),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", help="also read the arrays and compare every artifact with its parents"
        ),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            "--replay",
            metavar="SHARD",
            help="make this shard of the artifact again, and compare the bytes",
        ),
    ] = None,
    signature: Annotated[
        Path | None,
        typer.Option(help="check this signature of the artifact's history, from `opd sign`"),
    ] = None,
    key: Annotated[Path | None, typer.Option(help="the signer's public key (PEM)")] = None,
) -> None:
    """Hash every file again. Exit code 1 if one has changed; lists the artifacts that are void."""
    from flows.cli import answers
    from vla_opd.lineage.store import read_store
    from vla_opd.lineage.verify import verify

    store = read_store()
    artifacts = list(store.artifacts)
    if names:
        artifacts = [find_artifact(store, name) for name in names]
    needs_artifact = bool(shard or signature or key)
    if (needs_artifact and len(names or ()) != 1) or bool(signature) != bool(key):
        raise ValueError(
            "--replay, and --signature with --key, are for one artifact; expected its name"
        )
    findings = list(verify(store, artifacts if names else None, deep=deep))
    print(answers.findings(findings, len(artifacts)))
    if findings:
        raise typer.Exit(1)
    if signature and key:
        _check_signature(store, artifacts[0], signature, key)
    if shard:
        _replay(store, artifacts[0], shard)


def _check_signature(store: "Store", artifact: "Artifact", signature: Path, key: Path) -> None:
    with needs_lineage_extra("opd verify --signature"):
        from vla_opd.lineage.signatures import check_signature
    from vla_opd.lineage.history import History

    check_signature(History(artifact, store), signature, key)
    print(f"  {signature}: signed by the owner of {key}")


def _replay(store: "Store", artifact: "Artifact", shard: str) -> None:
    from flows.replay import replay

    require_equal_bits()
    settings = artifact.manifest.params
    device = settings.get("device", "cpu")
    graphs = settings.get("graphs", False)
    host = resolve_host(None, device, "none", METRICS, graphs=graphs)
    result = replay(store, artifact, shard, load(), host)
    if result.differing:
        raise ValueError(
            f"{result.name}/{result.shard}: differs after a replay in {', '.join(result.differing)}"
        )
    print(f"  {result.name}/{result.shard}: made again, the same bytes")


@app.command("audit")
@on_project
def query_artifacts(
    sql: Annotated[
        str,
        typer.Argument(
            metavar="SQL", help="a query; one with a mistake is answered with all tables"
        ),
    ],
) -> None:
    """Query all manifests, evaluations and executions in SQL."""
    from flows.cli import answers
    from vla_opd.lineage.sql import query
    from vla_opd.lineage.store import read_store

    columns, rows = query(read_store(), sql)
    print(answers.table(columns, rows))


@app.command("sign")
@on_project
def sign_history(
    artifact: ArtifactName,
    key: Annotated[Path, typer.Option(help="an Ed25519 private key (PEM)")],
    out: Out = None,
) -> None:
    """Sign the history of an artifact."""
    with needs_lineage_extra("opd sign"):
        from vla_opd.lineage.signatures import sign

    _write(sign(_read_history(artifact), key), out)


@app.command("gc")
@on_project
def collect_garbage(
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="ARTIFACT", help="also keep this artifact and what it came from"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only list the artifacts")] = False,
) -> None:
    """Remove the artifacts that the run in params.yaml does not need."""
    from stages.catalog import planned_artifacts
    from vla_opd.lineage.garbage import find_garbage, remove
    from vla_opd.lineage.store import read_store

    store = read_store()
    params = load()
    kept = [find_artifact(store, name) for name in keep or ()]
    garbage = find_garbage(store, params, planned_artifacts(params), kept)
    if dry_run:
        _print_garbage(garbage, "would be")
    else:
        remove(garbage)
        _print_garbage(garbage, "were")


def _print_garbage(garbage: "Garbage", verb: str) -> None:
    for artifact in garbage.artifacts:
        print(f"  {artifact.name}")
    count = len(garbage.artifacts)
    print(f"  {count} artifacts, {garbage.bytes / 1e6:.1f} MB {verb} removed")
    if garbage.artifacts and Path(".dvc/cache").is_dir():
        print(
            "  DVC's cache still has them (often as the same bytes on disk); "
            "`dvc gc --workspace` removes what the workspace no longer has"
        )


def _read_history(name: str) -> "History":
    from vla_opd.lineage.history import History
    from vla_opd.lineage.store import read_store

    store = read_store()
    return History(find_artifact(store, name), store)


def _write(text: str, out: Path | None) -> None:
    if out is None:
        print(text, end="" if text.endswith("\n") else "\n")
    else:
        out.write_text(text, encoding="utf-8")
        print(f"  {out}")
