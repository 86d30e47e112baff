"""What `auto` means on this machine."""

import os
from pathlib import Path

import pytest
import torch

from vla_opd.machine.host import processes, require_equal_shares, this_host


def test_auto_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in [(True, "cuda"), (False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert this_host(3, "auto", "none", Path("m")).device == expected
    host = this_host(0, "cpu", "jsonl", Path("m"))
    assert (host.workers, host.device, host.tracking, host.metrics) == (
        len(os.sched_getaffinity(0)),
        "cpu",
        "jsonl",
        Path("m"),
    )
    assert this_host(3, "cpu", "none", Path("m")).workers == 3


def test_unknown_tracking_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"tracking is 'paper'; expected one of \['wandb', 'jsonl', 'none'\]"
    ):
        this_host(1, "cpu", "paper", Path("m"))  # pyright: ignore[reportArgumentType]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda:0'; expected 'auto', 'cpu'"):
        this_host(1, "cuda:0", "none", Path("m"))


def test_graphs_are_a_gpus_and_in_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="OPD_GRAPHS, or --graphs, with the device 'cpu'; expected a GPU"
    ):
        this_host(1, "cpu", "none", Path("m"), graphs=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert this_host(1, "auto", "none", Path("m"), graphs=True).computes == {
        "device": "cuda",
        "graphs": True,
    }
    assert this_host(1, "auto", "none", Path("m")).computes == {"device": "cuda"}


def test_a_number_of_processes_is_one() -> None:
    assert processes("8") == 8
    for said in ("0", "-1", "two", "", "1.5"):
        with pytest.raises(
            ValueError,
            match=f"OPD_PROCESSES, or --processes, is '{said}'; expected a number of processes, at least 1",
        ):
            processes(said)


def test_a_batch_that_cannot_be_shared_out_is_named() -> None:
    require_equal_shares({"optimize.batch_size": 64, "finetune.batch_size": 8}, 8)
    with pytest.raises(
        ValueError,
        match=r"finetune\.batch_size is 8; expected a multiple of the 16 processes that are to train together",
    ):
        require_equal_shares({"optimize.batch_size": 64, "finetune.batch_size": 8}, 16)
