"""Histories: as a tree, as a graph, compared, exported, signed. Of a small but real run, and of manifests alone."""

import hashlib
import json
import re
import subprocess
from datetime import UTC, datetime, timedelta
from functools import reduce
from pathlib import Path

import pytest
from prov.model import ProvDocument

from flows.cli import answers
from tests.vla_opd.lineage.manifests import publish
from vla_opd.lineage import exports, provenance
from vla_opd.lineage.history import Difference, History, diff, layout, mermaid, page
from vla_opd.lineage.store import read_store
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import EXECUTIONS, Execution, execution

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("_nowhere")


@pytest.fixture
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand where there is no dvc.lock and no record of executions but what a test puts there."""
    monkeypatch.chdir(tmp_path)
    provenance.locked_stages.cache_clear()


def told(folder: Path, name: str = "one/checkpoints/it001") -> History:
    store = read_store(folder)
    return History(store.find(name), store)


def executed(digest: str, **changes: object) -> Execution:
    began = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
    known = {
        "id": "abcd1234", "stage": "label", "name": "it001", "digest": digest, "began": began, "ended": began + timedelta(seconds=90),
        "host": "box", "user": "ada", "commit": "f" * 40, "edited": False, "device": "cpu", "task_run": "",
    }  # fmt: skip
    return Execution.model_validate(known | changes)


def record(run: Path, *ran: Execution) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with (run / EXECUTIONS).open("a") as stream:
        stream.writelines(one.model_dump_json() + "\n" for one in ran)


def test_the_tree_tells_every_parent_once_and_what_is_not_here(root: Path) -> None:
    text = answers.history(told(root))
    lines = text.split("\n\n")[0].splitlines()
    assert lines[0].startswith("one/checkpoints/it001 ")
    assert sum("one/checkpoints/student" in line for line in lines) == 2
    assert sum("one/checkpoints/student" in line and "see above" in line for line in lines) == 1
    assert sum("demonstrations: 000000000000, not here" in line for line in lines) == 2
    assert "1 artifacts of this history aren't here" in text
    assert re.search(r"name +teacher \| student", text)


def test_who_ran_it_where_and_when_is_told_of_the_execution_that_gave_this_digest(
    root: Path,
) -> None:
    labels = read_store(root).find("logits/it001").digest
    record(
        root / ".metrics/one",
        executed("e" * 64, user="eve"),
        executed(labels, user="bob"),
        executed(labels, edited=True, task_run="t-1"),
    )
    line = next(
        line
        for line in answers.history(told(root)).splitlines()
        if "logits: one/logits/it001" in line
    )
    assert (
        "2026-11-25 12:00 UTC by ada on box in 90 s, 2 times; as Prefect task run t-1 and W&B run abcd1234; at commit fffffff with edits"
        in line
    )
    assert "eve" not in line


@pytest.mark.filterwarnings("ignore:no commit is recorded")  # outside a repository
def test_a_record_cut_short_by_a_kill_hides_no_other(root: Path) -> None:
    labels = read_store(root).find("logits/it001").digest
    record(root / ".metrics/one", executed(labels))
    with (root / ".metrics/one" / EXECUTIONS).open("a") as stream:
        stream.write(executed(labels, user="cut").model_dump_json()[:40])
    finished = execution(Host(metrics=root / ".metrics", tracking="jsonl"), "one", "label", "it001")
    finished(labels)
    assert len(told(root).origins[labels].executions) == 2


def test_the_code_of_dvc_lock_is_found_in_the_history_of_git(tmp_path: Path, root: Path) -> None:
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
    - {path: artifacts/one/logits/it001, hash: md5, md5: OUT}
"""
    labels = read_store(root).find("logits/it001")
    for text, commit in (("second", commits[1]), ("never committed", "")):
        (folder / "two.py").write_text(f"two, {text}")
        hashes = {
            "MD5": _md5(text),
            "FOLDER": provenance.folder_md5(folder),
            "OUT": provenance.folder_md5(labels.folder),
        }
        (tmp_path / "dvc.lock").write_text(
            reduce(lambda written, pair: written.replace(*pair), hashes.items(), lock)
        )
        provenance.locked_stages.cache_clear()
        made = told(root).origins[labels.digest]
        assert (made.stage, made.commit) == ("label@it001", commit)
    line = next(
        line
        for line in answers.history(told(root)).splitlines()
        if "logits: one/logits/it001" in line
    )
    assert (
        "label@it001, by python -m stages label --iteration it001; its code is in no commit" in line
    )


