"""Named arrays in one file, a Zarr v3 group inside a zip: compressed, checksummed, complete or
refused.

By default Zarr reads a lost chunk as zeros and lets a flipped byte pass; here every chunk carries a
CRC-32C, empty chunks are written too, and reading checks that all of them are there. Any Zarr opens
it: `zarr.open_group(zarr.storage.ZipStore(path, mode="r"))`.
"""

import math
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore, ZipStore
from zstandard import ZstdError, frame_content_size

SUFFIX = ".zarr.zip"
# Consecutive frames compress together (9.1x against 2.6x singly) and still read at random.
ROWS_PER_CHUNK = 16
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
LARGEST = MEMORY // 2  # bytes of all arrays: a description that promises more is a trap
CODECS = ["bytes", "zstd", "crc32c"]
FRAME_HEADER = 18  # the most bytes in the header of a Zstandard frame (RFC 8878, 3.1.1.1)
# Errors that may be raised by reading a file that is incomplete or of another origin.
DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    BadZipFile,
    struct.error,
    ZstdError,
)


def write(path: Path, columns: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
    """Write arrays to a new file, with deterministic bytes.

    Empty arrays are described, not stored.
    """
    members: dict[str, Any] = {}  # Zarr's buffers
    group = zarr.create_group(MemoryStore(members), zarr_format=3, attributes=dict(attributes))
    for name, values in columns.items():
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=_chunk_shape(values.shape),
            compressors=(ZstdCodec(level=1), Crc32cCodec()),
            config={"write_empty_chunks": True},
        )
        if values.size:
            array[...] = values
    with ZipFile(path, "w") as archive:
        for name in sorted(members):
            member = ZipInfo(name)  # dated 1980: the clock would change the bytes
            archive.writestr(member, members[name].to_bytes())


def read(
    path: Path, names: Collection[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read all arrays of a file, or those named, and its attributes.

    ValueError names the file and the array where bytes are missing or corrupt.
    """
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(ZipFile(path))
            members = _list_members(archive)
            store = stack.enter_context(ZipStore(path, mode="r"))
            group = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False)
            arrays = dict(group.arrays())
        except DAMAGED as error:
            raise ValueError(
                f"{path}: not a zip of a Zarr group ({error}); expected one written by this package"
            ) from error
        if names is not None:
            arrays = {name: arrays[name] for name in arrays if name in names}
        _require_memory(path, arrays.values())
        columns: dict[str, np.ndarray] = {}
        for name, array in arrays.items():
            columns[name] = _read_array(archive, members, name, array)
        return columns, dict(group.attrs)


def _chunk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a chunk's shape: all of a vector, some rows of anything else."""
    rows = ROWS_PER_CHUNK if len(shape) > 1 else max([1, *shape])
    widths = [max(1, size) for size in shape[1:]]
    return (rows, *widths)


def _list_members(archive: ZipFile) -> set[str]:
    """List the names in the zip.

    ValueError for compressed members: chunks are compressed already, and another compression could
    hide any number of bytes in a few.
    """
    for member in archive.infolist():
        if member.compress_type != ZIP_STORED:
            raise ValueError(
                f"{member.filename} is compressed by the zip; expected uncompressed members"
            )
    members = set(archive.namelist())
    arrays = {member.partition("/")[0] for member in members} - {"zarr.json"}
    for name in arrays:
        if f"{name}/zarr.json" not in members:
            raise ValueError(f"array {name!r} has no description")
    return members


def _require_memory(path: Path, arrays: Iterable["zarr.Array[Any]"]) -> None:
    size = sum(array.nbytes for array in arrays)
    if size > LARGEST:
        raise ValueError(
            f"{path}: its arrays would take {size / 1e9:.0f} GB;"
            f" expected at most {LARGEST / 1e9:.0f}"
        )


def _read_array(
    archive: ZipFile, members: set[str], name: str, array: "zarr.Array[Any]"
) -> np.ndarray:
    path = archive.filename
    chunk_shape = _chunk_shape(array.shape)
    if array.dtype.kind not in "biuf" or array.chunks != chunk_shape:
        raise ValueError(
            f"{path}: array {name!r} is of {array.dtype} in chunks of {array.chunks};"
            f" expected numbers in {chunk_shape}"
        )
    codecs = getattr(array.metadata, "codecs", ())  # Zarr's format 2 has none
    codec_names = [codec.to_dict()["name"] for codec in codecs]
    if codec_names != CODECS:
        raise ValueError(f"{path}: array {name!r} is packed by {codec_names}; expected {CODECS}")
    if array.size:
        _require_chunks(path, members, name, array)
    try:
        _require_chunk_sizes(archive, name, array)
        return np.asarray(array[...])
    except DAMAGED as error:
        raise ValueError(
            f"{path}: array {name!r} is corrupt ({error}); expected intact checksums"
        ) from error


def _require_chunks(
    path: str | None, members: set[str], name: str, array: "zarr.Array[Any]"
) -> None:
    """Refuse an array that lacks a chunk.

    `nchunks_initialized` does not tell: in a zip it mixes up `step` and `steps` (zarr 3.1.6).
    """
    if array.nchunks > len(members):  # before any number of chunks is listed
        raise ValueError(
            f"{path}: array {name!r} has {array.nchunks} chunks;"
            f" expected no more than the {len(members)} members of the zip"
        )
    for chunk in _chunk_names(name, array):
        if chunk not in members:
            raise ValueError(
                f"{path}: array {name!r} has no chunk {chunk}; expected all {array.nchunks}"
            )


def _require_chunk_sizes(archive: ZipFile, name: str, array: "zarr.Array[Any]") -> None:
    """Refuse a chunk whose header declares another size than a chunk's, or none.

    Zarr would allocate as much as it declares.
    """
    if not array.size:
        return
    size = math.prod(array.chunks) * array.dtype.itemsize
    for chunk in _chunk_names(name, array):
        with archive.open(chunk) as frame:
            header = frame.read(FRAME_HEADER)
        declared = frame_content_size(header)  # ZstdError if this is no frame
        if declared != size:
            raise ValueError(
                f"{chunk} declares {declared} unpacked bytes (-1: it declares none), not {size}"
            )


def _chunk_names(name: str, array: "zarr.Array[Any]") -> Iterator[str]:
    for place in np.ndindex(array.cdata_shape):
        yield "/".join([name, "c", *map(str, place)])
