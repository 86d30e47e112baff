"""Histories: as a tree, as a graph, as a page, compared."""

import hashlib
import re
import subprocess
from functools import reduce
from pathlib import Path
from typing import get_args

import pytest

from flows.cli import answers
from tests.vla_opd.lineage.manifests import execution_of, publish, read_history, record
from vla_opd.artifacts.manifest import Kind
from vla_opd.lineage import provenance
from vla_opd.lineage.history import COLUMNS, Difference, diff, layout, mermaid, page
from vla_opd.lineage.store import read_store
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import EXECUTIONS, start_execution

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.usefixtures("empty_project")


def test_the_tree_has_every_parent_once_and_marks_missing_ones(root: Path) -> None:
    text = answers.history(read_history(root))
    lines = text.split("\n\n")[0].splitlines()
    assert lines[0].startswith("one/checkpoints/it001 ")
    assert sum("one/checkpoints/student" in line for line in lines) == 2
    assert sum("one/checkpoints/student" in line and "see above" in line for line in lines) == 1
    assert sum("demonstrations: 000000000000, not here" in line for line in lines) == 2
    assert "1 artifacts of this history are missing" in text
    assert re.search(r"name +teacher \| student", text)


def test_every_kind_of_artifact_has_a_column() -> None:
    assert sorted(COLUMNS) == sorted(get_args(Kind))


def test_the_tree_has_the_executions_that_published_the_digest(
    root: Path,
) -> None:
    labels = read_store(root).find("labels/it001").digest
    record(
        root / ".metrics/one",
        execution_of("e" * 64, user="eve"),
        execution_of(labels, user="bob"),
        execution_of(labels, edited=True, task_run="t-1"),
    )
    line = next(
        line
        for line in answers.history(read_history(root)).splitlines()
        if "labels: one/labels/it001" in line
    )
    assert (
        "2026-11-25 12:00 UTC by ada on box in 90 s, 2 times; "
        "as Prefect task run t-1 and W&B run abcd1234; at commit fffffff with edits" in line
    )
    assert "eve" not in line


@pytest.mark.filterwarnings("ignore:no commit is recorded")  # outside a repository
def test_a_truncated_record_of_executions_is_still_read(root: Path) -> None:
    labels = read_store(root).find("labels/it001").digest
    record(root / ".metrics/one", execution_of(labels))
    with (root / ".metrics/one" / EXECUTIONS).open("a") as stream:
        stream.write(execution_of(labels, user="cut").model_dump_json()[:40])
    finished = start_execution(
        Host(metrics=root / ".metrics", tracking="jsonl"), "one", "label", "it001"
    )
    finished(labels)
    assert len(read_history(root).origins[labels].executions) == 2


def test_the_commit_of_the_code_in_dvc_lock_is_found(tmp_path: Path, root: Path) -> None:
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    (tmp_path / "stages").mkdir()
    code, commits = tmp_path / "stages/label.py", list[str]()
    folder = tmp_path / "vla_opd/policies"
    folder.mkdir(parents=True)
    (folder / "one.py").write_text("one")
    git("init", "-q")
    for text in ("first", "second", "third"):
        code.write_text(text)
        (folder / "two.py").write_text(f"two, {text}")
        git("add", "stages", "vla_opd")
        git("commit", "-q", "-m", text)
        commits.append(git("rev-parse", "HEAD"))
        git("commit", "-q", "--allow-empty", "-m", "something else")
    lock = """
schema: '2.0'
stages:
  label@it001:
    cmd: exec python -m stages label --iteration it001
    deps:
    - {path: artifacts/one/trajectories/it001, hash: md5, md5: 0.dir}
    - {path: stages/label.py, hash: md5, md5: MD5}
    - {path: vla_opd/policies, hash: md5, md5: FOLDER}
    outs:
    - {path: artifacts/one/labels/it001, hash: md5, md5: OUT}
"""
    labels = read_store(root).find("labels/it001")
    for text, commit in (("second", commits[1]), ("never committed", "")):
        (folder / "two.py").write_text(f"two, {text}")
        hashes = {
            "MD5": _md5(text),
            "FOLDER": provenance.hash_folder(folder),
            "OUT": provenance.hash_folder(labels.folder),
        }
        (tmp_path / "dvc.lock").write_text(
            reduce(lambda written, pair: written.replace(*pair), hashes.items(), lock)
        )
        provenance.locked_stages.cache_clear()
        origin = read_history(root).origins[labels.digest]
        assert (origin.stage, origin.commit) == ("label@it001", commit)
    line = next(
        line
        for line in answers.history(read_history(root)).splitlines()
        if "labels: one/labels/it001" in line
    )
    assert (
        "label@it001, by python -m stages label --iteration it001; its code is in no commit" in line
    )


