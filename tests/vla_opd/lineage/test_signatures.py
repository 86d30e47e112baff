"""Signatures over histories."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.vla_opd.lineage.manifests import publish, read_history
from vla_opd.lineage.signatures import check_signature, sign

pytestmark = pytest.mark.usefixtures("empty_project")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A pair of Ed25519 keys: private, public."""
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


def test_a_signature_is_valid_until_the_history_changes(
    root: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    signed = tmp_path / "signature.json"
    signed.write_text(sign(read_history(root), keys[0]))
    check_signature(read_history(root), signed, keys[1])
    (
        root / "one/trajectories/it001/manifest.json"
    ).unlink()  # what isn't here any more is still known by its digest
    check_signature(read_history(root), signed, keys[1])
    publish(root / "one/checkpoints/it001", "checkpoint", {"student": "1" * 64}, seed=0)
    with pytest.raises(
        ValueError,
        match=r"signs another history of one/checkpoints/it001; "
        r"they differ in .*student 111111111111",
    ):
        check_signature(read_history(root), signed, keys[1])


def test_a_forged_signature_is_refused(root: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    signed = tmp_path / "signature.json"
    envelope = json.loads(sign(read_history(root, "checkpoints/student"), keys[0]))
    envelope["payload"] = json.loads(sign(read_history(root), keys[0]))["payload"]
    signed.write_text(json.dumps(envelope))
    with pytest.raises(ValueError, match="not signed by the owner of"):
        check_signature(read_history(root), signed, keys[1])
    signed.write_text("{}")
    with pytest.raises(ValueError, match="not a signature"):
        check_signature(read_history(root), signed, keys[1])


def test_a_file_without_an_ed25519_key_is_refused(
    root: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    rsa = tmp_path / "rsa.pem"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "rsa", "-out", rsa], check=True, capture_output=True
    )
    for path, message in [
        (keys[1], "expected a PEM file"),
        (rsa, "expected Ed25519PrivateKey"),
        (tmp_path / "none", "No such file"),
    ]:
        with pytest.raises(ValueError, match=message):
            sign(read_history(root), path)
