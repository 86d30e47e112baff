"""The objective and its options: one model per objective, chosen by its name."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.vla_opd.params.minimal import MINIMAL
from vla_opd.learning.objectives import OBJECTIVES, ON_DECISIONS
from vla_opd.params.load import load
from vla_opd.params.objective import JsdParams, OptimizeParams

JSD = "optimize: {objective: {name: jsd, beta: 0.3}}\n"


def load_objective(path: Path, *overrides: str) -> dict[str, Any]:
    return load(path, overrides).optimize.objective.model_dump()


@pytest.mark.parametrize("name", [*OBJECTIVES, *ON_DECISIONS])
def test_a_name_alone_is_the_objective_with_its_defaults(name: str) -> None:
    short = OptimizeParams.model_validate({"objective": name})
    assert short.objective.name == name
    assert short == OptimizeParams.model_validate({"objective": {"name": name}})
    assert OptimizeParams.model_validate_json(short.model_dump_json()) == short


def test_options_are_set_with_the_name_or_after_it(minimal: Path) -> None:
    expected = {"name": "jsd", "beta": 0.3}
    assert load_objective(minimal, "optimize.objective={name: jsd, beta: 0.3}") == expected
    name = "optimize.objective.name=jsd"
    beta = "optimize.objective.beta=0.3"
    assert load_objective(minimal, name, beta) == expected
    assert load_objective(minimal, beta, name) == expected
    assert load_objective(minimal, "optimize.objective=jsd", beta) == expected
    minimal.write_text(f"{MINIMAL}optimize: {{objective: jsd}}\n")
    assert load_objective(minimal, beta) == expected
    minimal.write_text(MINIMAL + JSD)
    assert load_objective(minimal) == expected


def test_a_name_alone_drops_the_options_of_another_objective(minimal: Path) -> None:
    minimal.write_text(MINIMAL + JSD)
    assert load_objective(minimal, "optimize.objective=hard_ce") == {"name": "hard_ce"}
    message = (
        r"optimize\.objective\.beta is 0\.3, but hard_ce has no such option "
        r"\(remove it, or write `objective: hard_ce`, which replaces name and options\)"
    )
    with pytest.raises(ValueError, match=message):
        load(minimal, ["optimize.objective.name=hard_ce"])


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            "mse",
            (
                r"optimize\.objective is 'mse'; "
                r"expected one of 'reverse_kl', .*'mixed', 'package\.module:function'"
            ),
        ),
        ("{name: 3}", r"optimize\.objective is '3'; expected one of"),
        ("[jsd]", r"optimize\.objective is .*; expected one of"),
        ("{beta: 0.3}", r"objective\.beta is 0\.3, but reverse_kl has no such option"),
        ("{name: jsd, bet: 0.3}", r"objective\.bet is 0\.3, but jsd has no such option"),
        ("{name: jsd, beta: 1}", r"optimize\.objective\.beta is 1: .*less than 1"),
        (
            "{name: jsd, beta: true}",
            r"optimize\.objective\.beta is True: expected a number, not true or false",
        ),
        (
            "{name: reverse_kl_rollout, reward: stale}",
            r"optimize\.objective\.reward is 'stale': .*'fresh' or 'rollout'",
        ),
        (
            "{name: mixed, keep_low: 0.95}",
            r"optimize\.objective: keep_low is 0\.95 and keep_high is 0\.9; expected keep_low",
        ),
        ("{name: 'a:b', day: 2026-12-01}", r"optimize\.objective\.day.* is datetime\.date"),
    ],
)
def test_a_wrong_name_or_option_is_refused(minimal: Path, objective: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(minimal, [f"optimize.objective={objective}"])


def test_an_objective_from_outside_the_package_has_any_options(minimal: Path) -> None:
    name = "optimize.objective=package.module:function"
    assert load_objective(minimal, name) == {"name": "package.module:function"}
    settings = load(minimal, [name, "optimize.objective.tau=0.1"])
    assert settings.optimize.objective.model_dump()["tau"] == 0.1
    assert type(settings).model_validate_json(settings.model_dump_json()) == settings


def test_options_of_objectives_made_in_code_are_checked() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        JsdParams.model_validate({"bet": 0.3})
    assert OptimizeParams(objective=JsdParams(name="jsd", beta=0.3)).objective.name == "jsd"
