"""The smallest whole run, every stage for real, on an environment from outside the package: one worker or two, killed or not, the same bytes."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import stages.__main__ as command
from benchmarks import directions
from tests.small_run import HOST, PARAMS, STAGES, run_stage
from vla_opd.analysis.evaluation import read_records
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Kind, open_artifact
from vla_opd.data.trajectory import Observations, read_shard, shards
from vla_opd.learning.objectives import tempered
from vla_opd.policies.checkpoint import WEIGHTS, open_checkpoint, save_weights
from vla_opd.policies.load import load_policy

REPOSITORY = Path(__file__).parents[2]
# A stage of each kind, and how much it has finished when it is killed: shards, lines of the journal, or saved optimiser steps. A good part is left.
KILLED_AT = {
    "demonstrations/main": 1,
    "checkpoints/student": 6,
    "trajectories/it001": 2,
    "logits/it001": 2,
    "checkpoints/it001": 6,
    "trajectories/rl001": 6,  # in its second round
    "checkpoints/rl001": 6,
    "evaluations/final": 3,
    "report/page": 0,  # it has no parts
}
# A setting that changes what each stage makes.
OTHER = {
    "demonstrations/main": "demonstrate.noise=0.3",
    "checkpoints/student": "finetune.smoothing=2.5",
    "trajectories/it001": "sample.temperature=0.3",
    "logits/it001": "label.dtype=float32",
    "checkpoints/it001": "optimize.steps=23",
    "trajectories/rl001": "explore.temperature=0.5",
    "checkpoints/rl001": "reinforce.steps=11",
    "evaluations/final": "evaluate.horizon=33",
    "report/page": "evaluate.confidence=0.8",
}
# The artifacts whose files each stage reads (the report reads only the manifests of trajectories and logits).
CONSUMERS = {
    "checkpoints/student": ["demonstrations/main", "checkpoints/teacher"],
    "trajectories/it001": ["checkpoints/student", "checkpoints/teacher"],
    "logits/it001": ["trajectories/it001", "checkpoints/teacher"],
    "checkpoints/it001": ["checkpoints/student", "trajectories/it001", "logits/it001"],
    "trajectories/rl001": ["checkpoints/it001"],
    "checkpoints/rl001": ["checkpoints/it001", "trajectories/rl001"],
    "evaluations/final": ["checkpoints/it001"],
    "report/page": [
        "evaluations/start",
        "evaluations/final",
        "evaluations/teacher",
        "checkpoints/it001",
        "checkpoints/rl001",
    ],
}
SEED = "KILL_SEED"  # repeats the random kill or flips of an earlier test run


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_two_workers_write_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS)
    for artifact, arguments in STAGES.items():
        run_stage(tmp_path, arguments, workers=2)
        assert _bytes(tmp_path / "artifacts/small" / artifact) == _bytes(
            undisturbed / "artifacts/small" / artifact
        ), artifact


@pytest.mark.parametrize(
    "artifact", sorted(STAGES.keys() - {"report/page"})
)  # it is a view of the others
def test_every_manifest_names_stepping_and_render(undisturbed: Path, artifact: str) -> None:
    manifest = _manifest(undisturbed / "artifacts/small" / artifact)
    named = (
        manifest["params"].get("environment")
        or manifest["facts"].get("environment")
        or manifest["facts"].get("checkpoint", {}).get("environment")
    )
    assert {key: named[key] for key in ("stepping", "render")} == {
        "stepping": "fast",
        "render": "fast",
    }


def test_a_checkpoint_is_scored_under_another_stepping_only_if_that_is_said(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = _all_but("evaluations/final", undisturbed, tmp_path)
    arguments = [
        *STAGES["evaluations/final"],
        "--set",
        "environment.stepping=exact",
        "--set",
        "evaluate.episodes=1",
    ]
    with chdir(tmp_path):
        assert command.main([*arguments, *HOST]) == 2
        assert "environment.stepping is 'exact'; expected 'fast'" in capsys.readouterr().err
        assert not out.exists()
        assert command.main([*arguments, "--set", "evaluate.allow_mismatch=true", *HOST]) == 0
    params = _manifest(out)["params"]
    assert (params["environment"]["stepping"], params["evaluate"]["allow_mismatch"]) == (
        "exact",
        True,
    )


def test_rollouts_by_the_benchmarks_own_protocol_say_so(undisturbed: Path, tmp_path: Path) -> None:
    out = _all_but("trajectories/it001", undisturbed, tmp_path)
    run_stage(
        tmp_path,
        [
            *STAGES["trajectories/it001"],
            "--set",
            "sample.protocol=benchmark",
            "--set",
            "sample.group=1",
        ],
        workers=1,
    )
    assert _manifest(out)["params"]["sample"]["protocol"] == "benchmark"


def test_fine_tuning_draws_by_a_seed_of_its_own_if_it_has_one(
    undisturbed: Path, tmp_path: Path
) -> None:
    out = _all_but("checkpoints/student", undisturbed, tmp_path)
    as_it_is = (undisturbed / "artifacts/small/checkpoints/student" / WEIGHTS).read_bytes()
    for seed, same in ((3, True), (4, False)):  # the run's is 3
        run_stage(
            tmp_path,
            [*STAGES["checkpoints/student"], "--set", f"finetuned.student.seed={seed}"],
            workers=1,
        )
        assert ((out / WEIGHTS).read_bytes() == as_it_is) is same
        assert _manifest(out)["params"]["seed"] == seed
        shutil.rmtree(out)


def test_unseen_tasks_are_scored_apart(small: Path) -> None:
    """The run's own score stays what it was, to the episode; and a report of the run still is of its own tasks."""
    folder = small / "evaluations/final"
    before, own = open_artifact(folder, "evaluation").facts, read_records(folder)
    assert (
        command.main(
            [
                "evaluate",
                "--name",
                "final",
                "--set",
                "evaluate.unseen=[green]",
                "--workers",
                "2",
                *HOST,
            ]
        )
        == 0
    )
    after = open_artifact(folder, "evaluation").facts
    assert (after["overall"], after["tasks"]["red"]) == (before["overall"], before["tasks"]["red"])
    assert [record for record in read_records(folder) if record.task != "green"] == list(own)
    assert after["unseen"] == after["tasks"]["green"]
    assert after["unseen"]["episodes"] == 10
    assert command.main(["report", *HOST]) == 0
    page = (small / "report/page/index.html").read_text()
    assert "green" in page
    results = json.loads((small / "report/page/results.json").read_text())
    assert results["final"] == before["overall"]


