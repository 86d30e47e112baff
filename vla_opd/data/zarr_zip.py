"""Named arrays in one file, a Zarr v3 group inside a zip: compressed, checksummed, complete or refused.

By default Zarr reads a lost chunk as zeros and lets a flipped byte pass; here every chunk carries a CRC-32C, empty chunks are written too, and
reading checks that all of them are there. Any Zarr opens it: `zarr.open_group(zarr.storage.ZipStore(path, mode="r"))`.
"""

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

SUFFIX = ".zarr.zip"
ROWS_PER_CHUNK = 16  # consecutive frames compress together (9.1x against 2.6x one by one) and still read at random
LARGEST = (
    os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
)  # bytes of all arrays; a description that promises more is a trap
CODECS = ["bytes", "zstd", "crc32c"]
ZSTANDARD, HEADER = (
    bytes.fromhex("28b52ffd"),
    18,
)  # how a frame begins, and how long its header is at most
# What reading a file that isn't whole, or is somebody else's, may raise.
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
)


def write(path: Path, columns: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> None:
    """Write arrays to a new file. Deterministic bytes. Empty arrays are described, not stored."""
    members: dict[str, Any] = {}  # Zarr's buffers
    group = zarr.create_group(MemoryStore(members), zarr_format=3, attributes=dict(attributes))
    for name, values in columns.items():
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=_chunks(values.shape),
            compressors=(ZstdCodec(level=1), Crc32cCodec()),
            config={"write_empty_chunks": True},
        )
        if values.size:
            array[...] = values
    with ZipFile(path, "w") as archive:
        for name in sorted(members):
            archive.writestr(
                ZipInfo(name), members[name].to_bytes()
            )  # of 1980: a clock would make other bytes each time


def read(
    path: Path, names: Collection[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays of a file, or those named, and its attributes. ValueError names the file and the array where bytes are missing or corrupt."""
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(ZipFile(path))
            members = _members(archive)
            store = stack.enter_context(ZipStore(path, mode="r"))
            group = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False)
            found = {
                name: array for name, array in group.arrays() if names is None or name in names
            }
        except DAMAGED as error:
            raise ValueError(
                f"{path}: not a zip of a Zarr group ({error}); expected one written by this package"
            ) from error
        _require_room(path, found.values())
        return {
            name: _read_array(archive, members, name, array) for name, array in found.items()
        }, dict(group.attrs)


def _chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of one dimension, all; of more, some rows."""
    rows = ROWS_PER_CHUNK if len(shape) > 1 else max(shape, default=1)
    return (max(rows, 1), *(max(size, 1) for size in shape[1:]))


def _members(archive: ZipFile) -> set[str]:
    """The names in the zip. ValueError if it compresses: chunks are compressed already, and more could hide any number of bytes in a few."""
    for member in archive.infolist():
        if member.compress_type != ZIP_STORED:
            raise ValueError(
                f"{member.filename} is compressed by the zip; expected members as they are"
            )
    members = set(archive.namelist())
    for name in {member.partition("/")[0] for member in members} - {"zarr.json"}:
        if f"{name}/zarr.json" not in members:
            raise ValueError(f"array {name!r} has no description")
    return members


def _require_room(path: Path, arrays: Iterable["zarr.Array[Any]"]) -> None:
    wanted = sum(array.nbytes for array in arrays)
    if wanted > LARGEST:
        raise ValueError(
            f"{path}: its arrays would take {wanted // 10**9} GB; expected at most {LARGEST // 10**9}"
        )


def _read_array(
    archive: ZipFile, members: set[str], name: str, array: "zarr.Array[Any]"
) -> np.ndarray:
    path = archive.filename
    if array.dtype.kind not in "biuf" or array.chunks != _chunks(array.shape):
        raise ValueError(
            f"{path}: array {name!r} is of {array.dtype} in chunks of {array.chunks}; expected numbers in {_chunks(array.shape)}"
        )
    codecs = [
        codec.to_dict()["name"] for codec in getattr(array.metadata, "codecs", ())
    ]  # of format 2: none
    if codecs != CODECS:
        raise ValueError(f"{path}: array {name!r} is packed by {codecs}; expected {CODECS}")
    if array.size:
        _require_chunks(path, members, name, array)
    try:
        _require_sizes(archive, name, array)
        return np.asarray(array[...])
    except DAMAGED as error:
        raise ValueError(
            f"{path}: array {name!r} is corrupt ({error}); expected intact checksums"
        ) from error


def _require_chunks(
    path: str | None, members: set[str], name: str, array: "zarr.Array[Any]"
) -> None:
    """Not by `nchunks_initialized`: in a zip it mixes up `step` and `steps` (zarr 3.1.6)."""
    if array.nchunks > len(members):  # before they are named one by one
        raise ValueError(
            f"{path}: array {name!r} has {array.nchunks} chunks; expected no more than the {len(members)} members of the zip"
        )
    if lost := next((chunk for chunk in _names(name, array) if chunk not in members), None):
        raise ValueError(
            f"{path}: array {name!r} has no chunk {lost}; expected all {array.nchunks}"
        )


def _require_sizes(archive: ZipFile, name: str, array: "zarr.Array[Any]") -> None:
    """ValueError for a chunk that says that it unpacks to more or less than a chunk: Zarr would make room for as much."""
    size = int(np.prod(array.chunks)) * array.dtype.itemsize
    for chunk in _names(name, array) if array.size else ():
        with archive.open(chunk) as frame:
            if (unpacked := _unpacked(frame.read(HEADER))) != size:
                raise ValueError(f"{chunk} unpacks to {unpacked} bytes, not {size}")


def _names(name: str, array: "zarr.Array[Any]") -> Iterator[str]:
    return ("/".join((name, "c", *map(str, place))) for place in np.ndindex(array.cdata_shape))


def _unpacked(header: bytes) -> int | None:
    """The bytes to which a Zstandard frame says that it unpacks (RFC 8878, 3.1.1.1); None if it doesn't say, or is none."""
    if len(header) < 6 or not header.startswith(ZSTANDARD):
        return None
    flag, single, dictionary = header[4] >> 6, header[4] >> 5 & 1, header[4] & 3
    width = (single, 2, 4, 8)[flag]
    start = 5 + (1 - single) + (0, 1, 2, 4)[dictionary]
    return (
        int.from_bytes(header[start : start + width], "little") + 256 * (flag == 1)
        if width
        else None
    )
