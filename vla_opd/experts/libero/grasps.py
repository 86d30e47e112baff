"""Top-down grasps for a parallel gripper, searched in the geometry alone.

An object is a union of boxes; everything else is a cloud of points. Lengths are metres.

For each of `YAWS` closing directions, all points are rotated so that the fingers close along u,
with the pads' width along v, and are rasterised to height maps. Sliding maxima over the footprints
of the fingers, the palm and the swept strip give the lowest possible height of the finger tips at
every cell. A grasp is a cell where they go low enough to have the object between the pads.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy.lib.stride_tricks import sliding_window_view

Points = Float64[np.ndarray, "N 3"]
PlanarPoint = Float64[np.ndarray, "2"]
Places = Float64[np.ndarray, "N 2"]
Heights = Float64[np.ndarray, "U V"]

YAWS = 12
FINER = 3  # a second search, after one without result, has this many times the yaws and half cells
CELL = 0.004
SPACING = 0.0025
_FACES = ((-1, 0), (-1, 1), (-1, 2), (1, 0), (1, 1), (1, 2))  # side, axis

# The Panda hand, measured on its collision meshes relative to the finger tips: u is the closing
# direction, v runs across the pads.
SITE_ABOVE_TIP = 0.009
OPENING = 0.079
PAD_HALF_WIDTH = 0.008
PAD_FROM = 0.0045
PAD_TO = 0.0205
FINGER_INNER = 0.0385
FINGER_OUTER = 0.055
FINGER_HALF_WIDTH = 0.0105
FINGER_MIDDLE = (FINGER_INNER + FINGER_OUTER) / 2
FINGER_HALF_THICKNESS = (FINGER_OUTER - FINGER_INNER) / 2
PALM_ABOVE_TIP = 0.038
PALM_HALF_LENGTH = 0.102
PALM_HALF_WIDTH = 0.022

CLEARANCE = 0.003  # between the hand and whatever it passes
OVERLAP = 0.002  # least vertical overlap of the pads with the object
FIRM = 0.007  # overlap above which more is no better
FLAT = 0.0026  # largest deviation of a contact surface over the width of the pad
WEDGE = 0.002  # largest growth of the object, per side, toward the pads' lower edge
OFF_CENTRE = 0.006  # largest distance between the middle of the contacts and that of the hand
ROOMY = 0.045  # largest width that the open fingers easily get around
REACH = 0.70  # horizontal distance from the base beyond which the arm gets straight
UPWARD = 0.02  # least z of the normal of a face that can be seen from above


@dataclass(frozen=True)
class Boxes:
    """N boxes.

    centres:   in the world.
    rotations: the columns are the boxes' axes in the world.
    halves:    half extents along these axes.
    """

    centres: Float64[np.ndarray, "N 3"]
    rotations: Float64[np.ndarray, "N 3 3"]
    halves: Float64[np.ndarray, "N 3"]

    def corners(self) -> Points:
        """Return the 8N corners."""
        ends = [-1.0, 1.0]
        grid = np.meshgrid(ends, ends, ends)
        signs = np.stack(grid, -1)
        signs = signs.reshape(8, 1, 3)
        local = signs * self.halves
        rotated = np.einsum("nij,cnj->cni", self.rotations, local)
        corners = rotated + self.centres
        return corners.reshape(-1, 3)

    def surface(self, spacing: float) -> Points:
        """Sample all six faces of every box, at most `spacing` apart along the faces' edges."""
        return self._sample_faces(spacing, -np.inf)

    def roof(self, spacing: float) -> Points:
        """Sample, as `surface` does, only the faces seen from above, which make the height map."""
        return self._sample_faces(spacing, UPWARD)

    def _sample_faces(self, spacing: float, upward: float) -> Points:
        clouds = [np.empty((0, 3))]
        boxes = zip(self.centres, self.rotations, self.halves, strict=True)
        for centre, rotation, halves in boxes:
            edges = [_sample_edge(half, spacing) for half in halves]
            vertical = rotation[2]
            for side, axis in _FACES:
                elevation = side * vertical[axis]
                if elevation > upward:
                    face = _face_points(edges, axis, side)
                    cloud = face @ rotation.T + centre
                    clouds.append(cloud)
        return np.concatenate(clouds)


