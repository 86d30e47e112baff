"""The terminal, the settings and the command line, without Prefect or DVC."""

import http.server
import io
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest
import typer

from flows import cli, pipeline, settings, terminal
from flows.cli import runs
from flows.dvc_runner.process import Line
from flows.pipeline import StageFailed, Step
from flows.prefect_server import server
from tests.flows.toy import PARAMS, ROOT
from vla_opd.machine import proxies
from vla_opd.params.load import load

SUMMARY = {
    "start": {"success": 0.45, "low": 0.38, "high": 0.52, "episodes": 200},
    "final": {"success": 0.925, "low": 0.88, "high": 0.954, "episodes": 200},
    "teacher": {"success": 0.925, "low": 0.88, "high": 0.954, "episodes": 200},
    "seconds": 500,
    "env_steps": 15890,
    "teacher_queries": 7900,
}

STUDENT_WITHOUT_LIMIT = (
    "student: {parent: base, demonstrations: main, steps: 2, learning_rate: 0.1, per_task: null}"
)


class Screen(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, live: bool) -> None:
        super().__init__()
        self.live = live

    def isatty(self) -> bool:
        return self.live


def test_in_a_log_file_a_stage_says_what_it_says_and_how_it_ended() -> None:
    stream = Screen(live=False)
    line = terminal.StageLine("label@it001", stream)
    for text in (
        "Running stage 'label@it001':",
        "> python -m stages label",
        "reusing 3 of 5 shards",
        "Updating lock file 'dvc.lock'",
        "",
    ):
        line.show(Line(text))
    line.show(Line("label: 20%", passing=True))
    line.succeed()
    shown = stream.getvalue().splitlines()
    assert [text.split() for text in shown] == [
        ["▸", "label@it001", "reusing", "3", "of", "5", "shards"],
        ["✓", "label@it001", "0:00"],
    ]


def test_on_a_terminal_a_stage_is_one_line_with_its_last_words() -> None:
    stream = Screen(live=True)
    line = terminal.StageLine("label@it001", stream)
    line.show(Line("label: 20%", passing=True))
    line.show(Line("label: 100%"))
    line.succeed()
    assert stream.getvalue().count("\n") == 1
    last = stream.getvalue().split("\x1b[2K")[-1]
    assert last.split() == ["✓", "label@it001", "0:00", "label:", "100%"]


def test_the_end_shows_before_after_teacher_the_page_and_what_to_do_next(tmp_path: Path) -> None:
    text = terminal.closing_message(tmp_path, SUMMARY, "http://127.0.0.1:4200", Path())
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    assert rows["before"] == ["45.0%", "38.0%", "-", "52.0%", "200"]
    assert rows["after"] == ["92.5%", "88.0%", "-", "95.4%", "200"]
    assert rows["report"] == [str(tmp_path / "report/page/index.html")]
    assert "15,890 environment steps and 7,900 teacher queries in 8:20" in text
    assert "make run" in text
    other = terminal.closing_message(tmp_path, SUMMARY, "http://127.0.0.1:4200", Path("runs/one"))
    assert "opd run -p runs/one --set optimize.steps=120" in other
    assert "make run" not in other


