"""Artifacts: complete or not there, resumable, and refused when they are not what they say."""

import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_opd.artifacts import draft as drafts
from vla_opd.artifacts.draft import VERSIONED, BusyError, Draft, Share, draft
from vla_opd.artifacts.files import link
from vla_opd.artifacts.manifest import MANIFEST, Kind, Manifest, flat, open_artifact, read_manifest

ROOT = Path(__file__).parents[2]
PARENTS = {"student": "abc"}
PARAMS = {"steps": 3, "names": ("a", "b")}
PARTS = {"one": b"first", "two": b"second", "inner/three": b"third"}


def make(
    target: Path,
    parts: dict[str, bytes] | None = None,
    *,
    facts: dict[str, int] | None = None,
    made_with: dict[str, str] | None = None,
) -> Manifest:
    with draft(target, "logits", PARENTS, PARAMS) as work:
        for name, content in (PARTS if parts is None else parts).items():
            with work.part(name) as path:
                path.write_bytes(content)
        work.remember(made_with or {})
        return work.publish(facts or {"rows": 1})


def interrupt(
    target: Path, done: int, parents: dict[str, str] = PARENTS, params: dict[str, object] = PARAMS
) -> None:
    """Finish `done` parts, and be interrupted in the next."""
    names = list(PARTS)
    with pytest.raises(KeyboardInterrupt), draft(target, "logits", parents, params) as work:
        for name in names[:done]:
            with work.part(name) as path:
                path.write_bytes(PARTS[name])
        with work.part(names[done]) as path:
            path.write_bytes(b"half")
            raise KeyboardInterrupt


def finished(
    target: Path,
    kind: Kind = "logits",
    parents: dict[str, str] = PARENTS,
    params: dict[str, object] = PARAMS,
) -> list[str]:
    """The parts that a new attempt finds."""
    with draft(target, kind, parents, params) as work:
        return [name for name in PARTS if work.has(name)]


def test_a_link_never_takes_the_place_of_a_file(tmp_path: Path) -> None:
    """Which may itself be a link into another artifact, and would be written through."""
    (tmp_path / "one").write_text("one")
    (tmp_path / "two").write_text("two")
    with pytest.raises(FileExistsError):
        link(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").read_text() == "two"
    link(tmp_path / "one", tmp_path / "three")
    assert (tmp_path / "three").samefile(tmp_path / "one")


def test_an_artifact_says_what_it_is(tmp_path: Path) -> None:
    made = make(tmp_path / "deep" / "it001", facts={"rows": 7}, made_with={"device": "cpu"})
    found = open_artifact(tmp_path / "deep" / "it001", "logits")
    assert found == made
    assert (found.kind, found.parents, found.params, found.facts) == (
        "logits",
        PARENTS,
        {"steps": 3, "names": ["a", "b"]},
        {"rows": 7},
    )
    assert {name: entry.size for name, entry in found.files.items()} == {
        "one": 5,
        "two": 6,
        "inner/three": 5,
    }
    assert found.made_with["device"] == "cpu"
    assert set(VERSIONED) < set(found.made_with)
    there = {
        str(path.relative_to(tmp_path / "deep" / "it001"))
        for path in (tmp_path / "deep" / "it001").rglob("*")
        if path.is_file()
    }
    assert there == {*PARTS, MANIFEST}  # neither scratch nor temporary files
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == [".it001.lock", "it001"]


def test_a_file_that_was_not_published_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / "shard-999").write_bytes(b"stray")
    with pytest.raises(
        ValueError, match=r"shard-999: not in manifest\.json; expected only the 3 files"
    ):
        open_artifact(tmp_path / "a", "logits")


def test_a_draft_of_other_code_is_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "code_of_this_test"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inner" / "training.py").write_text("# an optimiser\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(drafts, "OURS", (package.name,))
    interrupt(tmp_path / "a", done=2)
    assert finished(tmp_path / "a") == ["one", "two"]
    (package / "inner" / "training.py").write_text("# another optimiser\n")
    assert finished(tmp_path / "a") == []


def test_an_interrupted_draft_leaves_no_target_and_keeps_its_finished_parts(tmp_path: Path) -> None:
    interrupt(tmp_path / "a", done=2)
    assert not (tmp_path / "a").exists()
    with draft(tmp_path / "a", "logits", PARENTS, PARAMS) as work:
        assert [name for name in PARTS if work.has(name)] == ["one", "two"]
        assert (work.folder / "two").read_bytes() == b"second"
        with work.part("inner/three") as path:
            path.write_bytes(b"third")
        resumed = work.publish({"rows": 1})
    assert resumed == make(tmp_path / "b")
    assert open_artifact(tmp_path / "a", "logits") == resumed


