"""A point mass that has to reach a goal: instant, numpy only, and able to crash, hang and complain on demand.

A task is a plain name, or `"<trouble>:<index>:<marker file>"`: the trouble strikes in the episode of that index, in the middle of it, unless the
marker file exists; it is written first, so that the trouble strikes once. With an empty marker it strikes every time.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla_opd.envs.protocol import Advance, Env, Observation, Placement
from vla_opd.params.stages import EnvironmentParams
from vla_opd.simulation.jobs import Outcome, outcome

FAMILY = "tests.vla_opd.fake_env:make"
EXPERT = "tests.vla_opd.fake_env:make_expert"
SPEED = 0.05  # of a unit action, in units a step
TOLERANCE = 0.15
STRIKE = 3  # the control step in which trouble strikes


class PointMass:
    """xyz in [-1, 1]; actions are xyz and an idle gripper; success is to be within TOLERANCE of the goal."""

    action_dim = 4
    proprio_dim = 6

    def __init__(self, params: EnvironmentParams) -> None:
        self.params = params
        self.placement: Placement | None = None
        self.position = self.goal = np.zeros(3)
        self.steps = 0

    def reset(self, placement: Placement) -> Observation:
        if placement.task == "mistake":
            raise ValueError("environment.tasks has 'mistake'; expected another")
        random = np.random.default_rng(placement.seed)
        self.placement, self.steps = placement, 0
        self.position, self.goal = random.uniform(-1, 1, 3), random.uniform(-1, 1, 3)
        return self.look()

    def advance(self, actions: np.ndarray, observe_every: int) -> Advance:
        observations = []
        for n, action in enumerate(actions, start=1):
            self.position = self.position + SPEED * np.clip(action[:3], -1, 1)
            self.steps += 1
            if self.steps == STRIKE:
                self.strike()
            if observe_every and self.steps % observe_every == 0:
                observations.append(self.look())
            if self.success:
                return Advance(n, success=True, observations=tuple(observations))
        return Advance(len(actions), success=False, observations=tuple(observations))

    @property
    def success(self) -> bool:
        return bool(np.linalg.norm(self.goal - self.position) < TOLERANCE)

    def look(self) -> Observation:
        size, cameras = self.params.image_size, len(self.params.cameras)
        picture = (np.resize(self.position, (size, size, 3)) * 1e4).astype(np.int64) % 256
        frames = np.stack([(picture + camera) % 256 for camera in range(cameras)]).astype(np.uint8)
        return Observation(
            frames,
            np.concatenate([self.position, self.goal]).astype(np.float32),
            f"reach {self.placement.task}",
        )

    def strike(self) -> None:
        trouble, _, rest = self.placement.task.partition(":")
        index, _, marker = rest.partition(":")
        if (
            trouble not in TROUBLES
            or int(index) != self.placement.index
            or (marker and Path(marker).exists())
        ):
            return
        if marker:
            Path(marker).touch()
        TROUBLES[trouble](self)

    def describe(self) -> Mapping[str, str]:
        return {}

    def close(self) -> None:
        pass


def _raise(_env: PointMass) -> None:
    raise RuntimeError("the solver diverged")


def _diverge(env: PointMass) -> None:
    env.position = env.position * np.nan


TROUBLES = {
    "exit": lambda _: os._exit(3),
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda _: time.sleep(3600),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "raise": _raise,
    "nan": _diverge,
}


class GoStraight:
    """Heads for the goal."""

    def __init__(self, env: PointMass) -> None:
        self.env = env

    def reset(self) -> None:
        self.gripper = 1.0

    def act(self) -> np.ndarray:
        ahead = self.env.goal - self.env.position
        return np.append(ahead / np.linalg.norm(ahead), self.gripper).astype(np.float32)


@dataclass(frozen=True)
class Inspect:
    """A command that tells about the worker itself, in place of an instruction: its process id, and what was asked for."""

    what: str

    def __call__(self, env: Env) -> Outcome:
        facts = {
            "modules": lambda: " ".join(sorted(sys.modules)),
            "threads": lambda: os.environ["OMP_NUM_THREADS"],
            "interrupt": lambda: signal.getsignal(signal.SIGINT).name,
        }
        look = Observation(
            np.zeros((1, 16, 16, 3), np.uint8),
            np.zeros(1, np.float32),
            f"{os.getpid()} {facts[self.what]()}",
        )
        return outcome(0, [look], np.zeros(1, np.int32), success=False)


def make(params: EnvironmentParams) -> PointMass:
    return PointMass(params)


def make_expert(env: PointMass) -> GoStraight:
    return GoStraight(env)
