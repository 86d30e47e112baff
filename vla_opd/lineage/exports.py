"""Histories in the languages of others: W3C PROV, OpenLineage, in-toto with SLSA's provenance; and signatures over them."""

import base64
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar
from uuid import NAMESPACE_URL, uuid5

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from google.protobuf.json_format import MessageToDict
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run, RunEvent, RunState
from openlineage.client.facet_v2 import (
    DatasetFacet,
    dataset_version_dataset,
    source_code_location_job,
)
from openlineage.client.serde import Serde
from prov.model import ProvDocument

from vla_opd.artifacts.manifest import MANIFEST, canonical, flat
from vla_opd.lineage.history import History
from vla_opd.lineage.store import SHORT, Artifact
from vla_opd.machine.tracking import Execution, ask_git
from vla_opd.params.load import text

URI = "https://arxiv.org/abs/2603.26666#vla-opd/"  # a name, not an address: nothing of ours is served there
SLSA = "https://slsa.dev/provenance/v1"
Key = TypeVar("Key")
SIGNED = "application/vnd.vla-opd.chain+json"  # what a DSSE envelope says that it holds


def prov(told: History) -> str:
    """PROV-JSON (W3C): artifacts are entities, executions of stages are activities, and who ran them are agents."""
    document = ProvDocument()
    document.add_namespace("opd", URI)
    for one in told.artifacts:
        manifest = one.manifest
        document.entity(
            f"opd:{one.digest}",
            {
                "opd:name": one.name,
                "opd:kind": manifest.kind,
                "opd:settings": canonical(manifest.params),
            },
        )
        last = told.origins[one.digest].last
        made = document.activity(
            f"opd:{_activity(one, last)}",
            last and last.began,
            last and last.ended,
            {"opd:stage": _stage(one)},
        )
        document.wasGeneratedBy(f"opd:{one.digest}", made)
        if last:
            document.wasAssociatedWith(made, document.agent(f"opd:{last.user}@{last.host}"))
        for role, digest in manifest.parents.items():
            document.used(made, f"opd:{digest}", other_attributes={"prov:role": role})
            document.wasDerivedFrom(f"opd:{one.digest}", f"opd:{digest}", activity=made)
    for digest, role in told.missing.items():
        document.entity(f"opd:{digest}", {"opd:kind": role, "opd:missing": True})
    return str(document.serialize(format="json", indent=2)) + "\n"


def openlineage(told: History) -> str:
    """OpenLineage run events, a line a stage: what it read, what it wrote."""
    return "".join(Serde.to_json(_event(told, one)) + "\n" for one in told.artifacts)


def _event(told: History, one: Artifact) -> RunEvent:
    made = told.origins[one.digest]
    last = made.last
    code = (
        {
            "sourceCodeLocation": source_code_location_job.SourceCodeLocationJobFacet(
                "git", repository(), version=made.commit
            )
        }
        if made.commit
        else {}
    )
    return RunEvent(
        eventTime=(
            last.ended
            if last
            else datetime.fromtimestamp((one.folder / MANIFEST).stat().st_mtime, UTC)
        ).isoformat(),
        producer=f"{URI}{version('vla-opd')}",
        eventType=RunState.COMPLETE,
        run=Run(str(uuid5(NAMESPACE_URL, URI + _activity(one, last)))),
        job=Job(one.run, _stage(one), facets=dict(code)),
        inputs=[
            InputDataset(one.run, found.name if found else role, facets=_version(digest))
            for role, digest, found in told.store.parents(one)
        ],
        outputs=[OutputDataset(one.run, one.name, facets=_version(one.digest))],
    )


def _version(digest: str) -> dict[str, DatasetFacet]:
    return {"version": dataset_version_dataset.DatasetVersionDatasetFacet(digest)}


def intoto(told: History) -> str:
    """An in-toto statement with SLSA provenance v1: its subjects are the artifact's files, its dependencies all artifacts that it came from."""
    one, made = told.artifact, told.origins[told.artifact.digest]
    last = made.last
    subjects = [
        ResourceDescriptor(name=f"{one.name}/{path}", digest={"sha256": entry.sha256}).pb
        for path, entry in one.manifest.files.items()
    ]
    dependencies = [
        {"name": a.name, "digest": {"opdManifest": a.digest}} for a in told.artifacts[:-1]
    ]
    dependencies += [
        {"name": role, "digest": {"opdManifest": digest}} for digest, role in told.missing.items()
    ]
    dependencies += [
        {"name": path, "digest": {"md5": md5}} for path, md5 in (made.code or {}).items()
    ]
    dependencies += (
        [{"uri": f"git+{repository()}", "digest": {"gitCommit": made.commit}}]
        if made.commit
        else []
    )
    predicate = {
        "buildDefinition": {
            "buildType": f"{URI}stage/v1",
            "externalParameters": {
                key: text(value) for key, value in flat(one.manifest.params).items()
            },
            "internalParameters": {"madeWith": dict(one.manifest.made_with)},
            "resolvedDependencies": dependencies,
        },
        "runDetails": {
            "builder": {"id": f"{URI}{last.user}@{last.host}" if last else f"{URI}unknown"},
            "metadata": _metadata(one, last),
        },
    }
    statement = Statement(subjects, SLSA, predicate)
    statement.validate()
    return json.dumps(MessageToDict(statement.pb), indent=2, sort_keys=True) + "\n"


