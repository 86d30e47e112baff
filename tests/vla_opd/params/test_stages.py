"""Rules within a section of a stage."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vla_opd.params.load import load
from vla_opd.params.stages import AdoptParams

TRAJ1 = "Haozhan72/Openvla-oft-SFT-libero10-traj1"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "evaluate.first_state=41",
            (
                r"first_state is 41 and episodes is 10; "
                r"expected first_state \+ episodes to be at most 50"
            ),
        ),
        (
            "evaluate.episodes=51",
            (
                r"first_state is 0 and episodes is 51; "
                r"expected first_state \+ episodes to be at most 50"
            ),
        ),
        (
            "explore.keep_low=0.95",
            r"keep_low is 0\.95 and keep_high is 0\.9; expected keep_low to be at most keep_high",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    minimal: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(minimal, [override])


def test_a_decision_is_between_two_rates_and_about_the_runs_own_tasks(minimal: Path) -> None:
    load(minimal, ["evaluate.decide=[0.8, 0.9]"])
    message = (
        r"evaluate\.decide is .*: "
        r"expected two success rates between 0 and 1, the lower one first"
    )
    for rates in ("[0.9, 0.8]", "[0.8, 1.0]", "[0, 0.5]"):
        with pytest.raises(ValueError, match=message):
            load(minimal, [f"evaluate.decide={rates}"])
    with pytest.raises(ValueError, match=r"expected no unseen tasks, and a confidence above 0\.5"):
        load(minimal, ["evaluate.decide=[0.8, 0.9]", "evaluate.unseen=[other]"])


def test_a_public_checkpoint_is_known_by_its_name() -> None:
    adopted = AdoptParams.model_validate({"folder": "x", "known": TRAJ1})
    assert adopted.variant == ("libero_10_no_noops", 0.9)
    as_a_study_copies_it = adopted.model_dump(exclude_unset=True)
    assert as_a_study_copies_it == {"folder": "x", "known": TRAJ1}


@pytest.mark.parametrize(
    "settings", [{"unnorm_key": "libero_10_no_noops"}, {"unnorm_key": None}, {"crop": 0.9}]
)
def test_settings_of_a_known_checkpoint_may_repeat_what_is_known(settings: dict[str, Any]) -> None:
    adopted = AdoptParams.model_validate({"folder": "x", "known": TRAJ1, **settings})
    assert adopted.variant == ("libero_10_no_noops", 0.9)


def test_settings_that_contradict_a_known_checkpoint_are_refused() -> None:
    message = rf"crop is 1\.0; expected 0\.9, with which {TRAJ1} was trained, or nothing"
    with pytest.raises(ValidationError, match=message):
        AdoptParams.model_validate({"folder": "x", "known": TRAJ1, "crop": 1.0})


def test_an_unknown_name_of_a_public_checkpoint_is_refused() -> None:
    message = (
        r"known is 'openvla'; expected one of \['Haozhan72/.*'\], "
        r"or unnorm_key and crop in its place"
    )
    with pytest.raises(ValidationError, match=message):
        AdoptParams.model_validate({"folder": "x", "known": "openvla"})


def test_a_checkpoint_that_is_not_known_has_the_settings_of_its_section() -> None:
    assert AdoptParams(folder="x", unnorm_key="k", crop=1.0).variant == ("k", 1.0)
    assert "known" not in AdoptParams(folder="x").model_dump()
