"""Checks of the folder that a command runs in: its code, and links in its artifacts' paths."""

import sys
from pathlib import Path

PACKAGES = ("flows", "vla_opd")


def require_own_code() -> None:
    """Check that the running code is that of this folder, if the folder is a checkout.

    ValueError otherwise: stages would be planned by one version and run by the other.
    """
    for package in PACKAGES:
        local = Path(package)
        module = sys.modules.get(package)
        file = getattr(module, "__file__", None)
        if file is None or not (local / "__init__.py").is_file():
            continue
        running = Path(file).resolve().parent
        if local.resolve() != running and read_sources(local) != read_sources(running):
            raise ValueError(
                f"this folder has {local.resolve()}, but the code that runs is {running}; expected "
                "one checkout: use this one's own environment (`make setup`, then .venv/bin/opd), "
                "or `python -m flows` and `python -m stages`, which use this folder's code"
            )


def read_sources(package: Path) -> dict[str, bytes]:
    """Return the contents of a package's Python files, by relative path."""
    sources: dict[str, bytes] = {}
    for path in package.rglob("*.py"):
        name = str(path.relative_to(package))
        sources[name] = path.read_bytes()
    return sources


def require_no_links(run: Path) -> None:
    """Check that no folder of a run's artifacts is a link, which DVC can't store.

    ValueError names the first link: `artifacts/<run>`, a folder above it, or one of its kinds.
    """
    kinds = sorted(path for path in run.glob("*") if not path.name.startswith("."))
    for folder in (*reversed(run.parents), run, *kinds):
        if folder.is_symlink():
            raise ValueError(
                f"{folder} is a link to {folder.readlink()}; expected a folder: DVC can't store "
                "artifacts behind a link. To keep them on another disk, put the whole checkout "
                "there, or only DVC's copies of them by `dvc cache dir --local PATH`"
            )
