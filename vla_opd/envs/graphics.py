"""Which OpenGL draws the frames: found out once, by drawing one in a child process, which is allowed to die of it."""

import functools
import os
import subprocess
import sys

_PACKAGES = {  # backend: the Debian packages that provide it without a screen and without a GPU
    "egl": "libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri",
    "osmesa": "libosmesa6",
}
_ACCEPTED = "egl or osmesa, which need no screen, or glfw, which needs one (DISPLAY)"
_DEVICE = "MUJOCO_EGL_DEVICE_ID"
_ONE_FRAME = """
import os, sys

def draw():
    import mujoco
    scene = "<mujoco><worldbody><light pos='0 0 3'/><geom size='.1'/></worldbody></mujoco>"
    model = mujoco.MjModel.from_xml_string(scene)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = mujoco.Renderer(model, 32, 32)
    renderer.update_scene(data)
    assert renderer.render().any(), "the frame is black"

try:
    draw()
except Exception as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)  # destructors of what was half made would have the last word
"""
_DEVICES = "from mujoco.egl import egl_ext; print(len(egl_ext.eglQueryDevicesEXT()))"


def use_backend() -> str:
    """Settle this process, and those that it will start, on `choose_backend()`; call it before anything draws.

    Sets `MUJOCO_GL` and `PYOPENGL_PLATFORM`, and `LP_NUM_THREADS=1` unless it is set: workers fill the cores, and the software
    rasteriser's own threads would only fight with them. RuntimeError if PyOpenGL is already loaded for another backend, which is final.
    """
    backend = choose_backend()
    loaded = _loaded_backend()
    if backend in _PACKAGES and loaded not in ("", backend):
        raise RuntimeError(
            f"graphics backend is to be {backend!r}, but PyOpenGL is already loaded for {loaded!r}; set MUJOCO_GL before importing it"
        )
    os.environ["MUJOCO_GL"] = backend
    if backend in _PACKAGES:
        os.environ["PYOPENGL_PLATFORM"] = backend
    os.environ.setdefault("LP_NUM_THREADS", "1")
    return backend


@functools.cache
def choose_backend() -> str:
    """The OpenGL backend for MuJoCo: what `MUJOCO_GL` says, otherwise the first of `egl` and `osmesa` that draws a frame.

    The answer costs a child process once; `use_backend` passes it on.

    Raises:
        ValueError: `MUJOCO_GL` is none of the accepted values or draws nothing here, or `MUJOCO_EGL_DEVICE_ID` is no device.
        RuntimeError: neither backend draws a frame; says what to install.
    """
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower()
    if wanted not in ("", "glfw", *_PACKAGES):
        raise ValueError(
            f"MUJOCO_GL is {wanted!r}; expected {_ACCEPTED}, or nothing for the first that works"
        )
    if wanted in ("", "egl"):
        _require_device()
    if wanted:
        failure = _failure(wanted)
        if failure is not None:
            needs = (
                f", needs the Debian packages {_PACKAGES[wanted]}" if wanted in _PACKAGES else ""
            )
            raise ValueError(
                f"MUJOCO_GL is {wanted!r}, which draws no frame here ({failure}{needs}); expected {_ACCEPTED}, or nothing"
            )
        return wanted
    failures: list[str] = []
    for backend, packages in _PACKAGES.items():
        if (failure := _failure(backend)) is None:
            return backend
        failures.append(f"  {backend} (Debian packages {packages}): {failure}")
    raise RuntimeError(
        "no OpenGL backend draws a frame off screen; install the packages of either:\n"
        + "\n".join(failures)
    )


def _require_device() -> None:
    """ValueError for an EGL device that this machine doesn't have."""
    device = os.environ.get(_DEVICE)
    if device is None:
        return
    try:
        child = _child("egl", _DEVICES)
    except subprocess.TimeoutExpired:
        return  # so will the frame
    found = child.stdout.strip()
    if child.returncode != 0 or not found.isdecimal():
        return  # no EGL at all, which has an error of its own
    if device.strip().isdecimal() and int(device) < int(found):
        return
    raise ValueError(
        f"{_DEVICE} is {device!r}; expected a number from 0 to {int(found) - 1} ({found} EGL device(s) here), or no such variable"
    )


def _failure(backend: str) -> str | None:
    """Why `backend` does not draw, in one line; None if it does."""
    try:
        child = _child(backend, _ONE_FRAME)
    except subprocess.TimeoutExpired:
        return "no frame within 120 s"
    if child.returncode == 0:
        return None
    lines = child.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {child.returncode}"


def _child(backend: str, code: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "MUJOCO_GL": backend, "LP_NUM_THREADS": "1"}
    if backend in _PACKAGES:
        environment["PYOPENGL_PLATFORM"] = backend
    command = [sys.executable, "-c", code]
    return subprocess.run(  # noqa: S603
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def _loaded_backend() -> str:
    """What PyOpenGL was loaded for in this process (`egl`, `osmesa`, `glx`, ...); empty where it is not loaded."""
    platform = getattr(sys.modules.get("OpenGL.platform"), "PLATFORM", None)
    return type(platform).__name__.removesuffix("Platform").lower() if platform is not None else ""
