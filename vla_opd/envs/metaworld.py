"""Meta-World, the light environment: a Sawyer arm at a table.

It runs hundreds of control steps per second without a GPU.

Actions [4]: displacement of the hand's target along x, y, z (1 is 1 cm), and the gripper (-1 opens,
+1 closes).
Proprioception [4]: the hand's x, y, z in metres, and the gripper's opening in [0, 1].

Source: McLean et al., "Meta-World+", 2025, package `metaworld` 3.1.
"""

# Meta-World's switches for seeded resets are private; mujoco's names are compiled, without stubs.
# ruff: noqa: SLF001
# pyright: reportAttributeAccessIssue=false

import copy
import functools
import operator
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from vla_opd.envs import graphics
from vla_opd.envs.protocol import Advance, Observation, Placement
from vla_opd.params.section import EVALUATION_STATES
from vla_opd.params.stages import EnvironmentParams

if TYPE_CHECKING:
    from metaworld.sawyer_xyz_env import SawyerXYZEnv
    from mujoco import MjData, MjModel

SCENES: tuple[dict[str, str], ...] = (
    {"window-open-v3": "open the window", "window-close-v3": "close the window"},
    {"drawer-open-v3": "open the drawer", "drawer-close-v3": "close the drawer"},
    {"door-open-v3": "open the door", "door-close-v3": "close the door"},
    {"door-lock-v3": "lock the door", "door-unlock-v3": "unlock the door"},
    {"faucet-open-v3": "turn on the faucet", "faucet-close-v3": "turn off the faucet"},
    {"handle-press-v3": "press the handle down", "handle-pull-v3": "pull the handle up"},
    {
        "handle-press-side-v3": "press the side handle down",
        "handle-pull-side-v3": "pull the side handle up",
    },
    {
        "plate-slide-v3": "slide the plate into the goal",
        "plate-slide-back-v3": "slide the plate out of the goal",
    },
    {
        "plate-slide-side-v3": "slide the plate sideways into the goal",
        "plate-slide-back-side-v3": "slide the plate sideways out of the goal",
    },
    {
        "coffee-button-v3": "press the button of the coffee machine",
        "coffee-push-v3": "push the mug under the coffee machine",
        "coffee-pull-v3": "pull the mug away from the coffee machine",
    },
    {"reach-v3": "reach the red target"},
    {"push-v3": "push the block to the green target"},
    {"pick-place-v3": "pick up the block and bring it to the blue target"},
    {"reach-wall-v3": "reach the red target behind the wall"},
    {"push-wall-v3": "push the block around the wall"},
    {"button-press-v3": "press the button on the front of the box"},
    {"button-press-wall-v3": "press the button behind the wall"},
    {"button-press-topdown-v3": "press the button on top of the box"},
    {"button-press-topdown-wall-v3": "press the button on top of the brick box"},
    {"dial-turn-v3": "turn the dial"},
    {"lever-pull-v3": "pull the lever up"},
    {"hammer-v3": "hammer the nail into the wall"},
    {"sweep-v3": "sweep the block off the table"},
    {"assembly-v3": "put the ring onto the peg"},
)
"""Task: instruction, one dict per scene.

Tasks that share a scene are told apart only by the instruction (and the initial state).

Meta-World has 50 tasks and no instructions. This selection holds those whose scripted expert is
short and solves at least 9 of 10 initial states, also with noise on its actions.
"""

TASKS: dict[str, str] = functools.reduce(operator.or_, SCENES)
"""Task: instruction, over all scenes."""

_NO_OP = np.array([0, 0, 0, -1], np.float32)
"""Stay, with the gripper open, as Meta-World's own reset does."""


def make(params: EnvironmentParams) -> "MetaworldEnv":
    """Make the environment of `environment.tasks`, rendered by `environment.cameras`.

    `environment.stepping` changes nothing here: Meta-World has one way of stepping.

    Raises:
        ValueError: a task or a camera does not exist.
    """
    for task in params.tasks:
        if task not in TASKS:
            raise ValueError(
                f"environment.tasks has {task!r}; "
                f"expected Meta-World tasks with a reliable expert: {sorted(TASKS)}"
            )
    return MetaworldEnv(params, graphics.use_backend())


