"""A compiled LIBERO model without the detail that only pictures have: the same physics, a twentieth of the size.

Most of a LIBERO model is 4096-pixel textures and scanned meshes that nothing collides with. Here textures are reduced to at most
`TEXTURE_EDGE` pixels and the visual meshes by vertex clustering: vertices that share a cube of edge `CELL` become their mean, triangles that
collapse are dropped (J. Rossignac and P. Borrel, Multi-resolution 3D approximations for rendering complex scenes, 1993).

MuJoCo can't resize the arrays of a compiled model, and compiling smaller meshes would change inertias and the order of contacts. So
the edit is made in the binary file format (MJB): a few arrays, their sizes and the total size are replaced, every other byte is kept.

Imported by `libero.make` only, in the process that owns the simulator.
"""

# mujoco's names are compiled, without stubs.
# pyright: reportAttributeAccessIssue=false

import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from PIL import Image

CELL = 0.008
TEXTURE_EDGE = 512
_FINEST = 6  # a mesh keeps at least that many cells along its longest side

_MESH_BLOCK = (  # in the order of the file
    *(
        "mesh_vertadr",
        "mesh_vertnum",
        "mesh_normaladr",
        "mesh_normalnum",
        "mesh_texcoordadr",
        "mesh_texcoordnum",
    ),
    *(
        "mesh_faceadr",
        "mesh_facenum",
        "mesh_bvhadr",
        "mesh_bvhnum",
        "mesh_graphadr",
        "mesh_scale",
        "mesh_pos",
        "mesh_quat",
    ),
    *(
        "mesh_vert",
        "mesh_normal",
        "mesh_texcoord",
        "mesh_face",
        "mesh_facenormal",
        "mesh_facetexcoord",
        "mesh_graph",
        "mesh_pathadr",
    ),
    *(
        "mesh_polynum",
        "mesh_polyadr",
        "mesh_polynormal",
        "mesh_polyvertadr",
        "mesh_polyvertnum",
        "mesh_polyvert",
    ),
    *("mesh_polymapadr", "mesh_polymapnum", "mesh_polymap"),
)
_BVH_BLOCK = ("body_bvhadr", "body_bvhnum", "bvh_depth", "bvh_child", "bvh_nodeid", "bvh_aabb")
_TEXTURE_BLOCK = ("tex_type", "tex_height", "tex_width", "tex_nchannel", "tex_adr", "tex_data")
_SIZES = (
    ("nbody", "nbvh", "nbvhstatic", "nbvhdynamic", "njnt"),
    (
        "nmesh",
        "nmeshvert",
        "nmeshnormal",
        "nmeshtexcoord",
        "nmeshface",
        "nmeshgraph",
        "nmeshpoly",
        "nmeshpolyvert",
        "nmeshpolymap",
    ),
    ("ntex", "ntexdata", "nmat"),
)
_HEADER_BYTES = 400
_ALIGNMENT = 64  # of every array in MuJoCo's buffer


@dataclass(frozen=True)
class Surface:
    """One mesh as it is drawn: corners of F triangles index V vertices, N normals, U texture coordinates (none: U = 0)."""

    vertices: Float32[np.ndarray, "V 3"]
    normals: Float32[np.ndarray, "N 3"]
    texture: Float32[np.ndarray, "U 2"]
    faces: Int32[np.ndarray, "F 3"]
    face_normals: Int32[np.ndarray, "F 3"]
    face_texture: Int32[np.ndarray, "F 3"]


def slim(model: mujoco.MjModel) -> bytes:
    """The model as the bytes of an MJB file, with simpler pictures and the same physics, bit for bit."""
    arrays = _slim_meshes(model) | _slim_textures(model)
    return _replaced(_binary(model), model, arrays)


