"""Tracking: curves arrive, and no stage fails, with and without network or account."""

import json
import os
import platform
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from vla_opd.machine import tracking
from vla_opd.machine.host import Host, TrackingMode
from vla_opd.machine.tracking import read_executions, start_execution, track

ROWS = [{"loss": 2.0, "accuracy": 0.25}, {"loss": 1.5}]


def make_host(tmp_path: Path, tracking: TrackingMode) -> Host:
    return Host(tracking=tracking, metrics=tmp_path / "metrics")


def record(host: Host, meanwhile: Callable[[], object] = lambda: None) -> None:
    with track(host, "run", "optimize", "it001", {"steps": 2}) as log:
        meanwhile()
        for step, row in enumerate(ROWS):
            log(row, step)


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (tmp_path / "metrics" / "run" / "optimize-it001.jsonl").read_text().splitlines()
    ]


@pytest.fixture
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[None]:
    """Provide no account, no network, no settings, and no W&B process of an earlier test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


class FakeWandb:
    """Record the calls of W&B's interface."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        refusal: Exception | None = None,
        refused: str = "online offline",
    ) -> None:
        import wandb

        self.modes: list[str] = []
        self.refused = refused
        self.options: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0
        self.refusal = refusal
        monkeypatch.setattr(wandb, "init", self.init)

    def init(self, **options: Any) -> "FakeWandb":
        self.modes.append(options["mode"])
        if self.refusal and options["mode"] in self.refused:
            raise self.refusal
        self.options = options
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((metrics, step))

    def finish(self) -> None:
        self.finished += 1


def test_none_writes_nothing(tmp_path: Path) -> None:
    record(make_host(tmp_path, "none"))
    assert list(tmp_path.iterdir()) == []


def test_json_lines_hold_every_row_and_are_appended_to(tmp_path: Path) -> None:
    record(make_host(tmp_path, "jsonl"))
    record(make_host(tmp_path, "jsonl"))
    rows = lines(tmp_path)
    assert [
        {"step": row["step"], **{k: row[k] for k in ("loss", "accuracy") if k in row}}
        for row in rows
    ] == [{"step": step, **row} for step, row in enumerate(ROWS)] * 2
    assert all(row["time"] > 1e9 and row["host"] for row in rows)
    assert [path.name for path in (tmp_path / "metrics").iterdir()] == ["run"]


def test_a_line_is_on_the_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="stage"),
        track(make_host(tmp_path, "jsonl"), "run", "optimize", "it001", {}) as log,
    ):
        log(ROWS[0], 5)
        assert len(lines(tmp_path)) == 1
        raise RuntimeError("the stage's own failure passes")
    assert lines(tmp_path)[0]["step"] == 5


@pytest.mark.usefixtures("_no_account")
def test_wandb_gets_run_stage_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb(monkeypatch)
    record(make_host(tmp_path, "wandb"))
    assert {key: fake.options[key] for key in ("group", "job_type", "name", "mode", "config")} == {
        "group": "run",
        "job_type": "optimize",
        "name": "optimize-it001",
        "mode": "offline",
        "config": {"steps": 2},
    }
    assert fake.logged == [
        ({"optimize/loss": 2.0, "optimize/accuracy": 0.25}, 0),
        ({"optimize/loss": 1.5}, 1),
    ]
    assert fake.finished == 1
    assert [row["loss"] for row in lines(tmp_path)] == [2.0, 1.5]  # the JSON lines too


@pytest.mark.usefixtures("_no_account")
def test_the_environment_names_another_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb(monkeypatch)
    monkeypatch.setenv("WANDB_RUN_GROUP", "objectives/grpo/3")
    record(make_host(tmp_path, "wandb"))
    assert fake.options["group"] == "objectives/grpo/3"


