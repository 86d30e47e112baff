"""A progress bar's numbers, as another process reads them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vla_opd.artifacts import progress
from vla_opd.artifacts.draft import scratch_folder
from vla_opd.artifacts.progress import Progress, ProgressBar, read_progress


@pytest.fixture
def target(tmp_path: Path) -> Path:
    target = tmp_path / "it001"
    scratch_folder(target).mkdir(parents=True)
    return target


@pytest.fixture(autouse=True)
def at_every_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL_S", 0)


def bar(target: Path, count: int = 4, first: int = 0) -> ProgressBar:
    scratch = scratch_folder(target)
    items = range(first, count)
    return ProgressBar(items, "label", scratch=scratch, total=count, initial=first, unit="shard")


def read_in_steps(target: Path, items: Iterator[int]) -> Iterator[Progress | None]:
    for _ in items:
        yield read_progress(target)


def test_what_is_done_can_be_read_while_the_work_goes_on(target: Path) -> None:
    assert read_progress(target) is None
    seen = list(read_in_steps(target, iter(bar(target))))
    assert [part.done for part in seen if part] == [0, 1, 2, 3]
    first, second, *_ = seen
    assert first == Progress(0, 4, "shard", None)
    assert second is not None
    assert second.seconds_left is not None
    assert second.seconds_left > 0


def test_what_an_earlier_process_did_counts_as_done_but_not_for_the_rate(target: Path) -> None:
    seen = list(read_in_steps(target, iter(bar(target, count=9, first=7))))
    assert seen[0] == Progress(7, 9, "shard", None)
    assert seen[1] is not None
    assert seen[1].done == 8


def test_processes_that_share_a_draft_are_added_up_and_dead_ones_do_not_count(
    target: Path,
) -> None:
    text = '{"done": 3, "total": 5, "unit": "shard", "seconds_left": 7.0}'
    parent = os.getppid()
    (scratch_folder(target) / f"{parent}.progress").write_text(text)
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    (scratch_folder(target) / f"{dead.pid}.progress").write_text(text)
    items = iter(bar(target))
    next(items)
    assert read_progress(target) == Progress(3, 9, "shard", None)
    next(items)
    both = read_progress(target)
    assert both is not None
    assert (both.done, both.seconds_left) == (4, 7.0)


def test_a_bar_may_end_after_its_draft_was_published(target: Path) -> None:
    items = bar(target)
    iterator = iter(items)
    next(iterator)
    scratch_folder(target).parent.rename(target)
    items.close()
    assert read_progress(target) is None