def test_an_evaluation_that_only_decides_stops_early_at_the_same_episode(small: Path) -> None:
    """With one worker or two, killed or not: what decides are the first episodes in order, not the first to finish."""
    made = []
    for workers in ("1", "2"):
        decide = ["--set", "evaluate.episodes=40", "--set", "evaluate.decide=[0.5, 0.95]"]
        assert (
            command.main(["evaluate", "--name", "teacher", *decide, "--workers", workers, *HOST])
            == 0
        )
        made.append(open_artifact(small / "evaluations/teacher", "evaluation"))
    assert made[0].digest == made[1].digest
    assert made[0].facts["decided"] in (0.5, 0.95)
    assert (
        len(read_records(small / "evaluations/teacher"))
        == made[0].facts["overall"]["episodes"]
        < 80
    )
    assert command.main(["report", *HOST]) == 0
    assert "teacher only decides" in (small / "report/page/index.html").read_text()


def test_the_teachers_states_are_a_control(small: Path) -> None:
    """The teacher acts; its states are labelled and learned from as the student's are, and every manifest says whose they were."""
    for verb in ("sample", "label", "optimize"):
        assert (
            command.main(
                [verb, "--iteration", "it001", *HOST, "--set", "sample.visited_by=teacher"]
            )
            == 0
        )
    visited, teacher = (
        open_artifact(small / name, kind)
        for name, kind in (
            ("trajectories/it001", "trajectories"),
            ("checkpoints/teacher", "checkpoint"),
        )
    )
    assert visited.params["sample"]["visited_by"] == "teacher"
    assert visited.parents["teacher"] == teacher.digest
    acted, policy = (
        read_shard(shards(small / "trajectories/it001")[0])[0],
        load_policy(open_checkpoint(small / "checkpoints/teacher"), "cpu"),
    )
    seen = Observations(acted.frames[:1], acted.proprio[:1], (acted.instruction,))
    with torch.inference_mode():
        said = (
            tempered(policy.logits(seen)[0], 0.6)
            .gather(-1, torch.from_numpy(acted.tokens[0]).long().unsqueeze(-1))
            .squeeze(-1)
        )
    torch.testing.assert_close(torch.from_numpy(acted.log_probs[0]), said, rtol=0, atol=1e-4)
    made = open_artifact(small / "checkpoints/it001", "checkpoint")
    assert made.parents["trajectories"] == visited.digest


