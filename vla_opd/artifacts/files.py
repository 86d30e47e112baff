"""Files and folders of artifacts: linked, flushed to the disk, removed without a half artifact in between."""

import os
import shutil
from pathlib import Path


def link(source: Path, target: Path) -> None:
    """The same file under another name: what artifacts hold is never written to, so a link will do where the file system has links."""
    try:
        target.hardlink_to(source.resolve())
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def remove(folder: Path) -> None:
    """Delete an artifact. It is renamed out of sight first, so that what a kill leaves behind is no half artifact."""
    hidden = folder.with_name(f".{folder.name}.removed")
    discard(hidden)  # what a kill has left
    folder.rename(hidden)
    discard(hidden)


def discard(path: Path) -> None:
    """Of a link the link, never what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or every file and folder of a tree, to the disk."""
    for child in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if child.is_dir():
            sync_folder(child)
        else:
            with child.open("rb") as stream:
                os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
