"""Families of policies: the shipped ones by name, others as `"package.module:function"`."""

from pathlib import Path

import pytest

from tests.vla_opd import small
from vla_opd.policies.checkpoint import CheckpointFacts, open_checkpoint
from vla_opd.policies.load import (
    POLICIES,
    Policy,
    build_policy,
    load_policy,
    save_pretrained,
)
from vla_opd.policies.tiny import TinyVLA


def facts_of(family: str) -> CheckpointFacts:
    shape = small.SHAPE.model_copy(update={"family": family})
    return small.FACTS.model_copy(update={"policy": shape})


def build_dict(facts: CheckpointFacts) -> dict[str, object]:
    return {"facts": facts}


class Undecided(Policy):
    """A policy without any of the methods that it needs."""

    def __init__(self, facts: CheckpointFacts) -> None:
        super().__init__()


def test_a_family_is_a_name_or_a_function_elsewhere() -> None:
    assert POLICIES["tiny"] is TinyVLA
    assert isinstance(build_policy(facts_of("tiny")), TinyVLA)
    assert isinstance(build_policy(facts_of("vla_opd.policies.tiny:TinyVLA")), TinyVLA)


def test_an_unknown_family_is_refused() -> None:
    message = r"policy\.family is 'huge'; expected one of \['openvla_oft', 'tiny'\]"
    with pytest.raises(ValueError, match=message):
        build_policy(facts_of("huge"))


def test_a_function_that_returns_no_policy_is_refused() -> None:
    message = (
        rf"policy\.family is '{__name__}:build_dict', which returned a dict; "
        r"expected an instance of a subclass of vla_opd\.policies\.policy\.Policy"
    )
    with pytest.raises(ValueError, match=message):
        build_policy(facts_of(f"{__name__}:build_dict"))


def test_a_policy_that_lacks_methods_cannot_be_built() -> None:
    with pytest.raises(TypeError, match=r"abstract methods? .*decode.*encode.*logits"):
        build_policy(facts_of(f"{__name__}:Undecided"))


def test_cuda_graphs_are_refused_where_a_policy_has_none(tmp_path: Path) -> None:
    save_pretrained(build_policy(small.FACTS), small.FACTS, tmp_path / "checkpoint")
    message = (
        "OPD_GRAPHS, or --graphs, is set for TinyVLA, which has no CUDA graphs; "
        "expected a policy of the family openvla_oft, or 0"
    )
    with pytest.raises(ValueError, match=message):
        load_policy(open_checkpoint(tmp_path / "checkpoint"), graphs=True)
