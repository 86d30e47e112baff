"""Foreign files that try to run code, exhaust the machine or reach other files are refused.

A manifest proves integrity, not good intentions: each artifact has a valid manifest here, as an
attacker would make it.
"""

import json
import os
import pickle
import re
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numcodecs
import numpy as np
import pytest
from ruamel.yaml import YAML

from tests.vla_opd import small
from tests.vla_opd.data.test_zarr_zip import members, rewrite
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Kind, open_artifact
from vla_opd.data.labels import Labels, read_shard, write_shard
from vla_opd.data.trajectory import read_states
from vla_opd.params.load import load
from vla_opd.policies.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[1]


class Bomb:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self._trace = str(trace)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (Path(self._trace),)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A file that exists once foreign code has run."""
    return tmp_path / "pwned"


def publish(
    folder: Path, kind: Kind, files: dict[str, bytes], facts: dict[str, object] | None = None
) -> Path:
    """Publish an artifact with these files and a valid manifest."""
    with draft(folder, kind, {}, {}) as work:
        for name, content in files.items():
            with work.part(name) as path:
                path.write_bytes(content)
        work.publish(facts or {})
    return folder


def checkpoint(folder: Path, weights: bytes, **facts: object) -> Path:
    return publish(
        folder,
        "checkpoint",
        {"model.safetensors": weights},
        {"checkpoint": small.FACTS.model_dump(mode="json") | facts},
    )


def test_a_pickle_in_the_place_of_weights_is_refused(tmp_path: Path, trace: Path) -> None:
    opened = open_checkpoint(checkpoint(tmp_path / "it", pickle.dumps(Bomb(trace))))
    with pytest.raises(ValueError, match=r"model\.safetensors: not safetensors"):
        opened.weights()
    assert not trace.exists()


@pytest.mark.parametrize(
    "name",
    [
        "weights.pt",
        "weights.bin",
        "weights.ckpt",
        "model.pkl",
        "data.npy",
        "data.npz",
        "notes.txt",
        "shard-000.zarr.zip",
    ],
)
def test_a_pickle_under_any_name_is_never_opened(tmp_path: Path, trace: Path, name: str) -> None:
    folder = publish(tmp_path / "labels", "labels", {name: pickle.dumps(Bomb(trace))})
    open_artifact(folder, "labels")
    for read in (lambda: read_shard(folder / name, 1), lambda: read_states([folder / name])):
        with pytest.raises(ValueError, match=re.escape(str(folder))):
            read()
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["zarr.json", "log_probs/zarr.json", "log_probs/c/0/0/0", "extra/zarr.json"]
)
def test_a_pickle_in_the_place_of_a_shards_member_is_never_opened(
    tmp_path: Path, trace: Path, name: str
) -> None:
    path = shard(tmp_path / "shard-000")
    rewrite(path, members(path) | {name: pickle.dumps(Bomb(trace))})
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_shard(path, 1)
    assert not trace.exists()


@pytest.mark.parametrize("header", [2**63, 2**40, 200_000_000])
def test_a_header_that_is_larger_than_the_file_is_refused(tmp_path: Path, header: int) -> None:
    with pytest.raises(ValueError, match="not safetensors"):
        open_checkpoint(checkpoint(tmp_path / "it", struct.pack("<Q", header) + b"{}")).weights()


def test_a_checkpoint_that_names_code_of_its_own_is_refused(tmp_path: Path) -> None:
    """As with `auto_map` and `trust_remote_code`: keys that this version does not know."""
    with pytest.raises(ValueError, match="auto_map"):
        open_checkpoint(
            checkpoint(tmp_path / "it", b"", auto_map={"AutoModel": "modeling_evil.Evil"})
        )


def shard(path: Path, **described: object) -> Path:
    """A shard with one array, whose description is then changed by hand."""
    write_shard(path, Labels(np.zeros((1, 2, 3), np.float16)))
    inside = members(path)
    description = json.loads(inside["log_probs/zarr.json"]) | described
    return rewrite(path, inside | {"log_probs/zarr.json": json.dumps(description).encode()})


def chunked(*sizes: int) -> dict[str, object]:
    return {"name": "regular", "configuration": {"chunk_shape": sizes}}


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (
            {"shape": [10**12, 256, 256], "chunk_grid": chunked(16, 256, 256)},
            r"its arrays would take \d+ GB; expected at most",
        ),
        (
            {"shape": [10**6, 256, 1], "chunk_grid": chunked(16, 256, 1)},
            "has 62500 chunks; expected no more than the 3 members of the zip",
        ),
        (
            {"shape": [10**9, 1, 1], "chunk_grid": chunked(16, 1, 1)},
            "has 62500000 chunks; expected no more than the 3",
        ),
        ({"shape": [10**12, 0, 1], "chunk_grid": chunked(1, 1, 1)}, "in chunks of"),
        (
            {"shape": [3, 2, 3], "chunk_grid": chunked(3 * 10**8, 2, 3)},
            r"in chunks of \(300000000, 2, 3\); expected numbers in \(16, 2, 3\)",
        ),
        ({"chunk_grid": chunked(0, 2, 3)}, ""),
        ({"shape": [], "chunk_grid": chunked()}, ""),
        ({"chunk_grid": chunked(1, 2, 3)}, "in chunks of"),
        ({"data_type": "object"}, ""),
        ({"data_type": "|O"}, ""),
        ({"data_type": {"name": "numpy.object", "configuration": {}}}, ""),
        ({"data_type": "string"}, ""),
        ({"codecs": [{"name": "pickle", "configuration": {}}]}, ""),
        (
            {
                "codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    *[{"name": "zstd", "configuration": {"level": 1}}] * 2,
                ]
            },
            "is packed by",
        ),
    ],
)
def test_an_array_that_would_fill_the_memory_or_is_not_of_numbers_is_refused(
    tmp_path: Path, described: dict[str, object], message: str
) -> None:
    path = shard(tmp_path / "shard-000", **described)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        read_shard(path, 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000  # KiB


def zeros(blocks: int, says_its_size: bool) -> bytes:
    """Return a Zstandard frame of blocks of 128 KiB of zeros, four bytes each.

    RFC 8878: a block of one repeated byte.
    """
    magic = bytes.fromhex("28b52ffd")
    header = bytes([0, 0b0011_1000])
    if says_its_size:
        size = (2**17 * blocks).to_bytes(4, "little")
        header = bytes([0b1000_0000, 0b0011_1000, *size])
    block = 1 << 1 | 2**17 << 3
    last = block | 1
    body = (block.to_bytes(3, "little") + b"\0") * (blocks - 1)
    return magic + header + body + last.to_bytes(3, "little") + b"\0"


@pytest.mark.parametrize("says_its_size", [True, False])
def test_a_chunk_that_unpacks_to_more_than_a_chunk_is_refused_before_there_is_room_for_it(
    tmp_path: Path, says_its_size: bool
) -> None:
    assert numcodecs.Zstd().decode(zeros(3, says_its_size)) == bytes(3 * 2**17)
    path = tmp_path / "shard-000"
    write_shard(path, Labels(np.zeros((1, 2, 3), np.float16)))
    frame = zeros(8192, says_its_size)  # a gigabyte in 33 kB
    checksum = google_crc32c.value(frame).to_bytes(4, "little")
    rewrite(path, members(path) | {"log_probs/c/0/0/0": frame + checksum})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = 2**30 if says_its_size else -1
    message = rf"log_probs/c/0/0/0 declares {size} unpacked bytes \(.*\), not 192"
    with pytest.raises(ValueError, match=message):
        read_shard(path, 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000  # KiB


def test_a_store_of_the_format_that_knows_pickles_is_refused(tmp_path: Path, trace: Path) -> None:
    """Zarr's version 2 has a codec for them, whose use another package decides."""
    array = {
        "zarr_format": 2,
        "shape": [1],
        "chunks": [1],
        "dtype": "|O",
        "fill_value": None,
        "order": "C",
    }
    inside = {
        ".zgroup": json.dumps({"zarr_format": 2}).encode(),
        "log_probs/.zarray": json.dumps(
            array | {"filters": [{"id": "vlen-utf8"}], "compressor": {"id": "pickle"}}
        ).encode(),
        "log_probs/0": pickle.dumps(Bomb(trace)),
    }
    for disguise in ({}, {"log_probs/zarr.json": b"{}", "log_probs/c/0": b""}):
        path = rewrite(tmp_path / "shard-000", inside | disguise)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_shard(path, 1)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", os.devnull])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    folder = publish(tmp_path / "it", "labels", {"file": b"secret"})
    sound = open_artifact(folder, "labels")
    moved = sound.model_copy(update={"files": {name: sound.files["file"]}}).with_seal()
    (folder / "file").unlink()
    (folder / "manifest.json").write_text(moved.to_json())
    with pytest.raises(ValueError, match="expected a path inside the artifact"):
        open_artifact(folder, "labels")


