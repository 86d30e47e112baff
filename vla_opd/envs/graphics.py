"""Choice of the OpenGL backend: draw one frame in a child process, which may crash safely."""

import functools
import os
import subprocess
import sys

_PACKAGES = {
    "egl": "libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri",
    "osmesa": "libosmesa6",
}
"""Backends that need neither a screen nor a GPU, and the Debian packages that provide them."""

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
    os._exit(1)  # skip the destructors of half-made objects: they would write the last line
"""
_DEVICES = "from mujoco.egl import egl_ext; print(len(egl_ext.eglQueryDevicesEXT()))"


def use_backend() -> str:
    """Select `choose_backend()` for this process and its children; call this before any drawing.

    Sets `MUJOCO_GL` and `PYOPENGL_PLATFORM`, and `LP_NUM_THREADS=1` unless it is set already: the
    simulators' processes use all cores, and threads of the software rasteriser would compete with
    them.

    Raises:
        RuntimeError: PyOpenGL is already loaded for another backend and cannot change it.
    """
    backend = choose_backend()
    loaded = _loaded_backend()
    if backend in _PACKAGES and loaded not in ("", backend):
        raise RuntimeError(
            f"graphics backend is to be {backend!r}, but PyOpenGL is already loaded for "
            f"{loaded!r}; set MUJOCO_GL before importing it"
        )
    os.environ["MUJOCO_GL"] = backend
    if backend in _PACKAGES:
        os.environ["PYOPENGL_PLATFORM"] = backend
    os.environ.setdefault("LP_NUM_THREADS", "1")
    return backend


@functools.cache
def choose_backend() -> str:
    """Choose the OpenGL backend for MuJoCo: `MUJOCO_GL` if set, else the first that draws a frame.

    The candidates are `egl`, then `osmesa`. The answer costs a child process once; `use_backend`
    passes it on.

    Raises:
        ValueError: `MUJOCO_GL` is not an accepted value or draws nothing here, or
            `MUJOCO_EGL_DEVICE_ID` is not a device.
        RuntimeError: neither backend draws a frame; the message names the packages to install.
    """
    requested = os.environ.get("MUJOCO_GL", "").strip().lower()
    if requested not in ("", "glfw", *_PACKAGES):
        raise ValueError(
            f"MUJOCO_GL is {requested!r}; expected {_ACCEPTED}, "
            "or unset to use the first that works"
        )
    if requested in ("", "egl"):
        _require_device()
    if not requested:
        return _first_backend()
    failure = _failure(requested)
    if failure is not None:
        if requested in _PACKAGES:
            failure += f", needs the Debian packages {_PACKAGES[requested]}"
        raise ValueError(
            f"MUJOCO_GL is {requested!r}, which draws no frame here ({failure}); "
            f"expected {_ACCEPTED}, or unset"
        )
    return requested


def _first_backend() -> str:
    """Return the first backend that draws a frame. RuntimeError if none does."""
    failures: list[str] = []
    for backend, packages in _PACKAGES.items():
        failure = _failure(backend)
        if failure is None:
            return backend
        failures.append(f"  {backend} (Debian packages {packages}): {failure}")
    raise RuntimeError(
        "no OpenGL backend draws a frame off screen; install the packages of either:\n"
        + "\n".join(failures)
    )


def _require_device() -> None:
    """Refuse a `MUJOCO_EGL_DEVICE_ID` that is not an EGL device of this machine."""
    device = os.environ.get(_DEVICE)
    if device is None:
        return
    try:
        child = _run_child("egl", _DEVICES)
    except subprocess.TimeoutExpired:
        return  # drawing a frame will time out too, and report it
    answer = child.stdout.strip()
    if child.returncode != 0 or not answer.isdecimal():
        return  # EGL is missing, which has an error message of its own
    count = int(answer)
    if device.strip().isdecimal() and int(device) < count:
        return
    raise ValueError(
        f"{_DEVICE} is {device!r}; expected a number from 0 to {count - 1} "
        f"({count} EGL device(s) here), or unset"
    )


def _failure(backend: str) -> str | None:
    """Return one line on why `backend` does not draw a frame, or None if it does."""
    try:
        child = _run_child(backend, _ONE_FRAME)
    except subprocess.TimeoutExpired:
        return "no frame within 120 s"
    if child.returncode == 0:
        return None
    lines = child.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {child.returncode}"


def _run_child(backend: str, code: str) -> "subprocess.CompletedProcess[str]":
    """Run Python `code` in a child process that is set to `backend`."""
    environment = {**os.environ, "MUJOCO_GL": backend, "LP_NUM_THREADS": "1"}
    if backend in _PACKAGES:
        environment["PYOPENGL_PLATFORM"] = backend
    command = [sys.executable, "-c", code]
    return subprocess.run(  # noqa: S603
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def _loaded_backend() -> str:
    """Return the backend for which this process loaded PyOpenGL (`egl`, `osmesa`, `glx`, ...).

    Empty if PyOpenGL is not loaded.
    """
    platform = getattr(sys.modules.get("OpenGL.platform"), "PLATFORM", None)
    if platform is None:
        return ""
    return type(platform).__name__.removesuffix("Platform").lower()