def test_a_failed_stage_is_reported_with_its_last_lines_and_how_to_resume(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(typer.Exit) as end, runs._interruptible("opd run -p runs/one"):
        raise StageFailed("label@it001", ["", "shard 3 is corrupt"])
    assert end.value.exit_code == 1
    said = capsys.readouterr().err
    assert "label@it001 failed" in said
    assert "shard 3 is corrupt" in said
    assert "resume with  opd run -p runs/one" in said


def test_the_plan_lists_every_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = (
        Step("demonstrate@main", stale=False, missing=True, due=False),
        Step("pretrain@base", stale=False, missing=False, due=False),
        Step("finetune@teacher", stale=True),
        Step("label@it001", stale=False, missing=False, due=True),
    )
    monkeypatch.setattr(pipeline, "inspect", lambda _: steps)
    assert cli.main(["plan"]) == 0
    said = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert said == [
        ["demonstrate@main", "not needed"],
        ["pretrain@base", "up to date"],
        ["finetune@teacher", "to do"],
        ["label@it001", "may be to do"],
    ]


@pytest.mark.parametrize(
    "arguments",
    [["undo"], ["lineage"], ["lineage", "it001", "--as", "poem"], ["extend", "--iterations", "0"]],
)
def test_a_command_line_that_cannot_be_read_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert "Usage: opd" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["flows.cli", "flows.train"])
def test_slow_libraries_are_not_imported_at_start(module: str) -> None:
    """Every command and every served run starts with these imports; torch alone takes 2 s."""
    slow = "'torch', 'duckdb', 'prov', 'openlineage', 'in_toto_attestation', 'scipy.stats'"
    program = f"import sys, {module}; print(*{{{slow}}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_every_command_has_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    for command in (
        "run",
        "plan",
        "serve",
        "extend",
        "accept",
        "lineage",
        "compare",
        "diff",
        "verify",
        "audit",
        "sign",
        "gc",
    ):
        assert re.search(rf"\b{command}\b +\w", said), command


def test_a_run_is_extended_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(PARAMS)
    assert cli.main(["extend", "--iterations", "2"]) == 0
    run = load()
    assert run.iterations == {
        "it001": "student",
        "it002": "it001",
        "it003": "it002",
        "it004": "it003",
    }
    assert run.evaluations["final"] == "it004"


def test_after_grpo_the_learning_rate_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    grpo = {"reinforcements: {}": "reinforcements: {rl001: it002}", "final: it002": "final: rl001"}
    Path("params.yaml").write_text(
        reduce(lambda text, change: text.replace(*change), grpo.items(), PARAMS)
    )
    for added, warned in (
        ("9", False),
        ("1", False),
        ("1", True),
    ):  # eleven after GRPO; the schedule is of ten
        assert cli.main(["extend", "--iterations", added]) == 0
        assert ("the learning rate has decayed" in capsys.readouterr().out) == warned
    run = load()
    assert (run.iterations["it003"], run.iterations["it013"], run.evaluations["final"]) == (
        "rl001",
        "it012",
        "it013",
    )


def test_a_server_is_ours_if_it_was_started_here_and_holds_the_port(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.chdir(tmp_path)
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)", "prefect", "--port", "4711"]
    with (
        subprocess.Popen(sleeps) as process,
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4711/api"}),
    ):
        assert not server.is_own_server()
        (tmp_path / ".prefect").mkdir()
        (tmp_path / ".prefect/server.pid").write_text(str(process.pid))
        assert server.is_own_server()
        with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4712/api"}):
            assert not server.is_own_server()
        process.kill()
        process.wait()
        assert not server.is_own_server()


def test_a_change_without_a_value_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"--set optimize\.steps: expected SECTION\.KEY=VALUE"):
        runs._parse_changes(["optimize.steps"])
    assert runs._parse_changes(["optimize.steps=3", "label.teacher=a=b"]) == {
        "optimize.steps": "3",
        "label.teacher": "a=b",
    }


