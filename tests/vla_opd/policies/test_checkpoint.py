"""Checkpoints: complete or refused, and used only where they belong."""

import re
from pathlib import Path

import pytest
import torch

from tests.vla_opd import small
from vla_opd.artifacts.draft import draft
from vla_opd.policies.checkpoint import (
    WEIGHTS,
    open_checkpoint,
    open_unverified,
    require_environment,
    require_same_actions,
    save_weights,
)


def publish(folder: Path, weights: dict[str, torch.Tensor], facts: dict[str, object]) -> None:
    with draft(folder, "checkpoint", {}, {}) as work:
        with work.part(WEIGHTS) as path:
            save_weights(path, weights)
        work.publish(facts)


def test_a_checkpoint_returns_its_weights_and_facts(tmp_path: Path) -> None:
    weights = {
        "a": torch.randn(3, 4),
        "b/c": torch.arange(4).view(2, 2).T,
        "half": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
    }
    publish(tmp_path / "student", weights, {"checkpoint": small.FACTS.model_dump()})
    checkpoint = open_checkpoint(tmp_path / "student")
    assert checkpoint.facts == small.FACTS
    assert checkpoint.digest == checkpoint.manifest.digest
    assert checkpoint.dtypes == (torch.float32, torch.bfloat16)
    stored = checkpoint.weights()
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in weights)


def test_the_manifest_can_be_read_without_verifying_the_weights(tmp_path: Path) -> None:
    publish(tmp_path / "student", {"a": torch.ones(8)}, {"checkpoint": small.FACTS.model_dump()})
    (tmp_path / "student" / WEIGHTS).write_bytes(b"corrupt")
    checkpoint = open_unverified(tmp_path / "student")
    assert checkpoint.facts == small.FACTS
    message = f"student/{WEIGHTS}: not safetensors .*; expected what `save_weights` writes"
    with pytest.raises(ValueError, match=message):
        checkpoint.weights()
    with pytest.raises(ValueError, match=message):
        _ = checkpoint.dtypes


def test_a_checkpoint_of_integers_has_no_precision(tmp_path: Path) -> None:
    weights = {"a": torch.arange(3)}
    publish(tmp_path / "student", weights, {"checkpoint": small.FACTS.model_dump()})
    message = rf"student/{WEIGHTS}: is in \['I64'\]; expected some tensors in \['BF16', 'F16'"
    with pytest.raises(ValueError, match=message):
        _ = open_checkpoint(tmp_path / "student").dtypes


def test_same_weights_same_bytes(tmp_path: Path) -> None:
    weights = {"b": torch.ones(3), "a": torch.zeros(2)}
    save_weights(tmp_path / "one", weights)
    save_weights(tmp_path / "two", dict(reversed(weights.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    "facts", [{}, {"checkpoint": {}}, {"checkpoint": small.FACTS.model_dump() | {"unheard_of": 1}}]
)
def test_facts_of_another_version_are_refused(tmp_path: Path, facts: dict[str, object]) -> None:
    publish(tmp_path / "student", {"a": torch.ones(1)}, facts)
    message = "student: the manifest's facts do not describe a checkpoint of this version"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "student")


def test_corrupt_weights_are_refused(tmp_path: Path) -> None:
    publish(tmp_path / "student", {"a": torch.ones(8)}, {"checkpoint": small.FACTS.model_dump()})
    path = tmp_path / "student" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=f"student/{WEIGHTS}: .* it is corrupt"):
        open_checkpoint(tmp_path / "student")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("q01", (-0.4, -1.0, 0.0)),
        ("q99", (0.5, 2.5, 0.0)),
        ("normalised", (True, True, True)),
        ("chunk", 3),
        ("bins", 9),
    ],
)
def test_tokens_of_other_actions_are_refused(field: str, value: object) -> None:
    require_same_actions(small.FACTS, small.SPACE, "labels/it001")
    teacher = small.SPACE.model_copy(update={field: value})
    expected = getattr(small.SPACE, field)
    message = (
        f"labels/it001: action_space.{field} is {value} for the teacher; "
        f"expected the student's {expected}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        require_same_actions(small.FACTS, teacher, "labels/it001")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("family", "libero"),
        ("cameras", ("front",)),
        ("image_size", 24),
        ("settle", 0),
        ("stepping", "exact"),
        ("render", "exact"),
        ("wording", "benchmark"),
    ],
)
def test_another_environment_is_refused(field: str, value: object) -> None:
    environment = small.ENVIRONMENT.model_copy(update={field: value})
    expected = getattr(small.ENVIRONMENT, field)
    message = (
        f"environment.{field} is {value!r}; expected {expected!r}, "
        "which the student was trained with"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        require_environment(small.FACTS, environment, "the student")


def test_other_tasks_of_the_same_environment_are_welcome() -> None:
    environment = small.ENVIRONMENT.model_copy(update={"tasks": ("push-v3",)})
    require_environment(small.FACTS, environment, "the student")
