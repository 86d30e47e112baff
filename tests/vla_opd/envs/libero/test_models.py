"""Slim models on disk: compiled once, shared by checkouts, removed if unused."""

import os
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytestmark = pytest.mark.simulator


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with a temporary folder of its own and nothing of MuJoCo."""
    from vla_opd.envs.libero import models

    fake = SimpleNamespace(from_binary_path=Path, from_xml_string=len)
    monkeypatch.setattr(models.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(models.slim, "slim_model", lambda _model: b"slim")
    monkeypatch.setattr(models.mujoco, "MjModel", fake)
    return models


def stored(folder: Path) -> list[Path]:
    """Return the stored models, the first used first."""
    paths = folder.glob(f"vla-opd-libero-{os.getuid()}/*.mjb")
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns)


def test_a_scene_is_compiled_once_for_all_checkouts(
    models: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(models, "compile_stock", compiled.append)
    for checkout in ("/first", "/second"):
        monkeypatch.setattr(models, "package_folder", lambda name, at=checkout: Path(at) / name)
        models.compile_slim(f'<mesh file="{checkout}/robosuite/a.stl"/>{checkout}/libero/b.png')
    assert len(compiled) == len(stored(tmp_path)) == 1
    models.compile_slim("another scene")
    assert len(compiled) == len(stored(tmp_path)) == 2


def test_models_that_nothing_uses_any_more_are_removed(models: ModuleType, tmp_path: Path) -> None:
    models.compile_slim("unused")
    models.compile_slim("used")
    two_months = time.time() - 2 * 30 * 24 * 3600
    unused, used = stored(tmp_path)
    for path in (unused, used):
        os.utime(path, (two_months, two_months))
    models.compile_slim("used")
    models.compile_slim("new")
    assert used.is_file()
    assert not unused.exists()