@pytest.mark.parametrize("artifact", KILLED_AT)
def test_a_killed_stage_goes_on_to_the_same_bytes(
    undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], artifact: str
) -> None:
    """Killed as soon as it has finished a chosen part of its work: it publishes nothing, and the next run does not do that part again."""
    out = _all_but(artifact, undisturbed, tmp_path)
    code = _killed(tmp_path, artifact, KILLED_AT[artifact])
    assert code == -signal.SIGKILL, f"not killed in its work: it ended with {code}"
    assert not out.exists()
    finished = _finished(_draft(out))
    assert finished >= KILLED_AT[artifact]
    _goes_on(undisturbed, tmp_path, artifact, finished, capfd)


@pytest.mark.parametrize("nth", range(int(os.environ.get("KILLS") or 1)))
def test_a_stage_killed_at_random_goes_on_to_the_same_bytes(
    undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], nth: int
) -> None:
    """Some stage, a random moment after its draft appeared: in the middle of anything, and perhaps too late."""
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(2**32)) + nth
    generator = random.Random(seed)  # noqa: S311 - no secret
    artifact = generator.choice(sorted(KILLED_AT))
    out = _all_but(artifact, undisturbed, tmp_path)
    code = _killed(
        tmp_path,
        artifact,
        generator.randint(0, KILLED_AT[artifact]),
        delay=generator.uniform(0, 0.3),
    )
    print(f"{SEED}={seed}: {artifact} ended with {code}")  # pytest shows it if the test fails
    assert out.exists() or code == -signal.SIGKILL
    _goes_on(undisturbed, tmp_path, artifact, _finished(_draft(out)), capfd)


METAWORLD = {
    "environment": "{family: metaworld, tasks: [window-open-v3, window-close-v3], image_size: 32, settle: 0, cameras: [corner4]}",
    "demonstrations": "{main: {episodes: 2}}",
    "demonstrate": "{expert: metaworld, horizon: 200}",
    "pretrained": "{teacher: {demonstrations: main, steps: 1, learning_rate: 1.0e-3}}",
    "finetuned": "{student: {parent: teacher, demonstrations: main, per_task: 1, steps: 1, learning_rate: 1.0e-3}}",
    "sample": "{group: 2, horizon: 24, prompts: 1}",
}


def test_a_killed_stage_goes_on_to_the_bytes_of_one_worker_on_metaworld_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = "\n".join(
        f"{key}: {METAWORLD.get(key, said)}"
        for key, said in (line.split(": ", 1) for line in PARAMS.strip().splitlines())
    )
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
        (folder / "params.yaml").write_text(settings)
    for artifact in (
        "demonstrations/main",
        "checkpoints/teacher",
        "checkpoints/student",
        "trajectories/it001",
    ):
        run_stage(undisturbed, STAGES[artifact], workers=1)
        out = killed / "artifacts/small" / artifact
        if artifact.startswith("checkpoints"):
            out.parent.mkdir(exist_ok=True)
            out.symlink_to(undisturbed / "artifacts/small" / artifact)
        else:
            assert _killed(killed, artifact, 1) == -signal.SIGKILL
            _goes_on(undisturbed, killed, artifact, _finished(_draft(out)), capfd)


def _goes_on(
    undisturbed: Path,
    folder: Path,
    artifact: str,
    finished: int,
    captured: pytest.CaptureFixture[str],
) -> None:
    """Run the killed stage again: it says that it reuses what was finished, leaves it alone, and ends at the undisturbed bytes."""
    out, expected = (place / "artifacts/small" / artifact for place in (folder, undisturbed))
    before = _shard_times(_draft(out)) if finished else {}
    said_before = captured.readouterr()
    run_stage(folder, STAGES[artifact], workers=2)
    said = captured.readouterr().err
    print(said_before.out, said_before.err, said, sep="\n")
    reused = re.findall(
        r"reusing (\d+) of \d+ |going on from step (\d+)", said
    )  # `explore` says so of each round
    assert sum(int(shards or steps) for shards, steps in reused) == finished
    assert before.items() <= _shard_times(out).items(), "a finished shard was written again"
    assert _manifest(out)["digest"] == _manifest(expected)["digest"]
    assert _bytes(out) == _bytes(expected)


def _all_but(artifact: str, undisturbed: Path, folder: Path) -> Path:
    """Lay out a run in which only `artifact` is missing. Returns where it belongs."""
    root = folder / "artifacts/small"
    (folder / "params.yaml").write_text(PARAMS)
    for other in [name for name in STAGES if name != artifact]:
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).symlink_to(undisturbed / "artifacts/small" / other)
    return root / artifact