@pytest.mark.parametrize(
    ("dotted", "value", "line"),
    [
        ("optimize.steps", "80", "optimize: {steps: 80}"),
        ("policy.proprio", True, "policy: {chunk: 8, proprio: true}"),
        ("optimize.learning_rate", 1e-4, "optimize: {steps: 4, learning_rate: 0.0001}"),
        (
            "finetuned.student.per_task",
            None,
            STUDENT_WITHOUT_LIMIT,
        ),
        (
            "finetuned.student.per_task",
            "null",
            STUDENT_WITHOUT_LIMIT,
        ),
        ("environment.tasks", ["reach", "push"], 'environment: {tasks: ["reach", "push"]}'),
        ("optimize.objective", "jsd", "optimize: {steps: 4, objective: jsd}"),
        (
            "optimize.objective",
            {"name": "jsd", "beta": 0.3},
            'optimize: {steps: 4, objective: {"name": "jsd", "beta": 0.3}}',
        ),
        ("optimize.objective.name", "jsd", "objective: {name: jsd}"),
    ],
)
def test_a_setting_is_written_where_it_belongs(
    tmp_path: Path, dotted: str, value: object, line: str
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    settings.write({dotted: value}, path)
    assert line in path.read_text()
    assert "# a comment that must survive" in path.read_text()
    assert "# how long" in path.read_text()


def test_an_option_may_be_added_to_an_objective_given_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    settings.write({"optimize.objective": "jsd"}, path)
    settings.write({"optimize.objective.beta": 0.3}, path)
    assert load(path).optimize.objective.model_dump() == {"name": "jsd", "beta": 0.3}


def test_a_wrong_setting_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    with pytest.raises(ValueError, match=r"optimize\.steps is 'many'"):
        settings.write({"optimize.steps": "many"}, path)
    assert path.read_text() == PARAMS


def test_nothing_is_null_wherever_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS.replace("student: {", "student:\n    {"))
    settings.write({"finetuned.student.per_task": None, "demonstrations.main.tasks": None}, path)
    run = load(path)
    assert run.finetuned["student"].per_task is None
    assert run.demonstrations["main"].tasks is None


