"""Meta-World, the light environment: a Sawyer arm at a table, 4 numbers an action, hundreds of control steps a second without a GPU.

Actions: x, y, z as a displacement of the hand's target (1 is 1 cm), and the gripper (-1 opens, +1 closes). Proprioception: the hand's x, y, z
in metres, and the gripper's opening in [0, 1]. Source: McLean et al., "Meta-World+", 2025, package `metaworld` 3.1.
"""

# Meta-World's switches for seeded resets are private attributes; mujoco's names are compiled, without stubs.
# ruff: noqa: SLF001
# pyright: reportAttributeAccessIssue=false

import copy
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
"""Tasks with their instructions, a dict a scene: where there are several, only the instruction (and the initial state) tells them apart.

Meta-World has 50 tasks and no instructions. These are those whose scripted expert is short and solves at least 9 of 10 initial states, with
noise on its actions too.
"""

TASKS: dict[str, str] = {
    task: instruction for scene in SCENES for task, instruction in scene.items()
}
"""Task: its instruction."""

_NO_OP = np.array(
    [0, 0, 0, -1], np.float32
)  # stay, gripper open: what Meta-World's own reset does with the hand


def make(params: EnvironmentParams) -> "MetaworldEnv":
    """The environment of `environment.tasks`, drawn by `environment.cameras`. ValueError for a task or a camera that does not exist.

    `environment.stepping` changes nothing here: Meta-World has one way of stepping.
    """
    for task in params.tasks:
        if task not in TASKS:
            raise ValueError(
                f"environment.tasks has {task!r}; expected Meta-World tasks with a reliable expert: {sorted(TASKS)}"
            )
    return MetaworldEnv(params, graphics.use_backend())


class MetaworldEnv:
    """Meta-World behind the `Env` protocol.

    raw:             Meta-World's own environment of the present task. Its reset is complete: a test compares the whole state, the model's
                     arrays and what follows with those of an environment that has just been made.
    raw_observation: Meta-World's 39 privileged numbers after the last control step, for scripted experts only.
    """

    action_dim = 4
    proprio_dim = 4
    raw: "SawyerXYZEnv"
    raw_observation: Float64[np.ndarray, "39"]

    def __init__(self, params: EnvironmentParams, backend: str) -> None:
        self._params = params
        self._backend = backend
        self._loaded: dict[str, SawyerXYZEnv] = {}
        self._painters: dict[
            str, _Painter
        ] = {}  # by scene: what is on the graphics card is the same for all its tasks
        self.task = ""
        self._step = 0
        self._scene(params.tasks[0])

    def reset(self, placement: Placement) -> Observation:
        """Start the episode of `placement`. ValueError for an unknown task, or an evaluation index outside 0 ... 49."""
        _check(placement)
        self._scene(placement.task)
        self.task, self._step = placement.task, 0
        self.raw = self._loaded[placement.task]
        self.raw_observation = _start(self.raw, placement.seed)
        for _ in range(self._params.settle):
            self._act(_NO_OP)
        return self._observe()

    def advance(self, actions: Float32[np.ndarray, "S 4"], observe_every: int) -> Advance:
        """Up to S control steps, as the protocol says. ValueError for another shape; RuntimeError where the simulation diverges."""
        if actions.ndim != 2 or actions.shape[1] != self.action_dim:
            raise ValueError(f"actions have shape {actions.shape}; expected [S, {self.action_dim}]")
        if not np.isfinite(actions).all():
            raise ValueError(
                f"actions hold {actions[~np.isfinite(actions)][0]}; expected finite numbers in [-1, 1]"
            )
        if not self.task:
            raise RuntimeError("advance before the first reset: there is no episode")
        observations: list[Observation] = []
        success, done = False, 0
        for action in actions:
            success, done = self._act(action), done + 1
            self._step += 1
            if observe_every and self._step % observe_every == 0:
                observations.append(self._observe())
            if success:
                break
        return Advance(done, success, tuple(observations))

    def describe(self) -> Mapping[str, str]:
        """Versions, the graphics backend, and what success means."""
        return {
            "metaworld": version("metaworld"),
            "mujoco": version("mujoco"),
            "graphics": self._backend,
            "stepping": "one mode only, Meta-World's own",
            "horizon": "control steps after settling; the episode stops at the first success",
        }

    def close(self) -> None:
        """Free the graphics contexts; an episode cannot go on afterwards. Calling it again does nothing."""
        for painter in self._painters.values():
            painter.close()
        self._painters.clear()
        self._loaded.clear()
        self.task = ""

    def _scene(self, task: str) -> None:
        """Have `task`, and a painter for its scene, loaded."""
        if task not in self._loaded:
            self._loaded[task] = _load(task)
        scene = self._loaded[task].model_name
        if scene not in self._painters:
            self._painters[scene] = _Painter(self._loaded[task].model, self._params, self._backend)

    def _act(self, action: Float32[np.ndarray, "4"]) -> bool:
        """One control step; whether the task's predicate holds after it."""
        self.raw_observation, _, _, _, info = self.raw.step(np.clip(action, -1, 1))
        if _diverged(self.raw.data):
            raise RuntimeError(f"the simulation of {self.task} diverged after step {self._step}")
        return bool(info["success"])

    def _observe(self) -> Observation:
        frames = self._painters[self.raw.model_name].draw(self.raw.model, self.raw.data)
        return Observation(frames, self.raw_observation[:4].astype(np.float32), TASKS[self.task])


