"""SQL queries over manifests, episodes of evaluations, rollouts and the record of executions."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import duckdb

from vla_opd.artifacts.manifest import flatten
from vla_opd.data import zarr_zip
from vla_opd.data.records import read_records
from vla_opd.data.trajectory import shards
from vla_opd.lineage.store import Artifact, Store
from vla_opd.machine.host import METRICS
from vla_opd.machine.tracking import read_executions
from vla_opd.params.load import format_value

Row = tuple[Any, ...]

SCHEMA = """
CREATE TABLE artifacts (digest TEXT, name TEXT, run TEXT, kind TEXT, bytes BIGINT);
CREATE TABLE parents (child TEXT, role TEXT, parent TEXT);
CREATE TABLE ancestors (descendant TEXT, ancestor TEXT);
CREATE TABLE files (digest TEXT, path TEXT, size BIGINT, sha256 TEXT);
CREATE TABLE settings (digest TEXT, key TEXT, value TEXT);
CREATE TABLE facts (digest TEXT, key TEXT, value TEXT);
CREATE TABLE versions (digest TEXT, package TEXT, version TEXT);
CREATE TABLE episodes (evaluation TEXT, task TEXT, state INTEGER, success BOOLEAN, steps INTEGER,
                       instruction TEXT);
CREATE TABLE rollouts (trajectories TEXT, shard TEXT, task TEXT, placement BIGINT, member INTEGER,
                       success BOOLEAN, steps INTEGER, states INTEGER);
CREATE TABLE executions (id TEXT, stage TEXT, name TEXT, digest TEXT, began TIMESTAMP,
                         ended TIMESTAMP, host TEXT, "user" TEXT, "commit" TEXT, edited BOOLEAN,
                         device TEXT, task_run TEXT);
"""
"""The tables. `digest`, `child`, `parent`, `descendant`, `ancestor`, `evaluation` and
`trajectories` are digests.

An artifact is one of its own ancestors. `rollouts` are the episodes of trajectories and
demonstrations; they are read from the shards, so only for a query that names the table.
"""
ROLLOUT_COLUMNS = ("index", "member", "success", "steps", "states")  # a shard's, per episode


def query(store: Store, sql: str, metrics: Path = METRICS) -> tuple[list[str], list[Row]]:
    """Return the names of the columns, and the rows.

    The database is in memory and closed to everything outside: a query can read the tables, and
    can neither read nor write a file.
    ValueError with DuckDB's message and the tables if the query has a mistake.
    """
    rollouts = "rollouts" in sql.lower()
    with duckdb.connect(":memory:") as database:
        database.execute("SET TimeZone = 'UTC'")
        database.execute(SCHEMA)
        for table, rows in _tables(store, metrics, rollouts=rollouts):
            if rows:
                values = ", ".join("?" * len(rows[0]))
                insert = f"INSERT INTO {table} VALUES ({values})"  # noqa: S608 - its own tables
                database.executemany(insert, rows)
        database.execute("SET enable_external_access = false")
        database.execute("SET lock_configuration = true")
        try:
            answer = database.execute(sql)
            columns = [column[0] for column in answer.description or ()]
            return columns, answer.fetchall()
        except duckdb.Error as error:
            raise ValueError(f"{sql!r}: {error}\nThe tables are:{SCHEMA}") from error


def _tables(store: Store, metrics: Path, *, rollouts: bool) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of every table."""
    readers = {**TABLES, "ancestors": partial(_ancestors, store)}
    if rollouts:
        readers["rollouts"] = _rollouts
    unique = store.by_digest.values()  # copies of an artifact differ in their names only
    for table, read_rows in readers.items():
        rows: list[Row] = []
        for artifact in unique:
            rows += read_rows(artifact)
        yield table, rows
    yield "artifacts", [_artifact_row(artifact) for artifact in store.artifacts]
    runs = {artifact.run for artifact in store.artifacts}
    executions = _executions(metrics, sorted(runs))
    yield "executions", list(executions)


def _artifact_row(artifact: Artifact) -> Row:
    return (
        artifact.digest,
        artifact.name,
        artifact.run,
        artifact.kind,
        artifact.size,
    )


def _ancestors(store: Store, artifact: Artifact) -> Iterator[Row]:
    for ancestor in store.ancestors(artifact):
        yield artifact.digest, ancestor.digest


def _parents(artifact: Artifact) -> Iterator[Row]:
    for role, parent in artifact.manifest.parents.items():
        yield artifact.digest, role, parent


def _files(artifact: Artifact) -> Iterator[Row]:
    for path, entry in artifact.manifest.files.items():
        yield artifact.digest, path, entry.size, entry.sha256


def _settings(artifact: Artifact) -> Iterator[Row]:
    settings = flatten(artifact.manifest.params)
    for key, value in settings.items():
        yield artifact.digest, key, format_value(value)


def _facts(artifact: Artifact) -> Iterator[Row]:
    facts = flatten(artifact.manifest.facts)
    for key, value in facts.items():
        yield artifact.digest, key, format_value(value)


def _versions(artifact: Artifact) -> Iterator[Row]:
    for package, version in artifact.manifest.made_with.items():
        yield artifact.digest, package, version


def _episodes(artifact: Artifact) -> Iterator[Row]:
    if artifact.kind != "evaluation":
        return
    try:
        records = read_records(artifact.folder)
    except (OSError, ValueError) as error:
        message = f"{artifact.name}: its episodes can't be read ({error}); see opd verify"
        warnings.warn(message, stacklevel=2)
        return
    for record in records:
        yield (
            artifact.digest,
            record.task,
            record.state,
            record.success,
            record.steps,
            record.instruction,
        )


TABLES: dict[str, Callable[[Artifact], Iterable[Row]]] = {
    "parents": _parents,
    "files": _files,
    "settings": _settings,
    "facts": _facts,
    "versions": _versions,
    "episodes": _episodes,
}


def _executions(metrics: Path, runs: Iterable[str]) -> Iterator[Row]:
    for run in runs:
        for execution in read_executions(metrics / run):
            columns = execution.model_dump()
            yield tuple(columns.values())


def _rollouts(artifact: Artifact) -> Iterator[Row]:
    if artifact.kind not in ("trajectories", "demonstrations"):
        return
    for shard in _read_or_warn(shards, artifact.folder):
        for episode in _read_or_warn(_read_episodes, shard):
            yield artifact.digest, shard.name, *episode


def _read_or_warn(read: Callable[[Path], list[Any]], path: Path) -> list[Any]:
    """Return what is read, or nothing if that fails, with a warning."""
    try:
        return read(path)
    except ValueError as error:
        warnings.warn(f"{error}; see opd verify", stacklevel=2)
        return []


def _read_episodes(shard: Path) -> list[Row]:
    arrays, attributes = zarr_zip.read(shard, ROLLOUT_COLUMNS)
    columns = [arrays[name].tolist() for name in ROLLOUT_COLUMNS]
    episodes = zip(*columns, strict=True)
    task = attributes["task"]
    return [(task, *episode) for episode in episodes]
