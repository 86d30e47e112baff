"""A run made by hand: manifests of everything, records of its evaluations, and no arrays."""

import json
from pathlib import Path

from scipy.stats import binomtest

from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest
from vla_opd.params.run import Params

TASKS = ("libero_object/0", "libero_object/1")
ITERATIONS = ("it001", "it002", "it003")
EPISODES = 10
# How many of each task's episodes succeed; a success comes after 70 + 20 * state control steps.
SUCCESSES = {"start": (1, 3), "it002": (5, 6), "final": (8, 8), "teacher": (10, 10)}
TREE = {
    "run": {"name": "small", "seed": 3},
    "environment": {"tasks": TASKS},
    "demonstrations": {"main": {"episodes": 5}},
    "pretrained": {"teacher": {"demonstrations": "main", "steps": 10, "learning_rate": 1e-3}},
    "finetuned": {
        "student": {
            "parent": "teacher",
            "demonstrations": "main",
            "per_task": 1,
            "steps": 5,
            "learning_rate": 1e-3,
        }
    },
    "sample": {"prompts": 1, "group": 4},
    "iterations": {"it001": "student", "it002": "it001", "it003": "it002"},
    "evaluations": {"teacher": "teacher", "start": "student", "it002": "it002", "final": "it003"},
}


def params(**changes: object) -> Params:
    return Params.model_validate({**TREE, **changes})


def score(outcomes: list[bool]) -> dict[str, float]:
    interval = binomtest(sum(outcomes), len(outcomes)).proportion_ci(0.95, method="wilson")
    return {
        "success": sum(outcomes) / len(outcomes),
        "low": interval.low,
        "high": interval.high,
        "episodes": len(outcomes),
    }


def record(task: str, state: int, successes: int, horizon: int) -> dict[str, object]:
    success = state < successes
    return {
        "task": task,
        "instruction": f"solve {task}",
        "state": state,
        "success": success,
        "steps": 70 + 20 * state if success else horizon,
    }


def publish_evaluation(
    folder: Path, checkpoint: Manifest, successes: tuple[int, ...], horizon: int = 280
) -> None:
    records: list[dict[str, object]] = []
    for task, count in zip(TASKS, successes, strict=True):
        records += [record(task, state, count, horizon) for state in range(EPISODES)]
    by_task = {task: score([r["success"] for r in records if r["task"] == task]) for task in TASKS}
    facts = {
        "overall": score([r["success"] for r in records]),
        "tasks": by_task,
        "env_steps": sum(r["steps"] for r in records),
        "horizon": horizon,
    }
    lines = [json.dumps(row, sort_keys=True) + "\n" for row in records]
    settings = {"seed": 3, "evaluate": {"confidence": 0.95, "horizon": horizon}}
    with draft(folder, "evaluation", {"checkpoint": checkpoint.digest}, settings) as work:
        with work.part("episodes.jsonl") as path:
            path.write_text("".join(lines))
        work.publish(facts)


def publish_finetuned(folder: Path) -> Manifest:
    settings = {"seed": 3, "name": folder.name}
    with draft(folder, "checkpoint", {"demonstrations": "d" * 64}, settings) as work:
        with work.part("model.safetensors") as path:
            path.write_bytes(folder.name.encode())
        work.record_made_with({"backend": "egl"})
        return work.publish({"checkpoint": {}, "states": 50, "episodes": 5})


def publish_trajectories(
    root: Path, iteration: str, student: Manifest, facts: dict[str, object]
) -> Manifest:
    folder = root / "trajectories" / iteration
    parents = {"student": student.digest}
    with draft(folder, "trajectories", parents, {"iteration": iteration}) as work:
        return work.publish(facts)


def publish_labels(
    root: Path, iteration: str, teacher: Manifest, trajectories: Manifest, queries: int
) -> Manifest:
    folder = root / "labels" / iteration
    parents = {"teacher": teacher.digest, "trajectories": trajectories.digest}
    with draft(folder, "labels", parents, {"label": {}}) as work:
        return work.publish({"teacher_queries": queries, "action_space": {}})


