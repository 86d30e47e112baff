"""The teacher is asked only about pictures of the kind that it was trained on."""

from pathlib import Path

import pytest

from stages import label
from tests.vla_opd import small
from tests.vla_opd.test_checkpoint import publish
from vla_opd.artifacts import draft
from vla_opd.host import Host
from vla_opd.params import CheckpointParams, DemonstrationSet, EnvironmentParams, Params, RunParams
from vla_opd.policies import build_policy

TRAINED = CheckpointParams(demonstrations="main", steps=1, learning_rate=0.1)
PARAMS = Params(
    run=RunParams(name="test"),
    environment=small.ENVIRONMENT,
    demonstrations={"main": DemonstrationSet(episodes=1)},
    teacher=TRAINED,
    student=TRAINED,
    iterations={"it001": "student"},
    evaluations={"start": "student", "final": "it001", "teacher": "teacher"},
)


def test_trajectories_of_another_camera_order_are_refused(tmp_path: Path) -> None:
    publish(tmp_path / "teacher", build_policy(small.FACTS).state_dict(), {"checkpoint": small.FACTS.model_dump()})
    swapped = EnvironmentParams(**small.ENVIRONMENT.model_dump() | {"cameras": small.ENVIRONMENT.cameras[::-1]})
    with draft(tmp_path / "trajectories", "trajectories", {}, {"environment": swapped.model_dump()}) as work:
        work.publish({"action_space": small.SPACE.digest, "states": 0})
    with pytest.raises(
        ValueError, match=r"environment\.cameras is \('side', 'front'\); expected \('front', 'side'\), which .*teacher was trained with"
    ):
        label.run(PARAMS, tmp_path / "teacher", tmp_path / "trajectories", tmp_path / "logits", Host())
    assert not (tmp_path / "logits").exists()