def test_a_kill_while_writing_leaves_the_old_settings_whole(tmp_path: Path) -> None:
    """The process dies in the middle of the text, as by SIGKILL: no handlers, no flush."""
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    program = f"""
import os
from ruamel.yaml import YAML
from flows import settings
def die(self, tree, stream):
    stream.write("run: {{na")
    stream.flush()
    os._exit(9)
YAML.dump = die
settings.write({{"optimize.steps": 80}}, {str(path)!r})
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 9
    assert path.read_text() == PARAMS
    settings.write({"optimize.steps": 80}, path)
    assert load(path).optimize.steps == 80


def test_a_failure_while_writing_leaves_nothing_beside_the_old_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    monkeypatch.setattr(settings.YAML, "dump", full)
    with pytest.raises(OSError, match="no space left"):
        settings.write({"optimize.steps": 80}, path)
    assert path.read_text() == PARAMS
    assert list(tmp_path.iterdir()) == [path]


def test_settings_behind_a_link_stay_behind_it_with_their_permissions(tmp_path: Path) -> None:
    real, link = tmp_path / "real.yaml", tmp_path / "params.yaml"
    real.write_text(PARAMS)
    real.chmod(0o640)
    link.symlink_to(real)
    settings.write({"optimize.steps": 80}, link)
    assert link.is_symlink()
    assert "steps: 80" in real.read_text()
    assert real.stat().st_mode & 0o777 == 0o640


@pytest.fixture
def fake_server() -> Iterator[str]:
    """Something that answers as a ready Prefect server does."""

    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"message": "OK"}')

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ready) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}/api"
        served.shutdown()
        thread.join()


def test_a_server_that_answers_is_used(fake_server: str) -> None:
    assert server.ensure_server(fake_server) == fake_server


def test_what_can_be_done_while_a_server_comes_up_is_done_before_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    happened: list[str] = []
    monkeypatch.setattr(server, "_start", lambda _port: happened.append("started"))
    monkeypatch.setattr(
        server, "_require_answer", lambda _url, _process: happened.append("waited for")
    )
    server.ensure_server("http://127.0.0.1:1/api", meanwhile=lambda: happened.append("done"))
    assert happened == ["started", "done", "waited for"]


def test_a_server_elsewhere_is_never_replaced_by_one_of_ours() -> None:
    with pytest.raises(ValueError, match="PREFECT_API_URL is http://prefect"):
        server.ensure_server("http://prefect.invalid:4200/api")


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_this_machines_server_is_not_asked_through_a_proxy(
    fake_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, proxy: str
) -> None:
    """By our own request, and by the client that Prefect uses."""
    import httpx
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.chdir(tmp_path)
    for name in ("no_proxy", "NO_PROXY", proxies.SAVED):
        monkeypatch.setenv(name, "")  # so that it is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, proxy)
    assert server.is_answering(fake_server)
    with temporary_settings({PREFECT_API_URL: fake_server}), server.use_server() as url:
        assert url == fake_server
        assert httpx.get(f"{url}/ready").json() == {"message": "OK"}


def test_a_server_elsewhere_is_asked_through_the_users_proxy(
    fake_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy answers in its place."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", fake_server.removesuffix("/api"))
    assert server.is_answering("http://prefect.invalid:4200/api")


def test_our_own_server_on_another_port_is_recognised(
    fake_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    port = fake_server.rpartition(":")[2].removesuffix("/api")
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)", "prefect", "--port", port]
    (tmp_path / ".prefect").mkdir()
    with subprocess.Popen(sleeps) as process:
        (tmp_path / ".prefect/server.pid").write_text(str(process.pid))
        assert server.ensure_server("http://127.0.0.1:1/api") == fake_server
        process.kill()


@pytest.mark.parametrize("error", [RuntimeError("it did not come up"), KeyboardInterrupt()])
def test_a_server_that_does_not_come_up_is_not_left_running(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException
) -> None:
    monkeypatch.chdir(tmp_path)
    started: list[subprocess.Popen[bytes]] = []

    def start(_port: int) -> "subprocess.Popen[bytes]":
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", "import time; time.sleep(60)", "prefect", "--port", "1"]
            )
        )
        (tmp_path / ".prefect").mkdir(exist_ok=True)
        (tmp_path / ".prefect/server.pid").write_text(str(started[-1].pid))
        return started[-1]

    def wait(*_: object) -> None:
        raise error

    monkeypatch.setattr(server, "_start", start)
    monkeypatch.setattr(server, "_require_answer", wait)
    with pytest.raises(type(error)):
        server.ensure_server("http://127.0.0.1:1/api")
    assert started[0].poll() is not None
    assert not (tmp_path / ".prefect/server.pid").exists()


def test_an_earlier_server_that_answers_no_more_is_ended_before_another_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".prefect").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", "prefect", "--port", "1"]
    ) as hung:
        (tmp_path / ".prefect/server.pid").write_text(str(hung.pid))
        monkeypatch.setattr(server, "START_TIMEOUT_S", 0.5)
        monkeypatch.setattr(server, "_start", lambda _port: None)
        monkeypatch.setattr(server, "_require_answer", lambda _url, _process: None)
        server.ensure_server("http://127.0.0.1:1/api")
        assert hung.wait(10) is not None


def test_a_server_that_is_coming_up_for_another_run_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".prefect").mkdir()
    asked = iter([False, False, False, True])
    monkeypatch.setattr(server, "is_answering", lambda _url: next(asked))
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)", "prefect", "--port", "4711"]
    ) as process:
        (tmp_path / ".prefect/server.pid").write_text(str(process.pid))
        assert server.ensure_server("http://127.0.0.1:1/api") == "http://127.0.0.1:4711/api"
        assert process.poll() is None
        process.kill()


@pytest.mark.parametrize(("signal_", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_says_how_to_resume(
    capsys: pytest.CaptureFixture[str], signal_: int, code: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background process may have been started without
    with pytest.raises(typer.Exit) as end, runs._interruptible("make run"):
        signal.raise_signal(signal_)
    signal.signal(signal.SIGINT, interrupt)
    assert end.value.exit_code == code
    assert "resume with  make run" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_read_error_of_a_question_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes(PARAMS.encode() + "# caf\u00e9\n".encode("latin-1"))
    assert cli.main(["plan"]) == 1
    said = capsys.readouterr().err
    assert "params.yaml: line" in said
    assert "0xe9" in said