def _killed(folder: Path, artifact: str, point: int, delay: float = 0.0) -> int:
    """Start the stage in a process of its own and SIGKILL it `delay` seconds after its draft holds `point` finished parts. Returns its exit code."""
    draft = _draft(folder / "artifacts/small" / artifact)
    with _started(folder, artifact) as process:
        try:
            while process.poll() is None and not (draft.exists() and _finished(draft) >= point):
                time.sleep(0.005)
            time.sleep(delay)
        finally:
            process.kill()
    return process.returncode


def _started(folder: Path, artifact: str, *more: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "stages", *STAGES[artifact], "--workers", "2", *HOST, *more],
        cwd=folder,
        env=environment,
    )


def _draft(out: Path) -> Path:
    return out.with_name(f".{out.name}.draft")


def _finished(draft: Path) -> int:
    """How much a next run can go on from: the shards, the whole lines of the journal or the saved optimiser steps, whichever the stage has."""
    scratch = draft / ".scratch"
    if not (scratch / "fingerprint").is_file():
        return 0
    try:
        finished = len(list(draft.glob("shard-*")))
        save = scratch / "training.safetensors"
        lines = sum(journal.read_text().count("\n") for journal in scratch.glob("journal-*.jsonl"))
        return finished + lines + (_saved_steps(save) if save.is_file() else 0)
    except FileNotFoundError:  # published under our eyes
        return 0


def _saved_steps(save: Path) -> int:
    with safetensors.safe_open(save, "pt") as file:
        return len(json.loads(file.metadata()["rows"]))


