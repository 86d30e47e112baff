"""Drafts: published completely or not at all, and resumable after kills and disk errors."""

import errno
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.vla_opd.artifacts.artifact_builder import (
    PARAMS,
    PARENTS,
    PARTS,
    finished,
    interrupt,
    make,
)
from vla_opd.artifacts import draft as drafts
from vla_opd.artifacts.draft import BusyError, draft
from vla_opd.artifacts.manifest import MANIFEST, Kind, open_artifact

ROOT = Path(__file__).parents[3]


def run_python(program: str, *prefix: str) -> "subprocess.CompletedProcess[str]":
    """Run a program in a process of its own, with the repository as its folder."""
    return subprocess.run(
        [*prefix, sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_draft_of_other_code_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "code_of_this_test"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inner" / "training.py").write_text("# an optimiser\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(drafts, "SOURCE_PACKAGES", (package.name,))
    interrupt(tmp_path / "a", done=2)
    assert finished(tmp_path / "a") == ["one", "two"]
    (package / "inner" / "training.py").write_text("# another optimiser\n")
    assert finished(tmp_path / "a") == []


def test_an_interrupted_draft_leaves_no_target_and_keeps_its_finished_parts(tmp_path: Path) -> None:
    interrupt(tmp_path / "a", done=2)
    assert not (tmp_path / "a").exists()
    with draft(tmp_path / "a", "labels", PARENTS, PARAMS) as work:
        assert [name for name in PARTS if work.has(name)] == ["one", "two"]
        assert (work.folder / "two").read_bytes() == b"second"
        with work.part("inner/three") as path:
            path.write_bytes(b"third")
        resumed = work.publish({"rows": 1})
    assert resumed == make(tmp_path / "b")
    assert open_artifact(tmp_path / "a", "labels") == resumed


def test_a_killed_process_leaves_no_target_and_keeps_its_finished_parts(tmp_path: Path) -> None:
    target = tmp_path / "a"
    killed = run_python(f"""
        import os, pathlib, signal
        from vla_opd.artifacts.draft import draft
        with draft(pathlib.Path({str(target)!r}), "labels", {PARENTS!r}, {PARAMS!r}) as work:
            with work.part("one") as path:
                path.write_bytes(b"first")
            with work.part("two") as path:
                path.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    assert finished(target) == ["one"]  # and the lock was released
    assert make(target) == make(tmp_path / "b")


@pytest.mark.parametrize(
    ("kind", "parents", "params"),
    [
        ("trajectories", PARENTS, PARAMS),
        ("labels", {"student": "abd"}, PARAMS),
        ("labels", {"teacher": "abc"}, PARAMS),
        ("labels", PARENTS, {**PARAMS, "steps": 4}),
    ],
)
def test_a_draft_of_other_inputs_is_deleted(
    tmp_path: Path, kind: Kind, parents: dict[str, str], params: dict[str, object]
) -> None:
    interrupt(tmp_path / "a", done=2)
    assert finished(tmp_path / "a") == ["one", "two"]
    assert finished(tmp_path / "a", kind, parents, params) == []
    assert finished(tmp_path / "a") == []


def test_a_draft_of_other_package_versions_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(tmp_path / "a", done=2)
    monkeypatch.setattr(drafts, "version", lambda name: "0.0.0")
    assert finished(tmp_path / "a") == []


def test_scratch_survives_an_interruption_and_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), draft(tmp_path / "a", "labels", PARENTS, PARAMS) as work:
        (work.scratch / "state").write_text("42")
        raise RuntimeError
    with draft(tmp_path / "a", "labels", PARENTS, PARAMS) as work:
        assert (work.scratch / "state").read_text() == "42"
        assert work.publish({}).files == {}
    assert [path.name for path in (tmp_path / "a").iterdir()] == [MANIFEST]


def test_an_exception_in_a_part_keeps_the_finished_part_of_that_name(tmp_path: Path) -> None:
    with draft(tmp_path / "a", "labels", PARENTS, PARAMS) as work:
        with work.part("one") as path:
            path.write_bytes(b"first")
        with pytest.raises(OSError, match="disk"), work.part("one") as path:
            path.write_bytes(b"other")
            raise OSError("disk")
        assert (work.folder / "one").read_bytes() == b"first"


def test_folders_are_parts_too(tmp_path: Path) -> None:
    with draft(tmp_path / "a", "labels", PARENTS, PARAMS) as work:
        for content in ("old", "new"):  # the second replaces the first
            with work.part("shard") as path:
                path.mkdir()
                (path / content).write_text(content)
        work.publish({})
    assert list(open_artifact(tmp_path / "a", "labels").files) == ["shard/new"]


def test_a_new_artifact_replaces_the_old_one(tmp_path: Path) -> None:
    old = make(tmp_path / "a", {"one": b"1", "gone": b"2"})
    interrupt(tmp_path / "a", done=1)
    assert open_artifact(tmp_path / "a", "labels") == old  # intact until the new one is complete
    new = make(tmp_path / "a", {"one": b"3"})
    assert open_artifact(tmp_path / "a", "labels") == new != old
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [MANIFEST, "one"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.lock", "a"]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with (
        draft(tmp_path / "a", "labels", PARENTS, PARAMS),
        pytest.raises(BusyError, match="another process is writing it"),
    ):
        make(tmp_path / "a")
    make(tmp_path / "a")


def test_nan_is_no_setting(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="not JSON compliant"),
        draft(tmp_path / "a", "labels", {}, {"rate": float("nan")}),
    ):
        pass


class FailingFiles:
    """Count every call that makes or changes a file below a folder, and fail the `at`-th."""

    OPERATIONS = (
        (os, "fsync"),
        (os, "rename"),
        (os, "mkdir"),
        (os, "open"),
        (os, "unlink"),
        (os, "rmdir"),
        (io, "open"),
    )

    def __init__(self, at: int, code: int, monkeypatch: pytest.MonkeyPatch, below: Path) -> None:
        self.count = 0
        self.at = at
        self.code = code
        self.below = str(below)
        for module, name in self.OPERATIONS:
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, operation: Callable[..., object]) -> Callable[..., object]:
        def call(file: object, *arguments: object, **options: object) -> object:
            # A number is the descriptor of an open file.
            if isinstance(file, int) or str(file).startswith(self.below):
                self.count += 1
                if self.count == self.at:
                    raise OSError(self.code, os.strerror(self.code), str(file))
            return operation(file, *arguments, **options)

        return call


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_whichever_file_operation_fails_nothing_half_is_published_and_the_next_attempt_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Fail each operation in turn, over an existing artifact.

    Afterwards the folder holds the old artifact, the new one, or nothing.
    """
    undisturbed = make(tmp_path / "undisturbed")
    failures = 0
    for at in itertools.count(1):
        folder = tmp_path / f"{code}-{at}"
        old = make(folder / "it001", facts={"rows": 2})
        with monkeypatch.context() as patch:
            failing = FailingFiles(at, code, patch, folder)
            with suppress(OSError):
                make(folder / "it001")
                failures -= 1
            failures += 1
        if failing.count < at:
            break
        if (folder / "it001").exists():
            digest = open_artifact(folder / "it001", "labels").digest
            assert digest in (old.digest, undisturbed.digest)
        assert make(folder / "it001").digest == undisturbed.digest
        assert sorted(path.name for path in folder.iterdir()) == [".it001.lock", "it001"]
    assert failures > 30


WRITTEN = (
    ".tmp-one",
    ".tmp-two",
    "inner/.tmp-three",
    ".scratch/fingerprint",
    ".scratch/.tmp-made_with.json",
    f".tmp-{MANIFEST}",
)


@pytest.mark.parametrize("code", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("call", ["write", "close"])
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace injects the error")
def test_whichever_file_cannot_be_written_or_closed_the_old_artifact_stays(
    tmp_path: Path, call: str, code: str
) -> None:
    """Let the kernel itself return the error, for each file in a process of its own."""
    undisturbed = make(tmp_path / "undisturbed")
    old = [make(tmp_path / str(nth) / "it001", facts={"rows": 2}) for nth in range(len(WRITTEN))]
    strace = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"inject={call}:error={code}"]
    for nth, name in enumerate(WRITTEN):
        strace += ["-P", str(tmp_path / str(nth) / ".it001.draft" / name)]
    program = f"""
        import os
        from pathlib import Path
        from tests.vla_opd.artifacts.artifact_builder import make
        for nth in range({len(WRITTEN)}):
            if os.fork() == 0:
                make(Path({str(tmp_path)!r}, str(nth), "it001"))
                os._exit(0)
            print(nth, os.waitstatus_to_exitcode(os.wait()[1]))
    """
    result = run_python(program, *strace)
    exit_codes = [f"{nth} 1" for nth in range(len(WRITTEN))]
    assert result.stdout.split("\n") == [*exit_codes, ""], result.stderr
    assert result.stderr.count(f"OSError: [Errno {getattr(errno, code)}]") >= len(WRITTEN)
    for nth in range(len(WRITTEN)):
        folder = tmp_path / str(nth)
        assert open_artifact(folder / "it001", "labels").digest == old[nth].digest
        assert make(folder / "it001").digest == undisturbed.digest
        assert sorted(path.name for path in folder.iterdir()) == [".it001.lock", "it001"]


@pytest.mark.parametrize("limit", [0, 1, 4, 100, 600])
def test_a_write_that_is_cut_short_publishes_nothing(tmp_path: Path, limit: int) -> None:
    """Let the kernel itself cut every write at `limit` bytes, in a process of its own."""
    result = run_python(f"""
        import resource, signal
        from pathlib import Path
        from tests.vla_opd.artifacts.artifact_builder import make
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        make(Path({str(tmp_path / "it001")!r}))
    """)
    assert "File too large" in result.stderr
    assert not (tmp_path / "it001").exists()
    assert make(tmp_path / "it001").digest == make(tmp_path / "undisturbed").digest
