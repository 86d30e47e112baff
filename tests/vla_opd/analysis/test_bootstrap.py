"""Results of a study against numbers worked out by hand, and the coverage of intervals."""

import math

import numpy as np
import pytest

from benchmarks.forgetting import at_level
from vla_opd.analysis.bootstrap import Curve, Estimate, Study, crossing, read_study
from vla_opd.analysis.study_table import Cost, EpisodeRow, Table, UpdateRow

TASKS = ("a", "b")
STATES = 10


def episodes(
    arm: str | None,
    seed: int | None,
    evaluation: str,
    successes: tuple[int, int],
    cost: Cost | None = None,
    *,
    seen: bool = True,
) -> list[EpisodeRow]:
    """Of each task's ten states, the first `successes` succeed."""
    return [
        EpisodeRow(
            **(cost or Cost()).model_dump(),
            arm=arm,
            seed=seed,
            evaluation=evaluation,
            checkpoint=evaluation,
            horizon=100,
            task=task if seen else f"unseen {task}",
            seen=seen,
            state=state,
            success=state < count,
            steps=50,
            digest="d",
        )
        for task, count in zip(TASKS, successes, strict=True)
        for state in range(STATES)
    ]


def update(arm: str, seed: int, position: int, entropy: float) -> UpdateRow:
    return UpdateRow(
        arm=arm,
        seed=seed,
        iteration=f"it{position:03d}",
        kind="distill",
        position=position,
        success=0.5,
        student_entropy_before=3.0,
        student_entropy_after=entropy,
        digest="d",
    )


def spent(iterations: int, env_steps: int) -> Cost:
    return Cost(iterations=iterations, env_steps=env_steps)


def table() -> Table:
    """`fast` reaches 90 % with either seed, `slow` 40 %; start 20 %, teacher 100 %."""
    rows = episodes(None, None, "start", (2, 2)) + episodes(None, None, "teacher", (10, 10))
    updates = []
    for seed in (0, 1):
        rows += episodes("fast", seed, "it002", (7, 5), spent(2, 1000)) + episodes(
            "fast", seed, "it004", (9, 9), spent(4, 2000)
        )
        rows += episodes("slow", seed, "it004", (4, 4), spent(4, 9000))
        updates += [update("fast", seed, p, 3.0 + p + seed) for p in (1, 2, 3, 4)] + [
            update("slow", seed, p, 2.0) for p in (1, 2, 3, 4)
        ]
    return Table(tuple(rows), tuple(updates))


def with_unseen() -> Table:
    """On unseen tasks the start is at 60 %, `fast` ends at 50 % and `slow` at 10 %."""
    rows = episodes(None, None, "start", (6, 6), seen=False) + episodes(
        None, None, "teacher", (3, 3), seen=False
    )
    for seed in (0, 1):
        rows += episodes("fast", seed, "it002", (6, 6), spent(2, 1000), seen=False)
        rows += episodes("fast", seed, "it004", (5, 5), spent(4, 2000), seen=False)
        rows += episodes("slow", seed, "it004", (1, 1), spent(4, 9000), seen=False)
    return Table((*table().episodes, *rows), table().updates)


def test_success_on_unseen_tasks_is_compared_at_equal_success_on_seen_ones() -> None:
    """`fast` goes 20, 60, 90 % on seen tasks and 60, 60, 50 % on unseen ones; `slow` fails."""
    seen, unseen = (
        read_study(with_unseen(), "start", "teacher", seen=is_seen) for is_seen in (True, False)
    )
    fast, slow, both = (
        at_level(seen, unseen, arms, level)
        for arms, level in ((["fast"], 0.75), (["slow"], 0.75), (["slow", "fast"], 0.5))
    )
    assert fast.value == pytest.approx(0.55)
    estimate = fast.estimate()
    assert estimate.low < estimate.value < estimate.high
    assert np.isfinite(fast.resampled).mean() > 0.9
    assert slow.value == math.inf
    assert both.value == pytest.approx((0.1 + 0.6) / 2)
    with pytest.raises(SystemExit, match=r"no arm 'quick'; expected some of \['fast', 'slow'\]"):
        at_level(seen, unseen, ["quick"], 0.5)


