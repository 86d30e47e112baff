"""A scripted expert for LIBERO's pick-and-place tasks: a closed-loop state machine around the geometric search of `grasps`.

It knows no object and no task. The goal's predicates say what goes where, the collision model says how to hold it and what is in the way.
Every action is computed from the simulator's present state, so whatever was executed instead of the last one is corrected by the next.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Float64

from vla_opd.experts.libero import grasps
from vla_opd.experts.libero.grasps import REACH, SITE_ABOVE_TIP, Grasp, Points
from vla_opd.experts.libero.scene import NEAR, Goal, Hand, Scene, Simulated, Vector

Action = Float32[np.ndarray, "7"]
Phase = Callable[["Plan", Hand], "Action | str"]  # an action, or the name of the phase that has one

OPEN, CLOSE = -1.0, 1.0
GAIN = 28.0  # action per metre: 43 % of the error is gone after a control step, 1.5 cm at most
TURN_GAIN = 2.8  # action per radian: the same for the orientation
DROP = 0.01  # from which height an object may be let go where its resting height is exact; how near to what is below it a hand is low enough then
BELOW = (
    0.02  # how far under its place such an object is steered, so that it sinks as fast at the end
)
MARGIN = 0.02  # by which whatever is carried clears what it passes over
ATTEMPTS = 20  # plans in one episode before the expert gives up
PATIENCE = 5  # steps that an object which was pushed has to come to rest before the next plan


@dataclass(frozen=True)
class Rest:
    """Where an object is to come to rest: its origin's place in the plane, relative to the anchor, and the height of its lowest point.

    exact: the height is where the object meets what is below, and not only where its bounding rectangle clears it.
    """

    offset: Float64[np.ndarray, "2"]
    height: float
    exact: bool


@dataclass(frozen=True)
class Plan:
    """How one goal is pursued: the grasp, the place, the object's pose that both were computed for, and what is in the way."""

    goal: Goal
    grasp: Grasp
    rest: Rest
    origin: Vector
    obstacles: Points
    radius: float
    top: float


@dataclass
class _Memory:
    """What the state machine remembers between two actions, reset with every change of phase."""

    steps: int = 0
    stuck: int = 0
    start: Vector = field(default_factory=lambda: np.zeros(3))
    last: Vector = field(default_factory=lambda: np.zeros(3))


def make_plan(scene: Scene, goal: Goal, avoid: tuple[Grasp, ...]) -> Plan | None:
    """Look at the scene and decide how to pick the goal's object up and where to put it down; None if no grasp or place is found."""
    origin, hand = scene.origin(goal.item), scene.hand()
    target, obstacles = scene.boxes(goal.item).surface(grasps.SPACING), scene.obstacles(goal.item)
    rest = find_rest(scene, goal)
    near = obstacles[np.linalg.norm(obstacles[:, :2] - origin[:2], axis=1) < NEAR + 0.05]
    floor = scene.floor(float(target[:, 2].min()))
    grasp = grasps.best(
        grasps.Task(
            target, near, floor, scene.mass_centre(goal.item)[:2], scene.base, hand.yaw, avoid
        )
    )
    if grasp is None or rest is None:
        return None
    radius = float(np.linalg.norm(target[:, :2] - grasp.position[:2], axis=1).max())
    return Plan(goal, grasp, rest, origin, obstacles, min(radius, 0.12), float(target[:, 2].max()))