@dataclass(frozen=True)
class Grasp:
    """A pose of the grip site for closing the fingers.

    yaw:     direction of the closing axis, modulo pi.
    width:   distance between the pads once they touch the object.
    overlap: part of the object's height between the edges of the pads.
    cost:    the lower, the better.
    """

    position: Float64[np.ndarray, "3"]
    yaw: float
    width: float
    overlap: float
    cost: float


@dataclass(frozen=True)
class GraspTask:
    """An object to grasp, and its surroundings.

    target:    surface points of the object.
    obstacles: surface points of everything else near it.
    floor:     height of the plane below both.
    centre:    horizontal position of the object's centre of mass.
    base:      horizontal position of the robot's base.
    yaw:       current closing direction of the hand; grasps with a similar yaw are preferred.
    avoid:     grasps that have failed: similar ones cost more.
    """

    target: Points
    obstacles: Points
    floor: float
    centre: PlanarPoint
    base: PlanarPoint
    yaw: float
    avoid: tuple[Grasp, ...] = ()


@dataclass(frozen=True)
class HeightMap:
    """Greatest height over every cell; `origin` is the corner of cell (0, 0)."""

    origin: PlanarPoint
    cell: float
    heights: Heights

    def cells(self, places: Places) -> Int64[np.ndarray, "N 2"]:
        """Return the cells that contain the places; some may lie beyond the map."""
        offsets = places - self.origin
        return np.floor(offsets / self.cell).astype(int)

    def dilate(self, half_u: float, half_v: float) -> Heights:
        """Return the maximum over a rectangle of these half sizes around every cell.

        Cells beyond the map count as empty.
        """
        reach_u = int(np.ceil(half_u / self.cell))
        reach_v = int(np.ceil(half_v / self.cell))
        along_u = _sliding_max(self.heights, reach_u)
        transposed = _sliding_max(along_u.T, reach_v)
        return transposed.T


def height_map(points: Points, low: PlanarPoint, high: PlanarPoint, cell: float) -> HeightMap:
    """Rasterise the points whose first two coordinates lie in [low, high).

    Empty cells have height minus infinity.
    """
    extent = high - low
    shape = np.ceil(extent / cell).astype(int)
    heights = np.full(shape, -np.inf)
    ground = HeightMap(
        low,
        cell,
        heights,
    )
    cells = ground.cells(points[:, :2])
    is_valid = (cells >= 0) & (cells < shape)
    is_inside = is_valid.all(axis=1)
    cells = cells[is_inside]
    tops = points[is_inside, 2]
    np.maximum.at(heights, tuple(cells.T), tops)
    return ground


def find_grasp(task: GraspTask) -> Grasp | None:
    """Return the cheapest grasp whose contacts hold, or None.

    The search is deterministic: ties go to the first candidate.

    Cells widen every obstacle by up to their own size. Where that leaves no room beside a
    neighbour, a finer search may still find a grasp.
    """
    grasp = _search(task, YAWS, CELL)
    if grasp is None:
        grasp = _search(task, FINER * YAWS, CELL / 2)
    return grasp


def _search(task: GraspTask, yaws: int, cell: float) -> Grasp | None:
    """Return the cheapest grasp over all yaws.

    Contacts are examined in the order of the cost without them, until no remaining candidate can be
    cheaper than the best grasp.
    """
    frames: list[_Frame] = []
    for number in range(yaws):
        yaw = task.yaw + number * np.pi / yaws
        frame = _Frame.from_task(task, yaw, cell)
        frames.append(frame)
    proposals = [frame.proposals(task) for frame in frames]
    counts = [len(rows) for rows in proposals]
    frame_numbers = np.repeat(np.arange(yaws), counts)
    table = np.concatenate(proposals)
    order = np.argsort(table[:, 3], kind="stable")
    best: Grasp | None = None
    for row in order:
        u, v, tip, cost = map(float, table[row])
        if best is not None and cost >= best.cost:
            break
        number = frame_numbers[row]
        frame = frames[number]
        grasp = frame.close_at(u, v, tip, cost)
        if grasp is None:
            continue
        if best is None or grasp.cost < best.cost:
            best = grasp
    return best


