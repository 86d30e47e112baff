"""The choice of an OpenGL backend, with and without one that works."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from vla_opd.envs import graphics


def _choose() -> str:
    return graphics.choose_backend.__wrapped__()  # past the cache


def test_what_the_user_set_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", " OSMesa")
    assert _choose() == "osmesa"


def test_the_first_backend_that_draws_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(graphics, "_failure", {"egl": "no driver", "osmesa": None}.__getitem__)
    assert _choose() == "osmesa"


def test_without_any_the_error_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(graphics, "_failure", lambda _: "no driver")
    with pytest.raises(RuntimeError, match=r"(?s)libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri.*no driver.*libosmesa6"):
        _choose()


def test_a_real_probe_says_why_it_failed() -> None:
    assert "nonsense" in (graphics._failure("nonsense") or "")


def test_children_inherit_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "LP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(graphics, "choose_backend", lambda: "egl")
    monkeypatch.setattr(graphics, "_loaded_backend", lambda: "")
    graphics.use_backend()
    assert [os.environ[name] for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "LP_NUM_THREADS")] == ["egl", "egl", "1"]


def test_another_backend_already_loaded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphics, "choose_backend", lambda: "egl")
    loaded = SimpleNamespace(PLATFORM=type("OSMesaPlatform", (), {})())
    monkeypatch.setitem(sys.modules, "OpenGL.platform", loaded)
    with pytest.raises(RuntimeError, match=r"'egl'.*'osmesa'"):
        graphics.use_backend()


def test_importing_the_environments_loads_no_simulator() -> None:
    code = "import sys, vla_opd.envs.metaworld, vla_opd.experts.metaworld; print([m for m in ('mujoco', 'metaworld', 'OpenGL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
