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
        host = address[0] if isinstance(address, tuple) else address  # a string is a local path
        local = host in (None, "", "0.0.0.0")
        if not local and not str(host).startswith(("/", "127.", "::1", "localhost")):
            with open(os.environ["OPD_TEST_WATCH"], "a") as log:
                log.write(f"{event} {address} by {sys.argv}\\n")
sys.addaudithook(watch)
"""


CHECKED_OUT = (
    "flows/",
    "stages/",
    "vla_opd/",
    ".dvc",
    "dvc.yaml",
    "prefect.yaml",
    ".gitignore",
    "artifacts/.gitignore",
)


def checkout(settings: str, folder: Path) -> Toy:
    """Copy the working tree's code and DVC settings, without the reference and its lock."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.split("\0"):
        if name.startswith(CHECKED_OUT) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(settings)
    project = Toy(folder)
    project.git("init", "-q")
    return project


@dataclass
class Served:
    """A toy project, and a terminal in which it is served.

    Every process of it carries a mark in its environment, by which it can be found and killed.
    """

    toy: Toy
    port: int
    runner: "subprocess.Popen[bytes] | None" = None
    mark: str = field(default_factory=lambda: f"served-{os.urandom(4).hex()}")

    @property
    def environment(self) -> dict[str, str]:
        variables = {
            "PREFECT_HOME": str(self.toy.folder / ".prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_CLIENT_MAX_RETRIES": "3",  # a server is lost after 14 seconds, not 62
            "PYTHONPATH": f"{ROOT}{os.pathsep}{self.toy.folder / 'watch'}",
            "OPD_TEST_WATCH": str(self.toy.folder / "elsewhere.log"),
            "OPD_TEST_MARK": self.mark,
            "TOY_SLEEPS": "optimize it001",
            "DO_NOT_TRACK": "1",
            # What DVC chooses where there is no login shell; dash stays between DVC and the stage.
            "SHELL": "/bin/sh",
        }
        return os.environ | variables

    @property
    def log(self) -> str:
        path = self.toy.folder / "serve.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def serve(self, *through: str) -> None:
        """Start `python -m flows.serve`, and wait until it says that it serves.

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
        """Return the type of a flow run's state.

        It comes from the server itself, since Prefect's command takes seconds to start.
        """
        return self.ask(f"flow_runs/{run}")["state_type"]

    def ask(self, path: str, question: object = None) -> Any:
        """Return the server's answer to a GET, or to a POST of the question."""
        url = f"http://127.0.0.1:{self.port}/api/{path}"
        answer = httpx.get(url) if question is None else httpx.post(url, json=question)
        return answer.raise_for_status().json()

    def processes(self) -> list[int]:
        """Return the ids of the server, the runner, the flow, dvc and the stage."""
        return [
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if self.mark.encode() in _environ(folder)
        ]

    def with_words(self, words: str) -> dict[int, str]:
        """Return the project's processes whose command lines have these words, and those lines."""
        return {pid: line for pid in self.processes() if words in (line := _command(pid))}

    def kill(self, words: str) -> None:
        """SIGKILL the one process of the project whose command line has these words."""
        victims = list(self.with_words(words))
        assert len(victims) == 1, [_command(pid) for pid in self.processes()]
        os.kill(victims[0], signal.SIGKILL)

    def kill_everything(self) -> int:
        killed = 0
        while victims := self.processes():
            for pid in victims:
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


def wait_for(condition: Callable[[], bool], seconds: float, explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.3)
