"""Choosing an OpenGL backend, with and without one that works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vla_opd.envs import graphics


def _choose() -> str:
    return graphics.choose_backend.__wrapped__()  # without the cache


def test_the_users_choice_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", " OSMesa")
    monkeypatch.setattr(graphics, "_failure", lambda _: None)
    assert _choose() == "osmesa"


def test_the_first_backend_that_draws_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(graphics, "_failure", {"egl": "no driver", "osmesa": None}.__getitem__)
    assert _choose() == "osmesa"


def test_without_a_backend_the_error_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(graphics, "_failure", lambda _: "no driver")
    with pytest.raises(
        RuntimeError,
        match=r"(?s)libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri.*no driver.*libosmesa6",
    ):
        _choose()


def test_a_real_probe_reports_its_failure() -> None:
    assert "nonsense" in (graphics._failure("nonsense") or "")


@pytest.mark.parametrize("value", ["nonsense", "glx", "on", "disabled", "cgl"])
def test_an_unknown_mujoco_gl_is_refused_with_the_accepted_values(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("MUJOCO_GL", value)
    with pytest.raises(
        ValueError,
        match=f"MUJOCO_GL is '{value}'; expected egl or osmesa, which need no screen, or glfw",
    ):
        _choose()


def test_glfw_is_refused_without_a_screen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ValueError,
        match=r"MUJOCO_GL is 'glfw', which draws no frame here .*; "
        "expected egl or osmesa, which need no screen",
    ):
        _choose()


@pytest.mark.parametrize("backend", ["", "egl"])
@pytest.mark.parametrize("device", ["99", "gpu", "-1", ""])
def test_an_unknown_egl_device_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str
) -> None:
    monkeypatch.setenv("MUJOCO_GL", backend)
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", device)
    with pytest.raises(
        ValueError, match=rf"MUJOCO_EGL_DEVICE_ID is '{device}'; expected a number from 0 to \d+ "
    ):
        _choose()
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "0")
    assert _choose() == "egl"


def test_a_stage_reports_a_bad_backend_before_it_starts_a_simulator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import stages.__main__ as command

    shutil.copy(Path(__file__).parents[3] / "examples/metaworld.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    monkeypatch.setattr(command, "use_backend", graphics.choose_backend.__wrapped__)
    assert command.main(["evaluate", "--name", "start", "--tracking", "none"]) == 2
    assert "MUJOCO_GL is 'nonsense'; expected egl or osmesa" in capsys.readouterr().err


def test_children_inherit_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "LP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(graphics, "choose_backend", lambda: "egl")
    monkeypatch.setattr(graphics, "_loaded_backend", lambda: "")
    graphics.use_backend()
    assert os.environ["MUJOCO_GL"] == "egl"
    assert os.environ["PYOPENGL_PLATFORM"] == "egl"
    assert os.environ["LP_NUM_THREADS"] == "1"


def test_another_backend_already_loaded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphics, "choose_backend", lambda: "egl")
    loaded = SimpleNamespace(PLATFORM=type("OSMesaPlatform", (), {})())
    monkeypatch.setitem(sys.modules, "OpenGL.platform", loaded)
    with pytest.raises(RuntimeError, match=r"'egl'.*'osmesa'"):
        graphics.use_backend()


def test_importing_the_environments_loads_no_simulator() -> None:
    code = (
        "import sys, vla_opd.envs.metaworld, vla_opd.experts.metaworld\n"
        "print([m for m in ('mujoco', 'metaworld', 'OpenGL') if m in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"
