"""Remove from a compiled LIBERO model the detail that only images need.

The result has the same physics and a twentieth of the size.

Most of a LIBERO model is 4096-pixel textures and scanned meshes that nothing collides with. Here
textures are reduced to at most `TEXTURE_EDGE` pixels, and the visual meshes by vertex clustering:
vertices that share a cube of edge `CELL` become their mean, and collapsed triangles are dropped.

MuJoCo can't resize the arrays of a compiled model, and compiling smaller meshes would change
inertias and the order of contacts. So the edit is made in the binary file format (MJB): a few
arrays, their sizes and the total size are replaced, every other byte is kept.

Imported only by `env.LiberoEnv`, in the process that owns the simulator.

Source: J. Rossignac and P. Borrel, Multi-resolution 3D approximations for rendering complex scenes,
1993.
"""

# mujoco's names are compiled, without stubs.
# pyright: reportAttributeAccessIssue=false

import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mujoco
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from PIL import Image

CELL = 0.008
TEXTURE_EDGE = 512
_MIN_CELLS = 6  # along the longest side of a mesh
_LAYOUT = "environment.render 'fast' needs the layout of MuJoCo 3.3.0; set it to 'exact'"

_MESH_BLOCK = (  # in the order of the file
    "mesh_vertadr",
    "mesh_vertnum",
    "mesh_normaladr",
    "mesh_normalnum",
    "mesh_texcoordadr",
    "mesh_texcoordnum",
    "mesh_faceadr",
    "mesh_facenum",
    "mesh_bvhadr",
    "mesh_bvhnum",
    "mesh_graphadr",
    "mesh_scale",
    "mesh_pos",
    "mesh_quat",
    "mesh_vert",
    "mesh_normal",
    "mesh_texcoord",
    "mesh_face",
    "mesh_facenormal",
    "mesh_facetexcoord",
    "mesh_graph",
    "mesh_pathadr",
    "mesh_polynum",
    "mesh_polyadr",
    "mesh_polynormal",
    "mesh_polyvertadr",
    "mesh_polyvertnum",
    "mesh_polyvert",
    "mesh_polymapadr",
    "mesh_polymapnum",
    "mesh_polymap",
)
_BVH_BLOCK = ("body_bvhadr", "body_bvhnum", "bvh_depth", "bvh_child", "bvh_nodeid", "bvh_aabb")
_TEXTURE_BLOCK = ("tex_type", "tex_height", "tex_width", "tex_nchannel", "tex_adr", "tex_data")
_SIZES = (  # runs of consecutive sizes in the header
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
_SIZED_ARRAYS = {  # a size, and the array whose length it is
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
_HEADER_BYTES = 400
_ALIGNMENT = 64  # of every array in MuJoCo's buffer

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Surface:
    """One mesh as it is drawn.

    The corners of F triangles index V vertices, N normals and U texture coordinates (none: U = 0).
    """

    vertices: Float32[np.ndarray, "V 3"]
    normals: Float32[np.ndarray, "N 3"]
    texture: Float32[np.ndarray, "U 2"]
    faces: Int32[np.ndarray, "F 3"]
    face_normals: Int32[np.ndarray, "F 3"]
    face_texture: Int32[np.ndarray, "F 3"]


def slim_model(model: mujoco.MjModel) -> bytes:
    """Return the bytes of an MJB file with simpler images and bit-for-bit the same physics."""
    arrays = _slim_meshes(model) | _slim_textures(model)
    return _splice(_binary(model), model, arrays)


def cluster_vertices(surface: Surface, cell: float) -> Surface:
    """Merge all vertices in a cube of edge `cell` (metres) into their mean.

    Triangles that collapse are dropped.
    """
    corner = surface.vertices.min(axis=0)
    offsets = surface.vertices - corner
    cubes = np.floor(offsets / cell).astype(np.int64)
    strides = np.array([1, 1 << 20, 1 << 40])
    _, member = np.unique(cubes @ strides, return_inverse=True)
    sizes = np.bincount(member)
    columns = surface.vertices.T
    sums = [np.bincount(member, weights=column) for column in columns]
    totals = np.stack(sums, axis=1)
    means = totals / sizes[:, None]

    corners = member[surface.faces]
    keep = _distinct_triangles(corners)
    used, faces = np.unique(corners[keep], return_inverse=True)
    normals, face_normals = _drop_unused(surface.normals, surface.face_normals[keep])
    texture, face_texture = _drop_unused(surface.texture, surface.face_texture[keep])
    return Surface(
        vertices=means[used].astype(np.float32),
        normals=normals,
        texture=texture,
        faces=faces.reshape(-1, 3).astype(np.int32),
        face_normals=face_normals,
        face_texture=face_texture,
    )


def _distinct_triangles(triangles: np.ndarray) -> Int32[np.ndarray, "K"]:
    """Return the indices of triangles with three different corners, without repetitions.

    Orientation counts, since back faces are not drawn.
    """
    a, b, c = triangles.T
    is_proper = (a != b) & (b != c) & (c != a)
    proper = np.flatnonzero(is_proper)
    # Turn each triangle so that its smallest corner comes first.
    corners = triangles[proper]
    start = corners.argmin(axis=1)[:, None]
    order = (start + np.arange(3)) % 3
    turned = np.take_along_axis(corners, order, axis=1)
    _, first = np.unique(turned, axis=0, return_index=True)
    first.sort()
    return proper[first]


def _drop_unused(rows: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop the rows that no index uses; return the rows and the renumbered indices."""
    if len(rows) == 0:
        return rows, indices
    used, renumbered = np.unique(indices, return_inverse=True)
    return rows[used], renumbered.reshape(-1, 3).astype(np.int32)


def _slim_meshes(model: mujoco.MjModel) -> Arrays:
    visual = _visual_meshes(model)
    surfaces: list[Surface] = []
    for mesh in range(model.nmesh):
        surface = _surface(model, mesh)
        if visual[mesh]:
            surface = _simplify(surface)
        surfaces.append(surface)
    counts = [len(surface.vertices) for surface in surfaces]
    return _drawn_arrays(model, surfaces) | _collision_arrays(model, visual, counts)


def _simplify(surface: Surface) -> Surface:
    extent = np.ptp(surface.vertices, axis=0)
    longest = float(extent.max())
    simpler = cluster_vertices(surface, min(CELL, longest / _MIN_CELLS))
    if 0 < len(simpler.faces) < len(surface.faces):
        return simpler
    return surface


def _visual_meshes(model: mujoco.MjModel) -> Bool[np.ndarray, "M"]:
    """Mark the meshes that no colliding geom uses."""
    collides = (model.geom_contype | model.geom_conaffinity).astype(bool)
    collides |= model.geom_group != 1
    is_mesh = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    colliding = model.geom_dataid[collides & is_mesh]
    visual = model.mesh_graphadr < 0
    visual[colliding] = False
    return visual


def _surface(model: mujoco.MjModel, mesh: int) -> Surface:
    vertices = _mesh_slice(model, "vert", mesh)
    normals = _mesh_slice(model, "normal", mesh)
    texture = _mesh_slice(model, "texcoord", mesh)
    faces = _mesh_slice(model, "face", mesh)
    return Surface(
        vertices=model.mesh_vert[vertices],
        normals=model.mesh_normal[normals],
        texture=model.mesh_texcoord[texture],
        faces=model.mesh_face[faces],
        face_normals=model.mesh_facenormal[faces],
        face_texture=model.mesh_facetexcoord[faces],
    )


def _drawn_arrays(model: mujoco.MjModel, surfaces: Sequence[Surface]) -> Arrays:
    parts = {
        "vert": [surface.vertices for surface in surfaces],
        "normal": [surface.normals for surface in surfaces],
        "texcoord": [surface.texture for surface in surfaces],
        "face": [surface.faces for surface in surfaces],
    }
    arrays: Arrays = {}
    for name, rows in parts.items():
        counts = np.array([len(part) for part in rows], dtype=np.int32)
        arrays[f"mesh_{name}"] = np.concatenate(rows)
        arrays[f"mesh_{name}adr"] = _starts(counts)
        arrays[f"mesh_{name}num"] = counts
    arrays["mesh_texcoordadr"][model.mesh_texcoordadr < 0] = -1
    face_normals = [surface.face_normals for surface in surfaces]
    face_texture = [surface.face_texture for surface in surfaces]
    arrays["mesh_facenormal"] = np.concatenate(face_normals)
    arrays["mesh_facetexcoord"] = np.concatenate(face_texture)
    return arrays


def _collision_arrays(
    model: mujoco.MjModel, visual: Bool[np.ndarray, "M"], vertices: Sequence[int]
) -> Arrays:
    """Return the convex polygons and bounding volumes, emptied for meshes that are only drawn."""
    colliding = [mesh for mesh in range(model.nmesh) if not visual[mesh]]
    polygons = _polygons(model, colliding, vertices)
    volumes = _bounding_volumes(model, colliding)
    return polygons | volumes


def _polygons(model: mujoco.MjModel, colliding: Sequence[int], vertices: Sequence[int]) -> Arrays:
    names = (
        "normal",
        "vertadr",
        "vertnum",
        "vert",
        "mapadr",
        "mapnum",
        "map",
    )
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    count = np.zeros(model.nmesh, dtype=np.int32)
    corners = 0  # polyvertadr and polymapadr count from the first mesh of the model
    for mesh in range(model.nmesh):
        if mesh in colliding:
            polygons = _mesh_polygons(model, mesh, corners)
            count[mesh] = model.mesh_polynum[mesh]
            corners += len(polygons["vert"])
        else:
            unused = np.zeros(vertices[mesh], dtype=np.int32)
            polygons = {"mapadr": unused, "mapnum": unused}
        for name, rows in polygons.items():
            parts[name].append(rows)
    arrays: Arrays = {
        "mesh_polynum": count,
        "mesh_polyadr": _starts(count),
    }
    for name, rows in parts.items():
        original = getattr(model, f"mesh_poly{name}")
        arrays[f"mesh_poly{name}"] = _concatenate(rows, original)
    return arrays


def _mesh_polygons(model: mujoco.MjModel, mesh: int, corners: int) -> Arrays:
    """Return a mesh's rows of the polygon arrays, with its corners numbered from `corners`."""
    polygon = _mesh_slice(model, "poly", mesh)
    vertex = _mesh_slice(model, "vert", mesh)
    start = model.mesh_polyvertadr[polygon][0]
    length = int(model.mesh_polyvertnum[polygon].sum())
    corner = slice(start, start + length)
    shift = corners - start
    return {
        "normal": model.mesh_polynormal[polygon],
        "vertadr": model.mesh_polyvertadr[polygon] + shift,
        "vertnum": model.mesh_polyvertnum[polygon],
        "vert": model.mesh_polyvert[corner],
        "mapadr": model.mesh_polymapadr[vertex] + shift,
        "mapnum": model.mesh_polymapnum[vertex],
        "map": model.mesh_polymap[corner],
    }


def _bounding_volumes(model: mujoco.MjModel, colliding: Sequence[int]) -> Arrays:
    """Return the nodes of bodies, followed by those of each colliding mesh.

    Children are numbered from the root of their own tree.
    """
    bodies = int(model.body_bvhnum.sum())
    meshes = list(colliding)
    count = np.zeros(model.nmesh, dtype=np.int32)
    count[meshes] = model.mesh_bvhnum[meshes]
    address = bodies + _starts(count)
    is_empty = count == 0
    address[is_empty] = -1

    rows = [slice(0, bodies)]
    rows += [_mesh_slice(model, "bvh", mesh) for mesh in meshes]
    arrays: Arrays = {
        "mesh_bvhnum": count,
        "mesh_bvhadr": address,
    }
    for name in ("bvh_depth", "bvh_child", "bvh_nodeid", "bvh_aabb"):
        original = getattr(model, name)
        arrays[name] = np.concatenate([original[part] for part in rows])
    return arrays


def _slim_textures(model: mujoco.MjModel) -> Arrays:
    images = [_shrink(_texture(model, number)) for number in range(model.ntex)]
    heights = [image.shape[0] for image in images]
    widths = [image.shape[1] for image in images]
    sizes = [image.size for image in images]
    pixels = [image.ravel() for image in images]
    return {
        "tex_height": np.array(heights, dtype=np.int32),
        "tex_width": np.array(widths, dtype=np.int32),
        "tex_adr": _starts(np.array(sizes, dtype=np.int32)),
        "tex_data": np.concatenate(pixels),
    }


def _texture(model: mujoco.MjModel, number: int) -> UInt8[np.ndarray, "H W C"]:
    shape = (
        model.tex_height[number],
        model.tex_width[number],
        model.tex_nchannel[number],
    )
    start = model.tex_adr[number]
    stop = start + int(np.prod(shape))
    return model.tex_data[start:stop].reshape(shape)


def _shrink(image: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "h w C"]:
    """Reduce a texture to a width of `TEXTURE_EDGE`; each pixel of the result is a mean.

    The six faces of a cube lie one below another and stay square.
    """
    height, width, channels = image.shape
    if width <= TEXTURE_EDGE or channels != 3:
        return image
    if height % width == 0:
        faces = height // width
        smaller = (TEXTURE_EDGE, faces * TEXTURE_EDGE)
    else:
        smaller = (TEXTURE_EDGE, max(1, height * TEXTURE_EDGE // width))
    resized = Image.fromarray(image).resize(smaller, Image.Resampling.BOX)
    return np.asarray(resized)


def _starts(counts: Int32[np.ndarray, "N"]) -> Int32[np.ndarray, "N"]:
    """Return the index at which each of several consecutive parts starts."""
    return (np.cumsum(counts) - counts).astype(np.int32)


def _mesh_slice(model: mujoco.MjModel, name: str, mesh: int) -> slice:
    """Return the rows of a mesh in the model's arrays of faces, vertices or other elements."""
    start = getattr(model, f"mesh_{name}adr")[mesh]
    count = getattr(model, f"mesh_{name}num")[mesh]
    return slice(start, start + count)


def _concatenate(parts: Sequence[np.ndarray], original: np.ndarray) -> np.ndarray:
    """Concatenate the parts to an array of the original's type; without parts it is empty."""
    if not parts:
        return original[:0]
    return np.concatenate(parts).astype(original.dtype)


def _binary(model: mujoco.MjModel) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mjb"
        mujoco.mj_saveModel(model, str(path), None)
        return path.read_bytes()


def _splice(binary: bytes, model: mujoco.MjModel, arrays: Arrays) -> bytes:
    """Replace arrays of the model in `binary`, and adapt the sizes in its header."""
    pieces: list[bytes] = []
    position = _HEADER_BYTES
    growth = 0
    for block in (_BVH_BLOCK, _MESH_BLOCK, _TEXTURE_BLOCK):
        old = [_array_bytes(getattr(model, name)) for name in block]
        start = _find_block(binary, old, position)
        pieces.append(binary[position:start])
        position = start
        for name, before in zip(block, old, strict=True):
            after = before
            if name in arrays:
                after = _array_bytes(arrays[name])
            pieces.append(after)
            position += len(before)
            growth += _padded_length(after)
            growth -= _padded_length(before)
    pieces.append(binary[position:])
    header = _resize_header(binary[:_HEADER_BYTES], model, arrays, growth)
    return header + b"".join(pieces)


def _array_bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _find_block(binary: bytes, arrays: Sequence[bytes], after: int) -> int:
    """Return the offset of the consecutive `arrays`.

    The file format has no index, so this searches for their bytes.

    Raises:
        RuntimeError: they are not in the file: MuJoCo's layout has changed.
    """
    anchor = b"".join(arrays[:2])
    start = binary.find(anchor, after)
    while start >= 0 and not _matches(binary, arrays, start):
        start = binary.find(anchor, start + 1)
    if start < 0:
        raise RuntimeError(f"MuJoCo {mujoco.__version__} has another file layout; {_LAYOUT}")
    return start


def _matches(binary: bytes, arrays: Sequence[bytes], start: int) -> bool:
    for data in arrays:
        if not binary.startswith(data, start):
            return False
        start += len(data)
    return True


def _resize_header(header: bytes, model: mujoco.MjModel, arrays: Arrays, growth: int) -> bytes:
    lengths: dict[str, int] = {}
    for size, name in _SIZED_ARRAYS.items():
        lengths[size] = len(arrays[name])
    for group in _SIZES:
        old: list[int] = [getattr(model, size) for size in group]
        new = [lengths.get(size, count) for size, count in zip(group, old, strict=True)]
        header = _replace_once(header, _int32_bytes(old), _int32_bytes(new))
    return _replace_once(
        header,
        struct.pack("<q", model.nbuffer),
        struct.pack("<q", model.nbuffer + growth),
    )


def _int32_bytes(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers)


def _replace_once(header: bytes, old: bytes, new: bytes) -> bytes:
    if header.count(old) != 1:
        raise RuntimeError(f"MuJoCo {mujoco.__version__} has another file header; {_LAYOUT}")
    return header.replace(old, new)


def _padded_length(data: bytes) -> int:
    return -(-len(data) // _ALIGNMENT) * _ALIGNMENT
