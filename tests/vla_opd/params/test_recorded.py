"""The spelling of earlier versions: read in manifests, refused in params.yaml."""

from pathlib import Path

import pytest

from vla_opd.artifacts.manifest import read_manifest
from vla_opd.params.load import load
from vla_opd.params.recorded import FLAT_OPTIONS, read_recorded

ROOT = Path(__file__).parents[3]
FLAT = {
    "beta": 0.3,
    "clamp": None,
    "centre": True,
    "ratio": True,
    "reward": "fresh",
    "discount": 0.0,
    "distill": 0.5,
    "keep_low": 0.1,
    "keep_high": 0.9,
    "clip_low": 0.2,
    "clip_high": 0.28,
}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimize.beta=0.5",
            r"optimize\.beta moved: write `objective: \{name: jsd, beta: 0\.5\}`",
        ),
        (
            "optimize.clamp=2",
            (
                r"optimize\.clamp moved: write "
                r"`objective: \{name: reverse_kl_sampled or reverse_kl_rollout, clamp: 2\}`"
            ),
        ),
        ("optimize.ratio=true", r"write `objective: \{name: reverse_kl_rollout, ratio: true\}`"),
    ],
)
def test_an_option_in_its_former_place_is_refused_with_its_present_one(
    minimal: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(minimal, [override])


@pytest.mark.parametrize("name", ["reverse_kl", *FLAT_OPTIONS])
def test_recorded_options_are_those_of_the_objective(minimal: Path, name: str) -> None:
    params = load(minimal, ["optimize.steps=7"])
    recorded = params.model_dump(mode="json")
    recorded["optimize"] |= {"objective": name, **FLAT}
    read = read_recorded(recorded)
    options = {option: FLAT[option] for option in FLAT_OPTIONS.get(name, ())}
    assert read.optimize.objective.model_dump() == {"name": name, **options}
    assert read.optimize.steps == 7
    assert read_recorded(read.model_dump(mode="json")) == read


@pytest.mark.parametrize("table", sorted(ROOT.glob("artifacts/*/studies/*")), ids=lambda p: p.name)
def test_committed_studies_can_be_read(table: Path) -> None:
    recorded = read_manifest(table, "study").params["parameters"]
    assert table.name in read_recorded(recorded).studies