class MetaworldEnv:
    """Meta-World behind the `Env` protocol.

    raw:             Meta-World's own environment of the current task. Its reset is complete: a test
                     compares the whole state, the model's arrays and the following steps with
                     those of a new environment.
    raw_observation: Meta-World's 39 privileged numbers after the last control step, for scripted
                     experts only.
    """

    action_dim = 4
    proprio_dim = 4
    raw: "SawyerXYZEnv"
    raw_observation: Float64[np.ndarray, "39"]

    def __init__(self, params: EnvironmentParams, backend: str) -> None:
        self._params = params
        self._backend = backend
        self._loaded: dict[str, SawyerXYZEnv] = {}
        # By scene: the tasks of a scene share their meshes and textures on the graphics card.
        self._renderers: dict[str, _Renderer] = {}
        self.task = ""
        self._step = 0
        self._load_task(params.tasks[0])

    def reset(self, placement: Placement) -> Observation:
        """Start the episode of `placement`.

        Raises:
            ValueError: the task is unknown, or the index of an evaluation is not 0 ... 49.
        """
        _check_placement(placement)
        self._load_task(placement.task)
        self.task = placement.task
        self._step = 0
        self.raw = self._loaded[placement.task]
        self.raw_observation = _reset_raw(self.raw, placement.seed)
        for _ in range(self._params.settle):
            self._act(_NO_OP)
        return self._observe()

    def advance(self, actions: Float32[np.ndarray, "S 4"], observe_every: int) -> Advance:
        """Execute up to S control steps, as specified by the protocol.

        Raises:
            ValueError: the actions have another shape or are not finite.
            RuntimeError: the simulation diverges, or there was no reset.
        """
        self._check_actions(actions)
        if not self.task:
            raise RuntimeError("advance before the first reset: there is no episode")
        observations: list[Observation] = []
        success = False
        executed = 0
        for action in actions:
            success = self._act(action)
            executed += 1
            self._step += 1
            if observe_every and self._step % observe_every == 0:
                observations.append(self._observe())
            if success:
                break
        return Advance(executed, success, tuple(observations))

    def describe(self) -> Mapping[str, str]:
        """Return versions, the graphics backend, and the convention for the horizon."""
        return {
            "metaworld": version("metaworld"),
            "mujoco": version("mujoco"),
            "graphics": self._backend,
            "stepping": "one mode only, Meta-World's own",
            "horizon": "control steps after settling; the episode stops at the first success",
        }

    def close(self) -> None:
        """Free the graphics contexts, which ends the episode. Calling it again does nothing."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._loaded.clear()
        self.task = ""

    def _load_task(self, task: str) -> None:
        """Load `task`, and a renderer for its scene, unless they are loaded already."""
        if task not in self._loaded:
            self._loaded[task] = _load(task)
        raw = self._loaded[task]
        scene = raw.model_name
        if scene not in self._renderers:
            self._renderers[scene] = _Renderer(raw.model, self._params, self._backend)

    def _check_actions(self, actions: Float32[np.ndarray, "S 4"]) -> None:
        if actions.ndim != 2 or actions.shape[1] != self.action_dim:
            raise ValueError(f"actions have shape {actions.shape}; expected [S, {self.action_dim}]")
        is_finite = np.isfinite(actions)
        if not is_finite.all():
            raise ValueError(
                f"actions hold {actions[~is_finite][0]}; expected finite numbers in [-1, 1]"
            )

    def _act(self, action: Float32[np.ndarray, "4"]) -> bool:
        """Execute one control step and return the task's predicate after it."""
        clipped = np.clip(action, -1, 1)
        self.raw_observation, _, _, _, info = self.raw.step(clipped)
        if _has_diverged(self.raw.data):
            raise RuntimeError(f"the simulation of {self.task} diverged after step {self._step}")
        return bool(info["success"])

    def _observe(self) -> Observation:
        raw = self.raw
        renderer = self._renderers[raw.model_name]
        frames = renderer.draw(raw.model, raw.data)
        proprio = self.raw_observation[:4].astype(np.float32)
        return Observation(frames, proprio, TASKS[self.task])


class _Renderer:
    """Off-screen rendering of one scene's cameras.

    Owns an OpenGL context with the scene's meshes and textures.
    """

    def __init__(self, model: "MjModel", params: EnvironmentParams, backend: str) -> None:
        import mujoco

        self._cameras = [_camera_id(model, name) for name in params.cameras]
        size = params.image_size
        self._rect = mujoco.MjrRect(0, 0, size, size)
        self._context = _gl_context(backend, size)
        self._context.make_current()
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        self._option = mujoco.MjvOption()
        if params.render == "fast":  # the time of software OpenGL goes to samples and extra passes
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self._scene.flags[flag] = False
        resized = _with_buffer_size(model, params)
        self._buffers = mujoco.MjrContext(resized, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._buffers)

    def draw(self, model: "MjModel", data: "MjData") -> UInt8[np.ndarray, "C H W 3"]:
        """Draw one upright frame per camera."""
        self._context.make_current()
        frames = [self._draw_frame(model, data, camera) for camera in self._cameras]
        return np.stack(frames)

    def close(self) -> None:
        """Free the context."""
        self._context.make_current()
        self._buffers.free()
        self._context.free()

    def _draw_frame(
        self, model: "MjModel", data: "MjData", camera: int
    ) -> UInt8[np.ndarray, "H W 3"]:
        import mujoco

        view = mujoco.MjvCamera()
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        view.fixedcamid = camera
        mujoco.mjv_updateScene(
            model,
            data,
            self._option,
            None,
            view,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )
        mujoco.mjr_render(self._rect, self._scene, self._buffers)
        shape = (self._rect.height, self._rect.width, 3)
        pixels = np.empty(shape, np.uint8)
        mujoco.mjr_readPixels(pixels, None, self._rect, self._buffers)
        image = pixels[::-1]  # OpenGL's first row is the lowest
        if _is_upside_down(model, data, camera):
            return image[::-1, ::-1]
        return image