def test_a_link_in_an_artifact_is_trusted_only_if_it_leads_to_the_bytes_that_the_manifest_names(
    tmp_path: Path,
) -> None:
    """As it does where DVC's cache is linked into the workspace."""
    (tmp_path / "outside").write_bytes(b"secret")
    folder = publish(tmp_path / "it", "labels", {"file": b"weights"})
    (folder / "file").rename(tmp_path / "cached")
    (folder / "file").symlink_to(tmp_path / "cached")
    open_artifact(folder, "labels")
    (folder / "file").unlink()
    (folder / "file").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="it is corrupt"):
        open_artifact(folder, "labels")


def test_the_target_of_a_link_is_never_removed(tmp_path: Path) -> None:
    """An artifact, its draft and the artifact it replaces are links to a user's folder."""
    users_folder = tmp_path / "users"
    users_folder.mkdir()
    (users_folder / "letter").write_text("dear")
    for name in ("it", ".it.old", ".it.draft"):
        (tmp_path / name).symlink_to(users_folder)
    publish(tmp_path / "it", "labels", {"file": b"weights"})
    open_artifact(tmp_path / "it", "labels")
    assert (users_folder / "letter").read_text() == "dear"
    assert not (tmp_path / "it").is_symlink()


# params.yaml

WHOLE = (ROOT / "params.yaml").read_text()


