"""The command `opd`: bring a run up to date, and ask where things came from. Also `python -m flows`."""

import os
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows import members, pipeline, serve, server, settings, summary, terminal
from flows.pipeline import StageFailed, Step
from vla_opd import checkout, host, mistakes, params
from vla_opd.host import METRICS, require_equal_bits, this_host

if TYPE_CHECKING:  # what answers questions is imported by the question: torch, DuckDB and the exports' libraries take seconds
    from flows.lineage import History
    from flows.store import Artifact, Store

PREFECT = {  # the terminal is for the stages; Prefect's own log is in its interface. A server that is silent for 15 seconds (2 + 4 + 8) is lost
    "PREFECT_CLIENT_MAX_RETRIES": "3",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    "DO_NOT_TRACK": "1",
}
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
LOST = threading.Event()  # Prefect's server, in the middle of a run
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Stages = Annotated[list[str] | None, typer.Argument(metavar="[STAGE]...", help="only what leads to these stages, e.g. evaluate@final")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="write a setting into params.yaml first")]
Wanted = Annotated[str, typer.Argument(metavar="ARTIFACT", help="a path, the end of a name (checkpoints/it003) or the beginning of a digest")]
Out = Annotated[Path | None, typer.Option("--out", help="write to this file, not to the terminal")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse a command line and run it. Returns the exit code: 0; 1 for what the user is told; 2 for a command line that can't be read."""
    code = _obey(arguments)
    if LOST.is_set():
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
        print(f"\n{failure.name} failed; its last lines were\n{last}\n\n  once that is put right, resume with  make run", file=sys.stderr)
    except BrokenPipeError:  # the reader of a pipe, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        code = mistakes.exit_code(error)
        if code is None:
            raise
        print(f"\n{mistakes.message(error)}\n", file=sys.stderr)
        return code if code == INTERRUPTED else 1
    return 1


# Runs


@app.command()
def run(targets: Stages = None, changes: Changes = None) -> None:
    """Bring the run that params.yaml describes up to date, as a Prefect flow."""
    _quiet()
    settings.write(_changes(changes or ()))
    with _interruptible("make run"), server.in_use() as url:
        from httpx import HTTPError
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        from flows.train import bring_alone, opd

        try:
            # Who sits at the terminal sees a run end; the heartbeat's thread takes 1 s to.
            with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
                opd(targets=targets or [])
        except HTTPError:  # the server was lost, and the end of the run could not be told to it
            LOST.set()
            bring_alone(targets or [])
    folder = Path("artifacts") / params.load().run.name
    if "report" in (targets or ["report"]) and (told := summary.read(folder)):
        print(terminal.closing(folder, told, url.removesuffix("/api")))


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="a study of params.yaml")],
    arms: Annotated[list[str] | None, typer.Option("--arm", help="only this arm; may be said again")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", min=0, help="only this seed; may be said again")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="members at the same time; each gets its share of the cores")] = 1,
) -> None:
    """Bring a study up to date: every arm with every seed, then its table and its page."""
    run = params.load()
    members.members(name, run, arms or (), seeds or ())  # a name that isn't there is refused before a server is started
    _quiet()
    with _interruptible(f"opd study {name}"), server.in_use():
        from httpx import HTTPError

        from flows.study import study as flow

        try:
            flow(name, arms, seeds, parallel)
        except HTTPError as error:
            LOST.set()
            raise RuntimeError(f"Prefect's server does not answer any more ({error}); what is done stays, go on with  opd study {name}") from error
    folder = Path("artifacts") / run.run.name
    print(f"\n  table      {folder / 'studies' / name}\n  page       {folder / 'report' / name / 'index.html'}")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, taken for what Ctrl-C is."""


@contextmanager
def _interruptible(again: str) -> Generator[None]:
    """End on Ctrl-C and on SIGTERM with one sentence: by which command the run is resumed."""

    def terminate(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)  # Prefect, which takes the signal first, hands it on when its run is ended
    try:
        yield
    except KeyboardInterrupt as end:
        print(f"\n\n  interrupted; what is done is kept: resume with  {again}", file=sys.stderr)
        raise typer.Exit(TERMINATED if isinstance(end, _Terminated) else INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _quiet() -> None:
    """What Prefect is told where the terminal is for something else. It has to be there before Prefect is imported."""
    for name, value in PREFECT.items():
        os.environ.setdefault(name, value)


@app.command()
def plan(
    targets: Stages = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="what the run will take of the memory, and whether it fits, in place of what is to do")
    ] = False,
    capacity: Annotated[
        float | None, typer.Option(min=0, metavar="GB", help="with --memory: of the device, if it isn't the one that is here")
    ] = None,
    processes: Annotated[
        str, typer.Option(metavar="N", envvar="OPD_PROCESSES", help="with --memory: that train together, each on a device of its own")
    ] = "1",
) -> None:
    """Say what is up to date and what is not; or, with --memory, what the run will need. Exit code 1 if that is more than there is."""
    if memory and not targets:
        _plan_memory(capacity, processes)
        return
    if memory or capacity is not None:
        raise ValueError(
            f"--memory with {targets or 'no stages'}, --capacity is {capacity}; expected --memory without stages, and --capacity with it only"
        )
    for step in pipeline.inspect(targets or ()):
        print(f"  {step.name:<20} {_state(step)}")


def _state(step: Step) -> str:
    if step.at_work:
        return "at work"
    if step.stale:
        return "to do"
    if step.due:
        return "may be to do"
    return "not needed" if step.missing else "up to date"


def _plan_memory(capacity: float | None, processes: str) -> None:
    from flows import capacity as needed

    told, too_much = needed.plan(params.load(), capacity, host.processes(processes))
    print(told)
    if too_much:
        raise ValueError("\n".join(too_much))


@app.command("serve")
def serve_() -> None:
    """Serve the deployment opd/train, and start a Prefect server if none answers."""
    raise typer.Exit(serve.main())


@app.command()
def extend(iterations: Annotated[int, typer.Option(min=1, help="how many more")]) -> None:
    """Add iterations to the end of the run; `opd run` then makes them, and repeats nothing."""
    changes = settings.extension(len(params.load().iterations) + iterations)
    settings.write(changes)
    for field, value in changes.items():
        print(f"  {field}: {value}")
    run = params.load()
    decay = run.optimize.schedule_iterations
    if run.depth(run.evaluations[run.report.final]) >= decay:
        print(f"  the learning rate has decayed after iteration {decay} (optimize.schedule_iterations): later ones make small steps")


@app.command()
def accept(stages: Annotated[list[str], typer.Argument(metavar="STAGE...")]) -> None:
    """Declare that edits of code didn't change what these stages made."""
    for name in pipeline.accept(stages):
        print(f"  {name}: dvc.lock now holds its code as it is; what it made stays as it was")


