"""A toy project: the real dvc.yaml over toy stages that take no time."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]

PARAMS = """\
# a comment that must survive
run: {name: toy, seed: 0, learning_seed: 0}
environment: {tasks: [reach]}
demonstrations:
  pre: {episodes: 1}
  main: {episodes: 2}
demonstrate: {noise: 0.1}
policy: {chunk: 8}
finetune: {batch_size: 4}
pretrained:
  base: {demonstrations: pre, steps: 1, learning_rate: 0.1}
finetuned:
  teacher: {parent: base, demonstrations: main, steps: 3, learning_rate: 0.1}
  student: {parent: base, demonstrations: main, steps: 2, learning_rate: 0.1}
adopt: {}
sample: {group: 2}
label: {teacher: teacher}
optimize: {steps: 4}  # how long
iterations: {it001: student, it002: it001}
reinforcements: {}
explore: {group: 2}
reinforce: {steps: 4}
evaluate: {episodes: 3}
evaluations: {start: student, final: it002, teacher: teacher}
report: {}
"""

STAGES = '''\
"""Toy stages: every out is a digest of what went in."""
import hashlib, json, os, pathlib, sys, time
from ruamel.yaml import YAML

verb, key = sys.argv[1], (sys.argv[3:] or [""])[0]
params = YAML(typ="safe").load(open("params.yaml"))
root = pathlib.Path("artifacts/toy")
demonstrations, checkpoints = root / "demonstrations", root / "checkpoints"
trajectories, labels, evaluations = root / "trajectories", root / "labels", root / "evaluations"
recipe = {**params["pretrained"], **params["finetuned"]}.get(key)
student = checkpoints / {**params["iterations"], **params["reinforcements"]}.get(key, "none")

def finetune():
    inputs = [demonstrations / recipe["demonstrations"]]
    if "parent" in recipe:
        inputs.append(checkpoints / recipe["parent"])
    return checkpoints / key, inputs

out, inputs = {
    "demonstrate": lambda: (demonstrations / key, []),
    "finetune": finetune,
    "sample": lambda: (trajectories / key, [student]),
    "label": lambda: (labels / key, [trajectories / key, checkpoints / "teacher"]),
    "optimize": lambda: (checkpoints / key, [student, trajectories / key, labels / key]),
    "explore": lambda: (trajectories / key, [student]),
    "reinforce": lambda: (checkpoints / key, [student, trajectories / key]),
    "evaluate": lambda: (evaluations / key, [checkpoints / params["evaluations"][key]]),
    "report": lambda: (root / "report/page", [evaluations / n for n in params["evaluations"]]),
}[verb]()
section = recipe if verb == "finetune" else params[verb]
content = json.dumps([verb, key, section], sort_keys=True)
content += "".join((folder / "digest").read_text() for folder in inputs)
print(f"{verb} {key}: from {len(inputs)} inputs", flush=True)
for step in (1, 2):
    print(f"{verb}: {step}/2", end="\\r", file=sys.stderr, flush=True)
if os.environ.get("TOY_FAILS") == f"{verb} {key}":
    sys.exit(f"{verb} {key}: no luck")
if os.environ.get("TOY_SLEEPS") == f"{verb} {key}":
    time.sleep(5)
out.mkdir(parents=True)
(out / "digest").write_text(hashlib.sha256(content.encode()).hexdigest())
if verb == "report":
    names = enumerate(params["iterations"])
    rows = [{"name": name, "depth": depth, "success": depth / 10} for depth, name in names]
    final = {"success": params["optimize"]["steps"] / 10}
    (out / "results.json").write_text(json.dumps({"final": final, "iterations": rows}))
'''

REFERENCE = ["evaluate@start", "evaluate@teacher"]


@dataclass(frozen=True)
class Toy:
    """A toy project, and commands on it."""

    folder: Path

    def dvc(self, *words: str, check: bool = True) -> str:
        """Run a dvc command in the project; return its output."""
        with self.started(*words) as process:
            output, _ = process.communicate()
        assert not check or process.returncode == 0, output
        return output

    def started(self, *words: str, **environment: str) -> "subprocess.Popen[str]":
        """Start a dvc command in the project, in a session of its own."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            [sys.executable, "-m", "dvc", *words],
            cwd=self.folder,
            env=os.environ | {"PATH": path} | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def git(self, *words: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words],
            cwd=self.folder,
            check=True,
            capture_output=True,
        )

    def tracked(self, path: Path) -> bool:
        """Return whether git has the file."""
        done = subprocess.run(
            ["git", "ls-files", "--error-unmatch", str(path)],
            cwd=self.folder,
            capture_output=True,
            check=False,
        )
        return done.returncode == 0

    def clone(self, folder: Path) -> "Toy":
        """Commit and clone the project: without DVC's cache and what isn't in git."""
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "toy")
        self.git("clone", "-q", ".", str(folder))
        return Toy(folder)

    @property
    def lock(self) -> bytes:
        return (self.folder / "dvc.lock").read_bytes()

    def edit(self, name: str, old: str, new: str) -> None:
        """Replace text in a file of the project."""
        path = self.folder / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def has(self, *names: str) -> bool:
        return all((self.folder / "artifacts/toy" / name).is_dir() for name in names)


def ran(output: str) -> list[str]:
    """Return the stages that ran, by the output of `dvc repro`."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage ")]


def code_files() -> Sequence[str]:
    """Return the files of code that dvc.yaml names, also by their folders."""
    files: set[Path] = set()
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in stages.values():
        for dep in stage.get("do", stage)["deps"]:
            path = ROOT / dep
            if not dep.startswith("artifacts/"):
                files.update(path.rglob("*.py") if path.is_dir() else [path])
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


def make_toy(folder: Path) -> Toy:
    """Write a project: toy settings and stages, the real DVC files, and a stub per file of code."""
    for name in code_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("# stands for the real file\n")
    for name in (
        "dvc.yaml",
        ".dvcignore",
        ".dvc/config",
        ".dvc/.gitignore",
        "artifacts/.gitignore",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "stages/__main__.py").write_text(STAGES)
    (folder / "stages/__init__.py").write_text("")
    (folder / ".gitignore").write_text("__pycache__/\n.prefect/\n")
    toy = Toy(folder)
    toy.git("init", "-q")
    return toy