@pytest.mark.parametrize(
    "text",
    [
        'seed: !!python/object/apply:os.system ["touch TRACE"]',
        'seed: !!python/object/new:subprocess.Popen [["touch", "TRACE"]]',
        "seed: !!python/name:os.system",
        "seed: !!python/module:os",
    ],
)
def test_params_that_name_code_are_refused(tmp_path: Path, trace: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(WHOLE.replace("seed: 0", text.replace("TRACE", str(trace))))
    with pytest.raises(ValueError, match="not YAML"):
        load(path)
    assert not trace.exists()


def test_a_few_lines_of_anchors_do_not_fill_the_memory_nor_the_screen(tmp_path: Path) -> None:
    lines = ["x0: &x0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, 12)]
    path = tmp_path / "params.yaml"
    path.write_text("\n".join([*lines, WHOLE]))
    with pytest.raises(ValueError, match="no such key") as refused:
        load(path)
    assert len(str(refused.value)) < 10_000


@pytest.mark.parametrize(
    "name",
    [
        "../../etc",
        "/etc",
        "a/b",
        "..",
        ".hidden",
        "a b",
        "$(touch x)",
        "a;b",
        "`x`",
        "-rf",
        "a\nb",
        "",
    ],
)
@pytest.mark.parametrize("field", ["run.name", "label.teacher", "iterations"])
def test_a_name_that_is_a_path_or_a_command_is_refused(
    tmp_path: Path, field: str, name: str
) -> None:
    """Names end up in paths and, by dvc.yaml, in command lines."""
    tree = YAML(typ="safe").load(WHOLE)
    section, _, key = field.partition(".")
    tree[section] = {**tree[section], key: name} if key else {**tree[section], name: "student"}
    path = tmp_path / "params.yaml"
    with path.open("w") as file:
        YAML(typ="safe").dump(tree, file)
    with pytest.raises(ValueError, match=section):
        load(path)


# Secrets


@pytest.mark.filterwarnings("ignore:no commit is recorded")  # outside a repository
def test_secrets_in_the_environment_reach_nothing_that_a_stage_writes(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stages.__main__ as command

    secret = "hunter2-" + os.urandom(8).hex()
    for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "PREFECT_API_KEY"):
        monkeypatch.setenv(name, secret)
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "artifacts/small/evaluations/final")
    shutil.rmtree(tmp_path / "artifacts/small/report")
    monkeypatch.chdir(tmp_path)
    for stage in (["evaluate", "--name", "final"], ["report"]):
        host = ["--workers", "1", "--device", "cpu", "--tracking", "jsonl"]
        assert command.main([*stage, *host]) == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "executions.jsonl" for path in written)
    assert [path for path in written if secret.encode() in path.read_bytes()] == []
