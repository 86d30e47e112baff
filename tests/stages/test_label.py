"""Who is asked about which states: a teacher, about pictures of the kind that it was trained on; the expert; a teacher that takes over."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import stages.__main__ as command
from stages import label
from stages.optimize import _read
from stages.report import render
from tests import out_of_tree
from tests.small_run import HOST
from tests.vla_opd import small as tiny
from tests.vla_opd.policies.test_checkpoint import publish
from vla_opd.analysis.finished_run import read_run
from vla_opd.analysis.study_table import member_rows
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import read_manifest
from vla_opd.data.labels import Labels, read_outcome, read_shard, write_shard
from vla_opd.data.trajectory import read_shard as read_episodes
from vla_opd.data.trajectory import read_states, shards
from vla_opd.learning.bin_transfer import between
from vla_opd.machine.host import Host
from vla_opd.params.load import load
from vla_opd.params.objective import OptimizeParams
from vla_opd.params.run import Params
from vla_opd.params.stages import DemonstrationSet, EnvironmentParams, PretrainedParams, RunParams
from vla_opd.policies.checkpoint import open_checkpoint
from vla_opd.policies.load import build_policy

TRAINED = PretrainedParams(demonstrations="main", steps=1, learning_rate=0.1)
PARAMS = Params(
    run=RunParams(name="test"),
    environment=tiny.ENVIRONMENT,
    demonstrations={"main": DemonstrationSet(episodes=1)},
    pretrained={"teacher": TRAINED, "student": TRAINED},
    iterations={"it001": "student"},
    evaluations={"start": "student", "final": "it001", "teacher": "teacher"},
)


def test_trajectories_of_another_camera_order_are_refused(tmp_path: Path) -> None:
    publish(
        tmp_path / "teacher",
        build_policy(tiny.FACTS).state_dict(),
        {"checkpoint": tiny.FACTS.model_dump()},
    )
    swapped = EnvironmentParams(
        **tiny.ENVIRONMENT.model_dump() | {"cameras": tiny.ENVIRONMENT.cameras[::-1]}
    )
    with draft(
        tmp_path / "trajectories", "trajectories", {}, {"environment": swapped.model_dump()}
    ) as work:
        work.publish({"action_space": tiny.SPACE.digest, "states": 0})
    with pytest.raises(
        ValueError,
        match=r"environment\.cameras is \('side', 'front'\); expected \('front', 'side'\), which .*teacher was trained with",
    ):
        label.run(
            PARAMS, tmp_path / "teacher", tmp_path / "trajectories", tmp_path / "logits", Host()
        )
    assert not (tmp_path / "logits").exists()


def label_it(*settings: str, workers: int = 1) -> int:
    """The stage by its command line, where the test stands."""
    arguments = [part for setting in settings for part in ("--set", setting)]
    return command.main(
        ["label", "--iteration", "it001", "--workers", str(workers), *HOST, *arguments]
    )


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


SIMULATED = [("label.expert=tests.out_of_tree:expert",), ("label.recover_every=3",)]


@pytest.mark.parametrize("settings", SIMULATED)
def test_simulated_labels_are_the_same_by_two_workers_and_after_a_kill(
    small: Path, settings: tuple[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert manifest.facts["teacher_queries"] == states
    executed = 0
    env = out_of_tree.make(load("params.yaml").environment)
    for shard in shards(small / "trajectories/it001")[:3]:
        states = read_states([shard])
        labels = read_shard(small / "logits/it001" / shard.name, len(states))
        episode, every = read_episodes(shard)[0], np.ones_like(states.mask)
        env.reset(episode.placement)
        for row in range(len(episode.step)):
            env.hand = states.observations.proprio[row].astype(np.float64)
            given = labels.labelled(every)[row].reshape(space.chunk, 2)
            assert (
                given.all(1).sum()
                == given.any(1).sum()
                == steps_to_success(env, states.observations.proprio[row], space.chunk)
            )
            executed += given.all(1).sum()
            wanted = space.encode(np.tile(out_of_tree.expert(env).act(), (1, space.chunk, 1)))[
                0, :2
            ]
            assert (
                np.abs(labels.log_probs[row, :2].argmax(-1) - wanted).max() <= 1
            )  # the recorded hand is rounded to float32
    assert (
        command.main(
            ["optimize", "--iteration", "it001", *HOST, "--set", "optimize.objective=forward_kl"]
        )
        == 0
    )
    assert command.main(["evaluate", "--name", "final", *HOST]) == 0
    run = read_run(
        load("params.yaml", ["label.expert=tests.out_of_tree:expert"]).model_copy(
            update={"reinforcements": {}}
        ),
        small,
    )
    assert (
        "Labelled by a scripted expert</strong> (<code>label.expert: tests.out_of_tree:expert</code>)"
        in render(run)
    )
    row = member_rows(run, "dagger", 0, {}).updates[0]
    assert (row.reverse_kl_before, row.teacher_entropy_after, row.failed_share is None) == (
        None,
        None,
        False,
    )
    assert row.student_entropy_after > 0
    facts = read_manifest(small / "checkpoints/it001", "checkpoint").facts
    assert facts["after"]["forward_kl"] < 0.8 * facts["before"]["forward_kl"]


def steps_to_success(env: out_of_tree.PointMass, hand: np.ndarray, most: int) -> int:
    """How many steps the expert needs from there, or `most`; the environment is left where it was."""
    env.hand, taken, success = hand.astype(np.float64), 0, False
    while taken < most and not success:
        success = env.advance(out_of_tree.expert(env).act()[None], 0).success
        taken += 1
    env.hand = hand.astype(np.float64)
    return taken


def test_a_teacher_with_other_statistics_is_transferred_if_so_told(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = open_checkpoint(small / "checkpoints/teacher")
    ours = teacher.facts.action_space
    theirs = ours.model_copy(
        update={"q01": tuple(q - 0.1 for q in ours.q01), "q99": tuple(q + 0.2 for q in ours.q99)}
    )
    facts = teacher.facts.model_copy(update={"action_space": theirs})
    publish(small / "checkpoints/teacher", teacher.weights(), {"checkpoint": facts.model_dump()})
    assert label_it() == 2
    assert (
        f"expected the teacher's, {theirs.digest[:12]} (or label.transfer true)"
        in capsys.readouterr().err
    )
    assert label_it("label.transfer=true") == 0
    stored = np.concatenate(
        [
            read_shard(path, len(read_states([small / "trajectories/it001" / path.name]))).log_probs
            for path in shards(small / "logits/it001")
        ]
    )
    transfer = between(theirs, ours)
    assert transfer is not None
    moved = _read(
        load("params.yaml").optimize, small / "trajectories/it001", small / "logits/it001", ours
    ).teacher
    np.testing.assert_array_equal(moved, transfer(stored))
    assert np.abs(np.exp(moved) - np.exp(stored.astype(np.float32))).max() > 0.1
    assert (
        command.main(["optimize", "--iteration", "it001", *HOST, "--set", "label.transfer=true"])
        == 0
    )
    found = read_manifest(small / "checkpoints/it001", "checkpoint").facts
    assert found["transferred_from"] == theirs.digest
    assert 0 < found["after"]["reverse_kl"] < 0.8 * found["before"]["reverse_kl"]
    assert open_checkpoint(small / "checkpoints/it001").facts.action_space == ours


def test_only_recoverable_states_are_learnt_from_if_so_told(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--set", "label.recover_every=2", "--set", "optimize.recoverable=true"]
    assert label_it() == 0
    assert command.main(["optimize", "--iteration", "it001", *HOST, *arguments]) == 2
    assert (
        "it001: doesn't say from which states the teacher still succeeds; expected labels made with label.recover_every"
        in capsys.readouterr().err
    )
    assert label_it("label.recover_every=2") == 0
    found = read_manifest(small / "logits/it001", "logits").facts
    tried = [read_outcome(path)[1] for path in sorted((small / "logits/it001").glob("shard-*"))]
    recoverable = np.concatenate([one for one in tried if one is not None])
    assert found["recoverable"] == recoverable.mean()
    assert 0 < found["recoverable"] < 1
    visited = read_manifest(small / "trajectories/it001", "trajectories").facts
    assert found["env_steps"] > 0
    assert found["teacher_queries"] > visited["states"]
    assert command.main(["optimize", "--iteration", "it001", *HOST, *arguments]) == 0
    assert (
        read_manifest(small / "checkpoints/it001", "checkpoint").facts["learnt_from"]
        == recoverable.sum()
    )
    assert command.main(["evaluate", "--name", "final", *HOST]) == 0
    run = read_run(load("params.yaml").model_copy(update={"reinforcements": {}}), small)
    assert run.results.iterations[0].recoverable == found["recoverable"]
    assert run.results.env_steps == visited["env_steps"] + found["env_steps"]
    told = render(run)
    assert "Recoverable: the states from which the teacher still succeeds" in told
    assert (
        f'<td class="number">{found["recoverable"]:.1%}</td><td class="number">' in told
    )  # then the gradient's norm
    assert "Labelled by a scripted expert" not in told


def test_grpo_weighs_every_episode_alike_whatever_is_left_of_it(small: Path) -> None:
    assert label_it("label.recover_every=2") == 0
    opt = OptimizeParams(objective="mixed", recoverable=True, keep_low=0, keep_high=1)
    data = _read(
        opt,
        small / "trajectories/it001",
        small / "logits/it001",
        open_checkpoint(small / "checkpoints/student").facts.action_space,
    )
    assert data.on_policy is not None
    decisions = data.on_policy.decisions
    advantage, episode = decisions.graded(data.learnt, opt).advantage, decisions.episode
    rows = data.usable[advantage[data.usable] != 0]  # of groups in which not all came to the same
    weight = data.on_policy.advantage[rows] / advantage[rows] * data.mask[rows].sum(1)
    each = [weight[episode[rows] == one].sum() for one in np.unique(episode[rows])]
    assert len(each) > 3
    np.testing.assert_allclose(each, each[0], rtol=1e-4)
    assert data.kept is not None
    assert any(0 < data.kept[episode == one].mean() < 1 for one in np.unique(episode)), (
        "the fixture should show an episode that is cut"
    )
    assert (
        len(rows) < (data.on_policy.decisions.decided & data.mask.any(1)).sum()
    )  # some are left out


def test_the_next_is_asked_for_before_one_is_waited_for() -> None:
    happened = list[str]()

    def asked() -> Iterator[int]:
        for one in range(3):
            happened.append(f"ask {one}")
            yield one

    for one in label._one_behind(asked()):
        happened.append(f"wait {one}")
    assert happened == ["ask 0", "ask 1", "wait 0", "ask 2", "wait 1", "wait 2"]
    assert list(label._one_behind(iter(()))) == []