def _changes(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set {pair}: expected SECTION.KEY=VALUE, as in optimize.steps=120")
    return dict(pair.split("=", 1) for pair in pairs)


# Lineage


class Form(StrEnum):
    """How a history is written."""

    tree = "tree"
    mermaid = "mermaid"
    html = "html"
    prov = "prov"
    openlineage = "openlineage"
    in_toto = "in-toto"


@app.command("lineage")
def lineage_(artifact: Wanted, form: Annotated[Form, typer.Option("--as")] = Form.tree, out: Out = None) -> None:
    """Everything that an artifact came from: parents, settings, seeds, code and its commit, versions, and who ran it when."""
    from flows import answers, exports, lineage

    told = _history(artifact)
    match form:
        case Form.tree:
            text = answers.history(told)
        case Form.mermaid:
            text = lineage.mermaid(told)
        case Form.html:
            text = lineage.page(told)
        case _:
            text = exports.EXPORTS[form.value](told)
    _write(text, out)


@app.command("diff")
def diff_(first: Wanted, second: Wanted) -> None:
    """What differs between the histories of two artifacts."""
    from flows import answers, lineage

    print(answers.differences(list(lineage.diff(_history(first), _history(second)))))


@app.command()
def compare(
    first: Wanted,
    second: Wanted,
    horizon: Annotated[int | None, typer.Option(min=1, help="control steps after which an episode is given up, in both")] = None,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999)] = 0.95,
) -> None:
    """Two evaluations of the same initial states, pair by pair: the difference with its interval, McNemar's exact p, and every task."""
    from flows import answers, store

    there = store.read_store()
    one, other = (answers.evaluated(_find(there, name), horizon) for name in (first, second))
    print(answers.compared(one, other, confidence, horizon))


@app.command("verify")
def verify_(
    artifacts: Annotated[list[str] | None, typer.Argument(metavar="[ARTIFACT]...", help="all that are here if none are named")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="also read the arrays and compare every artifact with its parents")] = False,
    shard: Annotated[
        str | None, typer.Option("--replay", metavar="SHARD", help="make this shard of the one artifact again, and compare bytes")
    ] = None,
    signature: Annotated[Path | None, typer.Option(help="check this signature over the one artifact's history, which `opd sign` wrote")] = None,
    key: Annotated[Path | None, typer.Option(help="the public key (PEM) of whoever signed")] = None,
) -> None:
    """Hash every file again. Exit code 1 if anything is not what was published; says what was made from it and is void."""
    from flows import answers, exports, lineage, store, verify

    there = store.read_store()
    wanted = [_find(there, name) for name in artifacts] if artifacts else None
    one = wanted[0] if wanted and len(wanted) == 1 else None
    if ((shard or signature or key) and one is None) or bool(signature) != bool(key):
        raise ValueError("--replay, and --signature with --key, are for one artifact; expected its name")
    findings = list(verify.verify(there, wanted, deep=deep))
    print(answers.findings(findings, len(wanted if wanted is not None else there.artifacts)))
    if findings:
        raise typer.Exit(1)
    if one and signature and key:
        exports.check(lineage.History(one, there), signature, key)
        print(f"  {signature}: signed by the owner of {key}")
    if one and shard:
        _replay(there, one, shard)


