"""A Prefect server on this machine, started if none answers."""

import ipaddress
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import psutil

from vla_opd.machine import proxies

HOME = Path(".prefect")
LOCAL = "http://127.0.0.1:4200/api"
SILENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
}
# One write for all tasks' states of a second, one for all events of five. With one for each state, and for each 20 events, SQLite is so busy
# that it refuses to create an iteration's run now and then, and the client waits 2 s before it asks again.
IN_BATCHES = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "500",
}
PATIENCE = 120.0  # seconds for a first start, which makes a database


@contextmanager
def in_use() -> Generator[str]:
    """The address of a Prefect API that answers, as Prefect's own setting for as long as the context lasts. Errors as of `ensure`.

    Where that is on this machine, nothing in this process goes through a proxy from then on.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    wanted = PREFECT_API_URL.value() or LOCAL
    if _is_here(wanted):
        proxies.bypass()
    url = ensure(wanted, meanwhile=_import_what_a_run_needs)
    with temporary_settings({PREFECT_API_URL: url}):
        yield url


def _import_what_a_run_needs() -> None:
    for name in ("flows.train", "dvc.repo.reproduce"):
        import_module(name)


def ensure(url: str, meanwhile: Callable[[], object] = lambda: None) -> str:
    """The address of a Prefect API that answers: `url`, or a server started here, detached, with its log in `.prefect/server.log`.

    meanwhile: done while a server that had to be started comes up, which takes seconds.
    A port of this machine that something else holds is left to it, and another is taken. RuntimeError with the log's end if no server comes up.
    """
    if answers(url):
        return url
    if urlsplit(url).hostname not in ("127.0.0.1", "localhost"):
        raise ValueError(
            f"PREFECT_API_URL is {url}: no Prefect server answers there; start it, or unset the variable to have one on this machine"
        )
    port = urlsplit(url).port or 4200
    own = _own()
    if (
        own is not None
    ):  # on another port than it is wanted on, still coming up for somebody else, or hung
        server, its_port = own
        its_url = f"http://127.0.0.1:{its_port}/api"
        if _comes_up(its_url, server.is_running):
            return its_url
        _end(server)
    if _taken(port):
        port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    process = _start(port)
    try:
        meanwhile()
        _wait(url, process)
    except BaseException:  # nobody would know of it
        _end(process)
        raise
    return url


def _is_here(url: str) -> bool:
    """Whether an address is of this machine, by number or by name."""
    host = urlsplit(url).hostname or "localhost"
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", socket.gethostname())
    return number.is_loopback or number.is_unspecified


def answers(url: str) -> bool:
    """Whether a Prefect server whose database works is there. This machine is asked without a proxy."""
    without = [urllib.request.ProxyHandler({})] if _is_here(url) else []
    try:
        with urllib.request.build_opener(*without).open(f"{url}/ready", timeout=5) as reply:
            return "message" in json.loads(reply.read())
    except (OSError, ValueError):
        return False


def is_ours() -> bool:
    """Whether the server of Prefect's setting was started here: it holds that port, and its number is in `.prefect/server.pid`."""
    from prefect.settings import PREFECT_API_URL

    own = _own()
    return own is not None and own[1] == urlsplit(PREFECT_API_URL.value() or "").port


def _own() -> tuple[psutil.Process, int] | None:
    """The server that was started from this folder, if it lives, and its port."""
    try:
        process = psutil.Process(int((HOME / "server.pid").read_text()))
        command = process.cmdline()
        *_, option, port = command
        return (process, int(port)) if option == "--port" and "prefect" in command else None
    except (OSError, ValueError, psutil.Error):
        return None


def _end(server: "psutil.Process | subprocess.Popen[bytes]") -> None:
    """End a server that was started here, so that none is left running that nobody knows of."""
    try:
        server.terminate()
        server.wait(10)
    except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
        server.kill()
    except psutil.Error:  # it has just ended by itself, or is somebody else's
        pass
    (HOME / "server.pid").unlink(missing_ok=True)


def leave(code: int) -> NoReturn:
    """End this process now, after its server was lost: Prefect's threads would go on for minutes to offer that one what they have for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start(port: int) -> "subprocess.Popen[bytes]":
    """The server outlives this process: its own session, its output in a file."""
    HOME.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "prefect",
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = (
        IN_BATCHES | os.environ | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", **SILENT}
    )
    with (HOME / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    (HOME / "server.pid").write_text(str(process.pid))
    return process


def _wait(url: str, process: "subprocess.Popen[bytes]") -> None:
    if not _comes_up(url, lambda: process.poll() is None):
        log = HOME / "server.log"
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"the Prefect server did not come up at {url}; the end of {log}:\n{end}")


def _comes_up(url: str, alive: Callable[[], bool]) -> bool:
    """Whether a server answers, now or before long."""
    deadline = time.monotonic() + PATIENCE
    while not answers(url):
        if not alive() or time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """A port of this machine that nothing holds now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
