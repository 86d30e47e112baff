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
# Of each task's ten episodes, how many succeed; a success comes at 70 + 20 * state control steps.
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


def publish_evaluation(
    folder: Path, checkpoint: Manifest, successes: tuple[int, ...], horizon: int = 280
) -> None:
    records = [
        {
            "task": task,
            "instruction": f"solve {task}",
            "state": state,
            "success": state < count,
            "steps": 70 + 20 * state if state < count else horizon,
        }
        for task, count in zip(TASKS, successes, strict=True)
        for state in range(EPISODES)
    ]
    by_task = {task: score([r["success"] for r in records if r["task"] == task]) for task in TASKS}
    facts = {
        "overall": score([r["success"] for r in records]),
        "tasks": by_task,
        "env_steps": sum(r["steps"] for r in records),
        "horizon": horizon,
    }
    with draft(
        folder,
        "evaluation",
        {"checkpoint": checkpoint.digest},
        {"seed": 3, "evaluate": {"confidence": 0.95, "horizon": horizon}},
    ) as work:
        with work.part("episodes.jsonl") as path:
            path.write_text(
                "".join(json.dumps(record, sort_keys=True) + "\n" for record in records)
            )
        work.publish(facts)


def publish_finetuned(folder: Path) -> Manifest:
    with draft(
        folder, "checkpoint", {"demonstrations": "d" * 64}, {"seed": 3, "name": folder.name}
    ) as work:
        with work.part("model.safetensors") as path:
            path.write_bytes(folder.name.encode())
        work.remember({"backend": "egl"})
        return work.publish({"checkpoint": {}, "states": 50, "episodes": 5})


def publish_iteration(
    root: Path, name: str, depth: int, student: Manifest, teacher: Manifest
) -> Manifest:
    sampled = {
        "episodes": 8,
        "success": (2 + 2 * depth) / 8,
        "env_steps": 1100 - 100 * depth,
        "states": 560,
        "protocol": "held-out",
        "action_space": "a",
    }
    with draft(
        root / "trajectories" / name,
        "trajectories",
        {"student": student.digest},
        {"iteration": name},
    ) as work:
        trajectories = work.publish(sampled)
    with draft(
        root / "logits" / name,
        "logits",
        {"teacher": teacher.digest, "trajectories": trajectories.digest},
        {"label": {}},
    ) as work:
        logits = work.publish({"teacher_queries": 550 + depth, "action_space": {}})
    parents = {
        "student": student.digest,
        "trajectories": trajectories.digest,
        "logits": logits.digest,
    }
    before, after = 1.9 / (depth + 1), 1.1 / (depth + 1)
    rows = [
        {
            "loss": before + (after - before) * i / 19 + 0.05 * (i % 3),
            "student_entropy": 2.5 + depth / 4 + i / 80,
            "gradient_norm": 1.0,
            "learning_rate": 1e-3,
        }
        for i in range(20)
    ]
    with draft(
        root / "checkpoints" / name,
        "checkpoint",
        parents,
        {"iteration": name, "optimize": {"steps": 20}},
    ) as work:
        for part, text in {
            "model.safetensors": name,
            "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        }.items():
            with work.part(part) as path:
                path.write_text(text)
        probes = {
            "before": distance(before, 2.5 + depth / 4),
            "after": distance(after, 2.75 + depth / 4),
        }
        return work.publish(
            {
                "checkpoint": {},
                "depth": depth,
                "states": 560,
                "failed_share": 0.6 - depth / 10,
                **probes,
            }
        )


def distance(reverse_kl: float, entropy: float) -> dict[str, object]:
    """Of a student to its teacher; in the second action of three no token is valid."""
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
    rolled = {
        "episodes": 32,
        "success": 0.5,
        "env_steps": 3100,
        "states": 400,
        "groups": 4,
        "useful_groups": 3,
    }
    with draft(
        root / "trajectories" / name,
        "trajectories",
        {"student": student.digest},
        {"iteration": name},
    ) as work:
        trajectories = work.publish(rolled)
    parents = {"student": student.digest, "trajectories": trajectories.digest}
    with draft(root / "checkpoints" / name, "checkpoint", parents, {"iteration": name}) as work:
        with work.part("metrics.jsonl") as path:
            path.write_text(
                '{"loss": 0.1, "student_entropy": 4.0, "gradient_norm": 0.25, "clip_fraction": 0.125}\n'
                * 7
            )
        return work.publish(
            {
                "checkpoint": {},
                "depth": 0,
                "before": {"student_entropy": 4.125},
                "after": {"student_entropy": 4.0},
            }
        )


def publish_run(root: Path) -> None:
    """A run in which only the manifests of trajectories and logits are there, as after a checkout without their data."""
    made = {name: publish_finetuned(root / "checkpoints" / name) for name in ("teacher", "student")}
    for depth, (name, parent) in enumerate(params().iterations.items()):
        made[name] = publish_iteration(root, name, depth, made[parent], made["teacher"])
    for name, checkpoint in params().evaluations.items():
        publish_evaluation(root / "evaluations" / name, made[checkpoint], SUCCESSES[name])