def cluster(surface: Surface, cell: float) -> Surface:
    """`surface` with all vertices in a cube of edge `cell` (metres) merged into their mean, and collapsed triangles dropped."""
    corner = surface.vertices.min(axis=0)
    cubes = np.floor((surface.vertices - corner) / cell).astype(np.int64)
    _, member = np.unique(cubes @ np.array([1, 1 << 20, 1 << 40]), return_inverse=True)
    means = (
        np.stack([np.bincount(member, weights=column) for column in surface.vertices.T], axis=1)
        / np.bincount(member)[:, None]
    )
    keep = _first_of_each(member[surface.faces])
    used, faces = np.unique(member[surface.faces[keep]], return_inverse=True)
    normals, face_normals = _compact(surface.normals, surface.face_normals[keep])
    texture, face_texture = _compact(surface.texture, surface.face_texture[keep])
    return Surface(
        means[used].astype(np.float32),
        normals,
        texture,
        faces.reshape(-1, 3).astype(np.int32),
        face_normals,
        face_texture,
    )


def _first_of_each(triangles: np.ndarray) -> Int32[np.ndarray, "K"]:
    """Indices of triangles with three different corners, one of each; orientation counts, as back faces are not drawn."""
    a, b, c = triangles.T
    proper = np.flatnonzero((a != b) & (b != c) & (c != a))
    start = triangles[proper].argmin(axis=1)
    turned = triangles[proper[:, None], (start[:, None] + np.arange(3)) % 3]
    _, first = np.unique(turned, axis=0, return_index=True)
    return proper[np.sort(first)]


def _compact(rows: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(rows) == 0:
        return rows, indices
    used, again = np.unique(indices, return_inverse=True)
    return rows[used], again.reshape(-1, 3).astype(np.int32)


def _slim_meshes(model: mujoco.MjModel) -> dict[str, np.ndarray]:
    visual = _only_drawn(model)
    surfaces = [_surface(model, mesh) for mesh in range(model.nmesh)]
    surfaces = [
        _simplified(surface) if is_visual else surface
        for surface, is_visual in zip(surfaces, visual, strict=True)
    ]
    return _drawn_arrays(model, surfaces) | _collision_arrays(
        model, visual, [len(surface.vertices) for surface in surfaces]
    )


def _simplified(surface: Surface) -> Surface:
    longest = float(np.ptp(surface.vertices, axis=0).max())
    simpler = cluster(surface, min(CELL, longest / _FINEST))
    return simpler if 0 < len(simpler.faces) < len(surface.faces) else surface


def _only_drawn(model: mujoco.MjModel) -> Bool[np.ndarray, "M"]:
    """Which meshes no colliding geom uses."""
    collides = (model.geom_contype | model.geom_conaffinity | (model.geom_group != 1)).astype(bool)
    is_mesh = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    drawn = np.ones(model.nmesh, dtype=bool)
    drawn[model.geom_dataid[collides & is_mesh]] = False
    return drawn & (model.mesh_graphadr < 0)


def _surface(model: mujoco.MjModel, mesh: int) -> Surface:
    face = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])

    def rows(name: str) -> np.ndarray:
        start, count = (
            getattr(model, f"mesh_{name}adr")[mesh],
            getattr(model, f"mesh_{name}num")[mesh],
        )
        return getattr(model, f"mesh_{name}")[start : start + count]

    drawn = (rows("vert"), rows("normal"), rows("texcoord"))
    return Surface(
        *drawn, model.mesh_face[face], model.mesh_facenormal[face], model.mesh_facetexcoord[face]
    )


