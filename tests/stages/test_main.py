"""`python -m stages`: its arguments, and mistakes: one message on stderr and exit code 2."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

import stages.__main__ as command
from stages.catalog import STAGES
from tests.vla_opd import small as tiny
from tests.vla_opd.params.minimal import MINIMAL
from tests.vla_opd.policies.test_checkpoint import publish
from vla_opd.experts import EXPERTS
from vla_opd.learning import preflight
from vla_opd.policies.load import build_policy

REPOSITORY = Path(__file__).parents[2]
ROOT = Path("artifacts/test")
MISSING = "no manifest.json; expected a complete artifact of kind"
# The environment of tests/vla_opd/small.py.
ENVIRONMENT = ("environment.cameras=[front, side]", "environment.image_size=20", "policy.crop=16")


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
def calls(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of a stage, which does nothing."""
    recorded: list[dict[str, Any]] = []

    def run(**arguments: Any) -> SimpleNamespace:
        recorded.append(arguments)
        return SimpleNamespace(digest="0123456789abcdef")

    replace_stages(monkeypatch, run)
    return recorded


def replace_stages(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    import_module = importlib.import_module

    def import_fake(name: str) -> Any:
        return SimpleNamespace(run=run) if name.startswith("stages.") else import_module(name)

    monkeypatch.setattr(importlib, "import_module", import_fake)


def call(arguments: Sequence[str], *settings: str) -> int:
    return command.main([*arguments, *(f"--set={setting}" for setting in settings)])


def test_the_refusals_of_label_and_optimize_come_before_any_rollout(
    calls: list[dict[str, Any]], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = ["sample", "--iteration", "it001"]
    assert call(sample, "optimize.objective=nowhere:mse") == 2
    assert (
        "optimize.objective is 'nowhere:mse': No module named 'nowhere'" in capsys.readouterr().err
    )

    assert call(sample, "label.expert=mse") == 2
    message = f"label.expert is 'mse'; expected one of {sorted(EXPERTS)} or"
    assert message in capsys.readouterr().err

    assert call(sample, *ENVIRONMENT) == 2
    assert f"checkpoints/teacher: {MISSING} 'checkpoint'" in capsys.readouterr().err

    weights = build_policy(tiny.FACTS).state_dict()
    shifted = tiny.SPACE.model_copy(update={"q99": tuple(q + 1 for q in tiny.SPACE.q99)})
    facts = tiny.FACTS.model_copy(update={"action_space": shifted})
    publish(project / ROOT / "checkpoints/teacher", weights, {"checkpoint": facts.model_dump()})
    assert call(sample, *ENVIRONMENT) == 2
    assert f"checkpoints/student: {MISSING} 'checkpoint'" in capsys.readouterr().err

    facts = tiny.FACTS
    publish(project / ROOT / "checkpoints/student", weights, {"checkpoint": facts.model_dump()})
    assert call(sample, *ENVIRONMENT) == 2
    assert "action_space.q99" in capsys.readouterr().err
    assert calls == []


def test_a_student_that_cannot_be_trained_is_refused_before_any_rollout(
    calls: list[dict[str, Any]], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = build_policy(tiny.FACTS).state_dict()
    facts = {"checkpoint": tiny.FACTS.model_dump()}
    publish(project / ROOT / "checkpoints/teacher", weights, facts)
    coarse = {name: tensor.bfloat16() for name, tensor in weights.items()}
    publish(project / ROOT / "checkpoints/student", coarse, facts)
    settings = (*ENVIRONMENT, "reinforcements.rl001=student")
    for verb, iteration, trainer in (
        ("sample", "it001", "optimize"),
        ("explore", "rl001", "reinforce"),
    ):
        assert call([verb, "--iteration", iteration], *settings) == 2
        message = f"{trainer}.lora_rank is null, and the weights are torch.bfloat16, too coarse"
        assert message in capsys.readouterr().err
    assert calls == []


def test_a_damaged_teacher_is_found_before_any_rollout(
    calls: list[dict[str, Any]], project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = build_policy(tiny.FACTS).state_dict()
    for name in ("student", "teacher"):
        facts = {"checkpoint": tiny.FACTS.model_dump()}
        publish(project / ROOT / "checkpoints" / name, weights, facts)
    file = project / ROOT / "checkpoints/teacher/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert call(["sample", "--iteration", "it001"], *ENVIRONMENT) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["demonstrate", "--name", "main"],
            {"name": "main", "chunk": 8, "out": ROOT / "demonstrations/main"},
        ),
        (
            ["finetune", "--name", "teacher"],
            {
                "name": "teacher",
                "demonstrations": ROOT / "demonstrations/main",
                "parent": None,
                "out": ROOT / "checkpoints/teacher",
            },
        ),
        (
            ["finetune", "--name", "student", "--set", "finetuned.student.parent=teacher"],
            {
                "name": "student",
                "demonstrations": ROOT / "demonstrations/main",
                "parent": ROOT / "checkpoints/teacher",
                "out": ROOT / "checkpoints/student",
            },
        ),
        (
            ["sample", "--iteration", "it002"],
            {
                "iteration": "it002",
                "student": ROOT / "checkpoints/it001",
                "teacher": ROOT / "checkpoints/teacher",
                "out": ROOT / "trajectories/it002",
            },
        ),
        (
            ["label", "--iteration", "it001"],
            {
                "teacher": ROOT / "checkpoints/teacher",
                "trajectories": ROOT / "trajectories/it001",
                "out": ROOT / "labels/it001",
            },
        ),
        (
            ["optimize", "--iteration", "it001"],
            {
                "iteration": "it001",
                "depth": 0,
                "earlier": [],
                "student": ROOT / "checkpoints/student",
                "trajectories": ROOT / "trajectories/it001",
                "labels": ROOT / "labels/it001",
                "initial": ROOT / "checkpoints/student",
                "out": ROOT / "checkpoints/it001",
            },
        ),
        (
            ["optimize", "--iteration", "it002", "--set", "optimize.earlier=3"],
            {
                "iteration": "it002",
                "depth": 1,
                "earlier": ["it001"],
                "student": ROOT / "checkpoints/it001",
                "trajectories": ROOT / "trajectories/it002",
                "labels": ROOT / "labels/it002",
                "initial": ROOT / "checkpoints/student",
                "out": ROOT / "checkpoints/it002",
            },
        ),
        (
            ["explore", "--iteration", "rl001", "--set", "reinforcements.rl001=it002"],
            {
                "iteration": "rl001",
                "student": ROOT / "checkpoints/it002",
                "out": ROOT / "trajectories/rl001",
            },
        ),
        (
            ["reinforce", "--iteration", "rl001", "--set", "reinforcements.rl001=it002"],
            {
                "iteration": "rl001",
                "depth": 0,
                "student": ROOT / "checkpoints/it002",
                "trajectories": ROOT / "trajectories/rl001",
                "out": ROOT / "checkpoints/rl001",
            },
        ),
        (
            ["evaluate", "--name", "final"],
            {"checkpoint": ROOT / "checkpoints/it002", "out": ROOT / "evaluations/final"},
        ),
        (["report"], {"root": ROOT, "out": ROOT / "report/page"}),
    ],
)
def test_a_stage_gets_its_inputs_and_its_output(
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: dict[str, object],
) -> None:
    for check in ("check_sample", "check_explore"):
        monkeypatch.setattr(preflight, check, lambda *_: None)  # no checkpoint exists
    assert command.main(words) == 0
    (arguments,) = calls
    host = arguments.pop("host")
    assert arguments.pop("run") == "test"
    arguments.pop("seed", None)
    inputs = {name: it for name, it in arguments.items() if not isinstance(it, BaseModel)}
    assert inputs == expected
    assert (host.device, host.tracking) == ("cpu", "none")
    assert capsys.readouterr().out == f"{words[0]}: digest 0123456789ab\n"


@pytest.mark.parametrize(
    ("words", "seed"),
    [
        (["demonstrate", "--name", "main"], 5),
        (["finetune", "--name", "student"], 5),
        (["evaluate", "--name", "final"], 5),
        (["optimize", "--iteration", "it001"], 7),
        (["label", "--iteration", "it001"], None),
    ],
)
def test_a_stage_gets_its_seed_and_its_sections(
    calls: list[dict[str, Any]], words: list[str], seed: int | None
) -> None:
    settings = ("run.seed=5", "run.learning_seed=7")
    assert call(words, *settings) == 0
    (arguments,) = calls
    assert arguments.get("seed") == seed
    section = type(arguments["settings"]).__name__
    assert section == f"{words[0].capitalize()}Params"


@pytest.mark.filterwarnings("ignore:no commit is recorded")  # outside a repository
def test_the_host_comes_from_options_and_the_environment(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_WORKERS", "3")
    command.main(["report"])
    command.main(["report", "--workers", "5", "--tracking", "jsonl"])
    hosts = [arguments["host"] for arguments in calls]
    assert [(host.workers, host.tracking) for host in hosts] == [(3, "none"), (5, "jsonl")]


@pytest.mark.parametrize(
    ("words", "message"),
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
            "finetune: pretrained or finetuned is 'base'; expected one of ['student', 'teacher']",
        ),
        (
            ["evaluate", "--name", "middle"],
            "evaluate: evaluations is 'middle'; expected one of ['final', 'start']",
        ),
        (
            ["report", "--set", "optimize.steps=0"],
            (
                "params.yaml: 1 mistake(s)\n"
                "  optimize.steps is 0: Input should be greater than or equal to 1"
            ),
        ),
        (["report", "--set", "nonsense"], "override 'nonsense': expected section.key=value"),
        (
            ["label", "--iteration", "it001"],
            f"trajectories/it001: {MISSING} 'trajectories'",
        ),
        (
            ["evaluate", "--name", "start"],
            f"checkpoints/student: {MISSING} 'checkpoint'",
        ),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    project: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert command.main(words) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith(f"{words[0]}: ")
    assert not output.out


def test_several_processes_are_refused_by_a_stage_that_does_not_train(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert command.main(["report"]) == 2
    message = "2 processes; expected one, as of every stage but finetune, optimize, reinforce"
    assert f"report: {message}" in capsys.readouterr().err
    assert calls == []


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
    calls: list[dict[str, Any]],
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
    assert not calls


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["distil"],
        ["sample"],
        ["report", "--workers", "many"],
        ["report", "--tracking", "paper"],
    ],
)
def test_an_unknown_command_ends_with_2(project: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main(words)
    assert end.value.code == 2


def test_a_crash_is_not_a_mistake(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(**_: object) -> None:
        raise RuntimeError("the simulator crashed too often")

    replace_stages(monkeypatch, crash)
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
def test_a_full_disk_is_reported_with_the_command_that_frees_space(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fill_disk(**_: object) -> None:
        raise error

    replace_stages(monkeypatch, fill_disk)
    assert command.main(["report"]) == 1
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert re.search(r"\d+ MB are free here.*opd gc --dry-run", message)


def test_the_command_itself_ends_with_2(project: Path) -> None:
    process = subprocess.run(
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
    assert process.returncode == 2
    assert process.stderr == "sample: iterations is 'it009'; expected one of ['it001', 'it002']\n"


@pytest.mark.parametrize(
    ("settings", "simulates"),
    [([], False), (["label.recover_every=2"], True), (["label.expert=a.b:c"], True)],
)
def test_labels_need_graphics_only_if_they_are_simulated(
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    *,
    simulates: bool,
) -> None:
    uses: list[bool] = []
    monkeypatch.setattr(command, "use_backend", lambda: uses.append(True))
    assert call(["label", "--iteration", "it001"], *settings) == 0
    assert bool(uses) is simulates
    assert len(calls) == 1


def test_stages_import_nothing_slow_that_they_may_not_need() -> None:
    """Every start would pay: transformers takes 3 s of processor time, wandb half a second."""
    modules = ", ".join(f"stages.{verb}" for verb in STAGES if verb != "adopt")
    slow = "'transformers', 'torch._dynamo', 'torch.distributed.tensor', 'scipy', 'wandb', 'peft'"
    program = f"import sys, {modules}; print(*{{{slow}}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_threads_that_wait_sleep(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenMP reads the variable as torch is imported, which the command itself therefore isn't."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert call(["report"]) == 0
    assert calls
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    program = "import sys, stages.__main__; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]