def lowest_tip(points: Points, position: PlanarPoint, yaw: float) -> float:
    """Return the lowest height of the open hand's tips at which it touches none of the points."""
    local = _rotate(points, yaw)
    local[:, :2] -= _rotate_point(position, yaw)
    u = np.abs(local[:, 0])
    v = np.abs(local[:, 1])
    z = local[:, 2]
    is_below_finger = (
        (u > FINGER_INNER - CLEARANCE)
        & (u < FINGER_OUTER + CLEARANCE)
        & (v < FINGER_HALF_WIDTH + CLEARANCE)
    )
    is_below_palm = (u < PALM_HALF_LENGTH) & (v < PALM_HALF_WIDTH)
    finger = np.max(
        z,
        where=is_below_finger,
        initial=-np.inf,
    )
    palm = np.max(
        z,
        where=is_below_palm,
        initial=-np.inf,
    )
    tip = float(max(finger, palm - PALM_ABOVE_TIP))
    return tip + CLEARANCE


def yaw_difference(yaw: float, reference: float) -> float:
    """Return the rotation from one closing direction to another, in [-pi/2, pi/2).

    A gripper is symmetric under half a turn.
    """
    shifted = yaw - reference + np.pi / 2
    return float(shifted % np.pi - np.pi / 2)


def distances(places: Places, point: PlanarPoint) -> Float64[np.ndarray, "N"]:
    """Return the Euclidean distance of each place from a point."""
    return np.linalg.norm(places - point, axis=1)


def skyline(points: Points, cell: float) -> Points:
    """Return the highest point of every cell, moved to the cell's middle.

    Where only heights matter, these few points replace all others.
    """
    if len(points) == 0:
        return points
    places = points[:, :2]
    first_cell = np.floor(places.min(axis=0) / cell)
    ground = height_map(
        points,
        low=first_cell * cell,
        high=places.max(axis=0) + cell,
        cell=cell,
    )
    is_filled = np.isfinite(ground.heights)
    cells = np.argwhere(is_filled)
    offsets = (cells + 0.5) * cell
    return np.column_stack(
        [
            ground.origin + offsets,
            ground.heights[is_filled],
        ]
    )


@dataclass(frozen=True)
class _Contact:
    """Where the closed pads touch the object: `shift` is the middle of both contacts along u."""

    width: float
    shift: float
    overlap: float