def _replay(there: "Store", one: "Artifact", shard: str) -> None:
    from flows import replay

    its = one.manifest.params
    require_equal_bits()
    host = this_host(None, its.get("device", "cpu"), "none", METRICS, graphs=its.get("graphs", False))
    again = replay.replay(there, one, shard, params.load(), host)
    if again.differing:
        raise ValueError(f"{again.name}/{again.shard}: made again, it came out differently: {', '.join(again.differing)}")
    print(f"  {again.name}/{again.shard}: made again, the same bytes")


@app.command("audit")
def audit_(question: Annotated[str, typer.Argument(help="in SQL; a wrong one is answered with the tables")]) -> None:
    """Ask anything of all manifests, evaluations and executions, in SQL."""
    from flows import answers, audit, store

    print(answers.rows(*audit.ask(store.read_store(), question)))


@app.command()
def parity(
    checkpoint: Annotated[Path, typer.Argument(help="a folder in OpenVLA-OFT's public layout")],
    inputs: Annotated[Path, typer.Argument(metavar="INPUTS.npz", help="pictures and prompts")],
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE.npz", help="what the original makes of them")],
    unnorm_key: Annotated[str | None, typer.Option(help="whose statistics the actions have, if there are several")] = None,
    crop: Annotated[float, typer.Option(min=0.01, max=1, help="share of a picture's area that is seen; 1 if it was trained without crops")] = 0.9,
    tolerance: Annotated[float, typer.Option(min=0, help="of features, logits and log-probabilities; what is counted is to be equal")] = 5e-4,
    device: Annotated[str, typer.Option(help="where ours is computed, as torch says it")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="and in which precision")] = "float32",
    out: Annotated[Path | None, typer.Option("--out", help="write our arrays to this file")] = None,
) -> None:
    """Whether OpenVLA-OFT as it is here computes what the original does, step by step. Exit code 1 if an array is farther off than it may be."""
    import torch

    from flows import answers
    from vla_opd import parity
    from vla_opd.policies.openvla_oft import from_public

    where = this_host(None, device, "none", METRICS).device
    policy = from_public(checkpoint, unnorm_key, getattr(torch, dtype), crop).to(where)
    found = parity.of_files(policy, inputs, reference, tolerance, out)
    told = [(one.name, f"{one.difference:.1e}", f"{one.tolerance:.0e}", one.verdict) for one in found.compared]
    print(answers.rows(["array", "largest difference", "allowed", ""], told))
    if found.left:
        print(f"  of the reference, not compared: {', '.join(found.left)}")
    if not all(one.holds for one in found.compared):
        raise typer.Exit(1)


@app.command()
def export(
    artifact: Wanted,
    out: Annotated[Path, typer.Argument(help="a new folder")],
    like: Annotated[Path, typer.Option(metavar="FOLDER", help="the public checkpoint that it came from")],
    unnorm_key: Annotated[str | None, typer.Option(help="whose statistics the actions have, if there are several")] = None,
) -> None:
    """Write an OpenVLA-OFT checkpoint in the public layout, its adapter merged, for the original's own code."""
    from flows import store
    from vla_opd.checkpoint import open_checkpoint
    from vla_opd.export import to_public

    checkpoint = open_checkpoint(_find(store.read_store(), artifact).folder)
    to_public(checkpoint, like, out, unnorm_key)
    print(f"  {out}: {checkpoint.folder}, {checkpoint.digest[:12]}")


@app.command()
def sign(artifact: Wanted, key: Annotated[Path, typer.Option(help="an Ed25519 private key (PEM)")], out: Out = None) -> None:
    """Sign an artifact's whole history."""
    from flows import exports

    _write(exports.sign(_history(artifact), key), out)


@app.command()
def gc(
    keep: Annotated[list[str] | None, typer.Option(metavar="ARTIFACT", help="keep this too, and all that it came from")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
) -> None:
    """Remove the artifacts that neither the run of params.yaml nor what is named needs."""
    from flows import collect, store

    there = store.read_store()
    found = collect.garbage(there, params.load(), [_find(there, name) for name in keep or ()])
    if not dry_run:
        collect.remove(found)
    for artifact in found.artifacts:
        print(f"  {artifact.name}")
    print(f"  {len(found.artifacts)} artifacts, {found.bytes / 1e6:.1f} MB {'would be' if dry_run else 'were'} removed")
    if found.artifacts and Path(".dvc/cache").is_dir():
        print("  DVC's cache keeps its own of them, often the same bytes on the disk; `dvc gc --workspace` removes what the workspace no longer has")


def _history(name: str) -> "History":
    from flows import lineage, store

    there = store.read_store()
    return lineage.History(_find(there, name), there)


def _find(there: "Store", name: str) -> "Artifact":
    """The artifact of that name: the present run's, where others have one too."""
    return there.find(name, params.load().run.name if Path("params.yaml").is_file() else "")


def _write(text: str, out: Path | None) -> None:
    if out is None:
        print(text, end="" if text.endswith("\n") else "\n")
    else:
        out.write_text(text, encoding="utf-8")
        print(f"  {out}")
