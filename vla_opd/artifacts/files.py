"""File operations on artifacts: link, remove without leaving half an artifact, flush to disk."""

import os
import shutil
from pathlib import Path


def link(source: Path, target: Path) -> None:
    """Link a file under another name, or copy it where the file system has no links.

    A link is enough because files of artifacts are never written to.
    """
    try:
        target.hardlink_to(source.resolve())
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def remove(folder: Path) -> None:
    """Delete an artifact. It is hidden by a rename first, so that a kill leaves no half of it."""
    hidden = folder.with_name(f".{folder.name}.removed")
    discard(hidden)  # left by a killed process
    folder.rename(hidden)
    discard(hidden)


def discard(path: Path) -> None:
    """Delete a file or folder, if it exists. A link is deleted, its destination is kept."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or every file and folder of a tree, to disk."""
    for child in (path, *path.rglob("*")):  # rglob yields nothing for a file
        if child.is_dir():
            sync_folder(child)
        else:
            with child.open("rb") as stream:
                os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
