"""dvc.lock from memory: what isn't parsed again, what is, and that it comes out as DVC itself would write it."""

from collections.abc import Callable
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.utils import strictyaml
from dvc.utils.serialize import _yaml

from flows.dvc_runner import lock_file

REFERENCE = Path(__file__).parents[2] / "dvc.lock"
LOCK = "schema: '2.0'  # kept\nstages:\n  a@1:\n    cmd: x\n"
plain_dump = _yaml._dump


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that DVC's own parsers got, as if in the process that stays."""
    texts: list[str] = []

    def noted(parse: Callable[..., Any]) -> Callable[..., Any]:
        return lambda text, *rest, **named: (texts.append(text), parse(text, *rest, **named))[1]

    read, update = noted(_yaml.parse_yaml), noted(lambda text, path: parse(text, path, typ="rt"))
    parse = _yaml.parse_yaml
    monkeypatch.setattr(_yaml, "parse_yaml", read)
    monkeypatch.setattr(strictyaml, "parse_yaml", read)
    monkeypatch.setattr(_yaml, "parse_yaml_for_update", update)
    monkeypatch.setattr(_yaml, "_dump", plain_dump)
    monkeypatch.setattr(
        strictyaml,
        "validate",
        lambda data, schema, text, path, **_: (
            texts.append(f"validated {len(text)}"),
            schema(data),
        )[1],
    )
    lock_file.remember()
    return texts


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "dvc.lock"


def dumped(data: Any) -> str:
    with StringIO() as text:
        plain_dump(data, text)
        return text.getvalue()


def test_what_it_wrote_itself_is_not_parsed_again_and_comes_out_the_same(
    tmp_path: Path, lock: Path, parsed: list[str]
) -> None:
    lock.write_text(LOCK)
    for name in "bcd":
        with _yaml.modify_yaml(lock) as data:
            data["stages"][name] = {"cmd": name}
        _yaml.dump_yaml(tmp_path / name, {"an entry": "of the run cache"})
        assert strictyaml.load(str(lock))[0]["stages"][name] == {"cmd": name}
    assert parsed == [LOCK]
    assert lock.read_text() == LOCK + "".join(f"  {name}:\n    cmd: {name}\n" for name in "bcd")


def test_what_somebody_else_wrote_or_a_failure_left_half_changed_is_parsed(
    lock: Path, parsed: list[str]
) -> None:
    lock.write_text(LOCK)
    with _yaml.modify_yaml(lock) as data:
        data["stages"]["b"] = {"cmd": "b"}
    lock.write_text(others := lock.read_text().replace("cmd: x", "cmd: y"))
    with _yaml.modify_yaml(lock) as data:
        assert data["stages"]["a@1"]["cmd"] == "y"
    with pytest.raises(KeyboardInterrupt), _yaml.modify_yaml(lock) as data:
        del data["stages"]["b"]
        raise KeyboardInterrupt
    with _yaml.modify_yaml(lock) as data:
        assert set(data["stages"]) == {"a@1", "b"}
    assert parsed == [LOCK, others, others]
    assert lock.read_text() == others


AWKWARD = {
    "cmd": "exec python -m stages report --and 'quotes' --and a line that is folded, since it is longer than eighty characters",
    "params": {
        "params.yaml": {
            "text": "two\nlines\n",
            "like a stage": "  a@1:\n",
            "numbers": [1, 1e-4, None, True, "2024-01-01", "é", ""],
            "empty": {},
        }
    },
}


def test_each_stage_of_the_reference_changed_in_turn_is_written_as_dvc_writes_it(
    lock: Path, parsed: list[str]
) -> None:
    lock.write_text(text := REFERENCE.read_text())
    for name in (stages := _yaml.parse_yaml(text, REFERENCE)["stages"]):
        stages[name] = stages[name] | deepcopy(AWKWARD)
        with _yaml.modify_yaml(lock) as data:
            data["stages"].update({name: stages[name]})
        assert lock.read_text() == dumped({"schema": "2.0", "stages": stages}), name
    assert strictyaml.load(str(lock), COMPILED_LOCKFILE_SCHEMA)[0] == {
        "schema": "2.0",
        "stages": stages,
    }
    assert len(parsed) == 2, "what it says was parsed or validated again"
    lock.write_text(lock.read_text() + "\n")
    assert strictyaml.load(str(lock), COMPILED_LOCKFILE_SCHEMA)[0]["stages"] == stages
    assert parsed[2:] == [lock.read_text(), f"validated {len(lock.read_text())}"]


@pytest.mark.parametrize(
    "text",
    [
        LOCK + f"  {'long' * 40}:\n    cmd: x\n",
        LOCK + "  # of b\n  b:\n    cmd: y\n",
        LOCK + "datasets:\n- name: d\n  type: dvc\n",
        "stages: {}\nschema: '2.0'\n",
        "schema: '2.0'\nstages: {}\n",
        "schema: '2.0'\nstages: {a: {cmd: x}}\n",
    ],
)
def test_a_lock_file_that_dvc_would_not_write_is_changed_as_dvc_changes_it(
    lock: Path, text: str, parsed: list[str]
) -> None:
    lock.write_text(text)
    expected = _yaml.parse_yaml(text, lock, typ="rt")
    for said in ({"cmd": "new"}, AWKWARD, {"cmd": "newer"}):
        expected["stages"]["n"] = said
        with _yaml.modify_yaml(lock) as data:
            data["stages"]["n"] = dict(said)
        assert lock.read_text() == dumped(expected)


def test_a_new_lock_file_grows_from_nothing(lock: Path, parsed: list[str]) -> None:
    for name in "ab":
        with _yaml.modify_yaml(lock) as data:
            data.update({"schema": "2.0"} if not data else {})
            data["stages"] = data.get("stages", {})
            data["stages"][name] = {"cmd": name}
    assert lock.read_text() == "schema: '2.0'\nstages:\n  a:\n    cmd: a\n  b:\n    cmd: b\n"
    assert not parsed


def test_who_reads_may_change_what_he_got(lock: Path, parsed: list[str]) -> None:
    lock.write_text(LOCK)
    with _yaml.modify_yaml(lock) as data:
        data["stages"]["b"] = {"deps": [{"path": "p"}]}
    for _ in range(2):
        read = strictyaml.load(str(lock))[0]
        assert read["stages"]["b"] == {"deps": [{"path": "p"}]}
        read["stages"]["b"]["deps"][0]["path"] = "another"
    (params := lock.with_name("params.yaml")).write_text("a: [1]\n")
    for _ in range(2):
        read = _yaml.load_yaml(params)
        assert read == {"a": [1]}
        read["a"].append(2)
    assert parsed == [LOCK, "a: [1]\n"]
