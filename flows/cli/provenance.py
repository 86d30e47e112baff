"""Commands on artifacts: where they came from, whether they are whole, what nobody needs any more."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.app import Out, Wanted, app, find_artifact
from vla_opd.machine.host import METRICS, require_equal_bits, this_host
from vla_opd.params.load import load

if TYPE_CHECKING:
    from vla_opd.lineage.history import History
    from vla_opd.lineage.store import Artifact, Store


class Form(StrEnum):
    """How a history is written."""

    tree = "tree"
    mermaid = "mermaid"
    html = "html"
    prov = "prov"
    openlineage = "openlineage"
    in_toto = "in-toto"


@app.command("lineage")
def lineage_(
    artifact: Wanted, form: Annotated[Form, typer.Option("--as")] = Form.tree, out: Out = None
) -> None:
    """Everything that an artifact came from: parents, settings, seeds, code and its commit, versions, and who ran it when."""
    from flows.cli import answers
    from vla_opd.lineage import exports, history

    told = _history(artifact)
    match form:
        case Form.tree:
            text = answers.history(told)
        case Form.mermaid:
            text = history.mermaid(told)
        case Form.html:
            text = history.page(told)
        case _:
            text = exports.EXPORTS[form.value](told)
    _write(text, out)


@app.command("diff")
def diff_(first: Wanted, second: Wanted) -> None:
    """What differs between the histories of two artifacts."""
    from flows.cli import answers
    from vla_opd.lineage import history

    print(answers.differences(list(history.diff(_history(first), _history(second)))))


@app.command()
def compare(
    first: Wanted,
    second: Wanted,
    horizon: Annotated[
        int | None,
        typer.Option(min=1, help="control steps after which an episode is given up, in both"),
    ] = None,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999)] = 0.95,
) -> None:
    """Two evaluations of the same initial states, pair by pair: the difference with its interval, McNemar's exact p, and every task."""
    from flows.cli import answers
    from vla_opd.lineage import store

    there = store.read_store()
    one, other = (
        answers.evaluated(find_artifact(there, name), horizon) for name in (first, second)
    )
    print(answers.compared(one, other, confidence, horizon))


@app.command("verify")
def verify_(
    artifacts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ARTIFACT]...", help="all that are here if none are named"),
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
            help="make this shard of the one artifact again, and compare bytes",
        ),
    ] = None,
    signature: Annotated[
        Path | None,
        typer.Option(
            help="check this signature over the one artifact's history, which `opd sign` wrote"
        ),
    ] = None,
    key: Annotated[Path | None, typer.Option(help="the public key (PEM) of whoever signed")] = None,
) -> None:
    """Hash every file again. Exit code 1 if anything is not what was published; says what was made from it and is void."""
    from flows.cli import answers
    from vla_opd.lineage import exports, history, store, verify

    there = store.read_store()
    wanted = [find_artifact(there, name) for name in artifacts] if artifacts else None
    one = wanted[0] if wanted and len(wanted) == 1 else None
    if ((shard or signature or key) and one is None) or bool(signature) != bool(key):
        raise ValueError(
            "--replay, and --signature with --key, are for one artifact; expected its name"
        )
    findings = list(verify.verify(there, wanted, deep=deep))
    print(answers.findings(findings, len(wanted if wanted is not None else there.artifacts)))
    if findings:
        raise typer.Exit(1)
    if one and signature and key:
        exports.check(history.History(one, there), signature, key)
        print(f"  {signature}: signed by the owner of {key}")
    if one and shard:
        _replay(there, one, shard)


def _replay(there: "Store", one: "Artifact", shard: str) -> None:
    from flows import replay

    its = one.manifest.params
    require_equal_bits()
    host = this_host(
        None, its.get("device", "cpu"), "none", METRICS, graphs=its.get("graphs", False)
    )
    again = replay.replay(there, one, shard, load(), host)
    if again.differing:
        raise ValueError(
            f"{again.name}/{again.shard}: made again, it came out differently: {', '.join(again.differing)}"
        )
    print(f"  {again.name}/{again.shard}: made again, the same bytes")


@app.command("audit")
def audit_(
    question: Annotated[
        str, typer.Argument(help="in SQL; a wrong one is answered with the tables")
    ],
) -> None:
    """Ask anything of all manifests, evaluations and executions, in SQL."""
    from flows.cli import answers
    from vla_opd.lineage import sql, store

    print(answers.rows(*sql.ask(store.read_store(), question)))


@app.command()
def sign(
    artifact: Wanted,
    key: Annotated[Path, typer.Option(help="an Ed25519 private key (PEM)")],
    out: Out = None,
) -> None:
    """Sign an artifact's whole history."""
    from vla_opd.lineage import exports

    _write(exports.sign(_history(artifact), key), out)


@app.command()
def gc(
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="ARTIFACT", help="keep this too, and all that it came from"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
) -> None:
    """Remove the artifacts that neither the run of params.yaml nor what is named needs."""
    from vla_opd.lineage import garbage, store

    there = store.read_store()
    found = garbage.garbage(there, load(), [find_artifact(there, name) for name in keep or ()])
    if not dry_run:
        garbage.remove(found)
    for artifact in found.artifacts:
        print(f"  {artifact.name}")
    print(
        f"  {len(found.artifacts)} artifacts, {found.bytes / 1e6:.1f} MB {'would be' if dry_run else 'were'} removed"
    )
    if found.artifacts and Path(".dvc/cache").is_dir():
        print(
            "  DVC's cache keeps its own of them, often the same bytes on the disk; `dvc gc --workspace` removes what the workspace no longer has"
        )


def _history(name: str) -> "History":
    from vla_opd.lineage import history, store

    there = store.read_store()
    return history.History(find_artifact(there, name), there)


def _write(text: str, out: Path | None) -> None:
    if out is None:
        print(text, end="" if text.endswith("\n") else "\n")
    else:
        out.write_text(text, encoding="utf-8")
        print(f"  {out}")
