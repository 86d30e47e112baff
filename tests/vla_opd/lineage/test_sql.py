"""SQL queries over a small run."""

import re
import shutil
import time
from pathlib import Path

import pytest

from tests.flows.toy import ROOT
from tests.vla_opd.lineage.manifests import execution_of, record
from vla_opd.data.records import read_records
from vla_opd.lineage.sql import query
from vla_opd.lineage.store import Store, read_store


@pytest.fixture
def store(undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(undisturbed)
    return read_store()


def test_which_checkpoints_saw_this_shard(store: Store) -> None:
    question = """
        SELECT a.name FROM files f JOIN ancestors x ON x.ancestor = f.digest
        JOIN artifacts a ON a.digest = x.descendant
        WHERE f.path = 'shard-000-00001.zarr.zip' AND a.kind = 'checkpoint'
        AND f.digest = (SELECT digest FROM artifacts WHERE name LIKE '%trajectories/NAME')
        GROUP BY a.name ORDER BY a.name
    """
    assert query(store, question.replace("NAME", "it001")) == (
        ["name"],
        [("small/checkpoints/it001",), ("small/checkpoints/rl001",)],
    )
    assert query(store, question.replace("NAME", "rl001")) == (
        ["name"],
        [("small/checkpoints/rl001",)],
    )


def test_which_episodes_changed_between_two_evaluations(store: Store) -> None:
    question = """
        SELECT o.task, o.state, o.success, n.success
        FROM episodes o JOIN artifacts a ON a.digest = o.evaluation AND a.name LIKE '%/start'
        JOIN episodes n USING (task, state)
        JOIN artifacts b ON b.digest = n.evaluation AND b.name LIKE '%/teacher'
        ORDER BY ALL
    """
    _, rows = query(store, question)
    assert len(rows) == 20
    assert {task for task, *_ in rows} == {"red", "blue"}
    assert query(store, "SELECT count(*) FROM episodes")[1] == [(60,)]


def test_the_questions_of_the_docs_are_answered(store: Store, undisturbed: Path) -> None:
    saw, changed, succeeded = re.findall(
        r'opd audit "([^"]*)"', (ROOT / "docs/lineage.md").read_text()
    )
    assert sorted(query(store, saw.replace("it003", "it001"))[1]) == [
        ("small/checkpoints/it001",),
        ("small/checkpoints/rl001",),
    ]
    assert query(store, saw.replace("it003", "rl001"))[1] == [("small/checkpoints/rl001",)]
    assert (
        len(query(store, succeeded)[1]) == 6
    )  # two tasks, in demonstrations and in the trajectories of either kind
    evaluations = undisturbed / "artifacts/small/evaluations"
    for after in ("final", "teacher"):
        pairs = zip(
            read_records(evaluations / "start"), read_records(evaluations / after), strict=True
        )
        expected = [
            (old.task, old.state, old.success, new.success)
            for old, new in pairs
            if old.success != new.success
        ]
        assert sorted(query(store, changed.replace("%/final", f"%/{after}"))[1]) == sorted(expected)
        assert expected or after == "final"


def test_which_rollouts_of_an_iteration_succeeded(store: Store) -> None:
    question = """
        SELECT task, count(*), count(DISTINCT placement)
        FROM rollouts r JOIN artifacts a ON a.digest = r.trajectories
        WHERE a.name LIKE '%/it001' GROUP BY task ORDER BY task
    """
    _, rows = query(store, question)
    assert rows == [("blue", 12, 4), ("red", 12, 4)]
    assert query(store, "SELECT min(steps) > 0, max(steps) <= 60, bool_or(success) FROM Rollouts")[
        1
    ] == [(True, True, True)]


def test_every_table_is_filled(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path / "small", execution_of(store.artifacts[0].digest))
    for table in (
        "artifacts",
        "parents",
        "ancestors",
        "files",
        "settings",
        "facts",
        "versions",
        "episodes",
        "executions",
    ):
        everything = f"SELECT * FROM {table}"  # noqa: S608 - our own name
        assert query(store, everything, tmp_path)[1], table
    assert query(store, 'SELECT "user", host, epoch(ended - began) FROM executions', tmp_path)[
        1
    ] == [("ada", "box", 90)]
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TZ", "America/New_York")
        time.tzset()
        assert query(store, "SELECT hour(began) FROM executions", tmp_path)[1] == [
            (12,)
        ]  # UTC, wherever one asks
    time.tzset()
    assert query(store, "SELECT DISTINCT value FROM settings WHERE key = 'sample.group'")[1] == [
        ("3",)
    ]


def test_a_wrong_question_is_answered_with_the_tables(store: Store) -> None:
    with pytest.raises(
        ValueError, match=r"(?s)nme.*CREATE TABLE artifacts \(digest TEXT, name TEXT"
    ):
        query(store, "SELECT nme FROM artifacts")


@pytest.mark.parametrize(
    "question",
    [
        "COPY artifacts TO 'out.csv'",
        "SELECT * FROM read_text('params.yaml')",
        "SET enable_external_access = true",
        "INSTALL httpfs",
    ],
)
def test_a_question_reaches_no_file(store: Store, question: str) -> None:
    before = sorted(Path().iterdir())
    with pytest.raises(ValueError, match=r"(?i)permission|configuration|disabled|cannot"):
        query(store, question)
    assert sorted(Path().iterdir()) == before


def test_an_artifact_of_an_earlier_version_is_warned_of_and_the_others_answer(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(undisturbed / "artifacts", tmp_path / "artifacts")
    monkeypatch.chdir(tmp_path)
    for shard in (tmp_path / "artifacts/small/demonstrations/main").glob("shard-*"):
        shard.unlink()
    with pytest.warns(UserWarning, match=r"demonstrations/main: no shards; .*; see opd verify"):
        _, rows = query(read_store(), "SELECT count(*) FROM rollouts")
    assert rows == [(72,)]  # 24 of the iteration's, 48 of GRPO's