@dataclass(frozen=True)
class _Frame:
    """The task, rotated so that the fingers close along the first axis."""

    yaw: float
    cell: float
    target: Points
    obstacles: Points

    @classmethod
    def from_task(cls, task: GraspTask, yaw: float, cell: float) -> "_Frame":
        target = _rotate(task.target, yaw)
        obstacles = _rotate(task.obstacles, yaw)
        return cls(
            yaw,
            cell,
            target,
            obstacles,
        )

    def close_at(self, u: float, v: float, tip: float, cost: float) -> Grasp | None:
        """Return the grasp that closing at a cell makes, centred between its contacts.

        A wide object, which leaves little room for error, costs more.
        """
        contact = _contact(self.target, u, v, tip)
        if contact is None:
            return None
        centre = np.array([u + contact.shift, v])
        x, y = _rotate_point(centre, -self.yaw)
        excess = max(0.0, contact.width - ROOMY)
        return Grasp(
            position=np.array([x, y, tip + SITE_ABOVE_TIP]),
            yaw=self.yaw,
            width=contact.width,
            overlap=contact.overlap,
            cost=cost + excess / 0.005,
        )

    def proposals(self, task: GraspTask) -> Float64[np.ndarray, "M 4"]:
        """Return (u, v, tip height, cost) of every cell where the open hand fits the object."""
        centre = _rotate_point(task.centre, self.yaw)
        tips, tops = self._tips_and_tops(task, centre)
        room = tops - tips
        cells = np.argwhere(room > PAD_FROM + OVERLAP)
        middle = np.array(tips.shape) // 2
        offsets = (cells - middle) * self.cell
        places = centre + offsets

        index = tuple(cells.T)
        missing = FIRM + PAD_FROM - room[index]
        shallow = np.maximum(missing, 0.0)
        costs = self._costs(task, places, centre)
        costs += shallow / 0.001
        return np.column_stack(
            [
                places,
                tips[index],
                costs,
            ]
        )

    def _tips_and_tops(self, task: GraspTask, centre: PlanarPoint) -> tuple[Heights, Heights]:
        """Return the lowest height of the tips and the object's height between them, per cell.

        The centre is the middle cell.
        """
        cell = self.cell
        offsets = self.target[:, :2] - centre
        reach = np.abs(offsets).max(axis=0)
        extent = reach + PALM_HALF_LENGTH
        cells = np.ceil(extent / cell)
        half = (cells + 0.5) * cell
        low = centre - half
        high = centre + half
        points = np.concatenate(
            [
                self.target,
                self.obstacles,
            ]
        )
        scene = height_map(points, low, high, cell)
        neighbours = height_map(self.obstacles, low, high, cell)
        target = height_map(self.target, low, high, cell)

        fingers = _finger_heights(scene)
        palm = scene.dilate(
            PALM_HALF_LENGTH,
            PALM_HALF_WIDTH,
        )
        strip = neighbours.dilate(
            FINGER_OUTER,
            FINGER_HALF_WIDTH,
        )
        hand = np.maximum(fingers, palm - PALM_ABOVE_TIP)
        ground = np.maximum(strip, task.floor)
        tips = np.maximum(hand, ground) + CLEARANCE
        tops = target.dilate(
            FINGER_INNER - cell,
            PAD_HALF_WIDTH - cell,
        )
        return tips, tops

    def _costs(
        self, task: GraspTask, places: Places, centre: PlanarPoint
    ) -> Float64[np.ndarray, "N"]:
        world = _rotate_places(places, -self.yaw)
        eccentricity = distances(places, centre)
        distance = distances(world, task.base)
        beyond = np.maximum(distance - REACH, 0.0)
        turn = abs(yaw_difference(self.yaw, task.yaw))
        # Of two equally good sides of a bowl, always take the same one: a demonstrator that flips a
        # coin can't be imitated. The left side has more room on LIBERO's tables.
        side = task.centre[1] - world[:, 1]
        costs = (
            eccentricity / 0.02  # 2 cm off the centre of mass cost 1
            + beyond / 0.02  # 2 cm beyond the reach cost 1
            + 2.0 * (turn / (np.pi / 2))  # a right angle costs 2
            + 4.0 * side
        )
        for failed in task.avoid:
            turn = abs(yaw_difference(self.yaw, failed.yaw))
            if turn < 0.4:
                distance = distances(world, failed.position[:2])
                is_similar = distance < 0.012
                costs = np.where(is_similar, costs + 10.0, costs)
        return costs


def _finger_heights(scene: HeightMap) -> Heights:
    """Return the greatest height below either finger of the open hand at every cell."""
    finger = scene.dilate(
        FINGER_HALF_THICKNESS + CLEARANCE,
        FINGER_HALF_WIDTH + CLEARANCE / 2,
    )
    shift = round(FINGER_MIDDLE / scene.cell)
    return np.maximum(
        _shift_rows(finger, shift),
        _shift_rows(finger, -shift),
    )


def _contact(target: Points, u: float, v: float, tip: float) -> _Contact | None:
    """Return the contact of the closing pads with the object.

    None unless both surfaces are flat over the pads' width and don't squeeze the object out.
    """
    local = target - np.array([u, v, tip])
    local = local[_is_between_pads(local)]
    if len(local) < 6:
        return None
    du, dv, dz = local.T
    low, high = _extremes(
        du,
        keys=dv,
        start=-PAD_HALF_WIDTH,
        stop=PAD_HALF_WIDTH,
        bins=5,
    )
    is_touched = np.isfinite(low)
    if is_touched.sum() < 3 or not is_touched[2]:
        return None
    low = low[is_touched]
    high = high[is_touched]
    if np.ptp(low) > FLAT or np.ptp(high) > FLAT or _is_wedge(du, dz):
        return None
    left_edge = low.min()
    right_edge = high.max()
    shift = (left_edge + right_edge) / 2
    if abs(shift) >= OFF_CENTRE:
        return None
    return _Contact(
        width=float(right_edge - left_edge),
        shift=float(shift),
        overlap=float(dz.max() - PAD_FROM),
    )


