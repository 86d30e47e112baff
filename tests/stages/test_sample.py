"""sample: seeded placements or, for comparison, the benchmark's initial states, none repeated."""

from stages.sample import plan_groups
from vla_opd.envs.protocol import Placement
from vla_opd.params.stages import SampleParams

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
