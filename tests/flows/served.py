"""A project that is served on a real Prefect server, and the means to kill any process of it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.flows.toy import ROOT, Toy

WATCH = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        address = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        host = address[0] if isinstance(address, tuple) else address  # a string is a path of this machine's
        if not (host is None or str(host).startswith(("/", "127.", "::1", "localhost")) or str(host) in ("", "0.0.0.0")):
            with open(os.environ["OPD_TEST_WATCH"], "a") as log:
                log.write(f"{event} {address} by {sys.argv}\\n")
sys.addaudithook(watch)
"""


def checkout(settings: str, folder: Path) -> Toy:
    """What git has of this project, as it is in the working tree, but for the reference and its lock."""
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, files):
        if (
            name.startswith(
                (
                    "flows/",
                    "stages/",
                    "vla_opd/",
                    ".dvc",
                    "dvc.yaml",
                    "prefect.yaml",
                    ".gitignore",
                    "artifacts/.gitignore",
                )
            )
            and (ROOT / name).is_file()
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(settings)
    project = Toy(folder)
    project.git("init", "-q")
    return project


@dataclass
class Served:
    """A toy project, and a terminal in which it is served: every process of it carries a mark by which it can be found and killed."""

    toy: Toy
    port: int
    runner: "subprocess.Popen[bytes] | None" = None
    mark: str = field(default_factory=lambda: f"served-{os.urandom(4).hex()}")

    @property
    def environment(self) -> dict[str, str]:
        return (
            os.environ
            | {
                "PREFECT_HOME": str(self.toy.folder / ".prefect"),
                "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
                "PYTHONPATH": f"{ROOT}{os.pathsep}{self.toy.folder / 'watch'}",
                "OPD_TEST_WATCH": str(self.toy.folder / "elsewhere.log"),
                "DO_NOT_TRACK": "1",
                "PREFECT_CLIENT_MAX_RETRIES": "3",  # 14 seconds until a server is held for lost, not 62
                "TOY_SLEEPS": "optimize it001",
                "OPD_TEST_MARK": self.mark,
                "SHELL": "/bin/sh",  # DVC's choice where there is no login shell; dash keeps standing between DVC and the stage
            }
        )

    @property
    def log(self) -> str:
        path = self.toy.folder / "serve.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def serve(self, *through: str) -> None:
        """`python -m flows.serve`, until it says that it serves.

        through: a command that runs it, such as strace.
        """
        command = [*through, sys.executable, "-m", "flows.serve"]
        with (self.toy.folder / "serve.log").open("w") as log:
            self.runner = subprocess.Popen(
                command, cwd=self.toy.folder, env=self.environment, stdout=log, stderr=log
            )
        wait_for(lambda: "serving opd/train" in self.log, 120, lambda: self.log)

    def prefect(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "prefect", *words],
            cwd=self.toy.folder,
            env=self.environment,
            text=True,
            capture_output=True,
            check=False,
        )

    def state(self, run: str) -> str:
        """The type of a flow run's state, from the server itself: Prefect's command takes seconds of a core to start."""
        return self.ask(f"flow_runs/{run}")["state_type"]

    def ask(self, path: str, question: object = None) -> Any:
        """What the server answers: to a GET, or to a POST of the question."""
        url = f"http://127.0.0.1:{self.port}/api/{path}"
        answer = httpx.get(url) if question is None else httpx.post(url, json=question)
        return answer.raise_for_status().json()

    def processes(self) -> list[int]:
        """All of them: the server, the runner, the flow, dvc, the stage."""
        return [
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if self.mark.encode() in _environ(folder)
        ]

    def with_words(self, words: str) -> dict[int, str]:
        """The processes of ours whose command lines have these words, and those lines."""
        return {pid: line for pid in self.processes() if words in (line := _command(pid))}

    def kill(self, words: str) -> None:
        """SIGKILL the one process of ours whose command line has these words."""
        found = self.with_words(words)
        assert len(found) == 1, [_command(pid) for pid in self.processes()]
        os.kill(next(iter(found)), signal.SIGKILL)

    def kill_everything(self) -> int:
        killed = 0
        while found := self.processes():
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                killed += 1
            if self.runner is not None:
                self.runner.wait()
        return killed


def _environ(folder: Path) -> bytes:
    try:
        if (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return b""
        return (folder / "environ").read_bytes()
    except OSError:
        return b""


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def wait_for(what: Callable[[], bool], seconds: float, why: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, why()
        time.sleep(0.3)
