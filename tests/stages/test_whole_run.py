"""The smallest whole run, every stage for real, and its settings that only a real run shows.

On an environment from outside the package.
"""

import json
from contextlib import chdir
from pathlib import Path

import pytest
import safetensors.torch
import torch

from benchmarks import directions
from tests.small_run import (
    PARAMS,
    STAGES,
    call_stage,
    lay_out_without,
    read_bytes,
    run_stage,
)
from vla_opd.artifacts.manifest import Kind, Manifest, open_artifact, read_manifest
from vla_opd.data.records import read_records
from vla_opd.data.trajectory import Observations, read_shard, shards
from vla_opd.learning.objectives import at_temperature, select_token
from vla_opd.policies.checkpoint import WEIGHTS, open_checkpoint
from vla_opd.policies.load import load_policy

EVALUATE = STAGES["evaluations/final"]
KINDS: dict[str, Kind] = {
    "demonstrations": "demonstrations",
    "checkpoints": "checkpoint",
    "trajectories": "trajectories",
    "labels": "labels",
    "evaluations": "evaluation",
}


def read(root: Path, artifact: str) -> Manifest:
    return read_manifest(root / artifact, KINDS[artifact.partition("/")[0]])


def test_two_workers_write_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS)
    for artifact, arguments in STAGES.items():
        run_stage(tmp_path, arguments, workers=2)
        expected = read_bytes(undisturbed / "artifacts/small" / artifact)
        assert read_bytes(tmp_path / "artifacts/small" / artifact) == expected, artifact


def test_the_student_becomes_more_like_the_teacher(undisturbed: Path) -> None:
    facts = read(undisturbed / "artifacts/small", "checkpoints/it001").facts
    assert facts["after"]["reverse_kl"] < 0.9 * facts["before"]["reverse_kl"]


# The report has none: it is a view of the others.
@pytest.mark.parametrize("artifact", sorted(STAGES.keys() - {"report/page"}))
def test_every_manifest_names_stepping_and_render(undisturbed: Path, artifact: str) -> None:
    manifest = read(undisturbed / "artifacts/small", artifact)
    checkpoint = manifest.facts.get("checkpoint", {})
    environment = (
        manifest.params.get("environment")
        or manifest.facts.get("environment")
        or checkpoint.get("environment")
    )
    assert environment["stepping"] == "fast"
    assert environment["render"] == "fast"


