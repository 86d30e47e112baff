"""The reference that is in git: up to date with dvc.lock, and all that the committed dvc.lock speaks of."""

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
    """An edit of code that changed no result: `python -m flows accept demonstrate base teacher student evaluate`. One that did: `dvc repro` them."""
    monkeypatch.chdir(ROOT)
    stale = [step.name for step in pipeline.plan(REFERENCE) if step.stale]
    assert stale == []


def test_the_committed_lock_speaks_of_the_reference_only() -> None:
    """With the iterations in it, `dvc repro --allow-missing` in a fresh clone would find them unchanged, and make nothing."""
    if "dvc.lock" not in git("ls-tree", "--name-only", "HEAD").split():
        pytest.skip("no dvc.lock is committed")
    locked = YAML(typ="safe").load(git("show", "HEAD:dvc.lock"))["stages"]
    files = git("ls-tree", "-r", "--name-only", "HEAD", "artifacts").split("\n")
    outs = {
        name: [out["path"] for out in stage["outs"]]
        for name, stage in locked.items()
        if not name.startswith("demonstrate@")
    }
    absent = [
        name
        for name, paths in outs.items()
        if not all(any(file.startswith(path + "/") for file in files) for path in paths)
    ]
    assert absent == []
