"""Named arrays on disk: what was written is read, and damage is refused by name."""

import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vla_opd.data import zarr_zip

DTYPES = st.sampled_from([np.uint8, np.int16, np.int32, np.int64, np.float16, np.float32, np.bool_])
ANY = DTYPES.flatmap(
    lambda dtype: hnp.arrays(
        dtype, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=37)
    )
)


def members(path: Path) -> dict[str, bytes]:
    with ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def refusal(path: Path) -> str | None:
    """Return the message with which reading a file is refused, if it is."""
    try:
        zarr_zip.read(path)
    except ValueError as error:
        return str(error)
    return None


def rewrite(path: Path, inside: Mapping[str, bytes], compression: int = ZIP_STORED) -> Path:
    """Put other members in a file."""
    with ZipFile(path, "w", compression) as archive:
        for name, content in inside.items():
            archive.writestr(name, content)
    return path


@settings(max_examples=25, deadline=None)
@given(values=ANY)
def test_what_is_written_is_read(values: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "a"
        zarr_zip.write(path, {"x": values}, {"n": 3})
        columns, attributes = zarr_zip.read(path)
    np.testing.assert_array_equal(columns["x"], values)
    assert columns["x"].dtype == values.dtype
    assert columns["x"].shape == values.shape
    assert attributes == {"n": 3}


def test_same_arrays_same_bytes_in_one_file(tmp_path: Path) -> None:
    columns = {
        "x": np.arange(600, dtype=np.float32).reshape(50, 12),
        "zeros": np.zeros((40, 3), np.uint8),
        "flat": np.arange(7),
    }
    zarr_zip.write(tmp_path / "a", columns, {"chunk": 8})
    time.sleep(2.1)  # a zip's clock has steps of two seconds
    zarr_zip.write(tmp_path / "b", dict(reversed(columns.items())), {"chunk": 8})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    stored = members(tmp_path / "a")
    zeros = {name for name in stored if "zeros/c" in name}
    assert zeros == {"zeros/c/0/0", "zeros/c/1/0", "zeros/c/2/0"}


def test_any_zarr_opens_it(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr.zip"
    zarr_zip.write(path, {"x": np.arange(100).reshape(50, 2)}, {"n": 3})
    with zarr.storage.ZipStore(path, mode="r") as store:
        group = zarr.open_group(store, mode="r")
        np.testing.assert_array_equal(group["x"][17:19], [[34, 35], [36, 37]])


def test_only_the_named_arrays_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    zarr_zip.write(path, {"step": np.arange(3), "steps": np.arange(5)}, {})
    rewrite(path, members(path) | {"steps/c/0": b"spoiled"})
    columns, _ = zarr_zip.read(path, ["step"])
    assert list(columns) == ["step"]


@pytest.mark.parametrize("name", ["large", "flat"])
def test_a_lost_chunk_is_refused_and_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a"
    zarr_zip.write(path, {"large": np.zeros((50, 12), np.float32), "flat": np.zeros(9)}, {})
    inside = members(path)
    chunk = next(member for member in inside if member.startswith(f"{name}/c/"))
    del inside[chunk]
    rewrite(path, inside)
    with pytest.raises(ValueError, match=f"array '{name}' has no chunk {chunk}; expected all"):
        zarr_zip.read(path)


def flip(content: bytes, position: int) -> bytes:
    """Flip one bit."""
    flipped = bytearray(content)
    flipped[position] ^= 0x10
    return bytes(flipped)


def test_no_flipped_byte_passes(tmp_path: Path) -> None:
    """Flip bytes anywhere in the file: it is refused, or read with the same values.

    Some bytes do not matter, such as a date of the zip.
    """
    random = np.random.default_rng(0)
    columns = {
        "large": random.normal(size=(50, 4)).astype(np.float32),
        "flat": random.normal(size=9),
        "zeros": np.zeros(5),
        "empty": np.zeros((0, 3)),
    }
    path = tmp_path / "a"
    zarr_zip.write(path, columns, {"n": 3})
    intact = path.read_bytes()
    positions = range(0, len(intact), 3)
    passed = 0
    for position in positions:
        path.write_bytes(flip(intact, position))
        message = refusal(path)
        if message is not None:
            assert message.startswith(f"{path}: ")
            continue
        passed += 1
        stored, attributes = zarr_zip.read(path)
        assert attributes == {"n": 3}
        assert stored.keys() == columns.keys()
        for name, values in columns.items():
            assert stored[name].tobytes() == values.tobytes()
    assert passed < len(positions) / 4


@pytest.mark.parametrize("name", ["large", "flat"])
def test_a_flipped_byte_of_a_chunk_is_refused_by_the_arrays_name(tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(0)
    columns = {
        "large": random.normal(size=(50, 4)).astype(np.float32),
        "flat": random.normal(size=9),
    }
    path = tmp_path / "a"
    zarr_zip.write(path, columns, {})
    intact = path.read_bytes()
    chunks = [chunk for member, chunk in members(path).items() if member.startswith(f"{name}/c/")]
    for chunk in chunks:
        size = len(chunk)
        begin = intact.index(chunk)
        for position in range(begin, begin + size, max(1, size // 40)):
            path.write_bytes(flip(intact, position))
            with pytest.raises(ValueError, match=f"array '{name}' is corrupt"):
                zarr_zip.read(path)


@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, part: float) -> None:
    path = tmp_path / "a"
    zarr_zip.write(path, {"large": np.ones((50, 12), np.float32), "flat": np.ones(9)}, {})
    intact = path.read_bytes()
    length = int(part * len(intact))
    path.write_bytes(intact[:length])
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a zip of a Zarr group")):
        zarr_zip.read(path)


def test_a_zip_that_compresses_is_refused(tmp_path: Path) -> None:
    """A few kilobytes of it could be gigabytes of description."""
    path = tmp_path / "a"
    zarr_zip.write(path, {"flat": np.ones(9)}, {})
    rewrite(path, members(path) | {"zarr.json": b" " * 10**6}, ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed by the zip; expected uncompressed members"):
        zarr_zip.read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a zip of a Zarr group"):
        zarr_zip.read(tmp_path / "nothing")
