"""Pictures of a MuJoCo scene without a window, stock or simplified.

Imported by `libero.make` only, in the process that owns the simulator: importing mujoco loads OpenGL.
"""

# mujoco's names are compiled, without stubs.
# pyright: reportAttributeAccessIssue=false

import atexit
import importlib
import os

import mujoco
import numpy as np
from jaxtyping import UInt8

_MAX_GEOMS = 1000  # as in robosuite's render context
_STOCK_BUFFER = (640, 480)


class Window:
    """An OpenGL context without a screen. One serves all renderers of an environment, one after the other: drivers warm up in it."""

    def __init__(self) -> None:
        # By name: `mujoco.GLContext` was chosen when mujoco was first imported, perhaps before the backend was.
        self._window = importlib.import_module(f"mujoco.{os.environ['MUJOCO_GL']}").GLContext(
            *_STOCK_BUFFER
        )
        atexit.register(
            self._window.free
        )  # after mujoco's own hook, so before it: a context can't outlive its display

    def make_current(self) -> None:
        """Draw here from now on; another environment in this process may have taken the thread."""
        self._window.make_current()

    def close(self) -> None:
        """Free the context, and all that was drawn with it."""
        atexit.unregister(self._window.free)
        self._window.free()


class Renderer:
    """Draws one model's cameras into square frames. Reads `data`, changes nothing in it.

    exact: robosuite's picture, bit for bit. Otherwise multisampling, shadows and reflections are off.
    """

    def __init__(self, window: Window, model: mujoco.MjModel, size: int, *, exact: bool) -> None:
        self._model = model
        self._viewport = mujoco.MjrRect(0, 0, size, size)
        self._window = window
        self._context = _context(window, model, size, exact=exact)
        self._scene = mujoco.MjvScene(model, maxgeom=_MAX_GEOMS)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # collision shapes
        self._options.geomgroup[1] = 1
        self._perturbation = mujoco.MjvPerturb()
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._pixels = np.empty((size, size, 3), dtype=np.uint8)
        if not exact:
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0

    def draw(self, data: mujoco.MjData, cameras: tuple[int, ...]) -> UInt8[np.ndarray, "C H W 3"]:
        """One upright frame per camera id."""
        self._window.make_current()
        return np.stack([self._draw_one(data, camera) for camera in cameras])

    def _draw_one(self, data: mujoco.MjData, camera: int) -> UInt8[np.ndarray, "H W 3"]:
        self._camera.fixedcamid = camera
        category = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(
            self._model,
            data,
            self._options,
            self._perturbation,
            self._camera,
            category,
            self._scene,
        )
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        mujoco.mjr_readPixels(self._pixels, None, self._viewport, self._context)
        return self._pixels[::-1].copy()

    def close(self) -> None:
        """Free the meshes and textures."""
        self._window.make_current()
        self._context.free()


def _context(window: Window, model: mujoco.MjModel, size: int, *, exact: bool) -> mujoco.MjrContext:
    width, height = (max(size, edge) for edge in _STOCK_BUFFER)
    if not exact:
        width = height = size
        model.vis.quality.offsamples = 0
    model.vis.global_.offwidth = width
    model.vis.global_.offheight = height
    window.make_current()
    context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)  # no text is drawn
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
    return context