def _is_upside_down(model: "MjModel", data: "MjData", camera: int) -> bool:
    """Detect a fixed camera that hangs upside down, as Meta-World's `corner` cameras do."""
    is_fixed = model.cam_bodyid[camera] == 0
    rotation = data.cam_xmat[camera].reshape(3, 3)
    upward = rotation[2, 1]  # z of the image's upward direction
    return bool(is_fixed and upward < -0.5)


def _has_diverged(data: "MjData") -> bool:
    """Detect a position, velocity or acceleration that was not finite.

    MuJoCo then resets the state silently, and only counts a warning.
    """
    import mujoco

    kinds = (
        mujoco.mjtWarning.mjWARN_BADQPOS,
        mujoco.mjtWarning.mjWARN_BADQVEL,
        mujoco.mjtWarning.mjWARN_BADQACC,
    )
    return any(data.warning[kind].number for kind in kinds)


def _camera_id(model: "MjModel", name: str) -> int:
    names = [model.camera(number).name for number in range(model.ncam)]
    if name not in names:
        raise ValueError(f"environment.cameras has {name!r}; expected one of {names}")
    return names.index(name)


def _with_buffer_size(model: "MjModel", params: EnvironmentParams) -> "MjModel":
    """Copy `model` and set its off-screen buffers to the size of a frame.

    In `fast` mode, multisampling and shadow maps are off.
    """
    resized = copy.copy(model)
    resized.vis.global_.offwidth = params.image_size
    resized.vis.global_.offheight = params.image_size
    if params.render == "fast":
        resized.vis.quality.offsamples = 0
        resized.vis.quality.shadowsize = 0
    return resized


def _gl_context(backend: str, size: int) -> Any:
    """Make MuJoCo's off-screen context for `backend`.

    `mujoco.GLContext` would be that of the backend chosen when mujoco was first imported.
    """
    if backend == "egl":
        from mujoco.egl import GLContext
    elif backend == "osmesa":
        from mujoco.osmesa import GLContext
    else:
        from mujoco import GLContext
    return GLContext(size, size)


def _check_placement(placement: Placement) -> None:
    if placement.task not in TASKS:
        raise ValueError(f"placement.task is {placement.task!r}; expected one of {sorted(TASKS)}")
    # Meta-World ships no fixed initial states: ours are resets seeded by `Placement.seed`.
    expected = "a seed of 0 or more"
    is_valid = placement.index >= 0
    if placement.split == "evaluation":
        expected = f"0 ... {EVALUATION_STATES - 1}"
        is_valid = 0 <= placement.index < EVALUATION_STATES
    if not is_valid:
        raise ValueError(
            f"placement.index is {placement.index}; "
            f"expected {expected} ({placement.split} of {placement.task})"
        )


def _load(task: str) -> "SawyerXYZEnv":
    """Make Meta-World's environment of `task`, without a reset.

    The goal is observed, since the experts need it; resets draw from the environment's own
    generator.
    """
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    raw = ALL_V3_ENVIRONMENTS[task]()
    raw._partially_observable = False
    # The cached space was made with the goal hidden; it would clip the goal to zero.
    del raw.sawyer_observation_space
    raw._set_task_called = True
    raw._freeze_rand_vec = False
    raw.seeded_rand_vec = True
    # Meta-World raises after 500 steps; the rollout enforces the horizon.
    raw.max_path_length = 2**31
    return raw


def _reset_raw(raw: "SawyerXYZEnv", seed: int) -> Float64[np.ndarray, "39"]:
    """Reset `raw` from `seed` and return the first observation.

    Meta-World moves bodies at the end of its reset without a forward pass, so its own first
    observation, and any image rendered then, show the objects elsewhere. This function adds the
    forward pass.
    """
    import mujoco

    raw.seed(seed)
    raw.reset()
    mujoco.mj_forward(raw.model, raw.data)
    raw._prev_obs = raw._get_curr_obs_combined_no_goal()
    return raw._get_obs()
