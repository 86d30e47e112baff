"""Shares: several processes write the parts of one artifact, and one of them publishes it."""

import re
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vla_opd.artifacts.artifact_builder import PARAMS, PARENTS, PARTS, make
from vla_opd.artifacts import draft as drafts
from vla_opd.artifacts.draft import BusyError, Draft, Share, draft


@given(count=st.integers(1, 9), parts=st.integers(0, 20))
def test_shares_are_contiguous_cover_everything_and_differ_in_length_by_at_most_one(
    count: int, parts: int
) -> None:
    items = list(range(parts))
    stretches = [Share(number, count).select(items) for number in range(1, count + 1)]
    assert [item for stretch in stretches for item in stretch] == items
    assert max(map(len, stretches)) - min(map(len, stretches)) <= 1
    assert Share.parse(f"{count}/{count}") == Share(count, count)
    assert Share(1, count).whole == (count == 1)


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "1/2/3", "-1/2", "a/b", "1 / 2"])
def test_a_text_that_names_no_share_is_refused(text: str) -> None:
    message = f"share is {text!r}; expected NUMBER/COUNT, as in 2/8, the second of eight"
    with pytest.raises(ValueError, match=re.escape(message)):
        Share.parse(text)


def test_shares_are_written_in_parallel_and_published_by_one_process(tmp_path: Path) -> None:
    names = sorted(PARTS)
    with (
        draft(tmp_path / "b", "labels", PARENTS, PARAMS, Share(1, 2)) as first,
        draft(tmp_path / "b", "labels", PARENTS, PARAMS, Share(2, 2)) as second,
    ):
        assert first.missing(names) + second.missing(names) == names
        for work in (first, second):
            for name in work.missing(names):
                with work.part(name) as path:
                    path.write_bytes(PARTS[name])
        with (
            pytest.raises(BusyError, match="another process is writing it"),
            draft(tmp_path / "b", "labels", PARENTS, PARAMS),
        ):
            pass
    with draft(tmp_path / "b", "labels", PARENTS, PARAMS) as work:
        assert work.missing(names) == []
        shared = work.publish({})
    alone = make(tmp_path / "a")
    assert (shared.files, shared.params, shared.parents) == (
        alone.files,
        alone.params,
        alone.parents,
    )


def test_the_publisher_makes_the_parts_that_a_share_left_out(tmp_path: Path) -> None:
    with (
        draft(tmp_path / "b", "labels", PARENTS, PARAMS, Share(1, 2)) as work,
        work.part("one") as path,
    ):
        path.write_bytes(PARTS["one"])
    with draft(tmp_path / "b", "labels", PARENTS, PARAMS) as work:
        assert sorted(work.missing(PARTS)) == ["inner/three", "two"]


def test_a_share_waits_while_the_draft_is_prepared_and_gives_up_next_to_a_whole_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafts, "JOIN_TIMEOUT_S", 0.2)
    with draft(tmp_path / "b", "labels", PARENTS, PARAMS):
        began = time.monotonic()
        with (
            pytest.raises(BusyError),
            draft(tmp_path / "b", "labels", PARENTS, PARAMS, Share(1, 2)),
        ):
            pass
        assert time.monotonic() - began >= 0.2
        monkeypatch.setattr(drafts, "JOIN_TIMEOUT_S", 30.0)
        waiting = threading.Thread(target=lambda: _write_second_share(tmp_path / "b"))
        waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()
    assert (tmp_path / ".b.draft/two").read_bytes() == PARTS["two"]


def _write_second_share(target: Path) -> None:
    with draft(target, "labels", PARENTS, PARAMS, Share(2, 2)) as work, work.part("two") as path:
        path.write_bytes(PARTS["two"])


MISMATCHES = [
    ("params.steps is 4 here; expected 3", 4, None, None),
    ("package.torch is '9' here; expected '", 3, "_package_versions", {"torch": "9"}),
    (
        "code.vla_opd/seeds.py is 'other' here; expected '",
        3,
        "_source_hashes",
        {"vla_opd/seeds.py": "other"},
    ),
]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("launch", ["", "one"])
@pytest.mark.parametrize(("message", "steps", "patched", "value"), MISMATCHES)
def test_a_share_of_other_settings_packages_or_code_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    message: str,
    steps: int,
    patched: str | None,
    value: object,
    launch: str,
    at_once: bool,
) -> None:
    """It runs next to the first share, or after it; the first share's parts are kept."""
    target = tmp_path / "b"
    with ExitStack() as first:
        work = first.enter_context(draft(target, "labels", PARENTS, PARAMS, Share(1, 2, launch)))
        with work.part("one") as path:
            path.write_bytes(PARTS["one"])
        if not at_once:
            first.close()
        if patched:
            monkeypatch.setattr(drafts, patched, lambda: value)
        changed = PARAMS | {"steps": steps}
        second = draft(target, "labels", PARENTS, changed, Share(2, 2, launch))
        with pytest.raises(ValueError, match=re.escape(f"b: {message}")), second:
            pass
    assert (tmp_path / ".b.draft/one").read_bytes() == PARTS["one"]


def test_parts_of_a_launch_are_deleted_by_another_launch_but_not_by_the_same(
    tmp_path: Path,
) -> None:
    target = tmp_path / "b"
    with (
        draft(target, "labels", PARENTS, PARAMS, Share(1, 2, "one")) as work,
        work.part("one") as path,
    ):
        path.write_bytes(PARTS["one"])
    changed = PARAMS | {"device": "cuda"}
    whole = draft(target, "labels", PARENTS, changed, Share(launch="one"))
    message = (
        r"params\.device is 'cuda' here; expected None, with which another process has started it"
    )
    with pytest.raises(ValueError, match=message), whole:
        pass
    with draft(target, "labels", PARENTS, PARAMS, Share(1, 2, "two")) as work:
        assert work.has("one")  # the same fingerprint: launch two takes the draft over
    with draft(target, "labels", PARENTS, changed, Share(1, 2, "three")) as work:
        assert not work.has("one")
    with draft(target, "labels", PARENTS, PARAMS) as work:  # started by hand
        assert not work.missing([])
        assert work.prepared


def test_a_share_that_arrives_while_another_process_publishes_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exclusive lock is refused, and once the shared lock is granted the draft is gone."""
    lock, refused = drafts._lock, []

    def refuse_once(file: Any, mode: int, work: Draft) -> None:
        if not refused:
            refused.append(mode)
            raise BusyError
        lock(file, mode, work)

    monkeypatch.setattr(drafts, "_lock", refuse_once)
    with draft(tmp_path / "b", "labels", PARENTS, PARAMS, Share(1, 2)) as work:
        assert work.prepared
    assert refused


def test_the_lock_file_is_readable_as_nfs_requires_for_a_shared_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readable: list[bool] = []
    lock = drafts._lock

    def observe(file: Any, mode: int, work: Draft) -> None:
        readable.append(file.readable())
        lock(file, mode, work)

    monkeypatch.setattr(drafts, "_lock", observe)
    with draft(tmp_path / "b", "labels", PARENTS, PARAMS, Share(1, 2)):
        pass
    assert readable
    assert all(readable)