def test_a_lock_of_other_bytes_says_nothing_of_an_artifact(tmp_path: Path, root: Path) -> None:
    """A stage was run by hand with another setting, or another dvc.lock was checked out: whose code that was isn't known."""
    lock = "{stages: {label@it001: {deps: [], outs: [{path: artifacts/one/logits/it001, md5: 0123.dir}]}}}"
    (tmp_path / "dvc.lock").write_text(lock)
    provenance.locked_stages.cache_clear()
    made = told(root).origins[read_store(root).find("logits/it001").digest]
    assert (made.stage, made.code, made.commit) == ("", None, "")


def test_dvc_names_a_folder_as_it_does_in_the_lock_of_this_repository() -> None:
    place = "artifacts/libero-object/checkpoints/student"
    locked = {
        out["path"]: out["md5"]
        for out in provenance.locked_stages(ROOT / "dvc.lock")[place]["outs"]
    }
    assert provenance.folder_md5(ROOT / place) == locked[place]


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def test_the_graph_has_an_arrow_for_every_parent(root: Path) -> None:
    lines = mermaid(told(root)).splitlines()
    arrows = [line.split(" -- ")[1].split(" --> ")[0] for line in lines if " --> " in line]
    assert sorted(arrows) == [
        "demonstrations",
        "demonstrations",
        "logits",
        "student",
        "student",
        "teacher",
        "trajectories",
        "trajectories",
    ]
    assert sum("not here" in line for line in lines) == 1


def test_every_box_stands_below_its_parents_and_no_two_in_one_place(root: Path) -> None:
    one = told(root)
    boxes = layout(one)
    assert len({(box.x, box.y) for box in boxes.values()}) == len(boxes) == 6
    for artifact in one.artifacts:
        assert all(
            boxes[parent].y < boxes[artifact.digest].y
            for parent in artifact.manifest.parents.values()
        )


def test_the_page_holds_everything_and_asks_nobody(root: Path) -> None:
    text = page(told(root))
    for artifact in told(root).artifacts:
        assert artifact.digest in text
    assert text.count("<path ") == 8
    assert not re.search(r"<script|src=|href=|url\(|@import", text)


def test_a_name_cannot_write_into_the_page(tmp_path: Path) -> None:
    publish(tmp_path / "artifacts/one/checkpoints/<b>x", "checkpoint", {}, name="<script>")
    text = page(told(tmp_path / "artifacts", "<b>x"))
    assert "<script" not in text
    assert "<b>x" not in text


# Two histories


def other_run(root: Path, **student: object) -> None:
    """A second run beside the first, from the same demonstrations, whose student may be another."""
    run = root / "two"
    made = publish(
        run / "checkpoints/student",
        "checkpoint",
        {"demonstrations": "0" * 64},
        **{"name": "student", "seed": 0} | student,
    )
    publish(run / "checkpoints/it001", "checkpoint", {"student": made}, seed=0)


def test_the_difference_of_two_histories_names_the_setting_that_differs(root: Path) -> None:
    other_run(root, seed=7)
    found = list(diff(told(root), told(root, "two/checkpoints/it001")))
    assert Difference("checkpoints/student", "params seed", "0", "7") in found
    assert [d for d in found if d.part == "checkpoints/teacher"] == [
        Difference(
            "checkpoints/teacher",
            "artifact",
            read_store(root).find("checkpoints/teacher").digest[:12],
            "not in its history",
        )
    ]
    assert ("checkpoints/it001", "parent logits") in {(d.part, d.what) for d in found}


def test_an_artifact_is_compared_with_one_of_its_own_history(root: Path) -> None:
    found = list(diff(told(root, "checkpoints/student"), told(root)))
    assert ("itself", "params name") in {(d.part, d.what) for d in found}
    assert not [d for d in found if d.part == "checkpoints/student"]


def test_equal_parts_are_not_mentioned(root: Path) -> None:
    other_run(root)
    assert not [
        d
        for d in diff(told(root), told(root, "two/checkpoints/it001"))
        if d.part == "checkpoints/student"
    ]
    assert list(diff(told(root), told(root))) == []
    assert answers.differences([]) == "  nothing differs"


