"""report: the numbers on the page, on a small run made by hand."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stages import report
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
from vla_opd.artifacts.manifest import open_artifact, read_manifest
from vla_opd.machine.host import Host
from vla_opd.params.run import Params


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "small"
    publish_run(folder)
    report.run(params(), folder, folder / "report" / "page", Host())
    return folder


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "report" / "page" / "index.html").read_text()


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    shutil.copytree(root, tmp_path / "small")
    return tmp_path / "small"


class Elements(HTMLParser):
    """Every element with its attributes, the ids, and the rows of text of every table."""

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
        (found,) = [row for row in self.rows if len(row) == length and row[0] == first]
        return found


def test_results_add_up(root: Path) -> None:
    results = json.loads((root / "report" / "page" / "results.json").read_text())
    assert results["start"] == pytest.approx(score([True] * 4 + [False] * 16))
    assert results["final"]["success"] == pytest.approx(0.8)
    assert results["teacher"] == pytest.approx(score([True] * 20))
    assert results["env_steps"] == 1100 + 1000 + 900
    assert results["teacher_queries"] == 550 + 551 + 552
    assert [row["name"] for row in results["iterations"]] == list(ITERATIONS)
    assert results["iterations"][1]["before"]["reverse_kl"] == pytest.approx(0.95)
    assert results["iterations"][2]["success"] == pytest.approx(0.75)


def test_it_is_an_artifact_that_names_all_it_was_made_from(root: Path) -> None:
    made = open_artifact(root / "report" / "page", "report")
    assert set(made.files) == {"index.html", "results.json"}
    assert len(made.parents) == 2 + 3 * 3 + 4
    assert made.parents["logits/it002"] == read_manifest(root / "logits" / "it002", "logits").digest


def test_headline_has_the_share_of_the_teacher_and_the_intervals(page: str) -> None:
    table = Elements(page)
    assert [table.row(label, 8)[2] for label in ("Before", "After", "Teacher")] == [
        "20.0%",
        "80.0%",
        "100.0%",
    ]
    assert [table.row(label, 8)[5] for label in ("Before", "After", "Teacher")] == [
        "20.0%",
        "80.0%",
        "100.0%",
    ]
    assert table.row("After", 8)[3] == "58.4% – 91.9%"  # noqa: RUF001 - an en dash
    assert "the student has 80.0% of that" in page


def test_share_is_of_the_teachers_success() -> None:
    student, teacher, failing = (
        report.Score.model_validate(score([True] * n + [False] * (20 - n))) for n in (16, 18, 0)
    )
    assert report._share(student, teacher) == "88.9%"
    assert report._share(student, failing) == "n/a"


def rendered(root: Path, how: Params | None = None) -> str:
    report.run(how or params(), root, root / "report" / "page", Host())
    return (root / "report" / "page" / "index.html").read_text()


def test_tasks_with_their_instructions(page: str) -> None:
    head, *rows = [row for row in Elements(page).rows if len(row) == 5][:4]
    assert [cell.replace("student", "").replace("it003", "") for cell in head] == [
        "Task",
        "start",
        "it002",
        "final",
        "teacher",
    ]
    assert rows[0][0] == "libero_object/0solve libero_object/0"
    assert [cell[:5] for cell in rows[0][1:]] == ["10.0%", "50.0%", "80.0%", "100.0"]
    assert rows[1][2].startswith("60.0%")


def test_iterations_table(page: str) -> None:
    row = Elements(page).row("it002", 9)
    assert row == [
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


def test_an_episode_counts_at_a_shorter_horizon_if_it_had_succeeded_by_then(page: str) -> None:
    # Successes come at 70, 90, ... 250: by step 220 those of states 0 to 7.
    table = Elements(page)
    assert [cell[:5] for cell in table.row("220", 5)[1:]] == ["20.0%", "55.0%", "80.0%", "80.0%"]
    assert [cell[:5] for cell in table.row("280", 5)[1:]] == ["20.0%", "55.0%", "80.0%", "100.0"]
    assert not [row for row in table.rows if row[0] in {"300", "512", "520"}]


def test_no_score_beyond_the_horizon_that_was_run(copy: Path) -> None:
    teacher = read_manifest(copy / "checkpoints" / "teacher", "checkpoint")
    publish_evaluation(copy / "evaluations" / "teacher", teacher, (10, 10), horizon=512)
    evaluations = list(report.read_run(params(), copy).evaluations.values())
    assert report._horizons(evaluations) == [220, 280, 300, 512]
    assert [one.scored_at(300) is None for one in evaluations] == [True, True, True, False]


def test_the_score_at_the_own_horizon_is_the_evaluations(root: Path) -> None:
    for one in report.read_run(params(), root).evaluations.values():
        assert one.scored_at(one.facts.horizon) == one.facts.overall
        assert one.scored_at(one.facts.horizon + 1) is None


def test_evaluations_stand_at_the_depth_of_their_checkpoint(root: Path) -> None:
    run = report.read_run(params(), root)
    assert {name: one.position for name, one in run.evaluations.items()} == {
        "start": 0,
        "it002": 2,
        "final": 3,
        "teacher": None,
    }
    assert list(run.evaluations) == ["start", "it002", "final", "teacher"]


def test_it_needs_nothing_but_itself(page: str) -> None:
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    for tag, attributes in Elements(page).elements:
        assert tag not in {"script", "link", "iframe", "img", "object", "embed"}
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_references_inside_the_drawings_hold(page: str) -> None:
    elements = Elements(page).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {
        (attributes.get("xlink:href") or "")[1:] for tag, attributes in elements if tag == "use"
    } | set(re.findall(r"url\(#([^)]*)\)", page))
    assert wanted
    assert wanted <= set(ids)


def test_drawings_have_text_alternatives_and_the_pages_colours(page: str) -> None:
    drawings = [attributes for tag, attributes in Elements(page).elements if tag == "svg"]
    assert len(drawings) == 12
    assert all(
        drawing["role"] == "img" and len(drawing["aria-label"] or "") > 40 for drawing in drawings
    )
    assert "final after 3 iterations 80.0%" in (drawings[0]["aria-label"] or "")
    assert not re.search(r"#00000\d", page)
    inside = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert not re.search(
        r"(fill|stroke): ?#(?!0{6}\b)", inside
    )  # nothing painted in a colour that does not follow the theme


def test_both_divergences_are_drawn_along_the_chunk_and_the_dimensions(page: str) -> None:
    told = [
        attributes["aria-label"] or ""
        for tag, attributes in Elements(page).elements
        if tag == "svg"
    ]
    for name, before in (("Reverse", "1.900, none, 0.950"), ("Forward", "3.800, none, 1.900")):
        for axis in ("action of the chunk", "action dimension"):
            assert any(
                one.startswith(f"{name} KL by {axis}: before {before}; after ") for one in told
            )


def test_provenance(root: Path, page: str) -> None:
    for name in ("teacher", "student", *ITERATIONS):
        manifest = read_manifest(root / "checkpoints" / name, "checkpoint")
        assert manifest.digest in page
        assert all(parent in page for parent in manifest.parents.values())
    assert "schedule_iterations: 10" in page
    assert "Trained on the evaluation's own" not in page
    assert re.search(r"backend egl.*torch \d", page)


def test_same_inputs_same_bytes(root: Path, tmp_path: Path) -> None:
    publish_run(tmp_path / "elsewhere")
    report.run(params(), tmp_path / "elsewhere", tmp_path / "page", Host())
    for name in ("index.html", "results.json", "manifest.json"):
        assert (tmp_path / "page" / name).read_bytes() == (
            root / "report" / "page" / name
        ).read_bytes()


@pytest.mark.parametrize("field", ["start", "final", "teacher"])
def test_report_names_evaluations_that_exist(field: str, tmp_path: Path) -> None:
    how = params(report={field: "x"})
    with pytest.raises(
        ValueError,
        match=rf"report\.{field} is 'x'; expected one of \['final', 'it002', 'start', 'teacher'\]",
    ):
        report.run(how, tmp_path, tmp_path / "page", Host())


@pytest.mark.parametrize(
    "missing",
    [
        "evaluations/it002",
        "checkpoints/it003",
        "checkpoints/teacher",
        "trajectories/it001",
        "logits/it002",
    ],
)
def test_a_missing_artifact_is_named(missing: str, copy: Path) -> None:
    shutil.rmtree(copy / missing)
    with pytest.raises(ValueError, match=rf"{missing}: no manifest\.json"):
        rendered(copy)


def test_a_score_of_another_checkpoint_is_refused(copy: Path) -> None:
    student = read_manifest(copy / "checkpoints" / "student", "checkpoint")
    publish_evaluation(copy / "evaluations" / "final", student, (8, 8))
    with pytest.raises(
        ValueError, match=r"evaluations/final: made from checkpoint \w{12}; expected \w{12}"
    ):
        rendered(copy)


def test_corrupt_records_are_refused(copy: Path) -> None:
    path = copy / "evaluations" / "start" / "episodes.jsonl"
    path.write_text(path.read_text().replace("false", "true "))
    with pytest.raises(ValueError, match="corrupt"):
        rendered(copy)


def test_iterations_of_grpo_have_a_table_and_their_place_on_the_chain(copy: Path) -> None:
    made = publish_reinforcement(
        copy, "rl001", open_artifact(copy / "checkpoints/it003", "checkpoint")
    )
    publish_evaluation(copy / "evaluations/final", made, (9, 9))
    run = params(
        reinforcements={"rl001": "it003"}, evaluations={**TREE["evaluations"], "final": "rl001"}
    )
    found = report.read_run(run, copy)
    assert found.evaluations["final"].position == 4
    assert found.results.env_steps == 1100 + 1000 + 900 + 3100
    assert found.optimizer_steps == 3 * 20 + 7
    assert found.parents["checkpoints/rl001"] == made.digest
    page = report.render(found)
    assert "After 3 iterations and 1 of GRPO the student succeeds" in page
    row = re.search(r'<tr><th scope="row">rl001</th>(.*?)</tr>', page)
    assert row is not None
    assert re.findall(r"<td[^>]*>(.*?)</td>", row[1]) == [
        "it003",
        "50.0%",
        "32",
        "3,100",
        "3 of 4",
        "4.125 → 4.000",
        "0.250",
        "12.5%",
    ]


def test_distances_are_told_with_what_they_are(page: str) -> None:
    rows = re.findall(r'<tr><th scope="row">it002</th>(.*?)</tr>', page)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", rows[1])
    assert cells == [
        "0.950 → 0.550",
        "1.425 → 0.825",
        "9.5 → 5.5",
        "40.0% → 40.0%",
        "50.0%",
        "1.000",
    ]
    assert (
        "Reverse KL by action dimension: before 1.900, none, 0.950; after 0.367, none, 0.183."
        in page
    )


def test_a_run_that_made_no_step_has_a_page(root: Path) -> None:
    found = report.read_run(params(), root)
    still = replace(found, iterations=tuple(replace(one, steps=()) for one in found.iterations))
    assert "optimiser step's batch" not in report.render(still)
    assert "optimiser step's batch" in report.render(found)


def test_an_iteration_that_made_no_step_is_no_gap(root: Path) -> None:
    found = report.read_run(params(), root)
    first, second, third = found.iterations
    gap = replace(found, iterations=(replace(first, steps=()), second, third))
    assert [report._numbers(gap, one) for one in gap.iterations] == [
        range(0),
        range(20),
        range(20, 40),
    ]
    assert "optimiser step's batch" in report.render(gap)


def test_iterations_go_on_after_one_of_grpo(copy: Path) -> None:
    """it001, rl001, it002, it003: the order is the chain's, whatever their own schedules say."""
    made = {
        name: open_artifact(copy / "checkpoints" / name, "checkpoint")
        for name in ("it001", "teacher")
    }
    made["rl001"] = publish_reinforcement(copy, "rl001", made["it001"])
    for depth, (name, parent) in enumerate({"it002": "rl001", "it003": "it002"}.items()):
        for kind in ("trajectories", "logits", "checkpoints"):
            shutil.rmtree(copy / kind / name)
        made[name] = publish_iteration(copy, name, depth, made[parent], made["teacher"])
    tree = {
        "iterations": {"it001": "student", "it002": "rl001", "it003": "it002"},
        "reinforcements": {"rl001": "it001"},
    }
    found = report.read_run(
        params(**tree, evaluations={"teacher": "teacher", "start": "student"}), copy
    )
    assert [(one.result.name, one.result.depth) for one in found.iterations] == [
        ("it001", 0),
        ("it002", 2),
        ("it003", 3),
    ]
    assert [report._numbers(found, one) for one in found.iterations] == [
        range(20),
        range(20, 40),
        range(40, 60),
    ]


def test_a_run_without_iterations_has_a_page(copy: Path) -> None:
    how = params(
        iterations={}, evaluations={"start": "student", "final": "student", "teacher": "teacher"}
    )
    student = read_manifest(copy / "checkpoints" / "student", "checkpoint")
    publish_evaluation(copy / "evaluations" / "final", student, (1, 3))
    page = rendered(copy, how)
    assert "After 0 iterations" in page
    assert "Towards the teacher" not in page


def test_other_evaluations_and_tasks_with_names_of_their_own(copy: Path) -> None:
    tree = params(report={"final": "it002"}).model_dump()
    tree["sample"]["protocol"] = "benchmark"
    tree["environment"] |= {"family": "my.module:make", "tasks": (*TASKS, "<b>task</b>")}
    page = rendered(copy, Params.model_validate(tree))
    assert Elements(page).row("After", 8)[:3] == ["After", "it002", "55.0%"]
    assert "Trained on the evaluation's own initial states" in page
    assert "<b>task</b>" not in page
    assert "&lt;b&gt;task" in page
