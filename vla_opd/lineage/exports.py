"""Export of histories to W3C PROV, OpenLineage and in-toto. Needs the extra `lineage`."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from google.protobuf.json_format import MessageToDict
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.facet_v2 import (
    DatasetFacet,
    JobFacet,
    dataset_version_dataset,
    source_code_location_job,
)
from openlineage.client.serde import Serde
from prov.model import ProvDocument

from vla_opd.artifacts.manifest import MANIFEST, canonical_json, flatten
from vla_opd.lineage.history import History
from vla_opd.lineage.provenance import Origin
from vla_opd.lineage.store import Artifact
from vla_opd.machine.tracking import Execution, run_git
from vla_opd.params.load import format_value

URI = "https://arxiv.org/abs/2603.26666#vla-opd/"  # a namespace; nothing of this project is there
SLSA = "https://slsa.dev/provenance/v1"


def _stage(artifact: Artifact) -> str:
    return f"{artifact.kind}@{artifact.folder.name}"


def _activity(artifact: Artifact, last: Execution | None) -> str:
    if last and last.id:
        return f"execution/{last.id}"
    return f"making/{artifact.short}"


def repository() -> str:
    """Return the address of git's remote without user and password, or the folder's URI."""
    try:
        remote = run_git("remote", "get-url", "origin").decode().strip()
    except OSError:
        return Path.cwd().as_uri()
    scheme, separator, address = remote.partition("://")
    if not separator:
        return remote
    host, slash, path = address.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


# W3C PROV


def to_prov(history: History) -> str:
    """Return PROV-JSON: entities are artifacts, activities executions of stages, agents users."""
    document = ProvDocument()
    document.add_namespace("opd", URI)
    for artifact in history.artifacts:
        origin = history.origins[artifact.digest]
        _add_to_prov(document, artifact, origin.last)
    for digest, role in history.missing.items():
        attributes = {"opd:kind": role, "opd:missing": True}
        document.entity(f"opd:{digest}", attributes)
    text = document.serialize(format="json", indent=2)
    return f"{text}\n"


def _add_to_prov(document: ProvDocument, artifact: Artifact, last: Execution | None) -> None:
    manifest = artifact.manifest
    entity = f"opd:{artifact.digest}"
    attributes = {
        "opd:name": artifact.name,
        "opd:kind": manifest.kind,
        "opd:settings": canonical_json(manifest.params),
    }
    document.entity(entity, attributes)
    activity = document.activity(
        f"opd:{_activity(artifact, last)}",
        last and last.began,
        last and last.ended,
        {"opd:stage": _stage(artifact)},
    )
    document.wasGeneratedBy(entity, activity)
    if last:
        document.wasAssociatedWith(activity, document.agent(f"opd:{last.user}@{last.host}"))
    for role, digest in manifest.parents.items():
        parent = f"opd:{digest}"
        document.used(activity, parent, other_attributes={"prov:role": role})
        document.wasDerivedFrom(entity, parent, activity=activity)


# OpenLineage


def to_openlineage(history: History) -> str:
    """Return OpenLineage run events as JSON lines: the inputs and the output of every stage."""
    lines: list[str] = []
    for artifact in history.artifacts:
        event = _run_event(history, artifact)
        lines.append(f"{Serde.to_json(event)}\n")
    return "".join(lines)


def _run_event(history: History, artifact: Artifact) -> RunEvent:
    origin = history.origins[artifact.digest]
    activity = _activity(artifact, origin.last)
    inputs: list[InputDataset] = []
    for role, digest, parent in history.store.parents(artifact):
        name = role if parent is None else parent.name
        facets = _version_facet(digest)
        inputs.append(InputDataset(artifact.run, name, facets=facets))
    output = OutputDataset(
        artifact.run,
        artifact.name,
        facets=_version_facet(artifact.digest),
    )
    time = _event_time(artifact, origin.last)
    return RunEvent(
        eventTime=time.isoformat(),
        producer=f"{URI}{version('vla-opd')}",
        eventType=RunState.COMPLETE,
        run=Run(str(uuid5(NAMESPACE_URL, URI + activity))),
        job=Job(artifact.run, _stage(artifact), facets=_code_facet(origin)),
        inputs=inputs,
        outputs=[output],
    )


def _event_time(artifact: Artifact, last: Execution | None) -> datetime:
    if last:
        return last.ended
    manifest = artifact.folder / MANIFEST
    return datetime.fromtimestamp(manifest.stat().st_mtime, UTC)


def _version_facet(digest: str) -> dict[str, DatasetFacet]:
    return {"version": dataset_version_dataset.DatasetVersionDatasetFacet(digest)}


def _code_facet(origin: Origin) -> dict[str, JobFacet]:
    if not origin.commit:
        return {}
    location = source_code_location_job.SourceCodeLocationJobFacet(
        "git", repository(), version=origin.commit
    )
    return {"sourceCodeLocation": location}


# in-toto


def to_in_toto(history: History) -> str:
    """Return an in-toto statement with SLSA provenance v1.

    Its subjects are the artifact's files, its dependencies are the artifact's ancestors and code.
    """
    artifact = history.artifact
    subjects = [
        ResourceDescriptor(name=f"{artifact.name}/{path}", digest={"sha256": entry.sha256}).pb
        for path, entry in artifact.manifest.files.items()
    ]
    last = history.origins[artifact.digest].last
    builder = f"{last.user}@{last.host}" if last else "unknown"
    predicate = {
        "buildDefinition": _build_definition(history),
        "runDetails": {
            "builder": {"id": f"{URI}{builder}"},
            "metadata": _run_metadata(artifact, last),
        },
    }
    statement = Statement(subjects, SLSA, predicate)
    statement.validate()
    return json.dumps(MessageToDict(statement.pb), indent=2, sort_keys=True) + "\n"


def _build_definition(history: History) -> dict[str, Any]:
    manifest = history.artifact.manifest
    settings = {key: format_value(value) for key, value in flatten(manifest.params).items()}
    return {
        "buildType": f"{URI}stage/v1",
        "externalParameters": settings,
        "internalParameters": {"madeWith": dict(manifest.made_with)},
        "resolvedDependencies": _dependencies(history),
    }


def _dependencies(history: History) -> list[dict[str, Any]]:
    origin = history.origins[history.artifact.digest]
    dependencies: list[dict[str, Any]] = []

    def add(name: str, algorithm: str, digest: str) -> None:
        dependency = {"name": name, "digest": {algorithm: digest}}
        dependencies.append(dependency)

    *ancestors, _ = history.artifacts
    for ancestor in ancestors:
        add(ancestor.name, "opdManifest", ancestor.digest)
    for digest, role in history.missing.items():
        add(role, "opdManifest", digest)
    if origin.code:
        for path, md5 in origin.code.items():
            add(path, "md5", md5)
    if origin.commit:
        address = repository()
        digest = {"gitCommit": origin.commit}
        dependencies.append({"uri": f"git+{address}", "digest": digest})
    return dependencies


def _run_metadata(artifact: Artifact, last: Execution | None) -> dict[str, str]:
    metadata = {"invocationId": _activity(artifact, last)}
    if last:
        metadata["startedOn"] = last.began.isoformat()
        metadata["finishedOn"] = last.ended.isoformat()
    return metadata


EXPORTS: dict[str, Callable[[History], str]] = {
    "prov": to_prov,
    "openlineage": to_openlineage,
    "in-toto": to_in_toto,
}
