"""Shapes and types are checked where tensors are: jaxtyping's annotations in these modules are enforced by beartype. Nowhere else."""

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

CHECKED = ["arrays", "tokens", "objectives", "logits", "trajectory", "checkpoint"]

install_import_hook([f"vla_opd.{module}" for module in CHECKED], "beartype.beartype")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest whole run, made once by one worker; tests copy what they change."""
    from tests.small_run import make_run  # brings the stages, which must come after the hook

    return make_run(tmp_path_factory.mktemp("undisturbed"))