def find_rest(scene: Scene, goal: Goal) -> Rest | None:
    """Where the object, with its present orientation, comes to rest such that the benchmark's own test of the place accepts it.

    None if it would not be accepted wherever it were put down from above: a closed drawer, say.
    """
    target, obstacles = scene.boxes(goal.item).corners(), scene.obstacles(goal.item)
    shape, floor = target - scene.origin(goal.item), scene.floor(float(target[:, 2].min()))
    holds, anchor = scene.region_holds(goal), scene.anchor(goal)
    if holds is None:
        surface = scene.boxes(goal.item).surface(grasps.SPACING) - scene.origin(goal.item)
        return Rest(np.zeros(2), max(_support(surface, obstacles, anchor), floor), exact=True)
    centre, radius = scene.region_centre(goal)
    steps = np.arange(-radius, radius + 0.005, 0.01)
    places = centre[:2] + np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    supports = _supports(shape, obstacles, places, floor)
    resting = np.column_stack([places, supports - shape[:, 2].min()])
    accepted = np.array([holds(point) for point in resting])
    if not accepted.any():
        return None
    score = np.linalg.norm(places - places[accepted].mean(axis=0), axis=1) + 2.0 * supports
    score += np.maximum(np.linalg.norm(places - scene.base, axis=1) - REACH, 0.0)
    chosen = int(np.argmin(np.where(accepted, score, np.inf)))
    return Rest(places[chosen] - anchor, float(supports[chosen]), exact=False)


def _support(surface: Points, obstacles: Points, place: Float64[np.ndarray, "2"]) -> float:
    """Height of the object's lowest point when it comes down at a place and meets what is there: a round one fits where its rectangle doesn't.

    What is far from the object now is known by a point a centimetre: a thin wall can be missed there. Lowering ends at a touch in any case.
    """
    low, high = surface[:, :2].min(axis=0), surface[:, :2].max(axis=0)
    begin = place + low - 0.01
    ground = grasps.height_map(obstacles, begin, place + high + 0.01, 0.005)
    below = ground.heights[
        tuple(np.floor((place + surface[:, :2] - begin) / ground.cell).astype(int).T)
    ]
    return float((below - (surface[:, 2] - surface[:, 2].min())).max())


def _supports(
    shape: Points, obstacles: Points, places: Float64[np.ndarray, "P 2"], floor: float
) -> Float64[np.ndarray, "P"]:
    """Height of what is below the object's bounding rectangle at each place."""
    low, high = shape[:, :2].min(axis=0), shape[:, :2].max(axis=0)
    begin, end = places.min(axis=0) + low - 0.05, places.max(axis=0) + high + 0.05
    ground = grasps.height_map(obstacles, begin, end, 0.005)
    half, middle = (high - low) / 2, (high + low) / 2
    wide = ground.widened(half[0], half[1])
    index = np.floor((places + middle - begin) / ground.cell).astype(int)
    return np.maximum(wide[tuple(index.T)], floor)


@dataclass(frozen=True)
class Corridor:
    """Heights that must be cleared on the straight way from where the hand is to a place, in bins of `step` metres."""

    needed: Float64[np.ndarray, "S"]
    step: float = 0.02

    @classmethod
    def between(
        cls, start: Vector, end: Float64[np.ndarray, "2"], points: Points, radius: float
    ) -> "Corridor":
        """Heights along the way: what is within `radius` in full, what is only below the palm less the palm's height above the tips."""
        way = end - start[:2]
        length = max(float(np.linalg.norm(way)), 1e-6)
        along, aside = way / length, np.array([-way[1], way[0]]) / length
        offset = points[:, :2] - start[:2]
        s, lateral = offset @ along, np.abs(offset @ aside)
        heights = np.where(lateral < radius, points[:, 2], points[:, 2] - grasps.PALM_ABOVE_TIP)
        near = (
            (lateral < max(radius, grasps.PALM_HALF_LENGTH))
            & (s > -radius)
            & (s < length + radius + cls.step)
        )
        s, heights = s[near], heights[near]
        centres = np.arange(int(np.ceil(length / cls.step)) + 1)[:, None] * cls.step
        inside = np.abs(s - centres) < radius + cls.step / 2
        return cls(
            np.max(np.broadcast_to(heights, inside.shape), axis=1, where=inside, initial=-np.inf)
        )

    def ahead(self, distance: float) -> float:
        """The greatest height needed within a distance."""
        return float(self.needed[: int(distance / self.step) + 1].max())