def _shard_times(folder: Path) -> dict[str, int]:
    """When each shard was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}


def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("settings", ["the same", "others"])
@pytest.mark.parametrize("nth", range(int(os.environ.get("ROUNDS") or 1)))
def test_two_runs_of_one_stage_at_once_publish_one_whole_artifact(
    undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], nth: int, settings: str
) -> None:
    """Started up to two seconds apart. Each publishes what it would have alone, or says that the other is at work."""
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(2**32)) + nth
    generator = random.Random(seed)  # noqa: S311 - no secret
    artifact = generator.choice(sorted(KILLED_AT))
    other = ["--set", OTHER[artifact]] if settings == "others" else []
    out = _all_but(artifact, undisturbed, tmp_path)
    processes = [_started(tmp_path, artifact)]
    time.sleep(generator.uniform(0, 2))
    processes.append(_started(tmp_path, artifact, *other))
    codes = [process.wait() for process in processes]
    said = capfd.readouterr().err
    print(f"{SEED}={seed}: {artifact} ended with {codes}\n{said}")
    assert sorted(codes) in ([0, 0], [0, 1])
    assert said.count("another process is writing it") == codes.count(1)
    assert not _draft(out).exists()
    open_artifact(out, _manifest(out)["kind"])
    found, first = _bytes(out), _bytes(undisturbed / "artifacts/small" / artifact)
    if found != first:  # of two that published, either may have been the last
        assert other
        assert codes[1] == 0
        shutil.rmtree(out)
        run_stage(tmp_path, [*STAGES[artifact], *other], workers=1)
        assert found == _bytes(out)
    else:
        assert codes[0] == 0 or not other


def test_the_student_moves_towards_the_teacher(undisturbed: Path) -> None:
    facts = _manifest(undisturbed / "artifacts/small/checkpoints/it001")["facts"]
    assert facts["after"]["reverse_kl"] < 0.9 * facts["before"]["reverse_kl"]


def test_every_flipped_bit_is_detected(small: Path) -> None:
    """One random bit at a time, in stores, logits, checkpoints, evaluations, the report and (three times in ten) manifests."""
    seed, flips = (
        int(os.environ.get(SEED) or random.SystemRandom().randrange(2**32)),
        int(os.environ.get("FLIPS") or 300),
    )
    generator = random.Random(seed)  # noqa: S311 - no secret
    kinds: dict[Path, Kind] = {small / name: _manifest(small / name)["kind"] for name in STAGES}
    for _ in range(flips):
        folder = generator.choice(sorted(kinds))
        with (
            flipped(folder, generator) as where,
            pytest.raises(ValueError, match=re.escape(str(folder))),
        ):
            print(f"{SEED}={seed}: {where}")
            open_artifact(folder, kinds[folder])
    for folder, kind in kinds.items():
        open_artifact(folder, kind)


@pytest.mark.parametrize(("consumer", "inputs"), CONSUMERS.items())
def test_nothing_is_made_from_a_corrupt_artifact(
    small: Path, capsys: pytest.CaptureFixture[str], consumer: str, inputs: list[str]
) -> None:
    """Whichever input has a flipped bit, the stage stops with its name, and neither replaces what is there nor leaves a draft."""
    before = _bytes(small / consumer)
    for name in inputs:
        with flipped(small / name, random.Random(name)):  # noqa: S311
            assert command.main([*STAGES[consumer], *HOST]) == 2
        assert f"small/{name}" in capsys.readouterr().err
    assert _bytes(small / consumer) == before
    assert not _draft(small / consumer).exists()


@pytest.mark.parametrize("artifact", ["trajectories/it001", "logits/it001"])
def test_a_corrupt_shard_is_remade_with_the_same_bytes(
    undisturbed: Path, small: Path, artifact: str
) -> None:
    shard = shards(small / artifact)[0]
    shard.write_bytes(_flip(sound := shard.read_bytes(), len(sound) * 4))
    run_stage(small.parents[1], STAGES[artifact], workers=1)
    assert _bytes(small / artifact) == _bytes(undisturbed / "artifacts/small" / artifact)


@pytest.mark.parametrize(
    ("artifact", "whose", "told"),
    [
        ("logits/it001", "teacher", "log-probabilities of"),
        ("trajectories/it001", "student", "logits after"),
    ],
)
def test_a_policy_whose_numbers_are_not_finite_is_not_believed(
    small: Path, capsys: pytest.CaptureFixture[str], artifact: str, whose: str, told: str
) -> None:
    """Its checkpoint is sound as a file. The stage stops with one message, and leaves what is there."""
    _spoil_weights(small / "checkpoints" / whose)
    if whose == "student":
        shutil.rmtree(small / artifact)
    before = _bytes(small / artifact)
    assert command.main([*STAGES[artifact], *HOST]) == 1
    said = capsys.readouterr().err
    assert told in said
    assert "not finite" in said
    assert "Traceback" not in said
    assert _bytes(small / artifact) == before


def test_a_run_that_diverges_keeps_the_batch_and_what_was_there(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _bytes(small / "checkpoints/it001")
    assert (
        command.main([*STAGES["checkpoints/it001"], *HOST, "--set", "optimize.learning_rate=1e30"])
        == 1
    )
    said = capsys.readouterr().err
    (kept,) = (small.parent / ".metrics/small/not_finite").iterdir()
    assert f"kept in artifacts/.metrics/small/not_finite/{kept.name}" in said
    tensors = safetensors.torch.load_file(kept)
    assert tensors["batch/frames"].shape == (16, 1, 32, 32, 3)
    assert tensors["batch/teacher"].isfinite().all()
    assert _bytes(small / "checkpoints/it001") == before
    run_stage(small.parents[1], STAGES["checkpoints/it001"], workers=1)
    assert _bytes(small / "checkpoints/it001") == before


def _spoil_weights(folder: Path) -> None:
    """Publish the checkpoint again with one weight that is not a number."""
    sound = open_artifact(folder, "checkpoint")
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    weights["placeholder"][0, 0] = torch.nan
    with draft(folder, "checkpoint", sound.parents, sound.params) as work:
        with work.part(WEIGHTS) as path:
            save_weights(path, weights)
        work.publish(sound.facts)


@contextmanager
def flipped(folder: Path, generator: random.Random) -> Iterator[str]:
    """One bit of one of an artifact's files is wrong for a while. Yields which."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = folder / "manifest.json" if generator.random() < 0.3 else generator.choice(files)
    sound = path.read_bytes()
    bit = generator.randrange(8 * len(sound))
    path.write_bytes(_flip(sound, bit))
    try:
        yield f"bit {bit} of {path.relative_to(folder.parents[1])}"
    finally:
        path.write_bytes(sound)


def _flip(content: bytes, bit: int) -> bytes:
    spoiled = bytearray(content)
    spoiled[bit // 8] ^= 1 << bit % 8
    return bytes(spoiled)


def test_objectives_are_compared_on_one_recorded_batch(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, "CHUNK", 16)
    monkeypatch.setattr("sys.argv", ["directions", "it001", "--json", "rows.jsonl"])
    directions.main()
    rows = {
        row["objective"]: row
        for row in map(json.loads, (small.parents[1] / "rows.jsonl").read_text().splitlines())
    }
    assert {"reverse_kl", "forward_kl", "hard_ce"} <= set(rows)
    assert rows["reverse_kl"]["cosine"] == pytest.approx([1, 1, 1])
    assert rows["forward_kl"]["cosine"][0] > 0.3
    assert rows["reverse_kl"]["reverse_kl"] < 0 > rows["forward_kl"]["forward_kl"]
    assert rows["grpo"]["states"] < rows["reverse_kl"]["states"] == rows["forward_kl"]["states"]
