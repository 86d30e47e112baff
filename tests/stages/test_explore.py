"""Groups for GRPO: seeded placements, in rounds until there are enough to learn from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import stages.explore
from stages.explore import _round
from tests.small_run import run_stage
from tests.vla_opd.small import CHUNK, episode
from vla_opd.data.trajectory import Episode, read_shard, shards, write_shard
from vla_opd.machine.host import Host
from vla_opd.params.load import load
from vla_opd.params.run import Params
from vla_opd.simulation.collect import counts


@pytest.fixture
def params(small: Path) -> Params:
    assert small.is_dir()
    return load("params.yaml")


def test_no_two_groups_of_a_run_begin_alike(params: Params) -> None:
    rounds = [
        _round(params, iteration, number) for iteration in ("rl001", "rl002") for number in range(2)
    ]
    jobs = [job for groups in rounds for members in groups.values() for job in members]
    assert {job.placement.split for job in jobs} == {"training"}
    assert (
        len({job.placement for job in jobs}) == 2 * 2 * 2 * 2
    )  # iterations, rounds, tasks, prompts
    assert len({job.seed for job in jobs}) == len(jobs) == 16 * 4
    assert list(rounds[1]) == [
        f"shard-{task:03d}-{prompt:05d}.zarr.zip" for task in range(2) for prompt in (2, 3)
    ]


def test_only_decisions_are_kept(small: Path, params: Params) -> None:
    for one in (one for shard in shards(small / "trajectories/rl001") for one in read_shard(shard)):
        assert (one.step % params.policy.chunk == 0).all()
        assert len(one.step) == len(one.tokens)


def test_rounds_go_on_until_there_are_groups_enough(small: Path) -> None:
    """With every group useful, one round of two tasks' two placements will do."""
    run_stage(
        small.parents[1],
        [
            "explore",
            "--iteration",
            "rl001",
            "--set",
            "explore.keep_low=0",
            "--set",
            "explore.keep_high=1",
        ],
        workers=1,
    )
    facts = json.loads((small / "trajectories/rl001/manifest.json").read_text())["facts"]
    assert (facts["groups"], facts["useful_groups"], facts["episodes"]) == (4, 4, 16)


def test_what_a_killed_attempt_left_of_a_later_round_does_not_end_this_one(
    small: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first round has three useful groups of the four wanted; of the second, one is there already, and useful."""

    def members(seed: int, *, mixed: bool) -> list[Episode]:
        return [replace(episode(seed, member=m), success=mixed and m == 0) for m in range(4)]

    filled: list[int] = []

    def fill(groups: dict[str, Any], *arguments: Any) -> None:
        work = arguments[3]
        filled.append(len(groups))
        for number, shard in enumerate(
            [*groups, *(["shard-000-00002.zarr.zip"] if len(filled) == 1 else [])]
        ):
            with work.part(shard) as path:
                write_shard(path, members(number, mixed=number > 0), CHUNK)

    monkeypatch.setattr(stages.explore, "fill", fill)
    made = stages.explore.run(
        params, "rl001", small / "checkpoints/it001", small / "trajectories/other", Host()
    )
    assert filled == [4, 4]
    assert (made.facts["groups"], made.facts["useful_groups"]) == (8, 6)


def test_counts_add_up() -> None:
    group = [
        replace(episode(seed, steps=steps), success=steps < 5)
        for seed, steps in enumerate((5, 3, 4))
    ]
    assert counts(group) == {"episodes": 3, "success": 2 / 3, "env_steps": 12, "states": 12}
