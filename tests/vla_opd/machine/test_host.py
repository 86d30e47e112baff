"""The resolution of `auto` and the checks of what this machine has."""

import os
from pathlib import Path

import pytest
import torch

from vla_opd.machine.host import parse_processes, require_equal_shares, resolve_host


def test_auto_takes_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, expected in [(True, "cuda"), (False, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda value=available: value)
        assert resolve_host(3, "auto", "none", Path("m")).device == expected
    host = resolve_host(0, "cpu", "jsonl", Path("m"))
    assert (host.workers, host.device, host.tracking, host.metrics) == (
        len(os.sched_getaffinity(0)),
        "cpu",
        "jsonl",
        Path("m"),
    )
    assert resolve_host(3, "cpu", "none", Path("m")).workers == 3


def test_unknown_tracking_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"tracking is 'paper'; expected one of \['wandb', 'jsonl', 'none'\]"
    ):
        resolve_host(1, "cpu", "paper", Path("m"))  # pyright: ignore[reportArgumentType]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda:0'; expected 'auto', 'cpu'"):
        resolve_host(1, "cuda:0", "none", Path("m"))


def test_graphs_need_a_gpu_and_are_in_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="OPD_GRAPHS, or --graphs, with the device 'cpu'; expected a GPU"
    ):
        resolve_host(1, "cpu", "none", Path("m"), graphs=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_host(1, "auto", "none", Path("m"), graphs=True).compute_params == {
        "device": "cuda",
        "graphs": True,
    }
    assert resolve_host(1, "auto", "none", Path("m")).compute_params == {"device": "cuda"}


def test_a_number_of_processes_is_one() -> None:
    assert parse_processes("8") == 8
    for text in ("0", "-1", "two", "", "1.5"):
        message = (
            f"OPD_PROCESSES, or --processes, is '{text}'; "
            "expected a number of processes, at least 1"
        )
        with pytest.raises(ValueError, match=message):
            parse_processes(text)


def test_a_batch_that_cannot_be_shared_out_is_named() -> None:
    require_equal_shares({"optimize.batch_size": 64, "finetune.batch_size": 8}, 8)
    message = (
        r"finetune\.batch_size is 8; expected a multiple of the 16 processes that are to "
        "train together"
    )
    with pytest.raises(ValueError, match=message):
        require_equal_shares({"optimize.batch_size": 64, "finetune.batch_size": 8}, 16)