@pytest.mark.usefixtures("_no_account")
@pytest.mark.parametrize(
    ("variables", "netrc", "mode"),
    [
        ({}, None, "offline"),
        ({}, "machine api.github.com login x password y\n", "offline"),
        ({}, "machine api.wandb.ai login user password key\n", "online"),
        ({"WANDB_API_KEY": "key"}, None, "online"),
        ({"WANDB_API_KEY": "key", "WANDB_MODE": "offline"}, None, "offline"),
        ({"WANDB_MODE": "disabled"}, None, "disabled"),
    ],
)
def test_online_with_an_account_only(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    netrc: str | None,
    mode: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / "netrc").write_text(netrc)
    fake = FakeWandb(monkeypatch)
    record(make_host(tmp_path, "wandb"))
    assert fake.options["mode"] == mode


@pytest.mark.usefixtures("_no_account")
def test_a_run_ends_when_its_stage_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb(monkeypatch)
    with (
        pytest.raises(RuntimeError, match="mine"),
        track(make_host(tmp_path, "wandb"), "run", "label", "it001", {}),
    ):
        raise RuntimeError("mine")
    assert fake.finished == 1


@pytest.mark.usefixtures("_no_account")
def test_wandb_that_cannot_start_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    for refusal in (wandb.errors.CommError("no network"), OSError("disk full")):
        FakeWandb(monkeypatch, refusal)
        with pytest.warns(UserWarning, match=f"W&B did not start .*{refusal}.*as JSON lines only"):
            record(make_host(tmp_path, "wandb"))
    assert [row["loss"] for row in lines(tmp_path)] == [2.0, 1.5] * 2


@pytest.mark.usefixtures("_no_account")
@pytest.mark.parametrize("variables", [{"WANDB_MODE": "sideways"}, {"WANDB_API_KEY": "too short"}])
def test_what_wandb_itself_refuses_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="W&B did not start"):
        record(make_host(tmp_path, "wandb"))
    assert [row["loss"] for row in lines(tmp_path)] == [2.0, 1.5]