# Exports


def test_prov_is_read_back_with_every_derivation(root: Path) -> None:
    one = told(root)
    document = ProvDocument.deserialize(content=exports.prov(one), format="json")
    kinds = [type(record).__name__ for record in document.get_records()]
    assert kinds.count("ProvEntity") == 6
    assert kinds.count("ProvActivity") == kinds.count("ProvGeneration") == 5
    assert kinds.count("ProvDerivation") == kinds.count("ProvUsage") == 8


def test_openlineage_has_an_event_for_every_artifact_with_its_inputs(root: Path) -> None:
    events = [json.loads(line) for line in exports.openlineage(told(root)).splitlines()]
    assert [event["outputs"][0]["name"] for event in events][-1] == "one/checkpoints/it001"
    last = {
        dataset["name"]: dataset["facets"]["version"]["datasetVersion"]
        for dataset in events[-1]["inputs"]
    }
    assert last == {
        f"one/{name}": read_store(root).find(name).digest
        for name in ("checkpoints/student", "trajectories/it001", "logits/it001")
    }
    assert {event["eventType"] for event in events} == {"COMPLETE"}
    assert len({event["run"]["runId"] for event in events}) == 5


def test_the_in_toto_statement_is_about_the_files_and_depends_on_all_ancestors(root: Path) -> None:
    statement = json.loads(exports.intoto(told(root)))
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    entry = read_store(root).find("checkpoints/it001").manifest.files["file"]
    assert statement["subject"] == [
        {"name": "one/checkpoints/it001/file", "digest": {"sha256": entry.sha256}}
    ]
    depends = {d["name"] for d in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
    assert depends == {
        "one/checkpoints/teacher",
        "one/checkpoints/student",
        "one/trajectories/it001",
        "one/logits/it001",
        "demonstrations",
    }


# Signatures


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A pair of Ed25519 keys: private, public."""
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


@pytest.mark.parametrize(
    ("remote", "told"),
    [
        (
            "https://somebody:hunter2@forge.example/lab/run@1.git",
            "https://forge.example/lab/run@1.git",
        ),
        ("ssh://git@forge.example/lab/run.git", "ssh://forge.example/lab/run.git"),
        ("git@forge.example:lab/run.git", "git@forge.example:lab/run.git"),
        ("", "file://"),
    ],
)
def test_the_code_is_where_git_has_it_from_and_no_password_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: str, told: str
) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    if remote:
        subprocess.run(["git", "remote", "add", "origin", remote], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    assert exports.repository() == (told if remote else tmp_path.as_uri())


def test_a_signature_holds_until_the_history_is_another(
    root: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    signed = tmp_path / "signature.json"
    signed.write_text(exports.sign(told(root), keys[0]))
    exports.check(told(root), signed, keys[1])
    (
        root / "one/trajectories/it001/manifest.json"
    ).unlink()  # what isn't here any more is still known by its digest
    exports.check(told(root), signed, keys[1])
    publish(root / "one/checkpoints/it001", "checkpoint", {"student": "1" * 64}, seed=0)
    with pytest.raises(
        ValueError,
        match=r"signed was another history of one/checkpoints/it001; they differ in .*student 111111111111",
    ):
        exports.check(told(root), signed, keys[1])


def test_a_forged_signature_is_refused(root: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    signed = tmp_path / "signature.json"
    envelope = json.loads(exports.sign(told(root, "checkpoints/student"), keys[0]))
    envelope["payload"] = json.loads(exports.sign(told(root), keys[0]))["payload"]
    signed.write_text(json.dumps(envelope))
    with pytest.raises(ValueError, match="not signed by the owner of"):
        exports.check(told(root), signed, keys[1])
    signed.write_text("{}")
    with pytest.raises(ValueError, match="not a signature of ours"):
        exports.check(told(root), signed, keys[1])


def test_a_file_that_holds_no_such_key_is_refused(
    root: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    rsa = tmp_path / "rsa.pem"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "rsa", "-out", rsa], check=True, capture_output=True
    )
    for path, said in [
        (keys[1], "expected a PEM file"),
        (rsa, "expected Ed25519PrivateKey"),
        (tmp_path / "none", "No such file"),
    ]:
        with pytest.raises(ValueError, match=said):
            exports.sign(told(root), path)
