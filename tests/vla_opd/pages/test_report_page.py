"""A run's page: the numbers of a small run whose artifacts are made by hand."""

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.made_run import (
    ITERATIONS,
    TASKS,
    TREE,
    params,
    publish_evaluation,
    publish_iteration,
    publish_reinforcement,
    publish_run,
    score,
)
from vla_opd.analysis.evaluation import Score
from vla_opd.analysis.finished_run import read_run
from vla_opd.artifacts.manifest import open_artifact, read_manifest
from vla_opd.pages.divergence_figures import step_numbers
from vla_opd.pages.report_page import horizons, render, share
from vla_opd.params.run import Params


def render_page(root: Path, settings: Params | None = None) -> str:
    return render(read_run(settings or params(), root))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "small"
    publish_run(folder)
    return folder


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return render_page(root)


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    shutil.copytree(root, tmp_path / "small")
    return tmp_path / "small"


class Elements(HTMLParser):
    """Every element with its attributes, and the rows of text of every table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in {"td", "th"}

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, first: str, length: int) -> list[str]:
        (row,) = [row for row in self.rows if len(row) == length and row[0] == first]
        return row


def drawings(page: str) -> list[dict[str, str | None]]:
    """Return the attributes of every drawing."""
    return [attributes for tag, attributes in Elements(page).elements if tag == "svg"]


def cells_of(page: str, iteration: str) -> list[list[str]]:
    """Return the cells of every row of an iteration, without its name."""
    row = rf'<tr><th scope="row">{iteration}</th>(.*?)</tr>'
    rows = re.findall(row, page, flags=re.DOTALL)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]


# Tables


def test_headline_has_the_share_of_the_teacher_and_the_intervals(page: str) -> None:
    table = Elements(page)
    rows = [table.row(label, 8) for label in ("Before", "After", "Teacher")]
    assert [row[2] for row in rows] == ["20.0%", "80.0%", "100.0%"]
    assert [row[5] for row in rows] == ["20.0%", "80.0%", "100.0%"]
    assert rows[1][3] == "58.4% – 91.9%"  # noqa: RUF001 - an en dash
    assert "the student reaches 80.0% of the teacher's success rate" in page


def test_share_is_of_the_teachers_success() -> None:
    student, teacher, failing = (
        Score.model_validate(score([True] * successes + [False] * (20 - successes)))
        for successes in (16, 18, 0)
    )
    assert share(student, teacher) == "88.9%"
    assert share(student, failing) == "n/a"


def test_tasks_with_their_instructions(page: str) -> None:
    head, *rows = [row for row in Elements(page).rows if len(row) == 5][:4]
    names = [cell.replace("student", "").replace("it003", "") for cell in head]
    assert names == ["Task", "start", "it002", "final", "teacher"]
    assert rows[0][0] == "libero_object/0solve libero_object/0"
    assert [cell[:5] for cell in rows[0][1:]] == ["10.0%", "50.0%", "80.0%", "100.0"]
    assert rows[1][2].startswith("60.0%")


def test_iterations_table(page: str) -> None:
    assert Elements(page).row("it002", 9) == [
        "it002",
        "it001",
        "50.0%",
        "8",
        "1,000",
        "551",
        "0.950 → 0.550",
        "2.750 → 3.000",
        "3.300",
    ]


def test_divergences_are_in_a_table_and_in_the_drawings_texts(page: str) -> None:
    assert cells_of(page, "it002")[1] == [
        "0.950 → 0.550",
        "1.425 → 0.825",
        "9.5 → 5.5",
        "40.0% → 40.0%",
        "50.0%",
        "1.000",
    ]
    text = (
        "The reverse KL by action dimension, in nats per token: "
        "before 1.900, none, 0.950; after 0.367, none, 0.183."
    )
    assert text in page


# Horizons


def test_an_episode_counts_at_a_shorter_horizon_if_it_had_succeeded_by_then(page: str) -> None:
    # Successes come at 70, 90, ... 250: by step 220 those of states 0 to 7.
    table = Elements(page)
    assert [cell[:5] for cell in table.row("220", 5)[1:]] == ["20.0%", "55.0%", "80.0%", "80.0%"]
    assert [cell[:5] for cell in table.row("280", 5)[1:]] == ["20.0%", "55.0%", "80.0%", "100.0"]
    assert not [row for row in table.rows if row[0] in {"300", "512", "520"}]


def test_no_score_beyond_the_horizon_that_was_run(copy: Path) -> None:
    teacher = read_manifest(copy / "checkpoints/teacher", "checkpoint")
    publish_evaluation(copy / "evaluations/teacher", teacher, (10, 10), horizon=512)
    evaluations = list(read_run(params(), copy).evaluations.values())
    assert horizons(evaluations) == [220, 280, 300, 512]
    unscored = [evaluation.scored_at(300) is None for evaluation in evaluations]
    assert unscored == [True, True, True, False]


def test_the_score_at_its_horizon_is_the_evaluations(root: Path) -> None:
    for evaluation in read_run(params(), root).evaluations.values():
        horizon = evaluation.facts.horizon
        assert evaluation.scored_at(horizon) == evaluation.facts.overall
        assert evaluation.scored_at(horizon + 1) is None


# The page as a file


def test_the_page_needs_no_other_file(page: str) -> None:
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    for tag, attributes in Elements(page).elements:
        assert tag not in {"script", "link", "iframe", "img", "object", "embed"}
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_references_inside_the_drawings_resolve(page: str) -> None:
    elements = Elements(page).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r"url\(#([^)]*)\)", page))
    for tag, attributes in elements:
        if tag == "use":
            references.add((attributes.get("xlink:href") or "")[1:])
    assert references
    assert references <= set(ids)


def test_drawings_have_text_alternatives_and_the_pages_colors(page: str) -> None:
    assert len(drawings(page)) == 12
    for drawing in drawings(page):
        assert drawing["role"] == "img"
        assert len(drawing["aria-label"] or "") > 40
    assert "final after 3 iterations 80.0%" in (drawings(page)[0]["aria-label"] or "")
    assert not re.search(r"#00000\d", page)
    contents = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    # No color that does not follow the theme.
    assert not re.search(r"(fill|stroke): ?#(?!0{6}\b)", contents)


def test_both_divergences_are_drawn_along_the_chunk_and_the_dimensions(page: str) -> None:
    labels = [drawing["aria-label"] or "" for drawing in drawings(page)]
    for name, before in (("reverse", "1.900, none, 0.950"), ("forward", "3.800, none, 1.900")):
        for axis in ("position in the chunk", "action dimension"):
            start = f"The {name} KL by {axis}, in nats per token: before {before}; after "
            assert any(label.startswith(start) for label in labels)


def test_provenance(root: Path, page: str) -> None:
    for name in ("teacher", "student", *ITERATIONS):
        manifest = read_manifest(root / "checkpoints" / name, "checkpoint")
        assert manifest.digest in page
        assert all(parent in page for parent in manifest.parents.values())
    assert "schedule_iterations: 10" in page
    assert "Trained on the evaluation's own" not in page
    assert re.search(r"backend egl.*torch \d", page)


# Runs of other shapes


def test_evaluations_are_at_the_depth_of_their_checkpoint(root: Path) -> None:
    evaluations = read_run(params(), root).evaluations
    positions = [(name, evaluation.position) for name, evaluation in evaluations.items()]
    assert positions == [("start", 0), ("it002", 2), ("final", 3), ("teacher", None)]


def test_iterations_of_grpo_have_a_table_and_a_position_in_the_chain(copy: Path) -> None:
    last = open_artifact(copy / "checkpoints/it003", "checkpoint")
    reinforced = publish_reinforcement(copy, "rl001", last)
    publish_evaluation(copy / "evaluations/final", reinforced, (9, 9))
    evaluations = {**TREE["evaluations"], "final": "rl001"}
    run = read_run(params(reinforcements={"rl001": "it003"}, evaluations=evaluations), copy)
    assert run.evaluations["final"].position == 4
    assert run.results.env_steps == 1100 + 1000 + 900 + 3100
    assert run.optimizer_steps == 3 * 20 + 7
    assert run.parents["checkpoints/rl001"] == reinforced.digest
    page = render(run)
    assert "After 3 iterations of distillation and 1 of GRPO, the student succeeds" in page
    assert cells_of(page, "rl001")[0] == [
        "it003",
        "50.0%",
        "32",
        "3,100",
        "3 of 4",
        "4.125 → 4.000",
        "0.250",
        "12.5%",
    ]


STEP_DRAWING = "optimizer step's batch"


def test_a_run_without_optimizer_steps_has_a_page(root: Path) -> None:
    run = read_run(params(), root)
    iterations = tuple(replace(iteration, steps=()) for iteration in run.iterations)
    assert STEP_DRAWING not in render(replace(run, iterations=iterations))
    assert STEP_DRAWING in render(run)


def test_an_iteration_without_optimizer_steps_leaves_no_gap(root: Path) -> None:
    run = read_run(params(), root)
    first, second, third = run.iterations
    run = replace(run, iterations=(replace(first, steps=()), second, third))
    numbers = [step_numbers(run, iteration) for iteration in run.iterations]
    assert numbers == [range(0), range(20), range(20, 40)]
    assert STEP_DRAWING in render(run)


def test_iterations_continue_after_one_of_grpo(copy: Path) -> None:
    """it001, rl001, it002, it003: the order is the chain's, not that of their schedules."""
    made = {
        name: open_artifact(copy / "checkpoints" / name, "checkpoint")
        for name in ("it001", "teacher")
    }
    made["rl001"] = publish_reinforcement(copy, "rl001", made["it001"])
    for depth, (name, parent) in enumerate({"it002": "rl001", "it003": "it002"}.items()):
        for kind in ("trajectories", "labels", "checkpoints"):
            shutil.rmtree(copy / kind / name)
        made[name] = publish_iteration(copy, name, depth, made[parent], made["teacher"])
    settings = params(
        iterations={"it001": "student", "it002": "rl001", "it003": "it002"},
        reinforcements={"rl001": "it001"},
        evaluations={"teacher": "teacher", "start": "student"},
    )
    run = read_run(settings, copy)
    depths = [(iteration.result.name, iteration.result.depth) for iteration in run.iterations]
    assert depths == [("it001", 0), ("it002", 2), ("it003", 3)]
    numbers = [step_numbers(run, iteration) for iteration in run.iterations]
    assert numbers == [range(20), range(20, 40), range(40, 60)]


def test_a_run_without_iterations_has_a_page(copy: Path) -> None:
    evaluations = {"start": "student", "final": "student", "teacher": "teacher"}
    student = read_manifest(copy / "checkpoints/student", "checkpoint")
    publish_evaluation(copy / "evaluations/final", student, (1, 3))
    page = render_page(copy, params(iterations={}, evaluations=evaluations))
    assert "After 0 iterations of distillation, the student" in page
    assert "Divergence from the teacher" not in page


def test_names_of_evaluations_and_tasks_are_free_and_escaped(copy: Path) -> None:
    tree = params(report={"final": "it002"}).model_dump()
    tree["sample"]["protocol"] = "benchmark"
    tree["environment"] |= {"family": "my.module:make", "tasks": (*TASKS, "<b>task</b>")}
    page = render_page(copy, Params.model_validate(tree))
    assert Elements(page).row("After", 8)[:3] == ["After", "it002", "55.0%"]
    assert "Trained on the evaluation's own initial states" in page
    assert "<b>task</b>" not in page
    assert "&lt;b&gt;task" in page
