"""Questions in SQL over everything that the manifests, the evaluations and the record of executions say."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb

from vla_opd.analysis.evaluation import read_records
from vla_opd.artifacts.manifest import flat
from vla_opd.data import zarr_zip
from vla_opd.data.trajectory import shards
from vla_opd.lineage.store import Artifact, Store
from vla_opd.machine.host import METRICS
from vla_opd.machine.tracking import executions
from vla_opd.params.load import text

SCHEMA = """
CREATE TABLE artifacts (digest TEXT, name TEXT, run TEXT, kind TEXT, bytes BIGINT);
CREATE TABLE parents (child TEXT, role TEXT, parent TEXT);
CREATE TABLE ancestors (descendant TEXT, ancestor TEXT);
CREATE TABLE files (digest TEXT, path TEXT, size BIGINT, sha256 TEXT);
CREATE TABLE settings (digest TEXT, key TEXT, value TEXT);
CREATE TABLE facts (digest TEXT, key TEXT, value TEXT);
CREATE TABLE versions (digest TEXT, package TEXT, version TEXT);
CREATE TABLE episodes (evaluation TEXT, task TEXT, state INTEGER, success BOOLEAN, steps INTEGER, instruction TEXT);
CREATE TABLE rollouts (trajectories TEXT, shard TEXT, task TEXT, placement BIGINT, member INTEGER, success BOOLEAN, steps INTEGER, states INTEGER);
CREATE TABLE executions (id TEXT, stage TEXT, name TEXT, digest TEXT, began TIMESTAMP, ended TIMESTAMP, host TEXT, "user" TEXT, "commit" TEXT,
                         edited BOOLEAN, device TEXT, task_run TEXT);
"""
"""The tables. `digest`, `child`, `parent`, `descendant`, `ancestor`, `evaluation` and `trajectories` are digests.

An artifact is among its own ancestors. `rollouts` are the episodes of trajectories and of demonstrations; they are read from the shards, so only for
a question that names the table.
"""
ROLLOUT = (
    "index",
    "member",
    "success",
    "steps",
    "states",
)  # a shard's arrays of one row an episode, in the table's order


def ask(
    store: Store, question: str, metrics: Path = METRICS
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The names of the columns, and the rows. ValueError with DuckDB's message and the tables for a question that it doesn't understand.

    The database is in memory and closed to everything outside: a question reads the tables, and neither reads nor writes a file.
    """
    with duckdb.connect(":memory:") as base:
        base.execute("SET TimeZone = 'UTC'")
        base.execute(SCHEMA)
        for table, rows in _rows(store, metrics, rollouts="rollouts" in question.lower()):
            if rows:
                base.executemany(
                    f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})",
                    rows,  # noqa: S608
                )
        base.execute("SET enable_external_access = false; SET lock_configuration = true")
        try:
            answer = base.execute(question)
            return [column[0] for column in answer.description or ()], answer.fetchall()
        except duckdb.Error as error:
            raise ValueError(f"{question!r}: {error}\nThe tables are:{SCHEMA}") from error


def _rows(
    store: Store, metrics: Path, *, rollouts: bool
) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    artifacts = list(
        store.by_digest.values()
    )  # copies of one artifact in several places say the same, but for where they are
    yield "artifacts", [(a.digest, a.name, a.run, a.manifest.kind, a.size) for a in store.artifacts]
    yield (
        "parents",
        [
            (a.digest, role, parent)
            for a in artifacts
            for role, parent in a.manifest.parents.items()
        ],
    )
    yield "ancestors", [(a.digest, one.digest) for a in artifacts for one in store.ancestors(a)]
    yield (
        "files",
        [
            (a.digest, path, entry.size, entry.sha256)
            for a in artifacts
            for path, entry in a.manifest.files.items()
        ],
    )
    yield (
        "settings",
        [
            (a.digest, key, text(value))
            for a in artifacts
            for key, value in flat(a.manifest.params).items()
        ],
    )
    yield (
        "facts",
        [
            (a.digest, key, text(value))
            for a in artifacts
            for key, value in flat(a.manifest.facts).items()
        ],
    )
    yield (
        "versions",
        [(a.digest, *pair) for a in artifacts for pair in a.manifest.made_with.items()],
    )
    yield (
        "episodes",
        [row for a in artifacts if a.manifest.kind == "evaluation" for row in _episodes(a)],
    )
    yield "rollouts", _rollouts(store) if rollouts else []
    yield (
        "executions",
        [
            tuple(e.model_dump().values())
            for run in sorted({a.run for a in store.artifacts})
            for e in executions(metrics / run)
        ],
    )


def _episodes(evaluation: Artifact) -> list[tuple[Any, ...]]:
    try:
        records = read_records(evaluation.folder)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{evaluation.name}: its episodes can't be read ({error}); see opd verify", stacklevel=2
        )
        return []
    return [
        (evaluation.digest, r.task, r.state, r.success, r.steps, r.instruction) for r in records
    ]


def _rollouts(store: Store) -> list[tuple[Any, ...]]:
    wanted = [
        a for a in store.by_digest.values() if a.manifest.kind in ("trajectories", "demonstrations")
    ]
    return [
        (a.digest, shard.name, *row)
        for a in wanted
        for shard in _readable(shards, a.folder)
        for row in _readable(_shard, shard)
    ]


def _readable(read: Callable[[Path], list[Any]], path: Path) -> list[Any]:
    """What is read there; nothing, and a warning, where that fails."""
    try:
        return read(path)
    except ValueError as error:
        warnings.warn(f"{error}; see opd verify", stacklevel=2)
        return []


def _shard(path: Path) -> list[tuple[Any, ...]]:
    columns, attributes = zarr_zip.read(path, ROLLOUT)
    return [
        (attributes["task"], *row)
        for row in zip(*(columns[name].tolist() for name in ROLLOUT), strict=True)
    ]
