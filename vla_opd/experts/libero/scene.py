"""The simulator's state as the scripted expert for LIBERO reads it.

Hand, boxes of objects, obstacles, and the benchmark's own predicates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float64, Int

from vla_opd.experts.libero import grasps
from vla_opd.experts.libero.grasps import Boxes, PlanarPoint, Points

Vector = Float64[np.ndarray, "3"]
Geoms = Int[np.ndarray, "N"]

FINE = 0.004  # spacing of the points on obstacles near the object
COARSE = 0.01  # the same for obstacles far from it
FINE_RADIUS = 0.22  # radius around the object within which obstacles are sampled finely
FINGER_JOINTS = ("gripper0_finger_joint1", "gripper0_finger_joint2")
UPRIGHT = 0.99  # cosine of a face's tilt up to which it counts as horizontal
LARGE = 0.3  # half width above which a horizontal box counts as a table


class PrivilegedEnv(Protocol):
    """The part of `LiberoEnv` that the expert reads.

    MuJoCo's model and data, and LIBERO's own problem (untyped upstream).
    """

    model: Any
    data: Any
    problem: Any


@dataclass(frozen=True)
class Goal:
    """One predicate of a task: `item` is to be `on` or `in` (the `relation`) a `place`."""

    relation: str
    item: str
    place: str


@dataclass(frozen=True)
class Hand:
    """The current pose of the gripper.

    rotation: its columns are the closing direction, the direction across the pads, and down.
    width:    distance between the fingers.
    """

    position: Vector
    rotation: Float64[np.ndarray, "3 3"]
    width: float

    @property
    def planar(self) -> PlanarPoint:
        """Horizontal position."""
        return self.position[:2]

    @property
    def height(self) -> float:
        """Vertical position."""
        return self.position[2]

    @property
    def yaw(self) -> float:
        """Direction of the closing axis in the plane."""
        x, y, _ = self.rotation[:, 0]
        return float(np.arctan2(y, x))


class Scene:
    """Privileged reading of the simulator."""

    def __init__(self, env: PrivilegedEnv) -> None:
        self._env = env
        model = env.model
        robot = model.body("robot0_base").id
        roots = model.body_rootid[model.geom_bodyid]
        is_robot = roots == robot
        is_solid = (model.geom_contype | model.geom_conaffinity) != 0
        is_plane = model.geom_type == 0
        is_box = is_solid & ~is_plane & ~is_robot
        self._roots = roots
        self._is_robot = is_robot
        self._planes = np.flatnonzero(is_solid & is_plane)
        self._solids = np.flatnonzero(is_box)
        self._site = model.site("gripper0_grip_site").id
        fingers = [model.joint(name) for name in FINGER_JOINTS]
        self._fingers = [finger.qposadr[0] for finger in fingers]
        base = env.data.xpos[robot]
        self.base = base[:2].copy()

    def goals(self) -> tuple[Goal, ...]:
        """Return the task's predicates. ValueError for one that is not a placement."""
        goals: list[Goal] = []
        problem = self._env.problem
        for predicate in problem.parsed_problem["goal_state"]:
            relation = predicate[0].lower()
            if relation not in ("on", "in"):
                raise ValueError(
                    f"goal is {predicate!r}; the scripted expert for LIBERO only knows placements: "
                    "expected (on a b) or (in a b)"
                )
            _, item, place = predicate
            goals.append(Goal(relation, item, place))
        return tuple(goals)

    def holds(self, goal: Goal) -> bool:
        """Evaluate the benchmark's own predicate."""
        states = self._env.problem.object_states_dict
        item = states[goal.item]
        place = states[goal.place]
        if goal.relation == "on":
            return bool(place.check_ontop(item))
        is_inside = place.check_contact(item) and place.check_contain(item)
        return bool(is_inside)

    def hand(self) -> Hand:
        """Return the current pose of the gripper."""
        data = self._env.data
        left_finger, right_finger = data.qpos[self._fingers]
        position = data.site_xpos[self._site]
        rotation = data.site_xmat[self._site].reshape(3, 3)
        return Hand(
            position=position.copy(),
            rotation=rotation.copy(),
            width=float(left_finger - right_finger),
        )

    def body(self, name: str) -> int:
        """Return the root body of an object."""
        return int(self._env.problem.obj_body_id[name])

    def origin(self, name: str) -> Vector:
        """Return an object's position, as the benchmark's predicates use it."""
        body = self.body(name)
        position = self._env.data.xpos[body]
        return position.copy()

    def anchor(self, goal: Goal) -> PlanarPoint:
        """Return the horizontal position of the object that is, or has, the goal's place.

        Zero if the place is a spot on a table.
        """
        problem = self._env.problem
        place = problem.object_states_dict[goal.place]
        name = getattr(place, "parent_name", goal.place)
        if name not in problem.obj_body_id:
            return np.zeros(2)
        return self.origin(name)[:2]

    def mass_centre(self, name: str) -> Vector:
        """Return the centre of mass of an object."""
        body = self.body(name)
        centre = self._env.data.subtree_com[body]
        return centre.copy()

    def boxes(self, name: str) -> Boxes:
        """Return the collision boxes of an object."""
        roots = self._roots[self._solids]
        is_part = roots == self._root(name)
        geoms = self._solids[is_part]
        return self._boxes(geoms)

    def lowest(self, name: str) -> float:
        """Return the height of an object's lowest corner."""
        corners = self.boxes(name).corners()
        return float(corners[:, 2].min())

    def touches(self, name: str, robot: bool) -> bool:
        """Return True if an object is in contact with the robot, or with anything but the robot.

        robot: choose the former.
        """
        contacts = self._env.data.contact
        pairs = contacts.geom
        is_object = self._roots[pairs] == self._root(name)
        is_partner = self._is_robot[pairs]
        if not robot:
            is_partner = ~is_partner & ~is_object
        partners = is_partner[:, ::-1]
        is_contact = is_object & partners
        return bool(is_contact.any())

    def floor(self, below: float) -> float:
        """Return the height of the highest large horizontal surface that is not above `below`."""
        data = self._env.data
        cosines = data.geom_xmat[self._planes, 8]
        is_level = cosines > UPRIGHT
        planes = self._planes[is_level]
        plane_heights = data.geom_xpos[planes, 2]
        large = self._solids[self._is_large()]
        tables = self._boxes(large)
        tops = tables.centres + tables.halves
        table_heights = tops[:, 2]
        heights = np.concatenate([plane_heights, table_heights])
        is_below = heights < below + 0.02
        floors = heights[is_below]
        return float(max(floors, default=0.0))

    def obstacles(self, without: str) -> Points:
        """Sample everything solid but an object, the robot and the large horizontal surfaces.

        The samples are fine near the object.
        """
        roots = self._roots[self._solids]
        is_other = roots != self._root(without)
        geoms = self._solids[is_other & ~self._is_large()]
        boxes = self._boxes(geoms)
        sizes = np.linalg.norm(boxes.halves, axis=1)
        centre = self.origin(without)[:2]
        places = boxes.centres[:, :2]
        distances = grasps.distances(places, centre)
        is_near = distances - sizes < FINE_RADIUS
        near_boxes = self._boxes(geoms[is_near])
        far_boxes = self._boxes(geoms[~is_near])
        fine = near_boxes.roof(FINE)
        coarse = far_boxes.roof(COARSE)
        return np.concatenate(
            [
                grasps.skyline(fine, FINE),
                grasps.skyline(coarse, COARSE),
            ]
        )

    def region_holds(self, goal: Goal) -> Callable[[Vector], bool] | None:
        """Return the benchmark's test of a position for a place that is a region.

        None for a place that is an object.
        """
        site = self._env.problem.object_sites_dict.get(goal.place)
        if site is None:
            return None
        frame = self._env.data.site(goal.place)
        position = frame.xpos.copy()
        rotation = frame.xmat.reshape(3, 3)
        rotation = rotation.copy()
        contains = site.in_box
        if goal.relation == "on":
            contains = site.under

        def holds(point: Vector) -> bool:
            return bool(contains(position, rotation, point))

        return holds

    def region_centre(self, goal: Goal) -> tuple[Vector, float]:
        """Return the centre of a region and a radius in the plane that covers it."""
        site = self._env.problem.object_sites_dict[goal.place]
        size = np.asarray(site.size)
        radius = float(np.linalg.norm(size))
        data = self._env.data
        frame = data.site(goal.place)
        return frame.xpos.copy(), radius

    def _root(self, name: str) -> int:
        body = self.body(name)
        root = self._env.model.body_rootid[body]
        return int(root)

    def _is_large(self) -> Bool[np.ndarray, "N"]:
        """Mark the solids that are wide upright boxes: tables, which are floors, not obstacles."""
        model = self._env.model
        data = self._env.data
        sizes = model.geom_aabb[self._solids, 3:5]
        is_wide = np.all(sizes > LARGE, axis=1)
        cosines = data.geom_xmat[self._solids, 8]
        is_upright = cosines > UPRIGHT
        return is_upright & is_wide

    def _boxes(self, geoms: Geoms) -> Boxes:
        """Return boxes around geoms.

        Exact for boxes, which are LIBERO's only shape except in the robot.
        """
        model = self._env.model
        data = self._env.data
        rotations = data.geom_xmat[geoms]
        rotations = rotations.reshape(-1, 3, 3)
        local = model.geom_aabb[geoms, :3]
        offsets = np.einsum("nij,nj->ni", rotations, local)
        return Boxes(
            centres=data.geom_xpos[geoms] + offsets,
            rotations=rotations.copy(),
            halves=model.geom_aabb[geoms, 3:].copy(),
        )
