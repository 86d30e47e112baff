"""Placements of an iteration: seeded resets, or for comparison the benchmark's own initial states, none of them twice."""

from stages.sample import _groups
from vla_opd.params.run import Params
from vla_opd.params.stages import (
    DemonstrationSet,
    EnvironmentParams,
    PretrainedParams,
    RunParams,
    SampleParams,
)

TRAINED = PretrainedParams(demonstrations="main", steps=1, learning_rate=0.1)


def params(sample: SampleParams) -> Params:
    return Params(
        run=RunParams(name="test"),
        environment=EnvironmentParams(family="metaworld", tasks=("reach-v3", "push-v3")),
        demonstrations={"main": DemonstrationSet(episodes=1)},
        sample=sample,
        pretrained={"teacher": TRAINED, "student": TRAINED},
        iterations={"it001": "student", "it002": "it001"},
        evaluations={"start": "student", "final": "it002", "teacher": "teacher"},
    )


def test_training_placements_are_never_the_benchmarks() -> None:
    groups = _groups(params(SampleParams(prompts=3, group=4)), "it001")
    jobs = [job for members in groups.values() for job in members]
    assert {job.placement.split for job in jobs} == {"training"}
    assert len({job.placement for job in jobs}) == len(groups) == 6
    assert len({job.seed for job in jobs}) == len(jobs) == 24
    other = {
        job.placement
        for members in _groups(params(SampleParams(prompts=3, group=4)), "it002").values()
        for job in members
    }
    assert not other & {job.placement for job in jobs}


def test_the_benchmarks_states_are_drawn_without_repetition() -> None:
    leaky = params(SampleParams(prompts=50, group=1, protocol="benchmark"))
    drawn = [
        [job.placement for members in _groups(leaky, iteration).values() for job in members]
        for iteration in ("it001", "it002")
    ]
    for placements in drawn:
        assert {placement.split for placement in placements} == {"evaluation"}
        for task in ("reach-v3", "push-v3"):
            assert sorted(
                placement.index for placement in placements if placement.task == task
            ) == list(range(50))
    assert drawn[0] != drawn[1]
