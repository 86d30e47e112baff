"""A scripted expert for LIBERO's pick-and-place tasks.

A closed-loop state machine around the geometric search of `grasps`. It knows no object and no task:
the goal's predicates say what goes where, the collision model says how to hold it and what is in
the way. Every action is computed from the simulator's current state, so the next action corrects
whatever was executed instead of the last one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float32, Float64

from vla_opd.experts.libero import grasps
from vla_opd.experts.libero.grasps import REACH, SITE_ABOVE_TIP, Grasp, Places, PlanarPoint, Points
from vla_opd.experts.libero.scene import FINE_RADIUS, Goal, Hand, PrivilegedEnv, Scene, Vector

Action = Float32[np.ndarray, "7"]
Phase = Callable[["Plan", Hand], "Action | str"]  # returns an action, or the next phase's name

OPEN = -1.0
CLOSE = 1.0
GAIN = 28.0  # action per metre: removes 43 % of the error, at most 1.5 cm, per control step
TURN_GAIN = 2.8  # action per radian: the same for the orientation
DROP = 0.01  # an object may fall from this height if its resting height is exact
BELOW = 0.02  # such an object is steered this far below its place, so that it keeps sinking
MARGIN = 0.02  # clearance of hand and load over obstacles
ATTEMPTS = 20  # plans in one episode before the expert gives up
PATIENCE = 5  # steps in which a pushed object may come to rest before the next plan
CELL = 0.005  # of the height maps in which places are searched


@dataclass(frozen=True)
class RestingPlace:
    """Where an object is to come to rest.

    offset: horizontal position of its origin, relative to the anchor of the goal.
    height: of its lowest point.
    exact:  the height is that of first contact; otherwise only the bounding rectangle is clear.
    """

    offset: PlanarPoint
    height: float
    exact: bool


@dataclass(frozen=True)
class Plan:
    """How to pursue one goal.

    origin:    the object's position for which the grasp and the resting place were computed.
    obstacles: points on everything in the way.
    radius:    horizontal reach of the object around the grasp.
    top:       height of the object's highest point.
    """

    goal: Goal
    grasp: Grasp
    resting_place: RestingPlace
    origin: Vector
    obstacles: Points
    radius: float
    top: float


@dataclass
class _Memory:
    """The state machine's memory between two actions, reset with every change of phase.

    steps: actions in this phase.
    stuck: consecutive actions that hardly moved the hand.
    start: the hand's position at the start of the phase.
    last:  the hand's position at the last action.
    width: the gripper's width at the last action of `close`.
    """

    steps: int = 0
    stuck: int = 0
    start: Vector = field(default_factory=lambda: np.zeros(3))
    last: Vector = field(default_factory=lambda: np.zeros(3))
    width: float = 0.0


def make_plan(scene: Scene, goal: Goal, avoid: tuple[Grasp, ...]) -> Plan | None:
    """Decide from the scene how to pick up the goal's object and where to put it down.

    None without a grasp or a resting place.
    """
    origin = scene.origin(goal.item)
    boxes = scene.boxes(goal.item)
    surface = boxes.surface(grasps.SPACING)
    obstacles = scene.obstacles(goal.item)
    resting_place = find_resting_place(scene, goal)
    gaps = grasps.distances(obstacles[:, :2], origin[:2])
    task = grasps.GraspTask(
        target=surface,
        obstacles=obstacles[gaps < FINE_RADIUS + 0.05],
        floor=scene.floor(float(surface[:, 2].min())),
        centre=scene.mass_centre(goal.item)[:2],
        base=scene.base,
        yaw=scene.hand().yaw,
        avoid=avoid,
    )
    grasp = grasps.find_grasp(task)
    if grasp is None or resting_place is None:
        return None
    radii = grasps.distances(surface[:, :2], grasp.position[:2])
    return Plan(
        goal=goal,
        grasp=grasp,
        resting_place=resting_place,
        origin=origin,
        obstacles=obstacles,
        radius=min(float(radii.max()), 0.12),
        top=float(surface[:, 2].max()),
    )


def find_resting_place(scene: Scene, goal: Goal) -> RestingPlace | None:
    """Find a place that passes the benchmark's own test, for the object's current orientation.

    None if no place that is reached from above passes: a closed drawer, for example.
    """
    holds = scene.region_holds(goal)
    if holds is None:
        return _rest_on_object(scene, goal)
    return _rest_in_region(scene, goal, holds)


def _rest_on_object(scene: Scene, goal: Goal) -> RestingPlace:
    """Rest at the anchor of a place that is an object."""
    item = goal.item
    origin = scene.origin(item)
    boxes = scene.boxes(item)
    surface = boxes.surface(grasps.SPACING) - origin
    support = _support(
        surface,
        scene.obstacles(item),
        scene.anchor(goal),
    )
    floor = scene.floor(scene.lowest(item))
    return RestingPlace(
        offset=np.zeros(2),
        height=max(support, floor),
        exact=True,
    )


def _rest_in_region(
    scene: Scene, goal: Goal, holds: Callable[[Vector], bool]
) -> RestingPlace | None:
    """Choose among accepted places a low one that is central and within reach."""
    item = goal.item
    corners = scene.boxes(item).corners()
    shape = corners - scene.origin(item)
    places = _region_grid(scene, goal)
    supports = _supports(
        shape,
        scene.obstacles(item),
        places,
        floor=scene.floor(scene.lowest(item)),
    )
    bottom = shape[:, 2].min()
    origins = np.column_stack([places, supports - bottom])
    is_accepted = np.array([holds(origin) for origin in origins])
    if not is_accepted.any():
        return None

    middle = places[is_accepted].mean(axis=0)
    eccentricity = grasps.distances(places, middle)
    distance = grasps.distances(places, scene.base)
    costs = eccentricity + 2.0 * supports
    costs += np.maximum(distance - REACH, 0.0)
    costs[~is_accepted] = np.inf
    chosen = int(np.argmin(costs))
    return RestingPlace(
        offset=places[chosen] - scene.anchor(goal),
        height=float(supports[chosen]),
        exact=False,
    )


def _region_grid(scene: Scene, goal: Goal) -> Places:
    """Return a grid of places, 1 cm apart, that covers a region."""
    centre, radius = scene.region_centre(goal)
    steps = np.arange(-radius, radius + 0.005, 0.01)
    grid = np.meshgrid(steps, steps)
    offsets = np.stack(grid, -1)
    offsets = offsets.reshape(-1, 2)
    return centre[:2] + offsets


def _support(surface: Points, obstacles: Points, place: PlanarPoint) -> float:
    """Return the height of the object's lowest point when it is lowered until first contact.

    This uses the object's shape: a round one fits where its bounding rectangle doesn't.

    Obstacles far from the object's current position are sampled 1 cm apart, which can miss a thin
    wall. Lowering ends at a touch in any case.
    """
    planar = surface[:, :2]
    low = place + planar.min(axis=0)
    high = place + planar.max(axis=0)
    ground = grasps.height_map(
        obstacles,
        low - 0.01,
        high + 0.01,
        CELL,
    )
    cells = ground.cells(place + planar)
    below = ground.heights[tuple(cells.T)]
    tops = surface[:, 2]
    heights = tops - tops.min()
    return float((below - heights).max())


def _supports(
    shape: Points, obstacles: Points, places: Places, floor: float
) -> Float64[np.ndarray, "N"]:
    """Return the greatest height below the object's bounding rectangle at each place."""
    planar = shape[:, :2]
    low = planar.min(axis=0)
    high = planar.max(axis=0)
    begin = places.min(axis=0) + low
    end = places.max(axis=0) + high
    ground = grasps.height_map(
        obstacles,
        begin - 0.05,
        end + 0.05,
        CELL,
    )
    half_u, half_v = (high - low) / 2
    dilated = ground.dilate(half_u, half_v)
    middle = (high + low) / 2
    cells = ground.cells(places + middle)
    heights = dilated[tuple(cells.T)]
    return np.maximum(heights, floor)


