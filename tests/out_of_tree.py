"""A family that the package does not know, as a user would add one: `environment.family: tests.out_of_tree:make`.

A white square walks on a table on which three coloured squares lie; the instruction says which of them it is to reach. Pure numpy, a few
microseconds a step, a few dozen steps an episode.
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
    """ValueError for a task that is not a colour, or a camera that does not exist."""
    for field, wanted, known in (
        ("tasks", params.tasks, tuple(COLOURS)),
        ("cameras", params.cameras, CAMERAS),
    ):
        if unknown := set(wanted) - set(known):
            raise ValueError(f"environment.{field} has {sorted(unknown)}; expected some of {known}")
    return PointMass(params)


def expert(env: "PointMass") -> "Straight":
    """The straight line to the square that the instruction names."""
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
        """From the hand to the square that is wanted."""
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
        self.task, self._step = placement.task, 0
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
        done, success = 0, False
        for action in actions:
            self.hand = np.clip(self.hand + STRIDE * np.clip(action, -1, 1), -1, 1)
            done, self._step, success = (
                done + 1,
                self._step + 1,
                bool(np.abs(self.offset).max() < NEAR),
            )
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
        frame = self._picture()
        frames = [
            frame if camera == "agentview" else frame[:, ::-1] for camera in self._params.cameras
        ]
        return Observation(
            np.stack(frames), self.hand.astype(np.float32), f"move to the {self.task} square"
        )

    def _picture(self) -> UInt8[np.ndarray, "H W 3"]:
        size = self._params.image_size
        picture = np.full((size, size, 3), 90, np.uint8)
        for name, centre in self.squares.items():
            _fill(picture, centre, COLOURS[name], half=0.12)
        _fill(picture, self.hand, (255, 255, 255), half=0.08)
        return picture


class Straight:
    """Proportional control, capped at one stride."""

    def __init__(self, env: PointMass) -> None:
        self._env = env

    def reset(self) -> None:
        """Nothing to plan."""

    def act(self) -> Float32[np.ndarray, "2"]:
        return np.clip(self._env.offset / STRIDE, -1, 1).astype(np.float32)


def _fill(
    picture: UInt8[np.ndarray, "H W 3"], centre: Point, colour: tuple[int, int, int], half: float
) -> None:
    """Draw a square of half width `half` around `centre`; y points up."""
    size = len(picture)
    x, y = (
        (centre * (1, -1) * 0.85 + 1) / 2 * size
    )  # a margin, so that a centre crop still sees the table
    reach = half * size / 2
    rows, columns = (slice(max(round(c - reach), 0), max(round(c + reach), 0)) for c in (y, x))
    picture[rows, columns] = colour
