"""Projects: what `opd new` makes, what a project takes from the checkout, and work in one."""

import os
from pathlib import Path

import pytest

from flows import cli, pipeline, projects
from flows.projects import Project
from tests.flows.toy import Toy
from tests.vla_opd.lineage.manifests import publish
from vla_opd.params.load import load

QUICK = Path("runs/quick")


def test_a_project_has_settings_of_its_own_and_the_checkouts_code(toy: Toy) -> None:
    before = Path("params.yaml").read_text()
    projects.create("quick", Path("params.yaml"), {"optimize.steps": "9"})
    assert load(QUICK / "params.yaml").optimize.steps == 9
    assert "# a comment that must survive" in (QUICK / "params.yaml").read_text()
    assert Path("params.yaml").read_text() == before
    assert projects.code_folders() == {"stages", "vla_opd"}
    for folder in projects.code_folders():
        assert (QUICK / folder).samefile(folder)
    assert (QUICK / "dvc.yaml").read_bytes() == Path("dvc.yaml").read_bytes()


def test_git_may_track_a_projects_settings_and_lock_and_nothing_else(clone: Toy) -> None:
    projects.create("quick", Path("params.yaml"), {})
    clone.git("add", "-A")
    tracked = [name for name in ("params.yaml", "dvc.lock") if clone.tracked(QUICK / name)]
    assert tracked == ["params.yaml", "dvc.lock"]
    assert not clone.tracked(QUICK / "dvc.yaml")
    assert not clone.tracked(QUICK / "stages")
    assert not clone.tracked(QUICK / ".dvc/config")


@pytest.mark.parametrize(
    ("name", "source", "changes", "message"),
    [
        ("../up", "params.yaml", {}, r"'\.\./up' is no name of a project; expected letters"),
        ("", "params.yaml", {}, "'' is no name of a project"),
        ("taken", "params.yaml", {}, r"runs/taken exists; .* opd run -p runs/taken"),
        ("new", "missing.yaml", {}, r"--from missing\.yaml: no such file"),
        ("new", "params.yaml", {"optimize.stepz": "1"}, r"optimize\.stepz is 1 \(no such key\)"),
    ],
)
def test_a_project_that_cannot_be_is_refused_and_nothing_is_written(
    toy: Toy, name: str, source: str, changes: dict[str, str], message: str
) -> None:
    projects.create("taken", Path("params.yaml"), {})
    with pytest.raises(ValueError, match=message):
        projects.create(name, Path(source), changes)
    assert list(Path("runs").iterdir()) == [Path("runs/taken")]


def test_what_the_checkout_made_by_the_same_settings_is_not_made_again(clone: Toy) -> None:
    locked = set(Project().read_lock())
    projects.create("same", Path("params.yaml"), {})
    projects.create("other", Path("params.yaml"), {"demonstrate.noise": "0.2"})
    assert set(Project(Path("runs/same")).read_lock()) == locked
    assert Project(Path("runs/other")).read_lock() == {}
    with projects.entered(Path("runs/same")):
        assert not pipeline.inspect(["finetune@teacher"])[-1].stale


def test_tables_of_studies_are_taken_along_so_that_they_are_added_to(toy: Toy) -> None:
    digest = publish(Path("artifacts/toy/studies/which"), "study", {})
    publish(Path("artifacts/other/studies/which"), "study", {})
    projects.create("quick", Path("params.yaml"), {})
    tables = list(QUICK.glob("artifacts/*/studies/*/manifest.json"))
    assert [path.parts[3] for path in tables] == ["toy"]
    assert digest in tables[0].read_text()


def test_a_command_works_on_a_project_and_comes_back(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["new", "quick", "--set", "iterations.it003=it002"]) == 0
    assert "opd run -p runs/quick" in capsys.readouterr().out
    assert cli.main(["plan", "--project", str(QUICK)]) == 0
    assert "optimize@it003" in capsys.readouterr().out
    assert Path.cwd() == toy.folder
    assert cli.main(["plan"]) == 0
    assert "optimize@it003" not in capsys.readouterr().out


def test_a_folder_that_is_no_project_is_refused_and_the_projects_are_named(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    projects.create("quick", Path("params.yaml"), {})
    assert cli.main(["plan", "-p", "runs/quack"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "--project runs/quack: has no params.yaml; expected a project" in said
    assert "there are: runs/quick" in said


def test_a_project_follows_its_checkout(toy: Toy, tmp_path: Path) -> None:
    """To another folder, and to a new pipeline."""
    projects.create("quick", Path("params.yaml"), {})
    moved = tmp_path / "moved"
    toy.folder.rename(moved)
    os.chdir(moved)
    toy.folder.mkdir()  # another project has come to the old place
    pipeline_of_today = "# a new pipeline\n" + Path("dvc.yaml").read_text()
    Path("dvc.yaml").write_text(pipeline_of_today)
    with projects.entered(QUICK):
        assert Path("stages").resolve() == moved / "stages"
        assert Path("dvc.yaml").read_text() == pipeline_of_today


def test_a_project_says_how_it_is_resumed(toy: Toy) -> None:
    assert projects.resume_command() == "make run"
    projects.create("quick", Path("params.yaml"), {})
    with projects.entered(QUICK):
        assert projects.resume_command() == "opd run -p runs/quick"


def test_dvc_in_the_checkout_does_not_see_its_projects(toy: Toy) -> None:
    projects.create("quick", Path("params.yaml"), {})
    assert "runs/" not in toy.dvc("status", check=False)
    assert "runs/" not in toy.dvc("stage", "list", "--all")