@dataclass(frozen=True)
class Corridor:
    """Heights to clear on the straight way from the hand to a place, in bins of `step` metres."""

    heights: Float64[np.ndarray, "S"]
    step: float = 0.02

    @classmethod
    def measure(cls, start: Vector, end: PlanarPoint, points: Points, radius: float) -> "Corridor":
        """Measure the heights along the way.

        Points within `radius` count in full. Points that are only below the palm count less the
        palm's height above the tips.
        """
        way = end - start[:2]
        length = max(float(np.linalg.norm(way)), 1e-6)
        forward = way / length
        sideways = np.array([-way[1], way[0]]) / length
        offsets = points[:, :2] - start[:2]
        along = offsets @ forward
        lateral = np.abs(offsets @ sideways)

        tops = points[:, 2]
        lowered = tops - grasps.PALM_ABOVE_TIP
        heights = np.where(lateral < radius, tops, lowered)
        reach = max(radius, grasps.PALM_HALF_LENGTH)
        is_near = (
            (lateral < reach)  # beside the way
            & (along > -radius)
            & (along < length + radius + cls.step)
        )
        return cls(
            cls._bin(
                along[is_near],
                heights[is_near],
                length,
                radius,
            )
        )

    @classmethod
    def _bin(
        cls,
        along: Float64[np.ndarray, "M"],
        heights: Float64[np.ndarray, "M"],
        length: float,
        radius: float,
    ) -> Float64[np.ndarray, "S"]:
        """Return the greatest height within `radius` of each bin."""
        step = cls.step
        count = int(np.ceil(length / step)) + 1
        centres = np.arange(count)[:, None] * step
        distance = np.abs(along - centres)
        is_inside = distance < radius + step / 2
        table = np.broadcast_to(heights, is_inside.shape)
        return np.max(
            table,
            axis=1,
            where=is_inside,
            initial=-np.inf,
        )

    def height_within(self, distance: float) -> float:
        """Return the greatest height to clear within a distance."""
        bins = int(distance / self.step) + 1
        return float(self.heights[:bins].max())


