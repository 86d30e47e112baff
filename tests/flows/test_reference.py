"""The reference in git: up to date with dvc.lock, which has entries of nothing else."""

import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows import pipeline

ROOT = Path(__file__).parents[2]
REFERENCE = (
    "pretrain@base",
    "finetune@teacher",
    "finetune@student",
    "evaluate@start",
    "evaluate@teacher",
)

pytestmark = pytest.mark.skipif(
    not (ROOT / "dvc.lock").is_file(), reason="the reference checkpoints have not been made yet"
)


def git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_the_reference_checkpoints_are_up_to_date_with_dvc_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If this fails after an edit of code that changed no result, run `opd accept` with the stages.

    After one that did, run `dvc repro` with them.
    """
    monkeypatch.chdir(ROOT)
    stale = [step.name for step in pipeline.plan(REFERENCE) if step.stale]
    assert stale == []


def test_the_committed_lock_has_entries_of_the_reference_only() -> None:
    """With iterations in it, `dvc repro --allow-missing` in a fresh clone would make nothing."""
    if "dvc.lock" not in git("ls-tree", "--name-only", "HEAD").split():
        pytest.skip("no dvc.lock is committed")
    stages = YAML(typ="safe").load(git("show", "HEAD:dvc.lock"))["stages"]
    files = git("ls-tree", "-r", "--name-only", "HEAD", "artifacts").split("\n")

    def is_committed(folder: str) -> bool:
        return any(file.startswith(folder + "/") for file in files)

    absent = [
        name
        for name, stage in stages.items()
        if not name.startswith("demonstrate@")
        and not all(is_committed(out["path"]) for out in stage["outs"])
    ]
    assert absent == []
