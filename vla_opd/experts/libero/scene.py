"""What the scripted expert for LIBERO reads of the simulator: hand, boxes of objects, obstacles, and the benchmark's own predicates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float64

from vla_opd.experts.libero import grasps
from vla_opd.experts.libero.grasps import Boxes, Points

Vector = Float64[np.ndarray, "3"]

FINE, COARSE = 0.004, 0.01  # spacing of the points on obstacles near the object and far from it
NEAR = 0.22  # radius around the object within which obstacles are sampled finely
UPRIGHT = 0.99  # cosine of a face's tilt up to which it counts as horizontal


class Simulated(Protocol):
    """What the expert reads of a `LiberoEnv`: MuJoCo's model and data, and LIBERO's own problem (untyped upstream)."""

    model: Any
    data: Any
    problem: Any


@dataclass(frozen=True)
class Goal:
    """One predicate of a task: `relation` is `on` or `in`."""

    relation: str
    item: str
    place: str


@dataclass(frozen=True)
class Hand:
    """The gripper now. The columns of `rotation` are the closing direction, the direction across the pads, and down."""

    position: Vector
    rotation: Float64[np.ndarray, "3 3"]
    width: float

    @property
    def yaw(self) -> float:
        """Direction of the closing axis in the plane."""
        return float(np.arctan2(self.rotation[1, 0], self.rotation[0, 0]))


class Scene:
    """Privileged reading of the simulator: boxes of objects, obstacles, hand, and the benchmark's own predicates."""

    def __init__(self, env: Simulated) -> None:
        self._env = env
        model = env.model
        roots = model.body_rootid[model.geom_bodyid]
        robot = model.body("robot0_base").id
        solid = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
        plane = model.geom_type == 0
        self._is_robot = roots == robot
        self._roots = roots
        self._planes = np.flatnonzero(solid & plane)
        self._solids = np.flatnonzero(solid & ~plane & ~self._is_robot)
        self._site = model.site("gripper0_grip_site").id
        self._fingers = [model.joint(f"gripper0_finger_joint{k}").qposadr[0] for k in (1, 2)]
        self.base = env.data.xpos[robot][:2].copy()

    def goals(self) -> tuple[Goal, ...]:
        """The task's predicates. ValueError for one that is not a placement."""
        state = self._env.problem.parsed_problem["goal_state"]
        for predicate in state:
            if predicate[0].lower() not in ("on", "in"):
                raise ValueError(
                    f"goal is {predicate!r}; the scripted expert for LIBERO only knows placements: expected (on a b) or (in a b)"
                )
        return tuple(Goal(relation.lower(), item, place) for relation, item, place in state)

    def holds(self, goal: Goal) -> bool:
        """The benchmark's own predicate."""
        item, place = (
            self._env.problem.object_states_dict[name] for name in (goal.item, goal.place)
        )
        if goal.relation == "on":
            return bool(place.check_ontop(item))
        return bool(place.check_contact(item) and place.check_contain(item))

    def hand(self) -> Hand:
        """Where the gripper is."""
        data = self._env.data
        left, right = data.qpos[self._fingers]
        return Hand(
            data.site_xpos[self._site].copy(),
            data.site_xmat[self._site].reshape(3, 3).copy(),
            float(left - right),
        )

    def body(self, name: str) -> int:
        """The root body of an object."""
        return int(self._env.problem.obj_body_id[name])

    def origin(self, name: str) -> Vector:
        """The position that the benchmark's predicates look at."""
        return self._env.data.xpos[self.body(name)].copy()

    def anchor(self, goal: Goal) -> Float64[np.ndarray, "2"]:
        """Horizontal position of the object that is, or has, the goal's place; the origin if that is a spot on a table."""
        name = getattr(self._env.problem.object_states_dict[goal.place], "parent_name", goal.place)
        return self.origin(name)[:2] if name in self._env.problem.obj_body_id else np.zeros(2)

    def mass_centre(self, name: str) -> Vector:
        """Centre of mass of an object."""
        return self._env.data.subtree_com[self.body(name)].copy()

    def boxes(self, name: str) -> Boxes:
        """The collision boxes of an object."""
        return self._boxes(self._solids[self._roots[self._solids] == self._root(name)])

    def lowest(self, name: str) -> float:
        """Height of an object's lowest corner."""
        return float(self.boxes(name).corners()[:, 2].min())

    def touches(self, name: str, robot: bool) -> bool:
        """Whether an object is in contact with the robot, or else with anything that is not the robot."""
        pairs = self._env.data.contact.geom
        mine = self._roots[pairs] == self._root(name)
        other = self._is_robot[pairs] if robot else ~self._is_robot[pairs] & ~mine
        return bool(np.any(mine & other[:, ::-1]))

    def floor(self, below: float) -> float:
        """Height of the highest large horizontal surface that is not above `below`."""
        data = self._env.data
        tops = [float(data.geom_xpos[g][2]) for g in self._planes if data.geom_xmat[g][8] > UPRIGHT]
        large = self._boxes(self._solids[self._is_large()])
        tops += [float(z) for z in large.centres[:, 2] + large.halves[:, 2]]
        return max((z for z in tops if z < below + 0.02), default=0.0)

    def obstacles(self, without: str) -> Points:
        """Points on everything solid but an object, the robot and the large horizontal surfaces; fine near the object."""
        others = self._solids[
            (self._roots[self._solids] != self._root(without)) & ~self._is_large()
        ]
        boxes = self._boxes(others)
        size = np.linalg.norm(boxes.halves, axis=1)
        near = np.linalg.norm(boxes.centres[:, :2] - self.origin(without)[:2], axis=1) - size < NEAR
        fine, coarse = self._boxes(others[near]), self._boxes(others[~near])
        return np.concatenate(
            [grasps.skyline(fine.roof(FINE), FINE), grasps.skyline(coarse.roof(COARSE), COARSE)]
        )

    def region_holds(self, goal: Goal) -> Callable[[Vector], bool] | None:
        """The benchmark's test of a position, for a place that is a region; None for a place that is an object."""
        site = self._env.problem.object_sites_dict.get(goal.place)
        if site is None:
            return None
        frame = self._env.data.site(goal.place)
        position, matrix = frame.xpos.copy(), frame.xmat.reshape(3, 3).copy()
        test = site.under if goal.relation == "on" else site.in_box
        return lambda point: bool(test(position, matrix, point))

    def region_centre(self, goal: Goal) -> tuple[Vector, float]:
        """Centre of a region and a radius in the plane that covers it."""
        size = np.asarray(self._env.problem.object_sites_dict[goal.place].size)
        return self._env.data.site(goal.place).xpos.copy(), float(np.linalg.norm(size))

    def _root(self, name: str) -> int:
        return int(self._env.model.body_rootid[self.body(name)])

    def _is_large(self) -> Any:
        """Which solids are wide upright boxes: tables. They count as a floor, not as obstacles."""
        sizes = self._env.model.geom_aabb[self._solids, 3:]
        upright = self._env.data.geom_xmat[self._solids, 8] > UPRIGHT
        return upright & np.all(sizes[:, :2] > 0.3, axis=1)

    def _boxes(self, geoms: Any) -> Boxes:
        """Boxes around geoms: exact for boxes, LIBERO's only shape but for the robot's."""
        model, data = self._env.model, self._env.data
        rotations = data.geom_xmat[geoms].reshape(-1, 3, 3)
        offset = np.einsum("nij,nj->ni", rotations, model.geom_aabb[geoms, :3])
        return Boxes(
            data.geom_xpos[geoms] + offset, rotations.copy(), model.geom_aabb[geoms, 3:].copy()
        )
