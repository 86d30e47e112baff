"""Which stages wait for the GPU (tests/flows/test_train.py uses Prefect's limit on a server)."""

from pathlib import Path

import pytest

from flows.prefect_server import gpu_limit


@pytest.mark.parametrize(
    ("device", "driver", "verb", "needed"),
    [
        ("auto", True, "optimize", True),
        ("auto", True, "report", False),
        ("auto", False, "optimize", False),
        ("cpu", True, "optimize", False),
        ("cuda:1", False, "label", True),
    ],
)
def test_only_what_uses_a_gpu_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    device: str,
    driver: bool,
    verb: str,
    needed: bool,
) -> None:
    monkeypatch.setenv("OPD_DEVICE", device)
    monkeypatch.setattr(gpu_limit, "DRIVER", tmp_path if driver else tmp_path / "none")
    monkeypatch.setattr(Path, "is_file", Path.exists)
    assert gpu_limit.needs_gpu(verb) is needed


def test_without_a_gpu_no_server_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Prefect server answers."""
    monkeypatch.setenv("OPD_DEVICE", "cpu")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with gpu_limit.hold_gpu("optimize"):
        pass