class LiberoExpert:
    """A state machine: approach, descend, close, carry, lower, release, rise; then the next goal.

    A phase returns an action or the name of the next phase.
    """

    def __init__(self, env: PrivilegedEnv) -> None:
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
        """Plan for the current state.

        Raises:
            ValueError: the task's goal has a predicate other than a placement, or a place that is
                not open from above.
        """
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
        """Return the next action: three translations, three rotations, gripper; all in [-1, 1]."""
        hand = self._scene.hand()
        if self._plan is None and self._memory.steps >= PATIENCE:
            self._enter(self._replan(None))
        for _ in range(8):
            if self._plan is None:
                # A falling object may have no grasp: plan again once it lies still.
                self._memory.steps += 1
                return _action(
                    offset=np.zeros(3),
                    turn=np.zeros(3),
                    gripper=OPEN,
                )
            act = self._phases[self._phase]
            outcome = act(self._plan, hand)
            if not isinstance(outcome, str):
                self._remember(hand, outcome)
                return outcome
            self._enter(outcome)
        raise RuntimeError(f"no phase of {self._plan} acts; the last phase was {self._phase}")

    @property
    def phase(self) -> str:
        """The name of the current phase; `done` without a plan."""
        if self._plan is None:
            return "done"
        return self._phase

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._memory = _Memory(start=self._scene.hand().position)

    def _remember(self, hand: Hand, action: Action) -> None:
        """Count steps, and consecutive steps in which the hand hardly moved despite its action."""
        memory = self._memory
        moved = _distance(hand.position, memory.last)
        command = np.abs(action[:3]).max()
        if moved < 0.0015 and command > 0.1:
            memory.stuck += 1
        else:
            memory.stuck = 0
        memory.last = hand.position
        memory.steps += 1

    def _next_plan(self) -> Plan | None:
        """Plan for the first goal that does not hold yet."""
        if self._attempts >= ATTEMPTS:
            return None
        for goal in self._goals:
            if not self._scene.holds(goal):
                self._attempts += 1
                return make_plan(self._scene, goal, self._failed)
        return None

    def _refuse_unreachable(self) -> None:
        for goal in self._goals:
            if self._scene.holds(goal):
                continue
            if find_resting_place(self._scene, goal) is None:
                raise ValueError(
                    f"goal is {goal}; the scripted expert for LIBERO only reaches places from "
                    "above: expected a place that is open from above"
                )

    def _replan(self, failed: Grasp | None) -> str:
        """Start over from the current scene, without the grasp that failed."""
        if failed is None:
            self._failed = ()
        else:
            self._failed = (*self._failed, failed)
        self._plan = self._next_plan()
        return "approach"

    def _approach(self, plan: Plan, hand: Hand) -> Action | str:
        """Go above the grasp with open fingers, over whatever is in between."""
        has_moved = self._has_moved(plan)
        if has_moved and self._memory.steps >= PATIENCE:
            return self._replan(None)
        if self._memory.stuck > 8:
            return "back_off"
        if not has_moved and _is_above_grasp(plan, hand):
            return "descend"
        target = plan.grasp.position
        hover = max(
            target[2] + 0.03,
            plan.top + SITE_ABOVE_TIP + 0.015,
        )
        object_top = np.append(plan.origin[:2], plan.top)
        waypoint = _pass_over(
            hand,
            goal=np.append(target[:2], hover),
            obstacles=np.concatenate([plan.obstacles, object_top[None]]),
            radius=grasps.FINGER_OUTER,
            lowest=hand.height - SITE_ABOVE_TIP,
        )
        return _move(plan, hand, waypoint, OPEN)

    def _descend(self, plan: Plan, hand: Hand) -> Action | str:
        """Go straight down around the object."""
        memory = self._memory
        target = plan.grasp.position
        lateral = _distance(target[:2], hand.planar)
        depth = target[2] - hand.height
        vertical = abs(depth)
        if lateral > 0.025 or self._has_moved(plan):
            return "approach"
        if memory.stuck > 5 or memory.steps > 60:
            return "close" if vertical < 0.02 else self._replan(plan.grasp)
        if lateral < 0.006 and vertical < 0.003:
            return "close"
        return _move(plan, hand, target, OPEN)

    def _close(self, plan: Plan, hand: Hand) -> Action | str:
        """Close until the fingers stand still."""
        memory = self._memory
        speed = abs(memory.width - hand.width)
        memory.width = hand.width
        is_still = speed < 0.0006 or memory.steps > 16
        if memory.steps >= 5 and is_still:
            if hand.width < 0.0015:
                return self._replan(plan.grasp)
            origin = self._scene.origin(plan.goal.item)
            self._held = origin - hand.position
            return "carry"
        # A thin edge between the pads slips or swings: press down by the clearance of the search.
        press = 0.0
        if plan.grasp.overlap < grasps.FIRM:
            press = grasps.CLEARANCE
        target = plan.grasp.position - _vertical(press)
        return _move(plan, hand, target, CLOSE)

    def _carry(self, plan: Plan, hand: Hand) -> Action | str:
        """Lift and move, steering by the object's current position in the hand."""
        if self._is_lost(plan, hand):
            return self._replan(plan.grasp)
        if self._memory.stuck > 8:
            return "back_off"
        target = hand.planar + self._missing(plan)
        if _distance(target, hand.planar) < 0.01:
            return "lower"
        lowest = self._scene.lowest(plan.goal.item)
        below = hand.height - min(lowest, hand.height - SITE_ABOVE_TIP)
        height = plan.resting_place.height + MARGIN + below
        waypoint = _pass_over(
            hand,
            goal=np.append(target, height),
            obstacles=plan.obstacles,
            radius=plan.radius,
            lowest=hand.height - below,
        )
        return _move(plan, hand, waypoint, CLOSE)

    def _lower(self, plan: Plan, hand: Hand) -> Action | str:
        """Go down until the object touches something, or is just above an exact place.

        The hand stops above obstacles, too.

        For an exact place this is fast and leaves the last millimetres: held by its rim, a heavy
        bowl tilts the hand, and a tilted hand drifts and hardly sinks. A policy that imitates an
        expert that waits for such an arm can't see why it lets go in the end.
        """
        if self._is_lost(plan, hand):
            return self._replan(plan.grasp)
        target = hand.planar + self._missing(plan)
        lowest = self._scene.lowest(plan.goal.item)
        tip = grasps.lowest_tip(
            plan.obstacles,
            hand.planar,
            hand.yaw,
        )
        limit = tip + SITE_ABOVE_TIP
        place = plan.resting_place
        sink = BELOW if place.exact else 0.005
        below = hand.height - lowest
        height = max(below + place.height - sink, limit)
        if place.exact:
            gap = min(
                lowest - place.height,
                hand.height - limit,
            )
            gap -= DROP
        else:
            gap = hand.height - height - 0.004
        if gap < 0 or self._is_stopped(plan):
            return "release"
        return _move(plan, hand, np.append(target, height), CLOSE)

    def _is_stopped(self, plan: Plan) -> bool:
        """Return True if the lowered object touches something, or the hand no longer sinks."""
        memory = self._memory
        item = plan.goal.item
        touches = self._scene.touches(item, robot=False)
        return touches or memory.stuck > 5 or memory.steps > 50

    def _release(self, plan: Plan, hand: Hand) -> Action | str:
        """Open the gripper in place."""
        memory = self._memory
        if memory.steps >= 4 and (hand.width > 0.065 or memory.steps > 10):
            return "rise"
        return _move(plan, hand, memory.start, OPEN)

    def _rise(self, plan: Plan, hand: Hand) -> Action | str:
        """Go up and away; shake off an object that still hangs on a finger."""
        memory = self._memory
        start = memory.start
        risen = start[2] + 0.08
        if hand.height > risen or memory.steps > 30:
            return self._replan(None)
        target = start + _vertical(0.12)
        if memory.steps > 3 and self._touches_robot(plan):
            side = (-1.0) ** (memory.steps // 2)
            sway = 0.03 * side
            closing_axis = hand.rotation[:, 0]
            shaken = hand.position + sway * closing_axis
            target = shaken + _vertical(0.01)
        return _move(plan, hand, target, OPEN)

    def _back_off(self, plan: Plan, hand: Hand) -> Action | str:
        """Go up and toward the base: an arm locked straight can't follow other commands."""
        is_closed = hand.width < 0.9 * grasps.OPENING
        is_holding = is_closed and self._touches_robot(plan)
        if self._memory.steps >= 10:
            return "carry" if is_holding else "approach"
        inward = self._scene.base - hand.planar
        distance = np.linalg.norm(inward)
        step = 0.05 * inward / distance
        return _action(
            offset=np.append(step, 0.03),
            turn=_orientation_error(hand, plan.grasp.yaw),
            gripper=CLOSE if is_holding else OPEN,
        )

    def _missing(self, plan: Plan) -> PlanarPoint:
        """Return the horizontal offset from the object's current position to its resting place."""
        origin = self._scene.origin(plan.goal.item)
        anchor = self._scene.anchor(plan.goal)
        offset = plan.resting_place.offset
        return anchor + offset - origin[:2]

    def _has_moved(self, plan: Plan) -> bool:
        """Return True if the object is not where the plan expects it."""
        origin = self._scene.origin(plan.goal.item)
        return _distance(origin, plan.origin) > 0.012

    def _is_lost(self, plan: Plan, hand: Hand) -> bool:
        """Return True if the fingers closed on nothing, or the object has left them.

        An object that only swings is still held.
        """
        origin = self._scene.origin(plan.goal.item)
        offset = origin - hand.position
        slip = _distance(offset, self._held)
        if hand.width < 0.001 or slip > 0.10:
            return True
        return slip > 0.02 and not self._touches_robot(plan)

    def _touches_robot(self, plan: Plan) -> bool:
        return self._scene.touches(plan.goal.item, robot=True)


def make(env: PrivilegedEnv) -> LiberoExpert:
    """Make the expert for a `LiberoEnv`."""
    return LiberoExpert(env)


def _is_above_grasp(plan: Plan, hand: Hand) -> bool:
    """Return True if the open, aligned hand is above the grasp."""
    grasp = plan.grasp
    lateral = _distance(grasp.position[:2], hand.planar)
    error = _orientation_error(hand, grasp.yaw)
    misalignment = float(np.linalg.norm(error))
    is_open = hand.width > 0.9 * grasps.OPENING
    is_aligned = lateral < 0.012 and misalignment < 0.12
    return is_open and is_aligned


def _pass_over(hand: Hand, goal: Vector, obstacles: Points, radius: float, lowest: float) -> Vector:
    """Return a waypoint that leads to `goal` over everything on the way.

    lowest: height of the lowest point of hand and load, which has to clear the obstacles.
    """
    target = goal[:2]
    corridor = Corridor.measure(
        hand.position,
        target,
        obstacles,
        radius,
    )
    below = hand.height - lowest
    ahead = corridor.height_within(0.14)
    height = max(goal[2], ahead + MARGIN + below)

    close_by = corridor.height_within(0.05)
    missing = close_by + MARGIN / 2 - lowest
    speed = 1.0 - missing / 0.03
    speed = min(max(speed, 0.0), 1.0)
    way = target - hand.planar
    planar = hand.planar + speed * way
    return np.append(planar, height)


def _move(plan: Plan, hand: Hand, target: Vector, gripper: float) -> Action:
    """Return the action toward a position, in the orientation of the grasp."""
    error = _orientation_error(hand, plan.grasp.yaw)
    return _action(target - hand.position, error, gripper)


def _action(offset: Vector, turn: Vector, gripper: float) -> Action:
    """Proportional control; a translation or rotation that is too large keeps its direction."""
    translation = _limit(GAIN * offset)
    rotation = _limit(TURN_GAIN * turn)
    action = np.concatenate(
        [
            translation,
            rotation,
            [gripper],
        ]
    )
    return action.astype(np.float32)


def _vertical(height: float) -> Vector:
    return np.array([0.0, 0.0, height])


def _limit(vector: Vector) -> Vector:
    largest = float(np.abs(vector).max())
    return vector / max(1.0, largest)


def _distance(a: Float64[np.ndarray, "D"], b: Float64[np.ndarray, "D"]) -> float:
    return float(np.linalg.norm(a - b))


def _orientation_error(hand: Hand, yaw: float) -> Vector:
    """Return the rotation vector, in the world, that points the hand down with a given yaw.

    The closing axis turns to `yaw` or to `yaw + pi`, whichever is nearer.

    Half the sum of the cross products of current and desired axes: exact to second order, and of
    the right sign everywhere.
    """
    nearest = hand.yaw + grasps.yaw_difference(yaw, hand.yaw)
    desired = _downward(nearest)
    error = np.zeros(3)
    for axis in range(3):
        error += np.cross(
            hand.rotation[:, axis],
            desired[:, axis],
        )
    return 0.5 * error


def _downward(yaw: float) -> Float64[np.ndarray, "3 3"]:
    """Return the rotation of a hand that points down."""
    c = np.cos(yaw)
    s = np.sin(yaw)
    return np.array(
        [
            [c, s, 0.0],
            [s, -c, 0.0],
            [0.0, 0.0, -1.0],
        ]
    )