def test_a_difference_at_equal_success_is_paired() -> None:
    """A path does not differ from itself; one that never reaches the level has no difference."""
    seen, unseen = (
        read_study(with_unseen(), "start", "teacher", seen=is_seen) for is_seen in (True, False)
    )
    fast, slow = (at_level(seen, unseen, [arm], 0.75) for arm in ("fast", "slow"))
    assert fast.minus(fast).estimate() == Estimate(0, 0, 0)
    assert at_level(seen, unseen, ["slow"], 0.35).minus(
        at_level(seen, unseen, ["fast"], 0.35)
    ).value == pytest.approx(0.6 + (0.1 - 0.6) * 0.75 - 0.6)
    assert slow.minus(fast).format("never") == "never"
    assert slow.seeds == fast.seeds == ((0, 1),)


@pytest.fixture(scope="module")
def study() -> Study:
    return read_study(table(), "start", "teacher")


def test_curves_begin_at_the_start_and_follow_the_iterations(study: Study) -> None:
    fast, slow = study.curves
    assert fast.checkpoints == ("start", "it002", "it004")
    assert [estimate.value for estimate in study.success(fast)] == pytest.approx([0.2, 0.6, 0.9])
    assert fast.cost("env_steps").tolist() == [0, 1000, 2000]
    assert (slow.arm, slow.seeds, slow.per_seed.tolist()) == ("slow", (0, 1), [0.4, 0.4])
    assert study.checkpoint_success(study.teacher) == Estimate(1.0, 1.0, 1.0)
    assert study.task_success(fast.outcomes[:, 1]) == {
        "a": pytest.approx(0.7),
        "b": pytest.approx(0.5),
    }


def test_metrics_of_updates_are_averaged_over_seeds(study: Study) -> None:
    fast = study.curves[0]
    assert fast.at_end("student_entropy_after") == pytest.approx(7.5)
    assert fast.at_end("reverse_kl_after") is None
    assert fast.by_position("student_entropy_after") == {1: 4.5, 2: 5.5, 3: 6.5, 4: 7.5}


def test_the_cost_to_reach_a_level_is_interpolated(study: Study) -> None:
    fast, slow = study.curves
    assert study.reach(fast, "env_steps", 0.75).value == pytest.approx(
        1500
    )  # half way from 60 to 90 %
    assert study.reach(fast, "iterations", 0.4).value == pytest.approx(1)
    assert study.reach(fast, "iterations", 0.2).value == 0
    assert study.reach(slow, "env_steps", 0.75) == Estimate(math.inf, math.inf, math.inf)


def test_an_arm_that_never_reaches_the_level_counts_with_its_total_cost(study: Study) -> None:
    fast, slow = study.curves
    ratio = study.ratio(fast, slow, "env_steps", 0.75)
    assert ratio is not None
    assert ratio.value == pytest.approx(9000 / 1500)
    assert ratio.low < 6 < ratio.high
    assert study.ratio(slow, fast, "env_steps", 0.75) is None


def test_no_ratio_to_a_reference_that_may_not_reach_the_level(study: Study) -> None:
    """With 90 % on two tasks of ten states, many resamples are below 90 %."""
    fast, slow = study.curves
    assert study.reach(fast, "env_steps", 0.9).high == math.inf
    assert study.ratio(fast, slow, "env_steps", 0.9) is None


def test_iterations_of_two_kinds_are_not_averaged() -> None:
    whole = table()
    updates: list[UpdateRow] = []
    for row in whole.updates:
        kind = "reinforce" if (row.seed, row.position) == (1, 4) else row.kind
        updates.append(row.model_copy(update={"kind": kind}))
    study = read_study(Table(whole.episodes, tuple(updates)), "start", "teacher")
    assert list(study.curves[0].by_position("student_entropy_after")) == [1, 2, 3]


def test_differences_are_paired(study: Study) -> None:
    """One arm succeeds wherever the other does, so it is ahead in every resample."""
    fast, slow = study.curves
    difference = study.difference(fast, slow)
    assert difference is not None
    assert difference.value == pytest.approx(-0.5)
    assert difference.high < 0
    assert study.difference(fast, fast) == Estimate(0, 0, 0)


