"""Off-screen rendering of a MuJoCo scene, stock or simplified.

Imported only by `env.LiberoEnv`, in the process that owns the simulator: importing mujoco loads
OpenGL.
"""

# mujoco's names are compiled, without stubs.
# pyright: reportAttributeAccessIssue=false

import atexit
import importlib
import os

import mujoco
import numpy as np
from jaxtyping import UInt8

_MAX_GEOMS = 1000  # robosuite's limit
_STOCK_BUFFER = (640, 480)


class Window:
    """An OpenGL context without a screen.

    One serves all renderers of an environment, one after the other, since drivers warm up in it.
    """

    def __init__(self) -> None:
        # By name: `mujoco.GLContext` is that of the backend chosen at mujoco's first import.
        backend = os.environ["MUJOCO_GL"]
        module = importlib.import_module(f"mujoco.{backend}")
        self._window = module.GLContext(*_STOCK_BUFFER)
        # Registered after mujoco's own hook, so it runs first: a context can't outlive its display.
        atexit.register(self._window.free)

    def make_current(self) -> None:
        """Draw here from now on; another environment may have made its context current."""
        self._window.make_current()

    def close(self) -> None:
        """Free the context and everything in it."""
        atexit.unregister(self._window.free)
        self._window.free()


class Renderer:
    """Renderer of one model's cameras into square frames. It reads `data` and never changes it.

    exact: render robosuite's image, bit for bit. Otherwise multisampling, shadows and reflections
           are off.
    """

    def __init__(self, window: Window, model: mujoco.MjModel, size: int, *, exact: bool) -> None:
        self._model = model
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        self._window = window
        self._context = _make_context(window, model, size, exact=exact)
        self._scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # collision shapes
        self._options.geomgroup[1] = 1  # visual shapes
        self._perturbation = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._pixels = np.empty((size, size, 3), dtype=np.uint8)
        if not exact:
            for flag in (mujoco.mjtRndFlag.mjRND_REFLECTION, mujoco.mjtRndFlag.mjRND_SHADOW):
                self._scene.flags[flag] = 0

    def draw(self, data: mujoco.MjData, cameras: tuple[int, ...]) -> UInt8[np.ndarray, "C H W 3"]:
        """Draw one upright frame per camera id."""
        self._window.make_current()
        frames = [self._draw_frame(data, camera) for camera in cameras]
        return np.stack(frames)

    def _draw_frame(self, data: mujoco.MjData, camera: int) -> UInt8[np.ndarray, "H W 3"]:
        self._camera.fixedcamid = camera
        mujoco.mjv_updateScene(
            self._model,
            data,
            self._options,
            self._perturbation,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL.value,
            self._scene,
        )
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._viewport, self._context)
        return self._pixels[::-1].copy()  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Free the meshes and textures."""
        self._window.make_current()
        self._context.free()


def _make_context(
    window: Window, model: mujoco.MjModel, size: int, *, exact: bool
) -> mujoco.MjrContext:
    if exact:
        width = max(size, _STOCK_BUFFER[0])
        height = max(size, _STOCK_BUFFER[1])
    else:
        width = size
        height = size
        model.vis.quality.offsamples = 0
    model.vis.global_.offwidth = width
    model.vis.global_.offheight = height
    window.make_current()
    context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)  # no text is drawn
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
    return context