def publish_iteration(
    root: Path, name: str, depth: int, student: Manifest, teacher: Manifest
) -> Manifest:
    sampled: dict[str, object] = {
        "episodes": 8,
        "success": (2 + 2 * depth) / 8,
        "env_steps": 1100 - 100 * depth,
        "states": 560,
        "protocol": "held-out",
        "action_space": "a",
    }
    trajectories = publish_trajectories(root, name, student, sampled)
    labels = publish_labels(root, name, teacher, trajectories, 550 + depth)
    parents = {
        "student": student.digest,
        "trajectories": trajectories.digest,
        "labels": labels.digest,
    }
    before = 1.9 / (depth + 1)
    after = 1.1 / (depth + 1)
    settings = {"iteration": name, "optimize": {"steps": 20}}
    with draft(root / "checkpoints" / name, "checkpoint", parents, settings) as work:
        with work.part("model.safetensors") as path:
            path.write_text(name)
        with work.part("metrics.jsonl") as path:
            path.write_text(metrics(depth, before, after))
        return work.publish(
            {
                "checkpoint": {},
                "depth": depth,
                "states": 560,
                "failed_share": 0.6 - depth / 10,
                "before": distance(before, 2.5 + depth / 4),
                "after": distance(after, 2.75 + depth / 4),
            }
        )


def metrics(depth: int, before: float, after: float) -> str:
    """Return the rows of 20 optimizer steps, whose loss falls from `before` to `after`."""
    lines: list[str] = []
    for step in range(20):
        row = {
            "loss": before + (after - before) * step / 19 + 0.05 * (step % 3),
            "student_entropy": 2.5 + depth / 4 + step / 80,
            "gradient_norm": 1.0,
            "learning_rate": 1e-3,
        }
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


def distance(reverse_kl: float, entropy: float) -> dict[str, object]:
    """Return divergences of a student; in the second action of three no token is valid."""
    kl = {
        "reverse_kl": [reverse_kl, None, reverse_kl / 2],
        "forward_kl": [2 * reverse_kl, None, reverse_kl],
    }
    profile = kl | {"student_entropy": [entropy, None, 1.0], "teacher_entropy": [3.3, None, 1.5]}
    return {
        "reverse_kl": reverse_kl,
        "forward_kl": 1.5 * reverse_kl,
        "student_entropy": entropy,
        "teacher_entropy": 3.3,
        "teacher_rank": 10 * reverse_kl,
        "top_overlap": 0.4,
        "by_position": profile,
        "by_dimension": profile,
    }


def publish_reinforcement(root: Path, name: str, student: Manifest) -> Manifest:
    explored: dict[str, object] = {
        "episodes": 32,
        "success": 0.5,
        "env_steps": 3100,
        "states": 400,
        "groups": 4,
        "useful_groups": 3,
    }
    trajectories = publish_trajectories(root, name, student, explored)
    parents = {"student": student.digest, "trajectories": trajectories.digest}
    row = {"loss": 0.1, "student_entropy": 4.0, "gradient_norm": 0.25, "clip_fraction": 0.125}
    with draft(root / "checkpoints" / name, "checkpoint", parents, {"iteration": name}) as work:
        with work.part("metrics.jsonl") as path:
            path.write_text((json.dumps(row) + "\n") * 7)
        return work.publish(
            {
                "checkpoint": {},
                "depth": 0,
                "before": {"student_entropy": 4.125},
                "after": {"student_entropy": 4.0},
            }
        )


def publish_run(root: Path) -> None:
    """Publish a run of whose trajectories and labels only the manifests exist.

    So it is after a checkout without their data.
    """
    run = params()
    checkpoints: dict[str, Manifest] = {}
    for name in ("teacher", "student"):
        checkpoints[name] = publish_finetuned(root / "checkpoints" / name)
    for depth, (name, parent) in enumerate(run.iterations.items()):
        checkpoints[name] = publish_iteration(
            root, name, depth, checkpoints[parent], checkpoints["teacher"]
        )
    for name, checkpoint in run.evaluations.items():
        folder = root / "evaluations" / name
        publish_evaluation(folder, checkpoints[checkpoint], SUCCESSES[name])