def _is_between_pads(local: Points) -> Bool[np.ndarray, "N"]:
    """Mark the points between the open pads; the points are relative to the middle of the tips."""
    du, dv, dz = local.T
    return (
        (np.abs(du) < OPENING / 2 - 0.0015)
        & (np.abs(dv) <= PAD_HALF_WIDTH)
        & (dz > PAD_FROM)
        & (dz < PAD_TO)
    )


def _is_wedge(du: Float64[np.ndarray, "M"], dz: Float64[np.ndarray, "M"]) -> bool:
    """Return True if the object widens downward, so that only the pads' lower edges touch it."""
    low, high = _extremes(
        du,
        keys=dz,
        start=PAD_FROM,
        stop=PAD_TO,
        bins=4,
    )
    upper_low = low[1:]
    upper_high = high[1:]
    left_growth = upper_low.min() - low[0]
    right_growth = high[0] - upper_high.max()
    growth = min(left_growth, right_growth)  # an inclined wall recedes on one side only
    is_filled = np.isfinite(upper_low)
    return bool(is_filled.any() and growth > WEDGE)


def _extremes(
    values: Float64[np.ndarray, "M"],
    keys: Float64[np.ndarray, "M"],
    start: float,
    stop: float,
    bins: int,
) -> tuple[Float64[np.ndarray, "K"], Float64[np.ndarray, "K"]]:
    """Return the minimum and the maximum of the values in each of `bins` equal bins of their keys.

    An empty bin has (inf, -inf).
    """
    extent = stop - start
    offsets = keys - start
    position = offsets / extent * bins
    numbers = position.astype(int)
    index = np.clip(numbers, 0, bins - 1)
    low = np.full(bins, np.inf)
    high = -low
    np.minimum.at(low, index, values)
    np.maximum.at(high, index, values)
    return low, high


def _rotate(points: Points, yaw: float) -> Points:
    """Express the points in a frame whose first axis has direction `yaw` and whose third is up."""
    c = np.cos(yaw)
    s = np.sin(yaw)
    rotation = np.array(
        [
            [c, -s, 0.0],
            [s, c, 0.0],
            [0.0, 0.0, 1.0],
        ]
    )
    return points @ rotation


def _rotate_places(places: Places, yaw: float) -> Places:
    """Express points of the plane as `_rotate` does."""
    zeros = np.zeros(len(places))
    points = np.column_stack([places, zeros])
    return _rotate(points, yaw)[:, :2]


def _rotate_point(point: PlanarPoint, yaw: float) -> PlanarPoint:
    """Express one point of the plane as `_rotate` does."""
    (rotated,) = _rotate_places(point[None], yaw)
    return rotated


def _sliding_max(array: Heights, reach: int) -> Heights:
    """Return the maximum over the `2 reach + 1` rows around each row."""
    columns = array.shape[1]
    padding = np.full((reach, columns), -np.inf)
    padded = np.concatenate([padding, array, padding])
    width = 2 * reach + 1
    windows = sliding_window_view(padded, width, axis=0)
    return windows.max(axis=-1)


def _shift_rows(heights: Heights, shift: int) -> Heights:
    """Return row i + shift at row i; rows beyond the map are empty."""
    if shift == 0:
        return heights
    shifted = np.full_like(heights, -np.inf)
    if shift > 0:
        shifted[:-shift] = heights[shift:]
    else:
        shifted[-shift:] = heights[:shift]
    return shifted


def _sample_edge(half: float, spacing: float) -> Float64[np.ndarray, "K"]:
    """Return evenly spaced coordinates from `-half` to `half`, both included."""
    intervals = int(np.ceil(2 * half / spacing))
    count = max(2, intervals + 1)
    return np.linspace(-half, half, count)


def _face_points(edges: list[Float64[np.ndarray, "K"]], axis: int, side: int) -> Points:
    """Return the grid of the edges' coordinates on the face at one end of an axis."""
    coordinates = list(edges)
    end = edges[axis][-1]
    coordinates[axis] = np.array([side * end])
    grid = np.meshgrid(*coordinates, indexing="ij")
    points = np.stack(grid, -1)
    return points.reshape(-1, 3)