def test_a_dvc_lock_of_other_bytes_is_ignored(tmp_path: Path, root: Path) -> None:
    """A stage was run by hand, or another dvc.lock was checked out: the code is not known."""
    out = "{path: artifacts/one/labels/it001, md5: 0123.dir}"
    lock = f"{{stages: {{label@it001: {{deps: [], outs: [{out}]}}}}}}"
    (tmp_path / "dvc.lock").write_text(lock)
    provenance.locked_stages.cache_clear()
    origin = read_history(root).origins[read_store(root).find("labels/it001").digest]
    assert (origin.stage, origin.code, origin.commit) == ("", None, "")


def test_a_folder_is_hashed_as_in_this_repositorys_dvc_lock() -> None:
    place = "artifacts/libero-object/checkpoints/student"
    locked = {
        out["path"]: out["md5"]
        for out in provenance.locked_stages(ROOT / "dvc.lock")[place]["outs"]
    }
    assert provenance.hash_folder(ROOT / place) == locked[place]


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def test_the_graph_has_an_arrow_for_every_parent(root: Path) -> None:
    lines = mermaid(read_history(root)).splitlines()
    arrows = [line.split(" -- ")[1].split(" --> ")[0] for line in lines if " --> " in line]
    assert sorted(arrows) == [
        "demonstrations",
        "demonstrations",
        "labels",
        "student",
        "student",
        "teacher",
        "trajectories",
        "trajectories",
    ]
    assert sum("not here" in line for line in lines) == 1


def test_every_box_is_below_its_parents_and_none_overlap(root: Path) -> None:
    history = read_history(root)
    boxes = layout(history)
    assert len({(box.x, box.y) for box in boxes.values()}) == len(boxes) == 6
    for artifact in history.artifacts:
        assert all(
            boxes[parent].y < boxes[artifact.digest].y
            for parent in artifact.manifest.parents.values()
        )


def test_the_page_has_every_artifact_and_loads_nothing(root: Path) -> None:
    text = page(read_history(root))
    for artifact in read_history(root).artifacts:
        assert artifact.digest in text
    assert text.count("<path ") == 8
    assert not re.search(r"<script|src=|href=|url\(|@import", text)


def test_names_are_escaped_in_the_page(tmp_path: Path) -> None:
    publish(tmp_path / "artifacts/one/checkpoints/<b>x", "checkpoint", {}, name="<script>")
    text = page(read_history(tmp_path / "artifacts", "<b>x"))
    assert "<script" not in text
    assert "<b>x" not in text


# Two histories


def publish_second_run(root: Path, **student: object) -> None:
    """Publish a second run from the same demonstrations, whose student may differ."""
    run = root / "two"
    digest = publish(
        run / "checkpoints/student",
        "checkpoint",
        {"demonstrations": "0" * 64},
        **{"name": "student", "seed": 0} | student,
    )
    publish(run / "checkpoints/it001", "checkpoint", {"student": digest}, seed=0)


def test_diff_names_the_setting_that_differs(root: Path) -> None:
    publish_second_run(root, seed=7)
    differences = list(diff(read_history(root), read_history(root, "two/checkpoints/it001")))
    assert Difference("checkpoints/student", "params seed", "0", "7") in differences
    assert [d for d in differences if d.part == "checkpoints/teacher"] == [
        Difference(
            "checkpoints/teacher",
            "artifact",
            read_store(root).find("checkpoints/teacher").digest[:12],
            "not in its history",
        )
    ]
    assert ("checkpoints/it001", "parent labels") in {(d.part, d.field) for d in differences}


def test_diff_compares_an_artifact_with_an_ancestor(root: Path) -> None:
    differences = list(diff(read_history(root, "checkpoints/student"), read_history(root)))
    assert ("itself", "params name") in {(d.part, d.field) for d in differences}
    assert not [d for d in differences if d.part == "checkpoints/student"]


def test_diff_skips_equal_artifacts(root: Path) -> None:
    publish_second_run(root)
    assert not [
        d
        for d in diff(read_history(root), read_history(root, "two/checkpoints/it001"))
        if d.part == "checkpoints/student"
    ]
    assert list(diff(read_history(root), read_history(root))) == []
    assert answers.differences([]) == "  nothing differs"