def test_unseen_tasks_are_a_study_of_their_own() -> None:
    assert read_study(with_unseen(), "start", "teacher").teacher.mean() == 1
    unseen = read_study(with_unseen(), "start", "teacher", seen=False)
    assert set(unseen.tasks) == {"unseen a", "unseen b"}
    lost = [unseen.forgetting(curve) for curve in unseen.curves]
    assert [estimate.value for estimate in lost] == pytest.approx([0.1, 0.5])
    assert lost[1].low > 0.1


def test_an_arm_without_iterations_is_one_checkpoint() -> None:
    rows = episodes("sft", 0, "start", (8, 8), Cost(optimizer_steps=400))
    curve = read_study(
        Table((*table().episodes, *rows), table().updates), "start", "teacher"
    ).curves[-1]
    assert (curve.arm, curve.checkpoints) == (
        "sft",
        ("start",),
    )  # its own, not the one that the others start from
    assert curve.cost("optimizer_steps").tolist() == [400]
    assert curve.at_end("student_entropy_after") is None
    assert curve.by_position("student_entropy_after") == {}


def test_arms_without_a_seed_in_common_are_not_compared(study: Study) -> None:
    fast, slow = study.curves
    alone = Curve("slow", (7, 8), slow.checkpoints, slow.outcomes, slow.costs, ())
    assert study.difference(fast, alone) is None
    assert study.ratio(fast, alone, "env_steps", 0.75) is None


def test_only_the_checkpoints_that_all_seeds_have_are_on_the_curve() -> None:
    whole = table()
    longer = Table(
        (*whole.episodes, *episodes("fast", 0, "it006", (10, 10), spent(6, 3000))), whole.updates
    )
    assert read_study(longer, "start", "teacher").curves[0].checkpoints == (
        "start",
        "it002",
        "it004",
    )


def test_other_episodes_than_the_starts_are_refused() -> None:
    whole = table()
    moved = whole.episodes[-1].model_copy(update={"state": 77})
    with pytest.raises(
        ValueError,
        match=r"slow, seed 1, it004: 2 episodes differ from those of the start, "
        r"the first of them state 9 of b",
    ):
        read_study(Table((*whole.episodes[:-1], moved), whole.updates), "start", "teacher")


def test_a_missing_evaluation_is_named() -> None:
    with pytest.raises(
        ValueError,
        match=r"no evaluation 'expert' of what the members share; "
        r"expected one of \['start', 'teacher'\]",
    ):
        read_study(table(), "start", "expert")


@pytest.mark.parametrize(
    ("success", "level", "expected"),
    [
        ([0.2, 0.6, 0.5, 0.9], 0.55, 8.75),
        ([0.2, 0.6, 0.5, 0.9], 0.8, 27.5),
        ([0.9, 0.9, 0.9, 0.9], 0.5, 0),
        ([0.1, 0.2, 0.3, 0.4], 0.5, math.inf),
    ],
)
def test_the_first_crossing_counts(success: list[float], level: float, expected: float) -> None:
    quantity = np.array([[0.0, 10, 20, 30]])
    assert crossing(np.array([success]), quantity, np.array([level]))[0] == pytest.approx(expected)


def test_intervals_have_their_nominal_coverage() -> None:
    """150 studies of five seeds and 40 episodes, with success rates around 0.7."""
    random = np.random.default_rng(0)
    tasks = ("a",) * 20 + ("b",) * 20
    covered = 0
    for _ in range(150):
        rates = np.clip(random.normal(0.7, 0.05, 5), 0, 1)
        outcomes = random.random((5, 2, 40)) < rates[:, None, None]
        curve = Curve("one", tuple(range(5)), ("start", "end"), outcomes, {}, ())
        study = Study((curve,), outcomes[0, 0], outcomes[0, 0], Cost(), tasks, 100)
        success = study.success(curve)[-1]
        covered += success.low <= 0.7 <= success.high
    assert 0.88 <= covered / 150 <= 0.995
