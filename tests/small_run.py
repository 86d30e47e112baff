"""The smallest whole run of the real stages, on an environment from outside the package."""

from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

import stages.__main__ as command

PARAMS = """
run: {name: small, seed: 3, learning_seed: 3}
environment: {family: "tests.out_of_tree:make", tasks: [red, blue], image_size: 32, settle: 0}
policy: {chunk: 4, bins: 32, crop: 32, width: 32, layers: 1, heads: 2, channels: 8}
demonstrations: {main: {episodes: 12}}
demonstrate: {expert: "tests.out_of_tree:expert", horizon: 60}
pretrained: {teacher: {demonstrations: main, steps: 30, learning_rate: 2.0e-3}}
finetuned:
  student: {parent: teacher, demonstrations: main, per_task: 1, steps: 24, learning_rate: 2.5e-4}
finetune: {save_every: 3, batch_size: 16, threads: 1}
sample: {group: 3, horizon: 40, prompts: 4}
optimize: {steps: 24, save_every: 3, schedule_iterations: 1, batch_size: 16, threads: 1}
iterations: {it001: student}
reinforcements: {rl001: it001}
explore: {prompts: 2, group: 4, rounds: 3, temperature: 1.0, horizon: 40}
reinforce: {steps: 12, save_every: 3, schedule_iterations: 1, batch_size: 16, threads: 1}
evaluate: {episodes: 10, horizon: 40}
evaluations: {start: student, final: it001, teacher: teacher}
"""
STAGES = {
    "demonstrations/main": ["demonstrate", "--name", "main"],
    "checkpoints/teacher": ["finetune", "--name", "teacher"],
    "checkpoints/student": ["finetune", "--name", "student"],
    "trajectories/it001": ["sample", "--iteration", "it001"],
    "labels/it001": ["label", "--iteration", "it001"],
    "checkpoints/it001": ["optimize", "--iteration", "it001"],
    "trajectories/rl001": ["explore", "--iteration", "rl001"],
    "checkpoints/rl001": ["reinforce", "--iteration", "rl001"],
    "evaluations/start": ["evaluate", "--name", "start"],
    "evaluations/final": ["evaluate", "--name", "final"],
    "evaluations/teacher": ["evaluate", "--name", "teacher"],
    "report/page": ["report"],
}
HOST = ["--device", "cpu", "--tracking", "none"]


def call_stage(arguments: Sequence[str], *settings: str) -> int:
    """Run a stage in this process, in the working directory. Returns its exit code.

    settings: overrides of params.yaml, each `section.key=value`.
    """
    return command.main([*arguments, *HOST, *(f"--set={setting}" for setting in settings)])


def run_stage(folder: Path, arguments: Sequence[str], workers: int) -> None:
    """Run a stage in this process, in a folder, to a good end."""
    with chdir(folder):
        assert call_stage([*arguments, "--workers", str(workers)]) == 0


def make_run(folder: Path) -> Path:
    """Make the whole run with one worker; return the folder."""
    (folder / "params.yaml").write_text(PARAMS)
    for arguments in STAGES.values():
        run_stage(folder, arguments, workers=1)
    return folder


def lay_out_without(artifact: str, undisturbed: Path, folder: Path) -> Path:
    """Link every artifact of the whole run but one into a folder. Returns where that one goes."""
    root = folder / "artifacts/small"
    (folder / "params.yaml").write_text(PARAMS)
    for name in STAGES:
        if name != artifact:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(undisturbed / "artifacts/small" / name)
    return root / artifact


def read_bytes(folder: Path) -> dict[str, bytes]:
    """Return the contents of every file in a folder, by its path in it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