def test_a_checkpoint_is_scored_under_another_stepping_only_on_demand(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = lay_out_without("evaluations/final", undisturbed, tmp_path)
    settings = ("environment.stepping=exact", "evaluate.episodes=1")
    with chdir(tmp_path):
        assert call_stage(EVALUATE, *settings) == 2
        assert "environment.stepping is 'exact'; expected 'fast'" in capsys.readouterr().err
        assert not out.exists()
        assert call_stage(EVALUATE, *settings, "evaluate.allow_mismatch=true") == 0
    params = read_manifest(out, "evaluation").params
    assert params["environment"]["stepping"] == "exact"
    assert params["evaluate"]["allow_mismatch"] is True


def test_rollouts_by_the_benchmarks_protocol_are_marked(undisturbed: Path, tmp_path: Path) -> None:
    out = lay_out_without("trajectories/it001", undisturbed, tmp_path)
    settings = ("sample.protocol=benchmark", "sample.group=1")
    with chdir(tmp_path):
        assert call_stage(STAGES["trajectories/it001"], *settings) == 0
    params = read_manifest(out, "trajectories").params
    assert params["sample"]["protocol"] == "benchmark"


@pytest.mark.parametrize(("seed", "is_the_runs"), [(3, True), (4, False)])
def test_a_checkpoint_can_have_its_own_seed(
    undisturbed: Path, tmp_path: Path, seed: int, is_the_runs: bool
) -> None:
    out = lay_out_without("checkpoints/student", undisturbed, tmp_path)
    with chdir(tmp_path):
        assert call_stage(STAGES["checkpoints/student"], f"finetuned.student.seed={seed}") == 0
    expected = (undisturbed / "artifacts/small/checkpoints/student" / WEIGHTS).read_bytes()
    assert ((out / WEIGHTS).read_bytes() == expected) is is_the_runs
    assert read_manifest(out, "checkpoint").params["seed"] == seed


def test_unseen_tasks_have_a_score_of_their_own(small: Path) -> None:
    """The score of the run's tasks is unchanged, to the episode, and the report is of those."""
    folder = small / "evaluations/final"
    before = open_artifact(folder, "evaluation").facts
    records = list(read_records(folder))
    assert call_stage([*EVALUATE, "--workers", "2"], "evaluate.unseen=[green]") == 0
    after = open_artifact(folder, "evaluation").facts
    assert after["overall"] == before["overall"]
    assert after["tasks"]["red"] == before["tasks"]["red"]
    assert [record for record in read_records(folder) if record.task != "green"] == records
    assert after["unseen"] == after["tasks"]["green"]
    assert after["unseen"]["episodes"] == 10
    assert call_stage(["report"]) == 0
    assert "green" in (small / "report/page/index.html").read_text()
    results = json.loads((small / "report/page/results.json").read_text())
    assert results["final"] == before["overall"]


def test_an_evaluation_that_only_decides_stops_early_at_the_same_episode(small: Path) -> None:
    """With one worker or two: the first episodes in order decide, not the first to finish."""
    folder = small / "evaluations/teacher"
    manifests: list[Manifest] = []
    for workers in ("1", "2"):
        arguments = [*STAGES["evaluations/teacher"], "--workers", workers]
        assert call_stage(arguments, "evaluate.episodes=40", "evaluate.decide=[0.5, 0.95]") == 0
        manifests.append(open_artifact(folder, "evaluation"))
    assert manifests[0].digest == manifests[1].digest
    facts = manifests[0].facts
    assert facts["decided"] in (0.5, 0.95)
    assert len(read_records(folder)) == facts["overall"]["episodes"] < 80
    assert call_stage(["report"]) == 0
    assert "teacher is a sequential test" in (small / "report/page/index.html").read_text()


def test_the_teachers_states_can_be_visited_as_a_control(small: Path) -> None:
    """The teacher acts; its states are labelled and learned from, and the manifests say so."""
    for name in ("trajectories/it001", "labels/it001", "checkpoints/it001"):
        assert call_stage(STAGES[name], "sample.visited_by=teacher") == 0
    visited = open_artifact(small / "trajectories/it001", "trajectories")
    teacher = open_checkpoint(small / "checkpoints/teacher")
    assert visited.params["sample"]["visited_by"] == "teacher"
    assert visited.parents["teacher"] == teacher.digest
    episode = read_shard(shards(small / "trajectories/it001")[0])[0]
    observations = Observations(episode.frames[:1], episode.proprio[:1], (episode.instruction,))
    with torch.inference_mode():
        log_probs = at_temperature(load_policy(teacher, "cpu").logits(observations), 0.6)
    tokens = torch.from_numpy(episode.tokens[:1]).long()
    recorded = torch.from_numpy(episode.log_probs[:1])
    torch.testing.assert_close(recorded, select_token(log_probs, tokens), rtol=0, atol=1e-4)
    checkpoint = open_artifact(small / "checkpoints/it001", "checkpoint")
    assert checkpoint.parents["trajectories"] == visited.digest


def test_a_run_that_diverges_keeps_the_batch_and_the_old_checkpoint(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimize = STAGES["checkpoints/it001"]
    before = read_bytes(small / "checkpoints/it001")
    assert call_stage(optimize, "optimize.learning_rate=1e30") == 1
    message = capsys.readouterr().err
    (dump,) = (small.parent / ".metrics/small/not_finite").iterdir()
    assert f"kept in artifacts/.metrics/small/not_finite/{dump.name}" in message
    tensors = safetensors.torch.load_file(dump)
    assert tensors["batch/frames"].shape == (16, 1, 32, 32, 3)
    assert tensors["batch/teacher"].isfinite().all()
    assert read_bytes(small / "checkpoints/it001") == before
    run_stage(small.parents[1], optimize, workers=1)
    assert read_bytes(small / "checkpoints/it001") == before


def test_objectives_are_compared_on_one_recorded_batch(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, "CHUNK", 16)
    monkeypatch.setattr("sys.argv", ["directions", "it001", "--json", "rows.jsonl"])
    directions.main()
    lines = (small.parents[1] / "rows.jsonl").read_text().splitlines()
    rows = {row["objective"]: row for row in map(json.loads, lines)}
    assert {"reverse_kl", "forward_kl", "hard_ce"} <= set(rows)
    reverse = rows["reverse_kl"]
    forward = rows["forward_kl"]
    assert reverse["cosine"] == pytest.approx([1, 1, 1])
    assert forward["cosine"][0] > 0.3
    assert reverse["reverse_kl"] < 0 > forward["forward_kl"]
    assert rows["grpo"]["states"] < reverse["states"] == forward["states"]
