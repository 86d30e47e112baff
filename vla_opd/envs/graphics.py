"""Which OpenGL draws the frames: found out once, by drawing one in a child process, which is allowed to die of it."""

import functools
import os
import subprocess
import sys

_PACKAGES = {  # backend: the Debian packages that provide it without a screen and without a GPU
    "egl": "libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri",
    "osmesa": "libosmesa6",
}
_ONE_FRAME = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><light pos='0 0 3'/><geom size='.1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    assert renderer.render().any(), "the frame is black"
"""


def use_backend() -> str:
    """Settle this process, and those that it will start, on `choose_backend()`; call it before anything draws.

    Sets `MUJOCO_GL` and `PYOPENGL_PLATFORM`, and `LP_NUM_THREADS=1` unless it is set: workers fill the cores, and the software
    rasteriser's own threads would only fight with them. RuntimeError if PyOpenGL is already loaded for another backend, which is final.
    """
    backend = choose_backend()
    loaded = _loaded_backend()
    if backend in _PACKAGES and loaded not in ("", backend):
        raise RuntimeError(f"graphics backend is to be {backend!r}, but PyOpenGL is already loaded for {loaded!r}; set MUJOCO_GL before importing it")
    os.environ["MUJOCO_GL"] = backend
    if backend in _PACKAGES:
        os.environ["PYOPENGL_PLATFORM"] = backend
    os.environ.setdefault("LP_NUM_THREADS", "1")
    return backend


@functools.cache
def choose_backend() -> str:
    """The OpenGL backend for MuJoCo: what `MUJOCO_GL` says, otherwise the first of `egl` and `osmesa` that draws a frame.

    RuntimeError, with what to install, where neither does. The answer costs a child process once; `use_backend` passes it on.
    """
    if wanted := os.environ.get("MUJOCO_GL", "").strip().lower():
        return wanted
    failures: list[str] = []
    for backend, packages in _PACKAGES.items():
        if (failure := _failure(backend)) is None:
            return backend
        failures.append(f"  {backend} (Debian packages {packages}): {failure}")
    raise RuntimeError("no OpenGL backend draws a frame off screen; install the packages of either:\n" + "\n".join(failures))


def _failure(backend: str) -> str | None:
    """Why `backend` does not draw, in one line; None if it does."""
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend, "LP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _ONE_FRAME]
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603 - our own text
    except subprocess.TimeoutExpired:
        return "no frame within 120 s"
    lines = child.stderr.strip().splitlines()
    return None if child.returncode == 0 else (lines[-1] if lines else f"exit status {child.returncode}")


def _loaded_backend() -> str:
    """What PyOpenGL was loaded for in this process (`egl`, `osmesa`, `glx`, ...); empty where it is not loaded."""
    platform = getattr(sys.modules.get("OpenGL.platform"), "PLATFORM", None)
    return type(platform).__name__.removesuffix("Platform").lower() if platform is not None else ""
