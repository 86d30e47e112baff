"""Top-down grasps for a parallel gripper, found in the geometry alone: an object is a union of boxes, everything else is a cloud of points.

For each of `YAWS` directions in which the fingers could close, all points are turned so that the fingers close along u, with the pads' width
along v, and are rasterised to height maps. Sliding maxima over the footprints of the fingers, of the palm and of the swept strip then say how
low the finger tips can go at every cell; a grasp is a cell where they go low enough to have the object between the pads. Lengths are metres.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

Points = Float64[np.ndarray, "N 3"]

YAWS = 12
FINER = 3  # how many times as many directions, and half the cells' size, where the first search finds nothing
_FACES = tuple((side, axis) for side in (-1, 1) for axis in range(3))
CELL = 0.004
SPACING = 0.0025

# The Panda hand, measured on its collision meshes, relative to the finger tips (u: closing direction, v: across the pads).
SITE_ABOVE_TIP = 0.009
OPENING = 0.079
PAD_HALF_WIDTH = 0.008
PAD_FROM, PAD_TO = 0.0045, 0.0205
FINGER_INNER, FINGER_OUTER, FINGER_HALF_WIDTH = 0.0385, 0.055, 0.0105
PALM_ABOVE_TIP, PALM_HALF_LENGTH, PALM_HALF_WIDTH = 0.038, 0.102, 0.022

CLEARANCE = 0.003  # kept between the hand and whatever it passes
OVERLAP = 0.002  # of the pads with the object, vertically, at least
FIRM = 0.007  # overlap from which more is no better
FLAT = 0.0026  # how far a contact surface may deviate over the width of the pad
WEDGE = 0.002  # how much further out, on both sides, the object may be at the pads' lower edge than above, before it is squeezed out
OFF_CENTRE = 0.006  # how far the middle of the contacts may be from the middle of the hand
ROOMY = 0.045  # width up to which an object is easy to get the open fingers around
REACH = 0.70  # horizontal distance from the base beyond which the arm gets straight


@dataclass(frozen=True)
class Boxes:
    """N boxes: centres (world), rotations (columns are the boxes' axes in the world) and half extents."""

    centres: Float64[np.ndarray, "N 3"]
    rotations: Float64[np.ndarray, "N 3 3"]
    halves: Float64[np.ndarray, "N 3"]

    def corners(self) -> Points:
        """The 8N corners."""
        signs = np.stack(np.meshgrid([-1.0, 1.0], [-1.0, 1.0], [-1.0, 1.0]), -1).reshape(8, 1, 3)
        local = signs * self.halves
        return (np.einsum("nij,cnj->cni", self.rotations, local) + self.centres).reshape(-1, 3)

    def surface(self, spacing: float) -> Points:
        """Points on all six faces of every box, at most `spacing` apart along the faces' edges."""
        return self._sampled(spacing, -np.inf)

    def roof(self, spacing: float) -> Points:
        """As `surface`, but only the faces that can be seen from above: all that a height map needs."""
        return self._sampled(spacing, 0.02)

    def _sampled(self, spacing: float, upward: float) -> Points:
        clouds = [np.empty((0, 3))]
        for centre, rotation, half in zip(self.centres, self.rotations, self.halves, strict=True):
            axes = [np.linspace(-h, h, max(2, int(np.ceil(2 * h / spacing)) + 1)) for h in half]
            clouds += [
                _face(axes, axis, side) @ rotation.T + centre
                for side, axis in _FACES
                if side * rotation[2, axis] > upward
            ]
        return np.concatenate(clouds)


@dataclass(frozen=True)
class Grasp:
    """A pose of the grip site for closing the fingers: `yaw` is the direction of the closing axis, modulo pi. The lower `cost`, the better.

    `overlap` is how much of the object's height lies between the pads' edges, `width` how far apart the pads are once they touch it.
    """

    position: Float64[np.ndarray, "3"]
    yaw: float
    width: float
    overlap: float
    cost: float


@dataclass(frozen=True)
class Task:
    """What to grasp, and from where.

    target:    surface points of the object.
    obstacles: surface points of all else near it.
    floor:     height of the plane below both.
    centre:    horizontal position of the object's centre of mass.
    base:      horizontal position of the robot's base.
    yaw:       the closing direction of the hand now; grasps near it are preferred.
    avoid:     grasps that have failed: nothing close to them is proposed.
    """

    target: Points
    obstacles: Points
    floor: float
    centre: Float64[np.ndarray, "2"]
    base: Float64[np.ndarray, "2"]
    yaw: float
    avoid: tuple[Grasp, ...] = ()


@dataclass(frozen=True)
class HeightMap:
    """Greatest height over every cell; `origin` is the corner of cell (0, 0)."""

    origin: Float64[np.ndarray, "2"]
    cell: float
    heights: Float64[np.ndarray, "U V"]

    def widened(
        self, half_u: float, half_v: float, offset_u: float = 0.0
    ) -> Float64[np.ndarray, "U V"]:
        """Maximum over the rectangle of these half sizes whose centre is `offset_u` along u away; cells beyond the map count as empty."""
        reach_u, reach_v = (int(np.ceil(half / self.cell)) for half in (half_u, half_v))
        wide = _sliding_max(_sliding_max(self.heights, reach_u).T, reach_v).T
        shift = round(offset_u / self.cell)
        moved = np.full_like(wide, -np.inf)
        source, goal = (
            (slice(shift, None), slice(None, -shift or None))
            if shift >= 0
            else (slice(None, shift), slice(-shift, None))
        )
        moved[goal] = wide[source]
        return moved


def height_map(
    points: Points, low: Float64[np.ndarray, "2"], high: Float64[np.ndarray, "2"], cell: float
) -> HeightMap:
    """Rasterise the points whose first two coordinates lie in [low, high); empty cells are at minus infinity."""
    shape = np.ceil((high - low) / cell).astype(int)
    heights = np.full(shape, -np.inf)
    index = np.floor((points[:, :2] - low) / cell).astype(int)
    inside = np.all((index >= 0) & (index < shape), axis=1)
    np.maximum.at(heights, tuple(index[inside].T), points[inside, 2])
    return HeightMap(low, cell, heights)


def best(task: Task) -> Grasp | None:
    """The cheapest grasp whose contacts hold, or None. Deterministic: ties go to the candidate that comes first.

    Cells widen every obstacle by up to their own size: where that leaves no room beside a neighbour, a finer search may find some.
    """
    return _search(task, YAWS, CELL) or _search(task, FINER * YAWS, CELL / 2)


def _search(task: Task, yaws: int, cell: float) -> Grasp | None:
    """Contacts are looked at in the order of the cost without them, until no candidate left can be cheaper than the best found."""
    frames = [_Frame.of(task, task.yaw + k * np.pi / yaws, cell) for k in range(yaws)]
    proposals = [frame.proposals(task) for frame in frames]
    owner = np.repeat(np.arange(yaws), [len(p) for p in proposals])
    table = np.concatenate(proposals)
    found: Grasp | None = None
    for row in np.argsort(table[:, 3], kind="stable"):
        if found is not None and table[row, 3] >= found.cost:
            break
        grasp = frames[owner[row]].closed(*map(float, table[row]))
        if grasp is not None and (found is None or grasp.cost < found.cost):
            found = grasp
    return found


def lowest_tip(points: Points, position: Float64[np.ndarray, "2"], yaw: float) -> float:
    """How low the tips of the open hand may go at a horizontal position without touching any of the points."""
    local = _turned(points, yaw)
    local[:, :2] -= _turned(np.array([[*position, 0.0]]), yaw)[0, :2]
    u, v, z = np.abs(local[:, 0]), np.abs(local[:, 1]), local[:, 2]
    finger = (
        (u > FINGER_INNER - CLEARANCE)
        & (u < FINGER_OUTER + CLEARANCE)
        & (v < FINGER_HALF_WIDTH + CLEARANCE)
    )
    palm = (u < PALM_HALF_LENGTH) & (v < PALM_HALF_WIDTH)
    return (
        float(
            max(
                np.max(z, where=finger, initial=-np.inf),
                np.max(z, where=palm, initial=-np.inf) - PALM_ABOVE_TIP,
            )
        )
        + CLEARANCE
    )


def angle(yaw: float, reference: float) -> float:
    """The rotation from one closing direction to another, in [-pi/2, pi/2): a gripper is symmetric under half a turn."""
    return float((yaw - reference + np.pi / 2) % np.pi - np.pi / 2)


def skyline(points: Points, cell: float) -> Points:
    """The highest point of every cell, moved to the cell's middle: as good as all points where only heights matter, and far fewer."""
    if len(points) == 0:
        return points
    low = np.floor(points[:, :2].min(axis=0) / cell) * cell
    ground = height_map(points, low, points[:, :2].max(axis=0) + cell, cell)
    filled = np.argwhere(np.isfinite(ground.heights))
    return np.column_stack([low + (filled + 0.5) * cell, ground.heights[tuple(filled.T)]])


@dataclass(frozen=True)
class _Contact:
    width: float
    shift: float
    overlap: float


@dataclass(frozen=True)
class _Frame:
    """The task turned so that the fingers close along the first axis."""

    yaw: float
    cell: float
    target: Points
    obstacles: Points

    @classmethod
    def of(cls, task: Task, yaw: float, cell: float) -> "_Frame":
        return cls(yaw, cell, _turned(task.target, yaw), _turned(task.obstacles, yaw))

    def closed(self, u: float, v: float, tip: float, cost: float) -> Grasp | None:
        """The grasp that closing there makes, centred on what the pads meet; a wide object, which leaves little room for error, costs more."""
        contact = _contact(self.target, u, v, tip)
        if contact is None:
            return None
        x, y = _turned(np.array([[u + contact.shift, v, 0.0]]), -self.yaw)[0, :2]
        tight = max(0.0, contact.width - ROOMY) / 0.005
        return Grasp(
            np.array([x, y, tip + SITE_ABOVE_TIP]),
            self.yaw,
            contact.width,
            contact.overlap,
            cost + tight,
        )

    def proposals(self, task: Task) -> Float64[np.ndarray, "M 4"]:
        """(u, v, height of the tips, cost) of every cell where the open hand fits around the object."""
        centre = _turned(np.array([[*task.centre, 0.0]]), self.yaw)[0, :2]
        tips, tops = self._rooms(task, centre)
        cells = np.argwhere(tops - tips > PAD_FROM + OVERLAP)
        tip = tips[tuple(cells.T)]
        size = np.array(tips.shape) // 2
        places = centre + (cells - size) * self.cell
        shallow = np.maximum(FIRM + PAD_FROM - (tops - tips)[tuple(cells.T)], 0.0) / 0.001
        return np.column_stack([places, tip, self._costs(task, places, centre) + shallow])

    def _rooms(
        self, task: Task, centre: Float64[np.ndarray, "2"]
    ) -> tuple[Float64[np.ndarray, "U V"], Float64[np.ndarray, "U V"]]:
        """For every cell: how low the tips can go, and how high the object reaches between the fingers there. The centre is the middle cell."""
        extent = np.abs(self.target[:, :2] - centre).max(axis=0) + PALM_HALF_LENGTH
        half = (np.ceil(extent / self.cell) + 0.5) * self.cell
        both = height_map(
            np.concatenate([self.target, self.obstacles]), centre - half, centre + half, self.cell
        )
        near = height_map(self.obstacles, centre - half, centre + half, self.cell)
        own = height_map(self.target, centre - half, centre + half, self.cell)
        middle, thick = (FINGER_INNER + FINGER_OUTER) / 2, (FINGER_OUTER - FINGER_INNER) / 2
        finger = both.widened(thick + CLEARANCE, FINGER_HALF_WIDTH + CLEARANCE / 2)
        fingers = np.maximum(_moved(finger, middle, self.cell), _moved(finger, -middle, self.cell))
        palm = both.widened(PALM_HALF_LENGTH, PALM_HALF_WIDTH) - PALM_ABOVE_TIP
        strip = near.widened(FINGER_OUTER, FINGER_HALF_WIDTH)
        tips = np.maximum(np.maximum(fingers, palm), np.maximum(strip, task.floor)) + CLEARANCE
        return tips, own.widened(FINGER_INNER - self.cell, PAD_HALF_WIDTH - self.cell)

    def _costs(
        self, task: Task, places: Float64[np.ndarray, "M 2"], centre: Float64[np.ndarray, "2"]
    ) -> Float64[np.ndarray, "M"]:
        """Two centimetres off the centre of mass, two beyond the reach and a right angle of yaw cost 1, 1 and 2."""
        flat = np.column_stack([places, np.zeros(len(places))])
        world = _turned(flat, -self.yaw)[:, :2]
        beyond = np.maximum(np.linalg.norm(world - task.base, axis=1) - REACH, 0.0)
        turn = abs(angle(self.yaw, task.yaw)) / (np.pi / 2)
        # Of two equally good sides of a bowl, always the same one: a demonstrator that flips a coin can't be imitated. The left one, as the tables
        # of LIBERO leave more room there.
        side = 4.0 * (task.centre[1] - world[:, 1])
        cost = np.linalg.norm(places - centre, axis=1) / 0.02 + beyond / 0.02 + 2.0 * turn + side
        for failed in task.avoid:
            close = np.linalg.norm(world - failed.position[:2], axis=1) < 0.012
            cost = np.where(close & (abs(angle(self.yaw, failed.yaw)) < 0.4), cost + 10.0, cost)
        return cost


def _moved(
    heights: Float64[np.ndarray, "U V"], offset: float, cell: float
) -> Float64[np.ndarray, "U V"]:
    return HeightMap(np.zeros(2), cell, heights).widened(0.0, 0.0, offset)


def _contact(target: Points, u: float, v: float, tip: float) -> _Contact | None:
    """What the closing pads meet, or None unless both surfaces are flat over the pad's width and don't squeeze the object out."""
    du, dv, dz = target[:, 0] - u, target[:, 1] - v, target[:, 2] - tip
    between = (
        (np.abs(du) < OPENING / 2 - 0.0015)
        & (np.abs(dv) <= PAD_HALF_WIDTH)
        & (dz > PAD_FROM)
        & (dz < PAD_TO)
    )
    if between.sum() < 6:
        return None
    du, dv, dz = du[between], dv[between], dz[between]
    low, high = _extremes(du, dv, -PAD_HALF_WIDTH, PAD_HALF_WIDTH, 5)
    touched = np.isfinite(low)
    if (
        touched.sum() < 3
        or not touched[2]
        or np.ptp(low[touched]) > FLAT
        or np.ptp(high[touched]) > FLAT
    ):
        return None
    if _is_wedge(du, dz):
        return None
    left, right = low[touched].min(), high[touched].max()
    shift = (left + right) / 2
    return (
        _Contact(float(right - left), float(shift), float(dz.max() - PAD_FROM))
        if abs(shift) < OFF_CENTRE
        else None
    )


def _is_wedge(du: Float64[np.ndarray, "M"], dz: Float64[np.ndarray, "M"]) -> bool:
    """Whether the object widens downward between the pads, so that only their lower edges touch it."""
    low, high = _extremes(du, dz, PAD_FROM, PAD_TO, 4)
    spread = min(
        low[1:].min() - low[0], high[0] - high[1:].max()
    )  # an inclined wall recedes on one side only
    return bool(np.isfinite(low[1:]).any() and spread > WEDGE)


def _extremes(
    values: Float64[np.ndarray, "M"],
    keys: Float64[np.ndarray, "M"],
    start: float,
    stop: float,
    bins: int,
) -> tuple[Float64[np.ndarray, "K"], Float64[np.ndarray, "K"]]:
    """Minimum and maximum of the values in each of `bins` equal bins of their keys; (inf, -inf) for an empty bin."""
    index = np.clip(((keys - start) / (stop - start) * bins).astype(int), 0, bins - 1)
    low, high = np.full(bins, np.inf), np.full(bins, -np.inf)
    np.minimum.at(low, index, values)
    np.maximum.at(high, index, values)
    return low, high


def _turned(points: Points, yaw: float) -> Points:
    """The points in a frame whose first axis has direction `yaw` and whose third is up."""
    c, s = np.cos(yaw), np.sin(yaw)
    return points @ np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _sliding_max(array: Float64[np.ndarray, "U V"], reach: int) -> Float64[np.ndarray, "U V"]:
    """Maximum over the `2 reach + 1` rows around each row."""
    padding = np.full((reach, array.shape[1]), -np.inf)
    padded = np.concatenate([padding, array, padding])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=0)
    return windows.max(axis=-1)


def _face(axes: list[Float64[np.ndarray, "K"]], axis: int, side: int) -> Points:
    flat = [np.array([side * axes[k][-1]]) if k == axis else axes[k] for k in range(3)]
    return np.stack(np.meshgrid(*flat, indexing="ij"), -1).reshape(-1, 3)
