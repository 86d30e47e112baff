"""Exports of histories: PROV, OpenLineage, in-toto."""

import json
import subprocess
from pathlib import Path

import pytest
from prov.model import ProvDocument

from tests.vla_opd.lineage.manifests import read_history
from vla_opd.lineage import exports
from vla_opd.lineage.store import read_store

pytestmark = pytest.mark.usefixtures("empty_project")


def test_prov_has_every_derivation(root: Path) -> None:
    history = read_history(root)
    document = ProvDocument.deserialize(content=exports.to_prov(history), format="json")
    kinds = [type(record).__name__ for record in document.get_records()]
    assert kinds.count("ProvEntity") == 6
    assert kinds.count("ProvActivity") == kinds.count("ProvGeneration") == 5
    assert kinds.count("ProvDerivation") == kinds.count("ProvUsage") == 8


def test_openlineage_has_an_event_for_every_artifact_with_its_inputs(root: Path) -> None:
    events = [json.loads(line) for line in exports.to_openlineage(read_history(root)).splitlines()]
    assert [event["outputs"][0]["name"] for event in events][-1] == "one/checkpoints/it001"
    last = {
        dataset["name"]: dataset["facets"]["version"]["datasetVersion"]
        for dataset in events[-1]["inputs"]
    }
    assert last == {
        f"one/{name}": read_store(root).find(name).digest
        for name in ("checkpoints/student", "trajectories/it001", "labels/it001")
    }
    assert {event["eventType"] for event in events} == {"COMPLETE"}
    assert len({event["run"]["runId"] for event in events}) == 5


def test_in_toto_has_the_files_as_subjects_and_all_ancestors_as_dependencies(root: Path) -> None:
    statement = json.loads(exports.to_in_toto(read_history(root)))
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
        "one/labels/it001",
        "demonstrations",
    }


@pytest.mark.parametrize(
    ("remote", "address"),
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
def test_the_repository_is_gits_remote_without_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: str, address: str
) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    if remote:
        subprocess.run(["git", "remote", "add", "origin", remote], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    assert exports.repository() == (address if remote else tmp_path.as_uri())
