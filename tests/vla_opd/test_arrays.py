"""Named arrays on disk: what was written is read, and damage is refused by name."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vla_opd import arrays

DTYPES = st.sampled_from([np.uint8, np.int16, np.int32, np.int64, np.float16, np.float32, np.bool_])
ANY = DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=37)))


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def data_file(folder: Path, name: str) -> Path:
    (path,) = [path for path in (folder / name).rglob("*") if path.is_file() and path.name != "zarr.json"]
    return path


@settings(max_examples=25, deadline=None)
@given(values=ANY)
def test_what_is_written_is_read(values: np.ndarray) -> None:
    with tempfile.TemporaryDirectory() as root:
        arrays.write(Path(root) / "a", {"x": values}, {"n": 3})
        columns, attributes = arrays.read(Path(root) / "a")
    np.testing.assert_array_equal(columns["x"], values)
    assert columns["x"].dtype == values.dtype
    assert columns["x"].shape == values.shape
    assert attributes == {"n": 3}


def test_same_arrays_same_bytes_in_one_file_each(tmp_path: Path) -> None:
    columns = {"x": np.arange(600, dtype=np.float32).reshape(50, 12), "zeros": np.zeros((40, 3), np.uint8), "flat": np.arange(7)}
    for name in "ab":
        arrays.write(tmp_path / name, columns, {"chunk": 8})
    assert all_files(tmp_path / "a") == all_files(tmp_path / "b")
    for name in columns:
        assert data_file(tmp_path / "a", name).stat().st_size > 0  # zeros are stored too: a lost file cannot pass for them


@pytest.mark.parametrize("name", ["large", "flat"])
def test_a_lost_file_is_refused_and_named(tmp_path: Path, name: str) -> None:
    arrays.write(tmp_path / "a", {"large": np.zeros((50, 12), np.float32), "flat": np.zeros(9)}, {})
    data_file(tmp_path / "a", name).unlink()
    with pytest.raises(ValueError, match=rf"array '{name}' has 0 of \d+ chunks; expected all"):
        arrays.read(tmp_path / "a")


@pytest.mark.parametrize("name", ["large", "flat"])
def test_no_flipped_byte_passes(tmp_path: Path, name: str) -> None:
    random = np.random.default_rng(0)
    arrays.write(tmp_path / "a", {"large": random.normal(size=(50, 4)).astype(np.float32), "flat": random.normal(size=9)}, {})
    path = data_file(tmp_path / "a", name)
    intact = path.read_bytes()
    for position in range(0, len(intact), max(1, len(intact) // 40)):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 0x10]) + intact[position + 1 :])
        with pytest.raises(ValueError, match=f"array '{name}'"):
            arrays.read(tmp_path / "a")


@pytest.mark.parametrize("name", ["large", "flat"])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str) -> None:
    arrays.write(tmp_path / "a", {"large": np.ones((50, 12), np.float32), "flat": np.ones(9)}, {})
    path = data_file(tmp_path / "a", name)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"array '{name}' is corrupt"):
        arrays.read(tmp_path / "a")


def test_a_folder_without_a_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a Zarr group"):
        arrays.read(tmp_path / "nothing")
