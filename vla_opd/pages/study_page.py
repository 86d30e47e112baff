"""A study's page: its table as HTML, and its numbers as JSON.

No network, no scripts, no clock: the same table gives the same bytes.
"""

from importlib.metadata import version
from pathlib import Path

from vla_opd.analysis.bootstrap import Study, read_study
from vla_opd.analysis.study_results import StudyResults, compute_results
from vla_opd.analysis.study_table import Table, read
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import Manifest, open_artifact
from vla_opd.pages import html
from vla_opd.pages.html import percent
from vla_opd.pages.study_figures import COST_NAMES, DIAGNOSTICS, study_figures
from vla_opd.params.recorded import read_recorded
from vla_opd.params.run import Params
from vla_opd.params.study import StudyParams

TEMPLATE = "study.html.jinja"


def run(root: Path, name: str) -> Manifest:
    """Write `<root>/report/<name>` from the table `<root>/studies/<name>`.

    ValueError if the table is missing or damaged, or has no finished member.
    """
    folder = root / "studies" / name
    table = open_artifact(folder, "study")
    params = read_recorded(table.params["parameters"])
    rows = read(folder)
    teacher = _teacher_evaluation(params, name)
    study = _read_study(rows, params, teacher, seen=True)
    unseen = _read_study(rows, params, teacher, seen=False)
    if study is None or not study.curves:
        raise ValueError(f"{folder}: no member is done; expected one at least (opd study {name})")
    results = compute_results(study, unseen)
    numbers = results.model_dump_json(indent=2)
    page = render(
        name,
        params,
        table,
        params.evaluations[teacher],
        study,
        unseen,
        results,
    )
    target = root / "report" / name
    parents = {"study": table.digest}
    with draft(target, "report", parents, {}) as work:
        with work.part("results.json") as path:
            path.write_text(f"{numbers}\n", encoding="utf-8")
        with work.part("index.html") as path:
            path.write_text(page, encoding="utf-8")
        packages = (*html.PACKAGES, "duckdb", "numpy")
        work.record_made_with({package: version(package) for package in packages})
        success = {result.arm: result.success.value for result in results.arms}
        facts = {
            "arms": list(success),
            "success": success,
        }
        return work.publish(facts)


def _read_study(rows: Table, params: Params, teacher: str, *, seen: bool) -> Study | None:
    """Return the study of the tasks that the run trains on, or of the others, if there are any."""
    if not any(row.seen is seen for row in rows.episodes):
        return None
    return read_study(rows, params.report.start, teacher, seen=seen)


def _teacher_evaluation(params: Params, name: str) -> str:
    """Return the evaluation of the teacher of all arms that distil.

    That of the report if the arms have several teachers, or if theirs is not evaluated.
    """
    study = params.studies[name]
    teachers: set[str] = set()
    for arm, settings in study.arms.items():
        if settings.distill:
            teachers.add(_teacher_checkpoint(study, arm, params.label.teacher))
    scored = [
        evaluation
        for evaluation, checkpoint in params.reference_evaluations.items()
        if teachers == {checkpoint}
    ]
    if params.report.teacher in scored or not scored:
        return params.report.teacher
    return scored[0]


def _teacher_checkpoint(study: StudyParams, arm: str, default: str) -> str:
    teacher = default
    for settings in study.lineage(arm):
        teacher = settings.settings.get("label.teacher", teacher)
    return teacher


# The page


def render(
    name: str,
    params: Params,
    table: Manifest,
    teacher: str,
    study: Study,
    unseen: Study | None,
    results: StudyResults,
) -> str:
    """Render the page. teacher: the checkpoint."""
    recipes = [_recipe(params.studies[name], result.arm) for result in results.arms]
    return html.render(
        "vla_opd.pages",
        TEMPLATE,
        name=name,
        params=params,
        table=table,
        teacher=teacher,
        results=results,
        arms=list(zip(results.arms, recipes, strict=True)),
        tasks=list(dict.fromkeys(study.tasks)),
        start_by_task=study.task_success(study.start),
        teacher_by_task=study.task_success(study.teacher),
        horizon=study.horizon,
        names=COST_NAMES,
        figures=study_figures(study, unseen, results),
        unseen_tasks=list(dict.fromkeys(unseen.tasks)) if unseen else [],
        diagnostics=DIAGNOSTICS,
    )


def _recipe(study: StudyParams, arm: str) -> str:
    """Describe an arm in words."""
    if arm not in study.arms:
        return ""
    settings = study.arms[arm]
    phrases: list[str] = []
    if settings.after:
        phrases.append(f"after {settings.after}")
    if settings.switch is not None:
        phrases.append(f"from its first iteration whose rollouts reach {percent(settings.switch)}")
    if settings.own_student:
        phrases.append("a student of its own")
    if settings.distill:
        phrases.append(f"{settings.distill} iterations of distillation")
    if settings.reinforce:
        phrases.append(f"{settings.reinforce} iterations of GRPO")
    phrases += [f"{key} {value}" for key, value in settings.settings.items()]
    return ", ".join(phrases)
