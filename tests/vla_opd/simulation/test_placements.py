"""Placements: seeded or, for comparison, the benchmark's initial states, none repeated."""

from vla_opd.envs.protocol import Placement
from vla_opd.params.stages import ExploreParams, SampleParams
from vla_opd.simulation.placements import plan_groups, plan_round

TASKS = ("reach-v3", "push-v3")


def placements(settings: SampleParams, iteration: str) -> list[Placement]:
    groups = plan_groups(settings, TASKS, seed=0, iteration=iteration)
    return [job.placement for members in groups.values() for job in members]


def test_training_placements_are_never_the_benchmarks() -> None:
    settings = SampleParams(prompts=3, group=4)
    groups = plan_groups(settings, TASKS, seed=0, iteration="it001")
    jobs = [job for members in groups.values() for job in members]
    assert {job.placement.split for job in jobs} == {"training"}
    assert len({job.placement for job in jobs}) == len(groups) == 6
    assert len({job.seed for job in jobs}) == len(jobs) == 24
    next_iteration = set(placements(settings, "it002"))
    assert not next_iteration & {job.placement for job in jobs}


def test_the_benchmarks_states_are_drawn_without_repetition() -> None:
    settings = SampleParams(prompts=50, group=1, protocol="benchmark")
    first = placements(settings, "it001")
    second = placements(settings, "it002")
    for drawn in (first, second):
        assert {placement.split for placement in drawn} == {"evaluation"}
        for task in TASKS:
            states = [placement.index for placement in drawn if placement.task == task]
            assert sorted(states) == list(range(50))
    assert first != second


def test_no_two_groups_of_a_run_begin_alike() -> None:
    settings = ExploreParams(prompts=2, group=4)
    rounds = [
        plan_round(settings, TASKS, 3, iteration, number)
        for iteration in ("rl001", "rl002")
        for number in range(2)
    ]
    groups = [members for shards_of_round in rounds for members in shards_of_round.values()]
    jobs = [job for members in groups for job in members]
    assert {job.placement.split for job in jobs} == {"training"}
    # Of two iterations, rounds, tasks and prompts.
    assert len({job.placement for job in jobs}) == 2 * 2 * 2 * 2
    assert len({job.seed for job in jobs}) == len(jobs) == 16 * 4
    assert list(rounds[1]) == [
        "shard-000-00002.zarr.zip",
        "shard-000-00003.zarr.zip",
        "shard-001-00002.zarr.zip",
        "shard-001-00003.zarr.zip",
    ]
