"""Who is asked about which states: a teacher, about pictures of the kind that it was trained on; the expert; a teacher that takes over."""

from pathlib import Path

import numpy as np
import pytest

import stages.__main__ as command
from stages import label
from tests import out_of_tree
from tests.small_run import HOST
from tests.vla_opd import small as tiny
from tests.vla_opd.test_checkpoint import publish
from vla_opd.artifacts import draft, read_manifest
from vla_opd.checkpoint import open_checkpoint
from vla_opd.host import Host
from vla_opd.logits import Labels, read_recoverable, read_shard, write_shard
from vla_opd.params import CheckpointParams, DemonstrationSet, EnvironmentParams, Params, RunParams, load
from vla_opd.policies import build_policy
from vla_opd.results import read_run
from vla_opd.trajectory import read_shard as read_episodes
from vla_opd.trajectory import read_states, shards

TRAINED = CheckpointParams(demonstrations="main", steps=1, learning_rate=0.1)
PARAMS = Params(
    run=RunParams(name="test"),
    environment=tiny.ENVIRONMENT,
    demonstrations={"main": DemonstrationSet(episodes=1)},
    teacher=TRAINED,
    student=TRAINED,
    iterations={"it001": "student"},
    evaluations={"start": "student", "final": "it001", "teacher": "teacher"},
)


def test_trajectories_of_another_camera_order_are_refused(tmp_path: Path) -> None:
    publish(tmp_path / "teacher", build_policy(tiny.FACTS).state_dict(), {"checkpoint": tiny.FACTS.model_dump()})
    swapped = EnvironmentParams(**tiny.ENVIRONMENT.model_dump() | {"cameras": tiny.ENVIRONMENT.cameras[::-1]})
    with draft(tmp_path / "trajectories", "trajectories", {}, {"environment": swapped.model_dump()}) as work:
        work.publish({"action_space": tiny.SPACE.digest, "states": 0})
    with pytest.raises(
        ValueError, match=r"environment\.cameras is \('side', 'front'\); expected \('front', 'side'\), which .*teacher was trained with"
    ):
        label.run(PARAMS, tmp_path / "teacher", tmp_path / "trajectories", tmp_path / "logits", Host())
    assert not (tmp_path / "logits").exists()


def label_it(*settings: str, workers: int = 1) -> int:
    """The stage by its command line, where the test stands."""
    arguments = [part for setting in settings for part in ("--set", setting)]
    return command.main(["label", "--iteration", "it001", "--workers", str(workers), *HOST, *arguments])


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


SIMULATED = [("label.expert=tests.out_of_tree:expert",), ("label.recover_every=3",)]


@pytest.mark.parametrize("settings", SIMULATED)
def test_simulated_labels_are_the_same_by_two_workers_and_after_a_kill(small: Path, settings: tuple[str], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = small / "logits/it001"
    assert label_it(*settings) == 0
    expected = bytes_of(logits)
    with monkeypatch.context() as patch:
        written = list[str]()

        def write_two(path: Path, labels: Labels) -> None:
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(path.name)
            write_shard(path, labels)

        patch.setattr(label, "write_shard", write_two)
        with pytest.raises(KeyboardInterrupt):
            label_it(*settings, workers=2)
        assert len(list((small / "logits/.it001.draft").glob("shard-*"))) == 2
    assert label_it(*settings, workers=2) == 0
    assert bytes_of(logits) == expected


def test_the_experts_labels_are_what_it_would_do_there(small: Path) -> None:
    assert label_it("label.expert=tests.out_of_tree:expert") == 0
    space = open_checkpoint(small / "checkpoints/student").facts.action_space
    manifest = read_manifest(small / "logits/it001", "logits")
    assert manifest.params["label"]["expert"] == "tests.out_of_tree:expert"
    states = read_manifest(small / "trajectories/it001", "trajectories").facts["states"]
    assert (manifest.facts["teacher_queries"], manifest.facts["env_steps"]) == (states, states * space.chunk)
    env = out_of_tree.make(load("params.yaml").environment)
    for shard in shards(small / "trajectories/it001")[:3]:
        states, labels = read_states([shard]), read_shard(small / "logits/it001" / shard.name, len(read_states([shard])))
        episode = read_episodes(shard)[0]
        env.reset(episode.placement)
        for row in range(len(episode.step)):
            env.hand = states.observations.proprio[row].astype(np.float64)
            wanted = space.encode(np.tile(out_of_tree.expert(env).act(), (1, space.chunk, 1)))[0, :2]
            assert np.abs(labels[row, :2].argmax(-1) - wanted).max() <= 1  # the recorded hand is rounded to float32
    assert command.main(["optimize", "--iteration", "it001", *HOST, "--set", "optimize.objective=forward_kl"]) == 0
    facts = read_manifest(small / "checkpoints/it001", "checkpoint").facts
    assert facts["after"]["forward_kl"] < 0.8 * facts["before"]["forward_kl"]


def test_only_recoverable_states_are_learnt_from_if_so_told(small: Path) -> None:
    assert label_it("label.recover_every=2") == 0
    found = read_manifest(small / "logits/it001", "logits").facts
    recoverable = np.concatenate([read_recoverable(path) for path in sorted((small / "logits/it001").glob("shard-*"))])
    assert found["recoverable"] == recoverable.mean()
    assert 0 < found["recoverable"] < 1
    visited = read_manifest(small / "trajectories/it001", "trajectories").facts
    assert found["env_steps"] > 0
    assert found["teacher_queries"] > visited["states"]
    arguments = ["--set", "label.recover_every=2", "--set", "optimize.recoverable=true"]
    assert command.main(["optimize", "--iteration", "it001", *HOST, *arguments]) == 0
    assert read_manifest(small / "checkpoints/it001", "checkpoint").facts["learnt_from"] == recoverable.sum()
    assert command.main(["evaluate", "--name", "final", *HOST]) == 0
    run = read_run(load("params.yaml").model_copy(update={"reinforcements": {}}), small)
    assert run.results.iterations[0].recoverable == found["recoverable"]
    assert run.results.env_steps == visited["env_steps"] + found["env_steps"]
