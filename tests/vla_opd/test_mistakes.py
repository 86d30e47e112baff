"""Errors end in one message and an exit code; defects show a traceback."""

import errno
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import pytest
import torch
from safetensors import SafetensorError

from vla_opd.artifacts.draft import BusyError
from vla_opd.envs import graphics
from vla_opd.mistakes import exit_code, message


def raised(function: Callable[[], object]) -> BaseException:
    try:
        function()
    except BaseException as error:  # noqa: BLE001
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("steps is 0; expected more"), 2),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "config.json"), 2),
        (PermissionError(errno.EACCES, "Permission denied", "artifacts"), 2),
        (OSError(errno.EIO, "Input/output error", "model.safetensors"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (RuntimeError("I/O error: Disk quota exceeded"), 1),
        (RuntimeError("the simulator crashed 3 times"), 1),
        (BusyError("another process is writing it"), 1),
        (FloatingPointError("the loss is nan"), 1),
        (MemoryError("64 GiB"), 1),
        (KeyboardInterrupt(), 130),
        (SafetensorError("header too large"), 2),
        (BadZipFile("File is not a zip file"), 2),
        (EOFError("compressed file ended"), 2),
        (AssertionError("an invariant"), None),
        (NotImplementedError("a defect"), None),
        (RecursionError("a defect"), None),
        (TypeError("a defect"), None),
    ],
)
def test_exit_codes(error: BaseException, code: int | None) -> None:
    assert exit_code(error) == code
    assert message(error)


def test_tracebacks_can_be_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_TRACEBACK", "1")
    assert exit_code(ValueError("a mistake")) is None


def test_the_file_of_an_oserror_is_named_first() -> None:
    text = message(raised(lambda: Path("/nowhere/at/all").read_text()))
    assert text == (
        "/nowhere/at/all: no such file or directory; expected an existing file or folder"
    )


def test_only_a_librarys_runtime_error_offers_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "OPD_TRACEBACK=1" in message(raised(lambda: torch.zeros(2) @ torch.zeros(3)))
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(graphics, "_failure", lambda _: "no driver")
    error = raised(graphics.choose_backend.__wrapped__)
    assert "no OpenGL backend draws a frame" in message(error)
    assert "OPD_TRACEBACK" not in message(error)


@pytest.mark.parametrize(
    "words",
    [
        "Could not determine home directory.",
        "could not determine the home directory for '~/.config', set an absolute HOME",
    ],
)
def test_a_missing_home_is_named(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.delenv("HOME", raising=False)
    assert message(RuntimeError(words)).startswith(
        "HOME is None; expected a folder that you may write to: DVC and Prefect"
    )
