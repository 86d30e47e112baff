"""Ed25519 signatures over histories, in DSSE envelopes. Needs the extra `lineage`."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from vla_opd.artifacts.manifest import canonical_json
from vla_opd.lineage.history import History
from vla_opd.lineage.store import SHORT

PAYLOAD_TYPE = "application/vnd.vla-opd.chain+json"
MISSING = " (not here)"

Key = TypeVar("Key")


def chain(history: History) -> str:
    """Return the text to sign: digest and name of everything in the history, missing or not.

    A digest covers a manifest, and so every file and parent.
    """
    names: dict[str, str] = {}
    for artifact in history.artifacts:
        names[artifact.digest] = artifact.name
    for digest, role in history.missing.items():
        names[digest] = f"{role}{MISSING}"
    statement = {
        "artifact": history.artifact.digest,
        "chain": names,
    }
    return canonical_json(statement)


def sign(history: History, key: Path) -> str:
    """Return a DSSE envelope around the chain.

    key: a file with an Ed25519 private key (PEM, without a password). ValueError if it is not.
    """
    private_key = _read_key(key, _load_private_key, Ed25519PrivateKey)
    payload = chain(history).encode()
    signature = private_key.sign(_pre_authentication_encoding(payload))
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": _encode(payload),
        "signatures": [{"sig": _encode(signature)}],
    }
    return json.dumps(envelope, indent=2) + "\n"


def check_signature(history: History, envelope: Path, key: Path) -> None:
    """Check that an envelope signs this history.

    key: a file with the signer's Ed25519 public key (PEM). ValueError if it is not, if the
    signature is not by that key, or if another history was signed.
    """
    public_key = _read_key(key, load_pem_public_key, Ed25519PublicKey)
    payload, signature = _read_envelope(envelope)
    try:
        public_key.verify(signature, _pre_authentication_encoding(payload))
    except InvalidSignature:
        raise ValueError(
            f"{envelope}: not signed by the owner of {key}; "
            "expected a signature of the file's contents by that key"
        ) from None
    signed = json.loads(payload)["chain"]
    present = json.loads(chain(history))["chain"]
    differences = _list_differences(signed, present)
    if differences:
        raise ValueError(
            f"{envelope}: signs another history of {history.artifact.name}; "
            f"they differ in {', '.join(differences)}"
        )


def _read_envelope(path: Path) -> tuple[bytes, bytes]:
    """Return payload and signature."""
    try:
        envelope = json.loads(path.read_text())
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{path}: not a signature ({type(error).__name__}: {error}); "
            "expected a file written by `opd sign`"
        ) from error
    return payload, signature


def _list_differences(signed: dict[str, str], present: dict[str, str]) -> list[str]:
    names = {**present, **signed}
    differences: list[str] = []
    for digest in signed.keys() ^ present.keys():
        name = names[digest].removesuffix(MISSING)
        short = digest[:SHORT]
        differences.append(f"{name} {short}")
    return sorted(differences)


def _pre_authentication_encoding(payload: bytes) -> bytes:
    """Return DSSE v1's PAE: "DSSEv1", the type and the body, the latter two with their lengths."""
    payload_type = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type, len(payload), payload)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _load_private_key(pem: bytes) -> object:
    return load_pem_private_key(pem, password=None)


def _read_key(path: Path, load: Callable[[bytes], object], kind: type[Key]) -> Key:
    try:
        key = load(path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}; expected a PEM file with an Ed25519 key") from error
    if not isinstance(key, kind):
        raise ValueError(f"{path}: holds a {type(key).__name__}; expected {kind.__name__}")
    return key