def test_a_killed_process_leaves_no_target_and_keeps_its_finished_parts(tmp_path: Path) -> None:
    script = f"""
        import os, pathlib, signal
        from vla_opd.artifacts.draft import draft
        with draft(pathlib.Path({str(tmp_path / "a")!r}), "logits", {PARENTS!r}, {PARAMS!r}) as work:
            with work.part("one") as path:
                path.write_bytes(b"first")
            with work.part("two") as path:
                path.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(__file__).parents[2],
        check=False,
        env=dict(os.environ),
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "a").exists()
    assert finished(tmp_path / "a") == ["one"]  # and the lock has died with it
    assert make(tmp_path / "a") == make(tmp_path / "b")


@pytest.mark.parametrize(
    ("kind", "parents", "params"),
    [
        ("trajectories", PARENTS, PARAMS),
        ("logits", {"student": "abd"}, PARAMS),
        ("logits", {"teacher": "abc"}, PARAMS),
        ("logits", PARENTS, {**PARAMS, "steps": 4}),
    ],
)
def test_a_draft_of_other_inputs_is_thrown_away(
    tmp_path: Path, kind: Kind, parents: dict[str, str], params: dict[str, object]
) -> None:
    interrupt(tmp_path / "a", done=2)
    assert finished(tmp_path / "a") == ["one", "two"]
    assert finished(tmp_path / "a", kind, parents, params) == []
    assert finished(tmp_path / "a") == []


def test_a_draft_of_other_package_versions_is_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(tmp_path / "a", done=2)
    monkeypatch.setattr(drafts, "version", lambda name: "0.0.0")
    assert finished(tmp_path / "a") == []


def test_scratch_survives_an_interruption_and_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), draft(tmp_path / "a", "logits", PARENTS, PARAMS) as work:
        (work.scratch / "state").write_text("42")
        raise RuntimeError
    with draft(tmp_path / "a", "logits", PARENTS, PARAMS) as work:
        assert (work.scratch / "state").read_text() == "42"
        assert work.publish({}).files == {}
    assert [path.name for path in (tmp_path / "a").iterdir()] == [MANIFEST]


def test_an_exception_in_a_part_leaves_the_finished_part_of_that_name(tmp_path: Path) -> None:
    with draft(tmp_path / "a", "logits", PARENTS, PARAMS) as work:
        with work.part("one") as path:
            path.write_bytes(b"first")
        with pytest.raises(OSError, match="disk"), work.part("one") as path:
            path.write_bytes(b"other")
            raise OSError("disk")
        assert (work.folder / "one").read_bytes() == b"first"


def test_the_digest_does_not_depend_on_order_or_machine(tmp_path: Path) -> None:
    one = make(tmp_path / "a", made_with={"device": "cpu"})
    other = make(tmp_path / "b", dict(reversed(PARTS.items())), made_with={"device": "cuda"})
    assert one.digest == other.digest
    assert one.made_with != other.made_with


def test_the_digest_depends_on_everything_else(tmp_path: Path) -> None:
    digests = {make(tmp_path / "a").digest, make(tmp_path / "b", facts={"rows": 2}).digest}
    digests |= {
        make(tmp_path / "c", {**PARTS, "two": b"secone"}).digest,
        make(tmp_path / "d", {**PARTS, "four": b""}).digest,
    }
    for name, kind, parents, params in [
        ("e", "report", PARENTS, PARAMS),
        ("f", "logits", {}, PARAMS),
        ("g", "logits", PARENTS, {"steps": 3}),
    ]:
        with draft(tmp_path / name, kind, parents, params) as work:
            for part, content in PARTS.items():
                with work.part(part) as path:
                    path.write_bytes(content)
            digests.add(work.publish({"rows": 1}).digest)
    assert len(digests) == 7


def test_folders_are_parts_too(tmp_path: Path) -> None:
    with draft(tmp_path / "a", "logits", PARENTS, PARAMS) as work:
        for content in ("old", "new"):  # the second replaces the first
            with work.part("shard") as path:
                path.mkdir()
                (path / content).write_text(content)
        work.publish({})
    assert list(open_artifact(tmp_path / "a", "logits").files) == ["shard/new"]


def test_a_new_artifact_replaces_the_old_one(tmp_path: Path) -> None:
    old = make(tmp_path / "a", {"one": b"1", "gone": b"2"})
    interrupt(tmp_path / "a", done=1)
    assert open_artifact(tmp_path / "a", "logits") == old  # it stays whole until the new one is
    new = make(tmp_path / "a", {"one": b"3"})
    assert open_artifact(tmp_path / "a", "logits") == new != old
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [MANIFEST, "one"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.lock", "a"]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with (
        draft(tmp_path / "a", "logits", PARENTS, PARAMS),
        pytest.raises(BusyError, match="another process is writing it"),
    ):
        make(tmp_path / "a")
    make(tmp_path / "a")


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for folder in (tmp_path / "a", tmp_path / "nothing"):
        with pytest.raises(
            ValueError,
            match=f"{folder.name}: no manifest.json; expected a complete artifact of kind 'report'",
        ):
            read_manifest(folder, "report")


@pytest.mark.parametrize(("content", "size"), [(b"firsu", 5), (b"fir", 3), (b"", 0)])
def test_a_changed_or_truncated_file_is_refused_and_named(
    tmp_path: Path, content: bytes, size: int
) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / "one").write_bytes(content)
    with pytest.raises(
        ValueError,
        match=rf"a/one: {size} bytes with sha256 \w+; expected 5 bytes with \w+: it is corrupt",
    ):
        open_artifact(tmp_path / "a", "logits")
    assert read_manifest(tmp_path / "a", "logits").files["one"].size == 5


def test_a_missing_file_is_refused_and_named(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / "inner" / "three").unlink()
    with pytest.raises(ValueError, match="a/inner/three: missing; expected 5 bytes"):
        open_artifact(tmp_path / "a", "logits")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(ValueError, match="kind is 'logits'; expected 'checkpoint'"):
        open_artifact(tmp_path / "a", "checkpoint")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"kind": "logits"}'])
def test_a_broken_manifest_is_refused(tmp_path: Path, text: str) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"a/manifest.json: not a manifest of format 1"):
        open_artifact(tmp_path / "a", "logits")


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    _edit(tmp_path / "a", format=2)
    with pytest.raises(ValueError, match="format"):
        open_artifact(tmp_path / "a", "logits")


def test_a_manifest_that_was_edited_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a", facts={"rows": 7})
    _edit(tmp_path / "a", facts={"rows": 8})
    with pytest.raises(ValueError, match="digest"):
        open_artifact(tmp_path / "a", "logits")


def _edit(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_nan_is_no_setting(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="not JSON compliant"),
        draft(tmp_path / "a", "logits", {}, {"rate": float("nan")}),
    ):
        pass


class Failing:
    """Every call that makes or changes a file below a folder is counted; the one with number `at` fails."""

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
        self.count, self.at, self.code, self.below = 0, at, code, str(below)
        for module, name in self.OPERATIONS:
            monkeypatch.setattr(module, name, self._failing(getattr(module, name)))

    def _failing(self, operation: Callable[..., object]) -> Callable[..., object]:
        def call(what: object, *rest: object, **more: object) -> object:
            mine = isinstance(what, int) or str(what).startswith(
                self.below
            )  # a number is an open file's
            self.count += mine
            if mine and self.count == self.at:
                raise OSError(self.code, os.strerror(self.code), str(what))
            return operation(what, *rest, **more)

        return call


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_whichever_file_operation_fails_nothing_half_is_published_and_the_next_attempt_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Each one in turn, over an artifact that is there already: afterwards the place holds the old one, the new one, or nothing."""
    undisturbed = make(tmp_path / "undisturbed")
    failures = 0
    for at in itertools.count(1):
        folder = tmp_path / f"{code}-{at}"
        old = make(folder / "it001", facts={"rows": 2})
        with monkeypatch.context() as patch:
            failing = Failing(at, code, patch, folder)
            with suppress(OSError):
                make(folder / "it001")
                failures -= 1
            failures += 1
        if failing.count < at:
            break
        if (folder / "it001").exists():
            assert open_artifact(folder / "it001", "logits").digest in (
                old.digest,
                undisturbed.digest,
            )
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
def test_whichever_file_cannot_be_written_or_closed_the_old_artifact_stays_and_the_next_attempt_succeeds(
    tmp_path: Path, call: str, code: str
) -> None:
    """The kernel itself answers with the error: for each file in turn, in a process of its own, over an artifact that is there already."""
    undisturbed = make(tmp_path / "undisturbed")
    old = [make(tmp_path / str(nth) / "it001", facts={"rows": 2}) for nth in range(len(WRITTEN))]
    program = f"""
        import os
        from pathlib import Path
        from tests.vla_opd.artifacts.test_draft import make
        for nth in range({len(WRITTEN)}):
            if os.fork() == 0:
                make(Path({str(tmp_path)!r}, str(nth), "it001"))
                os._exit(0)
            print(nth, os.waitstatus_to_exitcode(os.wait()[1]))
    """
    spoiled = [
        argument
        for nth, name in enumerate(WRITTEN)
        for argument in ("-P", str(tmp_path / str(nth) / ".it001.draft" / name))
    ]
    strace = [
        "strace",
        "-f",
        "-qq",
        "-o",
        os.devnull,
        *spoiled,
        "-e",
        f"inject={call}:error={code}",
    ]
    done = subprocess.run(
        [*strace, sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split("\n") == [*(f"{nth} 1" for nth in range(len(WRITTEN))), ""], (
        done.stderr
    )
    assert done.stderr.count(f"OSError: [Errno {getattr(errno, code)}]") >= len(WRITTEN)
    for nth in range(len(WRITTEN)):
        folder = tmp_path / str(nth)
        assert open_artifact(folder / "it001", "logits").digest == old[nth].digest
        assert make(folder / "it001").digest == undisturbed.digest
        assert sorted(path.name for path in folder.iterdir()) == [".it001.lock", "it001"]


@pytest.mark.parametrize("limit", [0, 1, 4, 100, 600])
def test_a_write_that_is_cut_short_publishes_nothing(tmp_path: Path, limit: int) -> None:
    """The kernel itself cuts every write at `limit` bytes, in a process of its own."""
    program = f"""
        import resource, signal
        from pathlib import Path
        from tests.vla_opd.artifacts.test_draft import make
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        make(Path({str(tmp_path / "it001")!r}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "File too large" in done.stderr
    assert not (tmp_path / "it001").exists()
    assert make(tmp_path / "it001").digest == make(tmp_path / "undisturbed").digest


def test_nested_settings_are_told_by_their_dotted_names() -> None:
    assert flat({"a": {"b": 1, "c": {"d": []}}, "e": {}, "f": None}) == {
        "a.b": 1,
        "a.c.d": [],
        "e": {},
        "f": None,
    }


# Shares


@given(count=st.integers(1, 9), parts=st.integers(0, 20))
def test_shares_are_stretches_of_equal_length_but_for_one_and_together_all(
    count: int, parts: int
) -> None:
    items = list(range(parts))
    stretches = [Share(number, count).of(items) for number in range(1, count + 1)]
    assert [item for stretch in stretches for item in stretch] == items
    assert max(map(len, stretches)) - min(map(len, stretches)) <= 1
    assert Share.parse(f"{count}/{count}") == Share(count, count)
    assert Share(1, count).whole == (count == 1)


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "1/2/3", "-1/2", "a/b", "1 / 2"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"share is {text!r}; expected NUMBER/COUNT, as in 2/8, the second of eight"
        ),
    ):
        Share.parse(text)


def test_shares_are_written_side_by_side_and_published_by_one(tmp_path: Path) -> None:
    names = sorted(PARTS)
    with (
        draft(tmp_path / "b", "logits", PARENTS, PARAMS, Share(1, 2)) as one,
        draft(tmp_path / "b", "logits", PARENTS, PARAMS, Share(2, 2)) as two,
    ):
        assert one.missing(names) + two.missing(names) == names
        for work in (one, two):
            for name in work.missing(names):
                with work.part(name) as path:
                    path.write_bytes(PARTS[name])
        with (
            pytest.raises(BusyError, match="another process is writing it"),
            draft(tmp_path / "b", "logits", PARENTS, PARAMS),
        ):
            pass
    with draft(tmp_path / "b", "logits", PARENTS, PARAMS) as work:
        assert work.missing(names) == []
        made = work.publish({})
    alone = make(tmp_path / "a")
    assert (made.files, made.params, made.parents) == (alone.files, alone.params, alone.parents)


def test_who_publishes_makes_what_a_share_has_not(tmp_path: Path) -> None:
    with (
        draft(tmp_path / "b", "logits", PARENTS, PARAMS, Share(1, 2)) as work,
        work.part("one") as path,
    ):
        path.write_bytes(PARTS["one"])
    with draft(tmp_path / "b", "logits", PARENTS, PARAMS) as work:
        assert sorted(work.missing(PARTS)) == ["inner/three", "two"]


def test_a_share_waits_while_the_draft_is_made_ready_and_gives_up_beside_a_whole_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts, "PATIENCE", 0.2)
    with draft(tmp_path / "b", "logits", PARENTS, PARAMS):
        began = time.monotonic()
        with (
            pytest.raises(BusyError),
            draft(tmp_path / "b", "logits", PARENTS, PARAMS, Share(1, 2)),
        ):
            pass
        assert time.monotonic() - began >= 0.2
        monkeypatch.setattr(drafts, "PATIENCE", 30.0)
        waiting = threading.Thread(target=lambda: _joined(tmp_path / "b"))
        waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()
    assert (tmp_path / ".b.draft/two").read_bytes() == PARTS["two"]


def _joined(target: Path) -> None:
    with draft(target, "logits", PARENTS, PARAMS, Share(2, 2)) as work, work.part("two") as path:
        path.write_bytes(PARTS["two"])


OTHERS = [
    ("params.steps is 4 here; expected 3", 4, None, None),
    ("package.torch is '9' here; expected '", 3, "_versions", {"torch": "9"}),
    (
        "code.vla_opd/seeds.py is 'other' here; expected '",
        3,
        "_code",
        {"vla_opd/seeds.py": "other"},
    ),
]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("launch", ["", "one"])
@pytest.mark.parametrize(("told", "steps", "patched", "value"), OTHERS)
def test_a_share_of_other_settings_packages_or_code_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: str,
    steps: int,
    patched: str | None,
    value: object,
    launch: str,
    at_once: bool,
) -> None:
    """Beside the first, or after it: what that has made stays."""
    with ExitStack() as first:
        work = first.enter_context(
            draft(tmp_path / "b", "logits", PARENTS, PARAMS, Share(1, 2, launch))
        )
        with work.part("one") as path:
            path.write_bytes(PARTS["one"])
        if not at_once:
            first.close()
        if patched:
            monkeypatch.setattr(drafts, patched, lambda: value)
        other = draft(
            tmp_path / "b", "logits", PARENTS, PARAMS | {"steps": steps}, Share(2, 2, launch)
        )
        with pytest.raises(ValueError, match=re.escape(f"b: {told}")), other:
            pass
    assert (tmp_path / ".b.draft/one").read_bytes() == PARTS["one"]


def test_what_a_launch_has_made_is_thrown_away_by_another_but_not_by_its_own(
    tmp_path: Path,
) -> None:
    with (
        draft(tmp_path / "b", "logits", PARENTS, PARAMS, Share(1, 2, "one")) as work,
        work.part("one") as path,
    ):
        path.write_bytes(PARTS["one"])
    changed = PARAMS | {"device": "cuda"}
    whole = draft(tmp_path / "b", "logits", PARENTS, changed, Share(launch="one"))
    with (
        pytest.raises(
            ValueError,
            match=r"params\.device is 'cuda' here; expected None, with which another process has begun it",
        ),
        whole,
    ):
        pass
    with draft(
        tmp_path / "b", "logits", PARENTS, PARAMS, Share(1, 2, "two")
    ) as work:  # of the same fingerprint: its own now
        assert work.has("one")
    with draft(tmp_path / "b", "logits", PARENTS, changed, Share(1, 2, "three")) as work:
        assert not work.has("one")
    with draft(tmp_path / "b", "logits", PARENTS, PARAMS) as work:  # by hand, as ever
        assert not work.missing([])
        assert work.begun


def test_a_share_that_comes_as_another_publishes_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused the draft for itself, and when it may share it, it isn't there any more."""
    hold, came = drafts._hold, []

    def late(lock: Any, how: int, work: Draft) -> None:
        if not came:
            came.append(how)
            raise BusyError
        hold(lock, how, work)

    monkeypatch.setattr(drafts, "_hold", late)
    with draft(tmp_path / "b", "logits", PARENTS, PARAMS, Share(1, 2)) as work:
        assert work.begun
    assert came


def test_the_lock_can_be_shared_where_that_takes_the_right_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS."""
    readable: list[bool] = []
    hold = drafts._hold
    monkeypatch.setattr(
        drafts,
        "_hold",
        lambda lock, how, work: (readable.append(lock.readable()), hold(lock, how, work)),
    )
    with draft(tmp_path / "b", "logits", PARENTS, PARAMS, Share(1, 2)):
        pass
    assert readable
    assert all(readable)
