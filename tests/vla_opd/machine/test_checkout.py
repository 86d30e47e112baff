"""The folder of a command: its code, and links in the paths of its artifacts."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vla_opd.machine.checkout import require_no_links, require_own_code

ROOT = Path(__file__).parents[3]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make another checkout with different code."""
    folder = tmp_path / "checkout"
    for package in ("flows", "stages", "vla_opd"):
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "params.yaml", folder)
    for package in ("flows", "vla_opd"):
        (folder / package / "seeds.py").write_text("# edited\n")
    return folder


def test_another_checkouts_code_is_refused_and_both_are_named(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_own_code()
    monkeypatch.chdir(checkout)
    message = (
        rf"this folder has {checkout}/\w+, but the code that runs is {ROOT}/\w+; "
        "expected one checkout"
    )
    with pytest.raises(ValueError, match=message):
        require_own_code()


@pytest.mark.parametrize(
    "command",
    [
        "from flows.cli import main",
        "from stages.__main__ import main",
        "from flows.serve import main",
    ],
)
def test_a_command_of_another_checkouts_environment_is_refused(
    checkout: Path, command: str
) -> None:
    """Start it as a console script, without this folder on the path."""
    arguments = {"flows.cli": ["plan"], "stages.__main__": ["report"], "flows.serve": []}[
        command.split()[1]
    ]
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[1:] = {arguments!r}; "
        f"{command}; sys.exit(main())"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode in (1, 2)
    assert str(checkout) in result.stderr
    assert str(ROOT) in result.stderr
    assert "Traceback" not in result.stderr


def test_a_copy_of_the_running_code_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(
        ROOT / "vla_opd", tmp_path / "vla_opd", ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.chdir(tmp_path)
    require_own_code()


def test_a_folder_of_links_to_the_running_code_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The project of a study's member has such links."""
    (tmp_path / "vla_opd").symlink_to(ROOT / "vla_opd", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    require_own_code()


def test_links_above_and_below_a_run_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("artifacts/run")
    require_no_links(run)
    (tmp_path / "elsewhere/checkpoints").mkdir(parents=True)
    run.mkdir(parents=True)
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere/checkpoints")
    with pytest.raises(
        ValueError,
        match=r"artifacts/run/checkpoints is a link to .*elsewhere/checkpoints; expected a folder",
    ):
        require_no_links(run)
    (run / "checkpoints").unlink()
    run.rmdir()
    run.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="artifacts/run is a link"):
        require_no_links(run)


def test_a_stage_that_dvc_runs_refuses_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import stages.__main__ as command

    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "artifacts").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_STAGE", "report")
    monkeypatch.setattr(command, "die_with_parent", lambda *_, **__: None)
    assert command.main(["report"]) == 2
    assert "artifacts is a link to" in capsys.readouterr().err


def test_line_endings_are_not_converted_even_with_autocrlf(tmp_path: Path) -> None:
    """Hashed files have the same bytes in a clone with core.autocrlf, as on Windows."""
    (tmp_path / "one").mkdir()

    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words],
            cwd=tmp_path / "one",
            check=True,
            capture_output=True,
        )

    git("init", "-q")
    shutil.copy(ROOT / ".gitattributes", tmp_path / "one")
    (tmp_path / "one/dvc.lock").write_bytes(b"schema: '2.0'\nstages:\n")
    (tmp_path / "one/manifest.json").write_bytes(b"{\r\n}\n")
    git("add", "-A")
    git("commit", "-q", "-m", "one")
    git("clone", "-q", "-c", "core.autocrlf=true", ".", str(tmp_path / "two"))
    for name in ("dvc.lock", "manifest.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