def _drawn_arrays(model: mujoco.MjModel, surfaces: Sequence[Surface]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    fields = {"vert": "vertices", "normal": "normals", "texcoord": "texture", "face": "faces"}
    for name, field in fields.items():
        parts = [getattr(surface, field) for surface in surfaces]
        arrays |= _ragged(f"mesh_{name}", f"mesh_{name}adr", f"mesh_{name}num", parts)
    arrays["mesh_texcoordadr"] = np.where(
        model.mesh_texcoordadr < 0, -1, arrays["mesh_texcoordadr"]
    ).astype(np.int32)
    arrays["mesh_facenormal"] = np.concatenate([surface.face_normals for surface in surfaces])
    arrays["mesh_facetexcoord"] = np.concatenate([surface.face_texture for surface in surfaces])
    return arrays


def _collision_arrays(
    model: mujoco.MjModel, visual: Bool[np.ndarray, "M"], vertices: Sequence[int]
) -> dict[str, np.ndarray]:
    """The convex polygons and bounding volumes of the meshes that collide; a mesh that is only drawn keeps none."""
    kept = [mesh for mesh in range(model.nmesh) if not visual[mesh]]
    return _polygons(model, kept, vertices) | _bounding_volumes(model, kept)


def _polygons(
    model: mujoco.MjModel, kept: Sequence[int], vertices: Sequence[int]
) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {
        name: [] for name in ("normal", "vertadr", "vertnum", "vert", "mapadr", "mapnum", "map")
    }
    count = np.zeros(model.nmesh, dtype=np.int32)
    total = 0  # polyvertadr and polymapadr count from the first mesh of the model
    for mesh in range(model.nmesh):
        if mesh not in kept:
            parts["mapadr"].append(np.zeros(vertices[mesh], dtype=np.int32))
            parts["mapnum"].append(np.zeros(vertices[mesh], dtype=np.int32))
            continue
        polygon = _rows(model.mesh_polyadr, model.mesh_polynum, mesh)
        vertex = _rows(model.mesh_vertadr, model.mesh_vertnum, mesh)
        start = model.mesh_polyvertadr[polygon][0]
        length = int(model.mesh_polyvertnum[polygon].sum())
        parts["normal"].append(model.mesh_polynormal[polygon])
        parts["vertadr"].append(model.mesh_polyvertadr[polygon] - start + total)
        parts["vertnum"].append(model.mesh_polyvertnum[polygon])
        parts["vert"].append(model.mesh_polyvert[start : start + length])
        parts["mapadr"].append(model.mesh_polymapadr[vertex] - start + total)
        parts["mapnum"].append(model.mesh_polymapnum[vertex])
        parts["map"].append(model.mesh_polymap[start : start + length])
        count[mesh] = model.mesh_polynum[mesh]
        total += length
    arrays = {
        f"mesh_poly{name}": _joined(rows, getattr(model, f"mesh_poly{name}"))
        for name, rows in parts.items()
    }
    return arrays | {"mesh_polynum": count, "mesh_polyadr": _starts(count)}


def _bounding_volumes(model: mujoco.MjModel, kept: Sequence[int]) -> dict[str, np.ndarray]:
    """Nodes of bodies come first, then those of each mesh; children are numbered from their own tree's root."""
    bodies = int(model.body_bvhnum.sum())
    count = np.zeros(model.nmesh, dtype=np.int32)
    count[list(kept)] = model.mesh_bvhnum[list(kept)]
    rows = [slice(0, bodies), *(_rows(model.mesh_bvhadr, model.mesh_bvhnum, mesh) for mesh in kept)]
    names = ("bvh_depth", "bvh_child", "bvh_nodeid", "bvh_aabb")
    arrays = {name: np.concatenate([getattr(model, name)[part] for part in rows]) for name in names}
    address = np.where(count > 0, bodies + _starts(count), -1).astype(np.int32)
    return arrays | {"mesh_bvhnum": count, "mesh_bvhadr": address}


def _slim_textures(model: mujoco.MjModel) -> dict[str, np.ndarray]:
    images = [_reduced(_image(model, texture)) for texture in range(model.ntex)]
    sizes = np.array([image.size for image in images], dtype=np.int32)
    heights, widths = (
        np.array([image.shape[axis] for image in images], dtype=np.int32) for axis in (0, 1)
    )
    data = np.concatenate([image.ravel() for image in images])
    return {"tex_height": heights, "tex_width": widths, "tex_adr": _starts(sizes), "tex_data": data}


def _image(model: mujoco.MjModel, texture: int) -> UInt8[np.ndarray, "H W C"]:
    shape = model.tex_height[texture], model.tex_width[texture], model.tex_nchannel[texture]
    start = model.tex_adr[texture]
    return model.tex_data[start : start + int(np.prod(shape))].reshape(shape)


def _reduced(image: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "h w C"]:
    """Each pixel of the result is a mean; the six faces of a cube lie one below another and stay square."""
    height, width, channels = image.shape
    if width <= TEXTURE_EDGE or channels != 3:
        return image
    faces = height // width if height % width == 0 else 1
    smaller = (
        TEXTURE_EDGE,
        faces * TEXTURE_EDGE if height % width == 0 else max(1, height * TEXTURE_EDGE // width),
    )
    return np.asarray(Image.fromarray(image).resize(smaller, Image.Resampling.BOX))


def _ragged(
    data: str, address: str, number: str, parts: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    counts = np.array([len(part) for part in parts], dtype=np.int32)
    return {data: np.concatenate(parts), address: _starts(counts), number: counts}


def _starts(counts: Int32[np.ndarray, "N"]) -> Int32[np.ndarray, "N"]:
    return (np.cumsum(counts) - counts).astype(np.int32)


def _rows(address: np.ndarray, number: np.ndarray, item: int) -> slice:
    return slice(address[item], address[item] + number[item])


def _joined(parts: Sequence[np.ndarray], like: np.ndarray) -> np.ndarray:
    return np.concatenate(parts).astype(like.dtype) if parts else like[:0]


def _binary(model: mujoco.MjModel) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mjb"
        mujoco.mj_saveModel(model, str(path), None)
        return path.read_bytes()


def _replaced(binary: bytes, model: mujoco.MjModel, arrays: Mapping[str, np.ndarray]) -> bytes:
    """`binary` with `arrays` in place of the model's own, and the sizes in its header made to fit."""
    header, pieces, position, grown = binary[:_HEADER_BYTES], [], _HEADER_BYTES, 0
    for block in (_BVH_BLOCK, _MESH_BLOCK, _TEXTURE_BLOCK):
        old = [np.ascontiguousarray(getattr(model, name)).tobytes() for name in block]
        new = [
            np.ascontiguousarray(arrays[name]).tobytes() if name in arrays else data
            for name, data in zip(block, old, strict=True)
        ]
        start = _find_block(binary, old, position)
        pieces += [binary[position:start], *new]
        position = start + sum(map(len, old))
        grown += sum(
            _padded(len(after)) - _padded(len(before))
            for before, after in zip(old, new, strict=True)
        )
    pieces.append(binary[position:])
    return _resized(header, model, arrays, grown) + b"".join(pieces)


def _find_block(binary: bytes, arrays: Sequence[bytes], after: int) -> int:
    """Where the consecutive `arrays` lie; the file format has no index, so they are looked for and compared."""
    anchor = b"".join(arrays[:2])
    start = binary.find(anchor, after)
    while start >= 0 and not _matches(binary, arrays, start):
        start = binary.find(anchor, start + 1)
    if start < 0:
        raise RuntimeError(
            f"MuJoCo {mujoco.__version__} writes models in another layout; environment.render 'fast' knows that of 3.3.0"
        )
    return start


def _matches(binary: bytes, arrays: Sequence[bytes], start: int) -> bool:
    for data in arrays:
        if not binary.startswith(data, start):
            return False
        start += len(data)
    return True


def _resized(
    header: bytes, model: mujoco.MjModel, arrays: Mapping[str, np.ndarray], grown: int
) -> bytes:
    like = {  # a size, and the array whose length it is
        "nbvh": "bvh_depth",
        "nbvhstatic": "bvh_depth",
        "nmeshvert": "mesh_vert",
        "nmeshnormal": "mesh_normal",
        "nmeshtexcoord": "mesh_texcoord",
        "nmeshface": "mesh_face",
        "nmeshpoly": "mesh_polyvertadr",
        "nmeshpolyvert": "mesh_polyvert",
        "nmeshpolymap": "mesh_polymap",
        "ntexdata": "tex_data",
    }
    lengths = {size: len(arrays[name]) for size, name in like.items()}
    for group in _SIZES:
        old = [getattr(model, name) for name in group]
        new = [lengths.get(name, value) for name, value in zip(group, old, strict=True)]
        header = _swapped(
            header, struct.pack(f"<{len(old)}i", *old), struct.pack(f"<{len(new)}i", *new)
        )
    return _swapped(
        header, struct.pack("<q", model.nbuffer), struct.pack("<q", model.nbuffer + grown)
    )


def _swapped(header: bytes, old: bytes, new: bytes) -> bytes:
    if header.count(old) != 1:
        raise RuntimeError(
            f"MuJoCo {mujoco.__version__} writes models with another header; environment.render 'fast' knows that of 3.3.0"
        )
    return header.replace(old, new)


def _padded(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT
