"""Artifacts that are hardly more than a manifest, their histories and executions."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Kind
from vla_opd.lineage.history import History
from vla_opd.lineage.store import read_store
from vla_opd.machine.tracking import EXECUTIONS, Execution


def publish(folder: Path, kind: Kind, parents: Mapping[str, str], **params: object) -> str:
    """Publish an artifact with one small file. Returns its digest."""
    with draft(folder, kind, parents, params) as work:
        with work.part("file") as path:
            path.write_text(folder.name)
        return work.publish({}).digest


def read_history(root: Path, name: str = "one/checkpoints/it001") -> History:
    """Read the history of an artifact in the store under `root`."""
    store = read_store(root)
    return History(store.find(name), store)


def execution_of(digest: str, **changes: object) -> Execution:
    """Return an execution that published this digest."""
    began = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
    fields: dict[str, object] = {
        "id": "abcd1234",
        "stage": "label",
        "name": "it001",
        "digest": digest,
        "began": began,
        "ended": began + timedelta(seconds=90),
        "host": "box",
        "user": "ada",
        "commit": "f" * 40,
        "edited": False,
        "device": "cpu",
        "task_run": "",
    }
    return Execution.model_validate(fields | changes)


def record(metrics: Path, *executions: Execution) -> None:
    """Append to a run's record of executions."""
    metrics.mkdir(parents=True, exist_ok=True)
    with (metrics / EXECUTIONS).open("a") as stream:
        stream.writelines(execution.model_dump_json() + "\n" for execution in executions)
