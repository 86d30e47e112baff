"""explore: groups for GRPO from seeded placements, in rounds until enough are useful."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import stages.explore
from tests.small_run import STAGES, call_stage
from tests.vla_opd.small import CHUNK, episode
from vla_opd.artifacts.manifest import read_manifest
from vla_opd.data.trajectory import Episode, read_shard, shards, write_shard
from vla_opd.machine.host import Host
from vla_opd.params.load import load
from vla_opd.params.run import Params
from vla_opd.simulation.collect import Collector, summarize_episodes


@pytest.fixture
def params(small: Path) -> Params:
    assert small.is_dir()
    return load("params.yaml")


def test_only_decisions_are_kept(small: Path, params: Params) -> None:
    for shard in shards(small / "trajectories/rl001"):
        for rollout in read_shard(shard):
            assert (rollout.step % params.policy.chunk == 0).all()
            assert len(rollout.step) == len(rollout.tokens)


def test_rounds_stop_once_enough_groups_are_useful(small: Path) -> None:
    """With every group useful, one round of two tasks' two placements will do."""
    settings = ("explore.keep_low=0", "explore.keep_high=1")
    assert call_stage([*STAGES["trajectories/rl001"], "--workers", "1"], *settings) == 0
    facts = read_manifest(small / "trajectories/rl001", "trajectories").facts
    assert (facts["groups"], facts["useful_groups"], facts["episodes"]) == (4, 4, 16)


def make_group(seed: int, *, useful: bool) -> list[Episode]:
    members = [episode(seed, member=member) for member in range(4)]
    return [replace(member, success=useful and member.member == 0) for member in members]


def test_a_killed_attempts_shards_of_a_later_round_do_not_end_this_one(
    small: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round has three useful groups of the four needed.

    One of the second is in the draft already, and useful.
    """
    written: list[int] = []

    def write(collector: Collector, groups: Mapping[str, Any], _description: str) -> None:
        names = list(groups)
        if not written:
            names.append("shard-000-00002.zarr.zip")
        written.append(len(groups))
        for number, name in enumerate(names):
            with collector.work.part(name) as path:
                write_shard(path, make_group(number, useful=number > 0), CHUNK)

    monkeypatch.setattr(Collector, "write", write)
    manifest = stages.explore.run(
        run="small",
        seed=3,
        settings=params.explore,
        environment=params.environment,
        iteration="rl001",
        student=small / "checkpoints/it001",
        out=small / "trajectories/other",
        host=Host(),
    )
    assert manifest is not None
    assert written == [4, 4]
    assert (manifest.facts["groups"], manifest.facts["useful_groups"]) == (8, 6)


def test_counts_add_up() -> None:
    group = [
        replace(episode(seed, steps=steps), success=steps < 5)
        for seed, steps in enumerate((5, 3, 4))
    ]
    expected = {"episodes": 3, "success": 2 / 3, "env_steps": 12, "states": 12}
    assert summarize_episodes(group) == expected