class _Painter:
    """The cameras of one scene, drawn off screen: an OpenGL context that holds the scene's meshes and textures."""

    def __init__(self, model: "MjModel", params: EnvironmentParams, backend: str) -> None:
        import mujoco

        self._fast = params.render == "fast"
        self._cameras = [_camera_id(model, name) for name in params.cameras]
        self._rect = mujoco.MjrRect(0, 0, params.image_size, params.image_size)
        self._context = _gl_context(backend, params.image_size)
        self._context.make_current()
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        self._option = mujoco.MjvOption()
        if self._fast:  # software OpenGL pays for samples and extra passes, not for pixels
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._buffers = mujoco.MjrContext(
            _buffered(model, params), mujoco.mjtFontScale.mjFONTSCALE_100
        )
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._buffers)

    def draw(self, model: "MjModel", data: "MjData") -> UInt8[np.ndarray, "C H W 3"]:
        """One upright frame a camera."""
        self._context.make_current()
        return np.stack([self._frame(model, data, camera) for camera in self._cameras])

    def close(self) -> None:
        """Free the context."""
        self._context.make_current()
        self._buffers.free()
        self._context.free()

    def _frame(self, model: "MjModel", data: "MjData", camera: int) -> UInt8[np.ndarray, "H W 3"]:
        import mujoco

        view = mujoco.MjvCamera()
        view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, camera
        mujoco.mjv_updateScene(
            model, data, self._option, None, view, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        mujoco.mjr_render(self._rect, self._scene, self._buffers)
        pixels = np.empty((self._rect.height, self._rect.width, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, self._rect, self._buffers)
        return _upright(pixels[::-1], model, data, camera)  # OpenGL's first row is the lowest


def _upright(
    picture: UInt8[np.ndarray, "H W 3"], model: "MjModel", data: "MjData", camera: int
) -> UInt8[np.ndarray, "H W 3"]:
    """`picture`, turned by half a circle if its camera hangs upside down in the room, as all of Meta-World's `corner` cameras do."""
    fixed = model.cam_bodyid[camera] == 0
    up = data.cam_xmat[camera].reshape(3, 3)[2, 1]  # z of the picture's upward direction
    return picture[::-1, ::-1] if fixed and up < -0.5 else picture


def _diverged(data: "MjData") -> bool:
    """MuJoCo starts over silently where a position, velocity or acceleration is not finite, and only counts it."""
    import mujoco

    kinds = (
        mujoco.mjtWarning.mjWARN_BADQPOS,
        mujoco.mjtWarning.mjWARN_BADQVEL,
        mujoco.mjtWarning.mjWARN_BADQACC,
    )
    return any(data.warning[kind].number for kind in kinds)


def _camera_id(model: "MjModel", name: str) -> int:
    known = [model.camera(i).name for i in range(model.ncam)]
    if name not in known:
        raise ValueError(f"environment.cameras has {name!r}; expected one of {known}")
    return known.index(name)


def _buffered(model: "MjModel", params: EnvironmentParams) -> "MjModel":
    """A copy of `model` that asks for buffers of the frame's size; in `fast` mode without multisampling and without shadow maps."""
    asking = copy.copy(model)
    asking.vis.global_.offwidth = asking.vis.global_.offheight = params.image_size
    if params.render == "fast":
        asking.vis.quality.offsamples = asking.vis.quality.shadowsize = 0
    return asking


def _gl_context(backend: str, size: int) -> Any:
    """MuJoCo's own off-screen context. `mujoco.GLContext` would be that of whoever imported mujoco first."""
    if backend == "egl":
        from mujoco.egl import GLContext
    elif backend == "osmesa":
        from mujoco.osmesa import GLContext
    else:
        from mujoco import GLContext
    return GLContext(size, size)


def _check(placement: Placement) -> None:
    if placement.task not in TASKS:
        raise ValueError(f"placement.task is {placement.task!r}; expected one of {sorted(TASKS)}")
    # Meta-World ships no fixed initial states: ours are the first so many resets seeded by `Placement.seed`.
    if placement.index < 0 or (
        placement.split == "evaluation" and placement.index >= EVALUATION_STATES
    ):
        wanted = (
            f"0 ... {EVALUATION_STATES - 1}"
            if placement.split == "evaluation"
            else "a seed of 0 or more"
        )
        raise ValueError(
            f"placement.index is {placement.index}; expected {wanted} ({placement.split} of {placement.task})"
        )


def _load(task: str) -> "SawyerXYZEnv":
    """Meta-World's environment of `task`, never reset: the goal is observed (the experts need it), resets draw from its own generator."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    raw = ALL_V3_ENVIRONMENTS[task]()
    raw._partially_observable = False
    del raw.sawyer_observation_space  # cached with the goal hidden; it would clip the goal to zero
    raw._set_task_called = True
    raw._freeze_rand_vec, raw.seeded_rand_vec = False, True
    raw.max_path_length = (
        2**31
    )  # the horizon is the rollout's business; Meta-World raises after 500 steps
    return raw


def _start(raw: "SawyerXYZEnv", seed: int) -> Float64[np.ndarray, "39"]:
    """Reset `raw` from `seed` and return the first observation.

    Meta-World moves bodies at the end of its reset without computing where that leaves the scene, so its own first observation, and a
    picture drawn at this point, show the objects elsewhere. Hence the forward pass.
    """
    import mujoco

    raw.seed(seed)
    raw.reset()
    mujoco.mj_forward(raw.model, raw.data)
    raw._prev_obs = raw._get_curr_obs_combined_no_goal()
    return raw._get_obs()