@pytest.mark.usefixtures("_no_account")
def test_a_server_that_does_not_answer_is_tried_once_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages within that hour stay offline, so that none of them waits 20 seconds."""
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "key")
    fake = FakeWandb(monkeypatch, wandb.errors.CommError("no network"), refused="online")
    with pytest.warns(UserWarning, match=r"W&B did not start \(no network\).* for the next hour"):
        record(make_host(tmp_path, "wandb"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(make_host(tmp_path, "wandb"))
    assert fake.modes == ["online", "offline", "offline"]
    assert len(fake.logged) == 4
    an_hour_ago = time.time() - 3601
    os.utime(tmp_path / "metrics/wandb-unreachable", (an_hour_ago, an_hour_ago))
    with pytest.warns(UserWarning, match="W&B did not start"):
        record(make_host(tmp_path, "wandb"))
    assert fake.modes[3:] == ["online", "offline"]


@pytest.mark.slow
@pytest.mark.usefixtures("_no_account")
def test_a_silent_server_delays_a_stage_by_seconds_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server accepts the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 4)
        with pytest.warns(UserWarning, match="W&B did not start"):
            record(make_host(tmp_path, "wandb"))
    assert list((tmp_path / "metrics/wandb").glob("offline-run-*"))
    assert [row["loss"] for row in lines(tmp_path)] == [2.0, 1.5]


class WandbServer(BaseHTTPRequestHandler):
    """The part of W&B's server that a run needs; once `silent`, it never answers."""

    silent = Event()
    closed = Event()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.silent.is_set():
            self.closed.wait()
            return
        project = {"id": "p", "name": "vla-opd", "entity": {"id": "e", "name": "ada"}}
        data = {
            "viewer": {
                "id": "u",
                "entity": "ada",
                "username": "ada",
                "flags": "{}",
                "teams": {"edges": []},
            },
            "serverInfo": {"features": []},
            "upsertBucket": {
                "bucket": {
                    "id": "r",
                    "name": "r",
                    "displayName": "r",
                    "historyLineCount": 0,
                    "project": project,
                },
                "inserted": True,
            },
            "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []},
        }
        answer = json.dumps({"data": data} if self.path == "/graphql" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""


@pytest.mark.slow
@pytest.mark.usefixtures("_no_account")
def test_a_server_that_stops_answering_is_one_warning_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            record(make_host(tmp_path, "wandb"))  # online from start to end
        monkeypatch.setattr(tracking, "UPLOAD_TIMEOUT_S", 2)
        with pytest.warns(
            UserWarning, match=r"W&B did not take a run's curves within 2 s; .* for the next hour"
        ) as warned:
            record(make_host(tmp_path, "wandb"), meanwhile=WandbServer.silent.set)
        assert len(warned) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            record(make_host(tmp_path, "wandb"))
    finally:
        WandbServer.closed.set()
        server.shutdown()
        server.server_close()
    assert [row["step"] for row in lines(tmp_path)] == [0, 1] * 3
    folders = sorted(
        path.name.partition("-20")[0]
        for path in (tmp_path / "metrics/wandb").glob("*run-*")
        if not path.is_symlink()
    )
    assert folders == ["offline-run", "run", "run"]


@pytest.mark.slow
@pytest.mark.usefixtures("_no_account")
def test_wandb_offline_needs_no_network_and_no_account(tmp_path: Path) -> None:
    record(make_host(tmp_path, "wandb"))
    (folder,) = (tmp_path / "metrics" / "wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    # Offline, `finish` does not wait for W&B's own process to write its file.
    end = time.monotonic() + 20
    while b"optimize/loss" not in log.read_bytes():
        assert time.monotonic() < end, "W&B wrote nothing"
        time.sleep(0.1)
    assert [row["loss"] for row in lines(tmp_path)] == [2.0, 1.5]


LOST = """
import os, signal, sys, time
from pathlib import Path
from vla_opd.machine.host import Host
from vla_opd.machine.tracking import track

with track(Host(tracking="wandb", metrics=Path("metrics")), "run", "optimize", "it001", {}) as log:
    log({"loss": 0.0}, 0)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_text().split("\\0")
        if words[0].endswith("wandb-core") and str(os.getpid()) in words:
            os.kill(int(path.parent.name), signal.SIGKILL)
    time.sleep(0.5)
    for step in range(1, 20):
        log({"loss": 1.0}, step)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("_no_account")
def test_wandb_that_is_lost_in_the_middle_is_one_warning(tmp_path: Path) -> None:
    """W&B's own process is killed."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    result = subprocess.run(
        [sys.executable, "-c", LOST],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("W&B was lost") == 1
    assert "Traceback" not in result.stderr
    assert [row["step"] for row in lines(tmp_path)] == list(range(20))


def test_an_execution_is_recorded_with_who_where_when_and_from_which_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@t", *words]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOGNAME", "ada")
    with pytest.warns(UserWarning, match="no commit is recorded: .*not a git repository"):
        start_execution(make_host(tmp_path, "jsonl"), "run", "label", "it001")("d" * 64)
    git("init", "-q")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/label.py").write_text("one")
    git("add", "stages")
    git("commit", "-q", "-m", "one")
    start_execution(
        replace(make_host(tmp_path, "jsonl"), execution="abc", task_run="t-1"),
        "run",
        "label",
        "it001",
    )("e" * 64)
    (tmp_path / "stages/label.py").write_text("two")
    (tmp_path / "params.yaml").write_text("not code")
    start_execution(make_host(tmp_path, "jsonl"), "run", "optimize", "it001")("f" * 64)
    outside, committed, edited = read_executions(tmp_path / "metrics/run")
    assert (outside.commit, outside.edited, outside.user, outside.host) == (
        "",
        False,
        "ada",
        platform.node(),
    )
    assert (committed.commit, committed.edited, committed.id, committed.task_run) == (
        git("rev-parse", "HEAD"),
        False,
        "abc",
        "t-1",
    )
    assert (edited.commit, edited.edited, edited.stage, edited.digest) == (
        committed.commit,
        True,
        "optimize",
        "f" * 64,
    )
    assert outside.began <= outside.ended <= committed.began


def test_an_execution_that_cannot_be_recorded_fails_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/run").write_text("in the way")
    with pytest.warns(UserWarning, match="who made it001 and when is not recorded"):
        start_execution(make_host(tmp_path, "jsonl"), "run", "label", "it001")("d" * 64)
    start_execution(make_host(tmp_path, "none"), "run", "label", "it001")("d" * 64)
    assert read_executions(tmp_path / "other") == ()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a repository of code the current folder, without any git configuration."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    return make_repository(tmp_path / "repository", monkeypatch)


def make_repository(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "stages").mkdir(parents=True)
    (folder / "stages/label.py").write_text(folder.name)
    monkeypatch.chdir(folder)
    for words in (
        ["init", "-q"],
        ["add", "stages"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", folder.name],
    ):
        subprocess.run(["git", *words], check=True)
    return folder


def head(folder: Path) -> str:
    return subprocess.run(
        ["git", "-C", folder, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


def recorded_commit(folder: Path) -> str:
    """Return the commit that an execution in this folder is recorded with."""
    start_execution(make_host(folder, "jsonl"), "run", "label", "it001")("d" * 64)
    return read_executions(folder / "metrics/run")[-1].commit


def test_git_dir_of_another_repository_is_not_followed(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = make_repository(tmp_path / "stranger", monkeypatch)
    monkeypatch.chdir(repository)
    assert head(repository) != head(stranger)
    expected = head(repository)
    monkeypatch.setenv("GIT_DIR", str(stranger / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(stranger))
    assert recorded_commit(repository) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")
def test_a_repository_of_another_owner_is_no_commit_and_a_warning(repository: Path) -> None:
    for path in [repository, *repository.rglob("*")]:
        os.lchown(path, 12345, 12345)
    with pytest.warns(
        UserWarning, match="no commit is recorded: fatal: detected dubious ownership"
    ):
        assert recorded_commit(repository) == ""


def test_the_repository_around_an_unpacked_archive_is_not_its_own(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "unpacked/stages").mkdir(parents=True)
    (repository / "unpacked/stages/label.py").write_text("of an archive")
    monkeypatch.chdir(repository / "unpacked")
    message = "the repository around this folder doesn't hold this project's code"
    with pytest.warns(UserWarning, match=f"no commit is recorded: {message}"):
        assert recorded_commit(repository / "unpacked") == ""


def test_a_machine_without_git_is_a_warning(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match="no commit is recorded: git isn't installed"):
        assert recorded_commit(repository) == ""


@pytest.mark.usefixtures("_no_account")
@pytest.mark.parametrize("spoilt", ["missing", "unset", "unreadable"])
def test_a_user_without_a_home_is_offline_and_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    if spoilt == "unset":
        monkeypatch.setattr(Path, "expanduser", no_home)
        monkeypatch.setattr(Path, "home", no_home)
    if spoilt == "unreadable":
        monkeypatch.setattr(Path, "is_file", forbidden)
    assert not tracking._has_key()
    if spoilt != "unreadable":
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.setenv(name, "")  # so that it is undone
            monkeypatch.delenv(name)
        tracking._keep_wandb_out_of_home(tmp_path)
        assert os.environ["WANDB_CONFIG_DIR"] == str(tmp_path / "wandb-home")


def no_home(*_: object) -> Path:
    raise RuntimeError("Could not determine home directory.")


def forbidden(*_: object) -> bool:
    raise PermissionError(13, "Permission denied")


def test_curves_that_cannot_be_kept_are_a_warning(tmp_path: Path) -> None:
    (tmp_path / "metrics").write_text("in the way")
    with (
        pytest.warns(UserWarning, match="the curves of it001 are not kept"),
        track(make_host(tmp_path, "jsonl"), "run", "label", "it001", {}) as log,
    ):
        log({"loss": 1.0}, 0)
