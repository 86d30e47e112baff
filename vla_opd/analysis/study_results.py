"""Results of a study: the numbers of its page, arm by arm."""

import math

from pydantic import BaseModel, ConfigDict

from vla_opd.analysis.bootstrap import COSTS, SHARE, Curve, Estimate, Study, common_seeds
from vla_opd.analysis.study_table import Cost


class ArmResult(BaseModel):
    """One arm at its end.

    success:    the success rate, averaged over seeds.
    reach:      the costs at which it reaches SHARE of the teacher's success rate; None if never.
    difference: its success rate minus that of the first arm, over the `compared` seeds of both.
    ratios:     `reach` over that of the first arm; a lower bound where `reach` is None.
    unseen:     the success rate on tasks that the run does not train on, if any were evaluated.
    forgotten:  by how much that is below the start's.
    """

    model_config = ConfigDict(frozen=True)
    arm: str
    seeds: tuple[int, ...]
    success: Estimate
    per_seed: tuple[float, ...]
    by_task: dict[str, float]
    costs: dict[str, float | None]
    student_entropy: float | None
    teacher_entropy: float | None
    reverse_kl: float | None
    reach: dict[str, Estimate | None]
    compared: int
    difference: Estimate | None
    unseen: Estimate | None
    forgotten: Estimate | None
    ratios: dict[str, Estimate | None]


class StudyResults(BaseModel):
    """`results.json`: the numbers of the page."""

    model_config = ConfigDict(frozen=True)
    start: Estimate
    teacher: Estimate
    teacher_cost: Cost
    unseen_start: Estimate | None
    unseen_teacher: Estimate | None
    share: float
    arms: tuple[ArmResult, ...]


def compute_results(study: Study, unseen: Study | None) -> StudyResults:
    """Return the numbers of the page. unseen: the study of the tasks not trained on, if any."""
    unseen_start = None
    unseen_teacher = None
    if unseen:
        unseen_start = unseen.checkpoint_success(unseen.start)
        unseen_teacher = unseen.checkpoint_success(unseen.teacher)
    return StudyResults(
        start=study.checkpoint_success(study.start),
        teacher=study.checkpoint_success(study.teacher),
        teacher_cost=study.teacher_cost,
        unseen_start=unseen_start,
        unseen_teacher=unseen_teacher,
        share=SHARE,
        arms=tuple(_arm_result(study, curve, unseen) for curve in study.curves),
    )


def _arm_result(study: Study, curve: Curve, unseen: Study | None) -> ArmResult:
    first = study.curves[0]
    difference = None
    ratios: dict[str, Estimate | None] = dict.fromkeys(COSTS)
    if curve is not first:
        difference = study.difference(first, curve)
        ratios = {name: study.ratio(first, curve, name) for name in COSTS}
    unseen_success = None
    forgotten = None
    unseen_curve = unseen.find(curve.arm) if unseen else None
    if unseen and unseen_curve:
        unseen_success = unseen.success(unseen_curve)[-1]
        forgotten = unseen.forgetting(unseen_curve)
    return ArmResult(
        arm=curve.arm,
        seeds=curve.seeds,
        success=study.success(curve)[-1],
        per_seed=tuple(curve.per_seed.tolist()),
        by_task=study.task_success(curve.outcomes[:, -1]),
        costs={name: _total_cost(curve, name) for name in COSTS},
        student_entropy=curve.at_end("student_entropy_after"),
        teacher_entropy=curve.at_end("teacher_entropy_after"),
        reverse_kl=curve.at_end("reverse_kl_after"),
        reach={name: _finite_reach(study, curve, name) for name in COSTS},
        compared=len(common_seeds(first, curve)),
        difference=difference,
        unseen=unseen_success,
        forgotten=forgotten,
        ratios=ratios,
    )


def _total_cost(curve: Curve, name: str) -> float | None:
    total = float(curve.cost(name)[-1])
    return total if math.isfinite(total) else None


def _finite_reach(study: Study, curve: Curve, name: str) -> Estimate | None:
    reach = study.reach(curve, name)
    return reach if math.isfinite(reach.value) else None
