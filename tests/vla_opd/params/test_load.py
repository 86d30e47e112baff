"""Loading `params.yaml`: the file, overrides, and how mistakes are listed."""

from pathlib import Path

import pytest

from tests.vla_opd.params.minimal import MINIMAL
from vla_opd.params.load import load

ROOT = Path(__file__).parents[3]


def test_the_projects_own_file_is_in_order() -> None:
    params = load(ROOT / "params.yaml")
    report = params.report
    assert set(params.evaluations) >= {report.start, report.final, report.teacher}


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimize.learning_rate=1e-4", "optimize", "learning_rate", 1e-4),
        ("optimize.steps=7", "optimize", "steps", 7),
        ("sample.protocol=benchmark", "sample", "protocol", "benchmark"),
        ("policy.proprio=false", "policy", "proprio", False),
        ("environment.tasks=[a-v3, b-v3]", "environment", "tasks", ("a-v3", "b-v3")),
        ("environment.family=a.b:c=d", "environment", "family", "a.b:c=d"),
    ],
)
def test_overrides_are_yaml_on_the_same_schema(
    minimal: Path, override: str, section: str, key: str, value: object
) -> None:
    assert getattr(getattr(load(minimal, [override]), section), key) == value
    assert getattr(getattr(load(minimal), section), key) != value


def test_later_overrides_win_and_deeper_ones_reach_in(minimal: Path) -> None:
    overrides = [
        "optimize.steps=7",
        "optimize.steps=8",
        "demonstrations.main.episodes=5",
        "demonstrations.more.episodes=6",
    ]
    params = load(minimal, overrides)
    assert params.optimize.steps == 8
    episodes = {name: settings.episodes for name, settings in params.demonstrations.items()}
    assert episodes == {"main": 5, "more": 6}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimize.steps", r"override 'optimize\.steps': expected section\.key=value"),
        ("steps=3", r"override 'steps=3': expected section\.key=value"),
        ("run.name.first=x", r"run\.name\.first: name is not a section"),
        ("environment.tasks=[a", r"override 'environment\.tasks=\[a'"),
    ],
)
def test_overrides_that_cannot_be_read_are_refused(
    minimal: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(minimal, [override])


def test_all_mistakes_are_listed_at_once(minimal: Path) -> None:
    with pytest.raises(ValueError, match=r"params\.yaml: 2 mistake\(s\)") as caught:
        load(minimal, ["optimize.steps=0", "sample.group=none"])
    assert "optimize.steps is 0" in str(caught.value)
    assert "sample.group is 'none'" in str(caught.value)


def test_a_missing_section_is_named(minimal: Path) -> None:
    minimal.write_text(MINIMAL.replace("run: {name: test}", ""))
    with pytest.raises(ValueError, match=r"run: Field required"):
        load(minimal)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = r"nowhere\.yaml does not exist; expected the run's params\.yaml"
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds list; expected one mapping"),
        ("", "holds NoneType; expected one mapping"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(minimal: Path, text: str, message: str) -> None:
    minimal.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(minimal)


@pytest.mark.parametrize("text", ["run: {name: [", MINIMAL + "run: {name: again}\n", "a: b: c"])
def test_a_file_that_is_no_yaml_is_refused_and_named(minimal: Path, text: str) -> None:
    minimal.write_text(text)
    with pytest.raises(ValueError, match=r"params\.yaml"):
        load(minimal)


@pytest.mark.parametrize("changes", [[], ["optimize.steps=3"]])
def test_a_file_in_another_encoding_is_named_with_the_line(
    minimal: Path, changes: list[str]
) -> None:
    minimal.write_bytes(MINIMAL.encode() + "# pr\u00e9s\n".encode("latin-1"))
    line = MINIMAL.count("\n") + 1
    message = rf"params\.yaml: line {line} has the byte 0xe9; expected UTF-8 text"
    with pytest.raises(ValueError, match=message):
        load(minimal, changes)


def test_a_byte_order_mark_is_accepted(minimal: Path) -> None:
    minimal.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load(minimal).run.name == "test"
