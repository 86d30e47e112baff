"""`python -m stages`: a user's mistake is one message on stderr and exit code 2; the rest is handed to the stage."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import stages.__main__ as command
from tests.vla_opd import small
from tests.vla_opd.params.test_load import MINIMAL
from tests.vla_opd.policies.test_checkpoint import publish
from vla_opd.policies.load import build_policy

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text(MINIMAL)
    monkeypatch.chdir(tmp_path)
    for name in ("OPD_WORKERS", "OPD_DEVICE", "OPD_TRACKING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPD_TRACKING", "none")
    monkeypatch.setenv("OPD_DEVICE", "cpu")
    return tmp_path


@pytest.fixture
def called(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments that the stage was run with, after `params`."""
    calls: list[tuple[Any, ...]] = []

    def run(_params: object, *arguments: object) -> SimpleNamespace:
        calls.append(arguments)
        return SimpleNamespace(digest="0123456789abcdef")

    real = importlib.import_module
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name: SimpleNamespace(run=run) if name.startswith("stages.") else real(name),
    )
    return calls


ROOT = Path("artifacts/test")


def test_what_label_and_optimize_would_refuse_stops_before_any_rollout(
    called: list[tuple[Any, ...]], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", "--iteration", "it001", "--set"]
    assert command.main([*arguments, "optimize.objective=mse"]) == 2
    assert "optimize.objective is 'mse'; expected one of" in capsys.readouterr().err

    assert command.main([*arguments, "label.expert=mse"]) == 2
    assert (
        "label.expert is 'mse'; expected one of ['libero', 'metaworld'] or"
        in capsys.readouterr().err
    )

    same = [
        "environment.cameras=[front, side]",
        "--set",
        "environment.image_size=20",
        "--set",
        "policy.crop=16",
    ]
    assert command.main([*arguments, *same]) == 2
    assert (
        "checkpoints/teacher: no manifest.json; expected a complete artifact of kind 'checkpoint'"
        in capsys.readouterr().err
    )

    weights = build_policy(small.FACTS).state_dict()
    other = small.FACTS.model_copy(
        update={
            "action_space": small.SPACE.model_copy(
                update={"q99": tuple(q + 1 for q in small.SPACE.q99)}
            )
        }
    )
    publish(project / ROOT / "checkpoints/teacher", weights, {"checkpoint": other.model_dump()})
    assert command.main([*arguments, *same]) == 2
    assert (
        "checkpoints/student: no manifest.json; expected a complete artifact of kind 'checkpoint'"
        in capsys.readouterr().err
    )

    publish(
        project / ROOT / "checkpoints/student", weights, {"checkpoint": small.FACTS.model_dump()}
    )
    assert command.main([*arguments, *same]) == 2
    assert "action_space.q99" in capsys.readouterr().err
    assert called == []


def test_weights_that_could_not_be_trained_are_not_rolled_out(
    called: list[tuple[Any, ...]], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, facts = (
        build_policy(small.FACTS).state_dict(),
        {"checkpoint": small.FACTS.model_dump()},
    )
    publish(project / ROOT / "checkpoints/teacher", weights, facts)
    publish(
        project / ROOT / "checkpoints/student",
        {name: tensor.bfloat16() for name, tensor in weights.items()},
        facts,
    )
    same = [
        "environment.cameras=[front, side]",
        "environment.image_size=20",
        "policy.crop=16",
        "reinforcements.rl001=student",
    ]
    for verb, iteration, trained in (
        ("sample", "it001", "optimize"),
        ("explore", "rl001", "reinforce"),
    ):
        assert (
            command.main(
                [verb, "--iteration", iteration, *(word for one in same for word in ("--set", one))]
            )
            == 2
        )
        assert (
            f"{trained}.lora_rank is null, and the weights are torch.bfloat16, too coarse"
            in capsys.readouterr().err
        )
    assert called == []


def test_a_damaged_teacher_is_found_before_any_rollout(
    called: list[tuple[Any, ...]], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, facts = (
        build_policy(small.FACTS).state_dict(),
        {"checkpoint": small.FACTS.model_dump()},
    )
    for name in ("student", "teacher"):
        publish(project / ROOT / "checkpoints" / name, weights, facts)
    file = project / ROOT / "checkpoints/teacher/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    same = ["environment.cameras=[front, side]", "environment.image_size=20", "policy.crop=16"]
    assert (
        command.main(
            ["sample", "--iteration", "it001", *(word for one in same for word in ("--set", one))]
        )
        == 2
    )
    assert "model.safetensors" in capsys.readouterr().err
    assert called == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demonstrate", "--name", "main"], ("main", ROOT / "demonstrations/main")),
        (
            ["finetune", "--name", "teacher"],
            ("teacher", ROOT / "demonstrations/main", None, ROOT / "checkpoints/teacher"),
        ),
        (
            ["finetune", "--name", "student", "--set", "finetuned.student.parent=teacher"],
            (
                "student",
                ROOT / "demonstrations/main",
                ROOT / "checkpoints/teacher",
                ROOT / "checkpoints/student",
            ),
        ),
        (
            ["sample", "--iteration", "it002"],
            (
                "it002",
                ROOT / "checkpoints/it001",
                ROOT / "checkpoints/teacher",
                ROOT / "trajectories/it002",
            ),
        ),
        (
            ["label", "--iteration", "it001"],
            (ROOT / "checkpoints/teacher", ROOT / "trajectories/it001", ROOT / "logits/it001"),
        ),
        (
            ["optimize", "--iteration", "it001"],
            (
                "it001",
                ROOT / "checkpoints/student",
                ROOT / "trajectories/it001",
                ROOT / "logits/it001",
                ROOT / "checkpoints/student",
                ROOT / "checkpoints/it001",
            ),
        ),
        (
            ["explore", "--iteration", "rl001", "--set", "reinforcements.rl001=it002"],
            ("rl001", ROOT / "checkpoints/it002", ROOT / "trajectories/rl001"),
        ),
        (
            ["reinforce", "--iteration", "rl001", "--set", "reinforcements.rl001=it002"],
            (
                "rl001",
                ROOT / "checkpoints/it002",
                ROOT / "trajectories/rl001",
                ROOT / "checkpoints/rl001",
            ),
        ),
        (["evaluate", "--name", "final"], (ROOT / "checkpoints/it002", ROOT / "evaluations/final")),
        (["report"], (ROOT, ROOT / "report/page")),
    ],
)
def test_a_stage_finds_its_inputs_and_its_output(
    called: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: tuple[object, ...],
) -> None:
    for check in ("_check_what_follows", "_require_trainable"):
        monkeypatch.setattr(command, check, lambda *_: None)  # nothing is there
    assert command.main(arguments) == 0
    ((*found, host),) = called
    assert tuple(found) == expected
    assert (host.device, host.tracking) == ("cpu", "none")
    assert capsys.readouterr().out == f"{arguments[0]}: digest 0123456789ab\n"


@pytest.mark.filterwarnings("ignore:no commit is recorded")  # outside a repository
def test_the_host_comes_from_options_and_the_environment(
    called: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_WORKERS", "3")
    command.main(["report"])
    command.main(["report", "--workers", "5", "--tracking", "jsonl"])
    assert [(host.workers, host.tracking) for *_, host in called] == [(3, "none"), (5, "jsonl")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sample", "--iteration", "it009"],
            "sample: iterations is 'it009'; expected one of ['it001', 'it002']",
        ),
        (
            ["explore", "--iteration", "it001"],
            "explore: reinforcements is 'it001'; expected one of []",
        ),
        (
            ["demonstrate", "--name", "other"],
            "demonstrate: demonstrations is 'other'; expected one of ['main']",
        ),
        (
            ["finetune", "--name", "base"],
            "finetune: checkpoint is 'base'; expected one of ['student', 'teacher']",
        ),
        (
            ["evaluate", "--name", "middle"],
            "evaluate: evaluations is 'middle'; expected one of ['final', 'start']",
        ),
        (
            ["report", "--set", "optimize.steps=0"],
            "params.yaml: 1 mistake(s)\n  optimize.steps is 0: Input should be greater than or equal to 1",
        ),
        (["report", "--set", "nonsense"], "override 'nonsense': expected section.key=value"),
        (
            ["label", "--iteration", "it001"],
            "trajectories/it001: no manifest.json; expected a complete artifact of kind 'trajectories'",
        ),
        (
            ["evaluate", "--name", "start"],
            "checkpoints/student: no manifest.json; expected a complete artifact of kind 'checkpoint'",
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert command.main(arguments) == 2
    answer = capsys.readouterr()
    assert message in answer.err
    assert answer.err.startswith(f"{arguments[0]}: ")
    assert not answer.out


def test_a_missing_params_file_is_a_mistake(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "params.yaml").unlink()
    assert command.main(["report"]) == 2
    assert "params.yaml does not exist" in capsys.readouterr().err


def test_broken_yaml_is_a_mistake(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "params.yaml").write_text("run: {name: [")
    assert command.main(["report"]) == 2
    assert "params.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "value"), [("OPD_WORKERS", "many"), ("OPD_TRACKING", "paper")]
)
def test_nonsense_in_the_environment_is_refused_by_name(
    called: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
) -> None:
    monkeypatch.setenv(variable, value)
    try:
        code = command.main(["report"])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert value in capsys.readouterr().err
    assert not called


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["distil"],
        ["sample"],
        ["report", "--workers", "many"],
        ["report", "--tracking", "paper"],
    ],
)
def test_a_command_that_does_not_exist_ends_with_2(project: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2


def test_a_crash_is_not_a_mistake(
    called: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("the simulator crashed too often")

    monkeypatch.setattr(command.importlib, "import_module", lambda name: SimpleNamespace(run=crash))
    assert command.main(["report"]) == 1
    assert "the simulator crashed too often" in capsys.readouterr().err
    monkeypatch.setenv("OPD_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="too often"):
        command.main(["report"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "shard"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_told_with_what_may_go(
    called: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(command.importlib, "import_module", lambda name: SimpleNamespace(run=full))
    assert command.main(["report"]) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert re.search(r"\d+ MB are free here.*opd gc --dry-run", said)


def test_the_command_itself_ends_with_2(project: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "stages", "sample", "--iteration", "it009"],
        cwd=project,
        env={
            "PYTHONPATH": str(REPOSITORY),
            "PATH": "",
            "OPD_DEVICE": "cpu",
            "OPD_TRACKING": "none",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr == "sample: iterations is 'it009'; expected one of ['it001', 'it002']\n"


@pytest.mark.parametrize(
    ("settings", "asked"),
    [([], False), (["label.recover_every=2"], True), (["label.expert=a.b:c"], True)],
)
def test_labelling_needs_graphics_only_where_it_simulates(
    called: list[tuple[Any, ...]],
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    *,
    asked: bool,
) -> None:
    looked = list[bool]()
    monkeypatch.setattr(command, "use_backend", lambda: looked.append(True))
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert command.main(["label", "--iteration", "it001", "--tracking", "none", *arguments]) == 0
    assert bool(looked) is asked
    assert len(called) == 1
    assert project.is_dir()