def _metadata(one: Artifact, last: Execution | None) -> dict[str, str]:
    known = {"invocationId": _activity(one, last)}
    return known | (
        {"startedOn": last.began.isoformat(), "finishedOn": last.ended.isoformat()} if last else {}
    )


def _stage(one: Artifact) -> str:
    return f"{one.manifest.kind}@{one.folder.name}"


def _activity(one: Artifact, last: Execution | None) -> str:
    return f"execution/{last.id}" if last and last.id else f"making/{one.digest[:SHORT]}"


EXPORTS: dict[str, Callable[[History], str]] = {
    "prov": prov,
    "openlineage": openlineage,
    "in-toto": intoto,
}


# Signatures


def chain(told: History) -> str:
    """What is signed: name and digest of everything in the history, the missing too. A digest covers a manifest, and so every file and parent."""
    here = {one.digest: one.name for one in told.artifacts}
    return canonical(
        {
            "artifact": told.artifact.digest,
            "chain": here | {digest: f"{role} (not here)" for digest, role in told.missing.items()},
        }
    )


def sign(told: History, key: Path) -> str:
    """A DSSE envelope around the chain, signed by an Ed25519 private key (PEM, without a password). ValueError if the file holds no such key."""
    private = _key(key, lambda pem: load_pem_private_key(pem, None), Ed25519PrivateKey)
    payload = chain(told).encode()
    signature = private.sign(_pre_authenticated(payload))
    envelope = {
        "payloadType": SIGNED,
        "payload": _base64(payload),
        "signatures": [{"sig": _base64(signature)}],
    }
    return json.dumps(envelope, indent=2) + "\n"


def check(told: History, envelope: Path, key: Path) -> None:
    """ValueError unless the envelope was signed by the owner of this public key (PEM), and what it says is what is here now."""
    public = _key(key, load_pem_public_key, Ed25519PublicKey)
    try:
        read = json.loads(envelope.read_text())
        payload, signature = (
            base64.b64decode(text, validate=True)
            for text in (read["payload"], read["signatures"][0]["sig"])
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{envelope}: not a signature of ours ({type(error).__name__}: {error}); expected what `opd sign` writes"
        ) from error
    try:
        public.verify(signature, _pre_authenticated(payload))
    except InvalidSignature:
        raise ValueError(
            f"{envelope}: not signed by the owner of {key}; expected a signature by that key, of what the file says"
        ) from None
    signed, now = json.loads(payload)["chain"], json.loads(chain(told))["chain"]
    if differing := sorted(f"{name} {digest[:SHORT]}" for digest, name in _unlike(signed, now)):
        raise ValueError(
            f"{envelope}: signed was another history of {told.artifact.name}; they differ in {', '.join(differing)}"
        )


def _unlike(signed: dict[str, str], now: dict[str, str]) -> Iterator[tuple[str, str]]:
    yield from (
        (digest, (signed.get(digest) or now[digest]).removesuffix(" (not here)"))
        for digest in signed.keys() ^ now.keys()
    )


def _pre_authenticated(payload: bytes) -> bytes:
    """DSSE v1's PAE: "DSSEv1" and type and body, each with its length."""
    return b"DSSEv1 %d %s %d %s" % (len(SIGNED), SIGNED.encode(), len(payload), payload)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _key(path: Path, load: Callable[[bytes], object], kind: "type[Key]") -> "Key":
    try:
        key = load(path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}; expected a PEM file with an Ed25519 key") from error
    if not isinstance(key, kind):
        raise ValueError(f"{path}: holds a {type(key).__name__}; expected {kind.__name__}")
    return key


def repository() -> str:
    """Where the code is: the address of git's remote, without a name or password in it; the folder, where there is none."""
    try:
        remote = ask_git("remote", "get-url", "origin").decode().strip()
    except OSError:
        remote = Path.cwd().as_uri()
    scheme, separator, rest = remote.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}" if separator else remote