class LiberoExpert:
    """The state machine: approach, descend, close, carry, lower, release, rise, and again for the next goal."""

    def __init__(self, env: Simulated) -> None:
        self._env = env
        self._phases: dict[str, Phase] = {
            "approach": self._approach,
            "descend": self._descend,
            "close": self._close,
            "carry": self._carry,
            "lower": self._lower,
            "release": self._release,
            "rise": self._rise,
            "back_off": self._back_off,
        }

    def reset(self) -> None:
        """Plan for the present state. ValueError if the task's goal has anything but placements."""
        self._scene = Scene(self._env)
        self._goals = self._scene.goals()
        self._failed: tuple[Grasp, ...] = ()
        self._attempts = 0
        self._held = np.zeros(3)
        self._enter("approach")
        self._plan = self._next_plan()
        if self._plan is None:
            self._refuse_unreachable()

    def act(self) -> Action:
        """The next action: three translations, three rotations, gripper; all in [-1, 1]."""
        hand = self._scene.hand()
        if self._plan is None and self._memory.steps >= PATIENCE:
            self._enter(self._again(None))
        for _ in range(8):
            if self._plan is None:
                self._memory.steps += (
                    1  # what fell may have no grasp in the air: look again once it lies
                )
                return _action(np.zeros(3), np.zeros(3), OPEN)
            outcome = self._phases[self._phase](self._plan, hand)
            if not isinstance(outcome, str):
                self._observe(hand, outcome)
                return outcome
            self._enter(outcome)
        raise RuntimeError(f"no phase of {self._plan} wants to act; the last was {self._phase}")

    @property
    def phase(self) -> str:
        """What the expert is doing."""
        return self._phase if self._plan is not None else "done"

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._memory = _Memory(start=self._scene.hand().position)

    def _observe(self, hand: Hand, action: Action) -> None:
        """Count steps, and how long the hand has hardly moved although it was told to."""
        memory = self._memory
        moved = np.linalg.norm(hand.position - memory.last)
        memory.stuck = memory.stuck + 1 if moved < 0.0015 and np.abs(action[:3]).max() > 0.1 else 0
        memory.last = hand.position
        memory.steps += 1

    def _next_plan(self) -> Plan | None:
        """A plan for the first goal that does not hold yet."""
        for goal in self._goals:
            if not self._scene.holds(goal) and self._attempts < ATTEMPTS:
                self._attempts += 1
                return make_plan(self._scene, goal, self._failed)
        return None

    def _refuse_unreachable(self) -> None:
        for goal in self._goals:
            if not self._scene.holds(goal) and find_rest(self._scene, goal) is None:
                raise ValueError(
                    f"goal is {goal}; the scripted expert for LIBERO only reaches places from above: expected one that is open there"
                )

    def _again(self, failed: Grasp | None) -> str:
        """Start over, from the scene as it is now."""
        self._failed = (*self._failed, failed) if failed is not None else ()
        self._plan = self._next_plan()
        return "approach"

    def _toward(self, hand: Hand, goal: Vector, yaw: float, gripper: float) -> Action:
        return _action(goal - hand.position, _orientation_error(hand, yaw), gripper)

    def _approach(self, plan: Plan, hand: Hand) -> Action | str:
        """Go above the grasp with open fingers, over whatever is in between."""
        has_moved = self._has_moved(plan)
        if has_moved and self._memory.steps >= PATIENCE:
            return self._again(None)
        if self._memory.stuck > 8:
            return "back_off"
        goal = plan.grasp.position
        distance = float(np.linalg.norm(goal[:2] - hand.position[:2]))
        is_open = hand.width > 0.9 * grasps.OPENING
        if (
            is_open
            and not has_moved
            and distance < 0.012
            and _misaligned(hand, plan.grasp.yaw) < 0.12
        ):
            return "descend"
        hover = max(goal[2] + 0.03, plan.top + SITE_ABOVE_TIP + 0.015)
        everything = np.concatenate([plan.obstacles, np.append(plan.origin[:2], plan.top)[None]])
        way = self._over(
            hand,
            np.append(goal[:2], hover),
            everything,
            grasps.FINGER_OUTER,
            hand.position[2] - SITE_ABOVE_TIP,
        )
        return self._toward(hand, way, plan.grasp.yaw, OPEN)

    def _over(
        self, hand: Hand, goal: Vector, obstacles: Points, radius: float, lowest: float
    ) -> Vector:
        """A point to head for so that `lowest`, now the lowest point of hand and load, passes over everything on the way to `goal`."""
        corridor = Corridor.between(hand.position, goal[:2], obstacles, radius)
        below = hand.position[2] - lowest
        height = max(goal[2], corridor.ahead(0.14) + MARGIN + below)
        short = corridor.ahead(0.05) + MARGIN / 2 - lowest
        speed = float(np.clip(1.0 - short / 0.03, 0.0, 1.0))
        return np.append(hand.position[:2] + speed * (goal[:2] - hand.position[:2]), height)

    def _descend(self, plan: Plan, hand: Hand) -> Action | str:
        """Straight down around the object."""
        error = plan.grasp.position - hand.position
        if np.linalg.norm(error[:2]) > 0.025 or self._has_moved(plan):
            return "approach"
        if self._memory.stuck > 5 or self._memory.steps > 60:
            return "close" if abs(error[2]) < 0.02 else self._again(plan.grasp)
        if np.linalg.norm(error[:2]) < 0.006 and abs(error[2]) < 0.003:
            return "close"
        return self._toward(hand, plan.grasp.position, plan.grasp.yaw, OPEN)

    def _close(self, plan: Plan, hand: Hand) -> Action | str:
        """Close until the fingers stand still."""
        memory = self._memory
        speed = abs(memory.start[0] - hand.width)
        memory.start = np.array([hand.width, 0.0, 0.0])
        if memory.steps >= 5 and (speed < 0.0006 or memory.steps > 16):
            if hand.width < 0.0015:
                return self._again(plan.grasp)
            self._held = self._scene.origin(plan.goal.item) - hand.position
            return "carry"
        # A thin edge between the pads slips or swings: press down by what the search kept clear of what is below.
        press = grasps.CLEARANCE if plan.grasp.overlap < grasps.FIRM else 0.0
        return self._toward(
            hand, plan.grasp.position - np.array([0.0, 0.0, press]), plan.grasp.yaw, CLOSE
        )

    def _carry(self, plan: Plan, hand: Hand) -> Action | str:
        """Lift and move, steering by where the object is in the hand now."""
        if self._is_lost(plan, hand):
            return self._again(plan.grasp)
        if self._memory.stuck > 8:
            return "back_off"
        goal, lowest = hand.position[:2] + self._missing(plan), self._scene.lowest(plan.goal.item)
        if np.linalg.norm(goal - hand.position[:2]) < 0.01:
            return "lower"
        below = hand.position[2] - min(lowest, hand.position[2] - SITE_ABOVE_TIP)
        way = self._over(
            hand,
            np.append(goal, plan.rest.height + MARGIN + below),
            plan.obstacles,
            plan.radius,
            hand.position[2] - below,
        )
        return self._toward(hand, way, plan.grasp.yaw, CLOSE)

    def _lower(self, plan: Plan, hand: Hand) -> Action | str:
        """Down until the object touches something, the hand would, or the object is just above its place if that is known exactly.

        Then fast, and not to the last millimetre: held by its rim, a heavy bowl tilts the hand, and a tilted hand drifts and hardly sinks. Who
        imitates a demonstrator that waits there for an arm that stands still doesn't see why it lets go in the end.
        """
        if self._is_lost(plan, hand):
            return self._again(plan.grasp)
        goal, lowest = hand.position[:2] + self._missing(plan), self._scene.lowest(plan.goal.item)
        limit = grasps.lowest_tip(plan.obstacles, hand.position[:2], hand.yaw) + SITE_ABOVE_TIP
        exact = plan.rest.exact
        height = max(
            hand.position[2] - lowest + plan.rest.height - (BELOW if exact else 0.005), limit
        )
        above = (
            min(lowest - plan.rest.height, hand.position[2] - limit) - DROP
            if exact
            else hand.position[2] - height - 0.004
        )
        if (
            above < 0
            or self._scene.touches(plan.goal.item, robot=False)
            or self._memory.stuck > 5
            or self._memory.steps > 50
        ):
            return "release"
        return self._toward(hand, np.append(goal, height), plan.grasp.yaw, CLOSE)

    def _release(self, plan: Plan, hand: Hand) -> Action | str:
        """Open where the hand is."""
        if self._memory.steps >= 4 and (hand.width > 0.065 or self._memory.steps > 10):
            return "rise"
        return self._toward(hand, self._memory.start, plan.grasp.yaw, OPEN)

    def _rise(self, plan: Plan, hand: Hand) -> Action | str:
        """Up and away; an object that still hangs on a finger is shaken off."""
        if hand.position[2] > self._memory.start[2] + 0.08 or self._memory.steps > 30:
            return self._again(None)
        goal = self._memory.start + np.array([0.0, 0.0, 0.12])
        if self._memory.steps > 3 and self._scene.touches(plan.goal.item, robot=True):
            sway = 0.03 * (-1.0) ** (self._memory.steps // 2)
            goal = hand.position + sway * hand.rotation[:, 0] + np.array([0.0, 0.0, 0.01])
        return self._toward(hand, goal, plan.grasp.yaw, OPEN)

    def _back_off(self, plan: Plan, hand: Hand) -> Action | str:
        """Up and toward the base: an arm that is locked straight can't follow any other command."""
        holding = hand.width < 0.9 * grasps.OPENING and self._scene.touches(
            plan.goal.item, robot=True
        )
        if self._memory.steps >= 10:
            return "carry" if holding else "approach"
        toward = self._scene.base - hand.position[:2]
        step = np.append(0.05 * toward / np.linalg.norm(toward), 0.03)
        return _action(step, _orientation_error(hand, plan.grasp.yaw), CLOSE if holding else OPEN)

    def _missing(self, plan: Plan) -> Float64[np.ndarray, "2"]:
        """How far the object is from where it is to be let go: its live offset, whatever its place in the hand."""
        return (
            self._scene.anchor(plan.goal)
            + plan.rest.offset
            - self._scene.origin(plan.goal.item)[:2]
        )

    def _has_moved(self, plan: Plan) -> bool:
        return bool(np.linalg.norm(self._scene.origin(plan.goal.item) - plan.origin) > 0.012)

    def _is_lost(self, plan: Plan, hand: Hand) -> bool:
        """Whether the fingers closed on nothing, or the object has left them (one that only swings is still held)."""
        slip = float(
            np.linalg.norm(self._scene.origin(plan.goal.item) - hand.position - self._held)
        )
        return (
            hand.width < 0.001
            or slip > 0.10
            or (slip > 0.02 and not self._scene.touches(plan.goal.item, robot=True))
        )


def make(env: Simulated) -> LiberoExpert:
    """The expert for a `LiberoEnv`."""
    return LiberoExpert(env)


def _action(offset: Vector, turn: Vector, gripper: float) -> Action:
    """Proportional control; a translation or rotation that is too large keeps its direction."""
    parts = [_limited(GAIN * offset), _limited(TURN_GAIN * turn), np.array([gripper])]
    return np.concatenate(parts).astype(np.float32)


def _limited(vector: Vector) -> Vector:
    return vector / max(1.0, float(np.abs(vector).max()))


def _misaligned(hand: Hand, yaw: float) -> float:
    return float(np.linalg.norm(_orientation_error(hand, yaw)))


def _orientation_error(hand: Hand, yaw: float) -> Vector:
    """Rotation vector, in the world, that points the hand down with its closing axis at `yaw` (or at `yaw + pi`, if that is nearer).

    Half the sum of the cross products of present and wanted axes: exact to second order, and of the right sign everywhere.
    """
    yaw = hand.yaw + grasps.angle(yaw, hand.yaw)
    wanted = _downward(yaw)
    return 0.5 * sum(
        (np.cross(hand.rotation[:, k], wanted[:, k]) for k in range(3)), start=np.zeros(3)
    )


def _downward(yaw: float) -> Float64[np.ndarray, "3 3"]:
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, s, 0.0], [s, -c, 0.0], [0.0, 0.0, -1.0]])
