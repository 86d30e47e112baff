"""Checkpoints: whole or refused, and used only where they belong."""

from pathlib import Path

import pytest
import torch

from tests.vla_opd import small
from vla_opd.artifacts.draft import draft
from vla_opd.policies.checkpoint import (
    WEIGHTS,
    open_checkpoint,
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
    found = open_checkpoint(tmp_path / "student")
    assert found.facts == small.FACTS
    assert found.digest == found.manifest.digest
    assert found.weights().keys() == weights.keys()
    assert all(torch.equal(found.weights()[name], weights[name]) for name in weights)


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
    with pytest.raises(
        ValueError,
        match=r"student: the manifest's facts do not describe a checkpoint of this version",
    ):
        open_checkpoint(tmp_path / "student")


def test_corrupt_weights_are_refused(tmp_path: Path) -> None:
    publish(tmp_path / "student", {"a": torch.ones(8)}, {"checkpoint": small.FACTS.model_dump()})
    path = tmp_path / "student" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=f"student/{WEIGHTS}: .* it is corrupt"):
        open_checkpoint(tmp_path / "student")


@pytest.mark.parametrize(
    ("field", "theirs"),
    [
        ("q01", (-0.4, -1.0, 0.0)),
        ("q99", (0.5, 2.5, 0.0)),
        ("normalised", (True, True, True)),
        ("chunk", 3),
        ("bins", 9),
    ],
)
def test_tokens_of_other_actions_are_refused(field: str, theirs: object) -> None:
    require_same_actions(small.FACTS, small.SPACE, "labels/it001")
    with pytest.raises(
        ValueError,
        match=rf"labels/it001: action_space\.{field} is .* for the teacher; expected the student's",
    ) as caught:
        require_same_actions(
            small.FACTS, small.SPACE.model_copy(update={field: theirs}), "labels/it001"
        )
    assert str(theirs) in str(caught.value)
    assert str(getattr(small.SPACE, field)) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "ours"),
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
def test_another_environment_is_refused(field: str, ours: object) -> None:
    with pytest.raises(
        ValueError, match=rf"environment\.{field} is .*, which the student was trained with"
    ) as caught:
        require_environment(
            small.FACTS, small.ENVIRONMENT.model_copy(update={field: ours}), "the student"
        )
    assert f"is {ours!r}; expected {getattr(small.ENVIRONMENT, field)!r}" in str(caught.value)


def test_other_tasks_of_the_same_environment_are_welcome() -> None:
    require_environment(
        small.FACTS, small.ENVIRONMENT.model_copy(update={"tasks": ("push-v3",)}), "the student"
    )
