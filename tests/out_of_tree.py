"""An environment from outside the package: `environment.family: tests.out_of_tree:make`.

A white square moves on a table with three colored squares; the instruction names the one to reach.
Pure numpy, a few microseconds per step, a few dozen steps per episode.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from vla_opd.envs.protocol import Advance, Observation, Placement
from vla_opd.params.stages import EnvironmentParams

Point = Float64[np.ndarray, "2"]
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 60, 220)}
CAMERAS = ("agentview", "mirrored")
STRIDE = 0.06
NEAR = 0.08
EVALUATION_STATES = 50


def make(params: EnvironmentParams) -> "PointMass":
    """Make the environment. ValueError for a task that is no color, or an unknown camera."""
    for field, names, expected in (
        ("tasks", params.tasks, tuple(COLOURS)),
        ("cameras", params.cameras, CAMERAS),
    ):
        unknown = sorted(set(names) - set(expected))
        if unknown:
            raise ValueError(f"environment.{field} has {unknown}; expected some of {expected}")
    return PointMass(params)


def expert(env: "PointMass") -> "Straight":
    """Make the expert that moves straight to the square that the instruction names."""
    return Straight(env)


class PointMass:
    """Positions in [-1, 1]^2; an action in [-1, 1]^2 moves the hand by `STRIDE` times itself."""

    action_dim = 2
    proprio_dim = 2

    def __init__(self, params: EnvironmentParams) -> None:
        self._params = params
        self._step = 0
        self.task = ""
        self.hand: Point = np.zeros(2)
        self.squares: dict[str, Point] = {}

    @property
    def offset(self) -> Point:
        """The vector from the hand to the square to reach."""
        return self.squares[self.task] - self.hand

    def reset(self, placement: Placement) -> Observation:
        if placement.task not in COLOURS:
            raise ValueError(
                f"placement.task is {placement.task!r}; expected one of {sorted(COLOURS)}"
            )
        if placement.index < 0 or (
            placement.split == "evaluation" and placement.index >= EVALUATION_STATES
        ):
            raise ValueError(
                f"placement.index is {placement.index}; expected 0 ... {EVALUATION_STATES - 1}"
            )
        generator = np.random.default_rng(placement.seed)
        self.task = placement.task
        self._step = 0
        self.hand = np.array([0.0, -0.8]) + generator.uniform(-0.1, 0.1, 2)
        columns = generator.permutation([-0.65, 0.0, 0.65])  # apart, whatever the jitter
        self.squares = {
            name: np.array([x, 0.3]) + generator.uniform(-0.15, 0.15, 2)
            for name, x in zip(COLOURS, columns, strict=True)
        }
        return self._observe()

    def advance(self, actions: Float32[np.ndarray, "S 2"], observe_every: int) -> Advance:
        if actions.ndim != 2 or actions.shape[1] != self.action_dim:
            raise ValueError(f"actions have shape {actions.shape}; expected [S, {self.action_dim}]")
        observations: list[Observation] = []
        done = 0
        success = False
        for action in actions:
            self.hand = np.clip(self.hand + STRIDE * np.clip(action, -1, 1), -1, 1)
            self._step += 1
            done += 1
            success = bool(np.abs(self.offset).max() < NEAR)
            if observe_every and self._step % observe_every == 0:
                observations.append(self._observe())
            if success:
                break
        return Advance(done, success, tuple(observations))

    def describe(self) -> Mapping[str, str]:
        return {
            "point_mass": "1",
            "horizon": "control steps; the episode stops at the first success",
        }

    def close(self) -> None:
        """Nothing to release."""

    def _observe(self) -> Observation:
        image = self._draw()
        views = {"agentview": image, "mirrored": image[:, ::-1]}
        frames = [views[camera] for camera in self._params.cameras]
        return Observation(
            frames=np.stack(frames),
            proprio=self.hand.astype(np.float32),
            instruction=f"move to the {self.task} square",
        )

    def _draw(self) -> UInt8[np.ndarray, "H W 3"]:
        size = self._params.image_size
        image = np.full((size, size, 3), 90, np.uint8)
        for name, centre in self.squares.items():
            _fill(image, centre, COLOURS[name], half=0.12)
        _fill(image, self.hand, (255, 255, 255), half=0.08)
        return image


class Straight:
    """Proportional control, capped at one stride."""

    def __init__(self, env: PointMass) -> None:
        self._env = env

    def reset(self) -> None:
        """Nothing to plan."""

    def act(self) -> Float32[np.ndarray, "2"]:
        return np.clip(self._env.offset / STRIDE, -1, 1).astype(np.float32)


def _fill(
    image: UInt8[np.ndarray, "H W 3"], centre: Point, colour: tuple[int, int, int], half: float
) -> None:
    """Draw a square of half width `half` around `centre`; y points up."""
    size = len(image)
    # A margin, so that a center crop still shows the table.
    x, y = (centre * (1, -1) * 0.85 + 1) / 2 * size
    reach = half * size / 2
    rows = _pixels(y, reach)
    columns = _pixels(x, reach)
    image[rows, columns] = colour


def _pixels(middle: float, reach: float) -> slice:
    first = max(round(middle - reach), 0)
    last = max(round(middle + reach), 0)
    return slice(first, last)
