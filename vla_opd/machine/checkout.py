"""The folder that a command runs in: whether its code is the one that runs, and whether its artifacts lie where they seem to."""

import sys
from pathlib import Path

PACKAGES = ("flows", "vla_opd")


def require_own_code() -> None:
    """ValueError if this folder is a checkout, and the code that runs is other code: stages would be planned by one and made by the other."""
    for package in PACKAGES:
        here = Path(package)
        module = sys.modules.get(package)
        if module is None or not module.__file__ or not (here / "__init__.py").is_file():
            continue
        running = Path(module.__file__).resolve().parent
        if here.resolve() != running and sources(here) != sources(running):
            raise ValueError(
                f"this folder has {here.resolve()}, but the code that runs is {running}; expected one checkout: use this one's own environment "
                f"(`make setup`, then .venv/bin/opd), or `python -m flows` and `python -m stages`, which take this folder's code"
            )


def sources(package: Path) -> dict[str, bytes]:
    """The Python files of a package, by their paths in it."""
    return {str(path.relative_to(package)): path.read_bytes() for path in package.rglob("*.py")}


def require_no_links(run: Path) -> None:
    """ValueError if a folder that artifacts of a run lie in, `artifacts/<run>` or one above or below it, is a link: DVC can't store them then."""
    kinds = sorted(path for path in run.glob("*") if not path.name.startswith("."))
    for folder in (*reversed(run.parents), run, *kinds):
        if folder.is_symlink():
            raise ValueError(
                f"{folder} is a link to {folder.readlink()}; expected a folder: DVC can't store artifacts behind a link. To keep them on another "
                f"disk, put the whole checkout there; DVC's copies of them go to another disk by `dvc cache dir --local PATH`"
            )
