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
# One write per second for all task states, and one per five seconds for all events. With one write
# per state, and per 20 events, SQLite is so busy that it sometimes refuses to create an iteration's
# run, and the client waits 2 s before it tries again.
IN_BATCHES = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "500",
}
START_TIMEOUT_S = 120.0  # a first start creates a database


@contextmanager
def use_server() -> Generator[str]:
    """Yield the address of a Prefect API that answers, and make it Prefect's setting meanwhile.

    If it is on this machine, this process uses no proxies from then on. Errors as of
    `ensure_server`.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    configured = PREFECT_API_URL.value() or LOCAL
    if _is_on_this_machine(configured):
        proxies.bypass()
    url = ensure_server(configured, meanwhile=_import_flow)
    with temporary_settings({PREFECT_API_URL: url}):
        yield url


def _import_flow() -> None:
    for name in ("flows.train", "dvc.repo.reproduce"):
        import_module(name)


def ensure_server(url: str, meanwhile: Callable[[], object] = lambda: None) -> str:
    """Return the address of a Prefect API that answers: `url`, or that of a server started here.

    A started server is detached and logs to `.prefect/server.log`. If another program holds the
    port, another port is used.

    meanwhile: called while a new server starts, which takes seconds.
    ValueError if nothing answers at an address of another machine. RuntimeError with the end of
    the log if the server does not start.
    """
    if is_answering(url):
        return url
    if urlsplit(url).hostname not in ("127.0.0.1", "localhost"):
        raise ValueError(
            f"PREFECT_API_URL is {url}: no Prefect server answers there; start it, or unset the "
            "variable to have one on this machine"
        )
    running = _find_own_server()
    if running is not None:  # on another port, or started by another process, or hung
        server, port = running
        running_url = _local_url(port)
        if _wait_for_answer(running_url, server.is_running):
            return running_url
        _end(server)
    port = urlsplit(url).port or 4200
    if _is_taken(port):
        port = free_port()
    url = _local_url(port)
    process = _start(port)
    try:
        meanwhile()
        _require_answer(url, process)
    except BaseException:  # otherwise the server would run on, unknown to anyone
        _end(process)
        raise
    return url


def _local_url(port: int) -> str:
    return f"http://127.0.0.1:{port}/api"


def _is_on_this_machine(url: str) -> bool:
    """Return whether an address is this machine's, by number or by name."""
    host = urlsplit(url).hostname or "localhost"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", socket.gethostname())
    return address.is_loopback or address.is_unspecified


def is_answering(url: str) -> bool:
    """Return whether a Prefect server with a working database answers there.

    No proxy is used for this machine.
    """
    handlers = [urllib.request.ProxyHandler({})] if _is_on_this_machine(url) else []
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(f"{url}/ready", timeout=5) as reply:
            return "message" in json.loads(reply.read())
    except (OSError, ValueError):
        return False


def is_own_server() -> bool:
    """Return whether the server in Prefect's settings was started from this folder.

    It must hold that port and have the process id in `.prefect/server.pid`.
    """
    from prefect.settings import PREFECT_API_URL

    running = _find_own_server()
    return running is not None and running[1] == urlsplit(PREFECT_API_URL.value() or "").port


def _find_own_server() -> tuple[psutil.Process, int] | None:
    """Return the server that was started from this folder, if it lives, and its port."""
    try:
        process = psutil.Process(int((HOME / "server.pid").read_text()))
        command = process.cmdline()
        *_, option, port = command
        if option == "--port" and "prefect" in command:
            return process, int(port)
    except (OSError, ValueError, psutil.Error):
        pass
    return None


def _end(server: "psutil.Process | subprocess.Popen[bytes]") -> None:
    """End a server that was started here, so that none runs unnoticed."""
    try:
        server.terminate()
        server.wait(10)
    except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
        server.kill()
    except psutil.Error:  # it has just ended, or belongs to another user
        pass
    (HOME / "server.pid").unlink(missing_ok=True)


def exit_now(code: int) -> NoReturn:
    """End this process after the loss of its server.

    Otherwise Prefect's threads would try for minutes to send their data.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start(port: int) -> "subprocess.Popen[bytes]":
    """Start a server that outlives this process: in its own session, its output in a file."""
    HOME.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "prefect", "server", "start"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = IN_BATCHES | os.environ | {"PREFECT_API_URL": _local_url(port), **SILENT}
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


def _require_answer(url: str, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the server answers. RuntimeError with the end of its log if it does not."""
    if not _wait_for_answer(url, lambda: process.poll() is None):
        log = HOME / "server.log"
        text = log.read_text(errors="replace")
        lines = text.splitlines()
        end = "\n".join(lines[-15:])
        raise RuntimeError(f"the Prefect server did not come up at {url}; the end of {log}:\n{end}")


def _wait_for_answer(url: str, is_running: Callable[[], bool]) -> bool:
    """Wait until a server answers; False if it ends or takes longer than `START_TIMEOUT_S`."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not is_answering(url):
        if not is_running() or time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """Return a port of this machine that no process holds now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
