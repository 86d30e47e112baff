"""The cache of dvc.lock: what is parsed again, and byte-identical results."""

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

REFERENCE = Path(__file__).parents[3] / "dvc.lock"
LOCK = "schema: '2.0'  # kept\nstages:\n  a@1:\n    cmd: x\n"
plain_dump = _yaml._dump


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the texts that DVC's own parsers get, with the cache installed."""
    texts: list[str] = []

    def recording(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parse_and_record(text: str, *arguments: Any, **named: Any) -> Any:
            texts.append(text)
            return parse(text, *arguments, **named)

        return parse_and_record

    def validate(data: Any, schema: Any, text: str, path: object, **_: Any) -> Any:
        texts.append(f"validated {len(text)}")
        return schema(data)

    parse = _yaml.parse_yaml
    read = recording(parse)
    update = recording(lambda text, path: parse(text, path, typ="rt"))
    monkeypatch.setattr(_yaml, "parse_yaml", read)
    monkeypatch.setattr(strictyaml, "parse_yaml", read)
    monkeypatch.setattr(_yaml, "parse_yaml_for_update", update)
    monkeypatch.setattr(_yaml, "_dump", plain_dump)
    monkeypatch.setattr(strictyaml, "validate", validate)
    lock_file.cache_lock_file()
    return texts


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "dvc.lock"


def dumped(data: Any) -> str:
    with StringIO() as text:
        plain_dump(data, text)
        return text.getvalue()


def test_its_own_text_is_not_parsed_again_and_gives_the_same_data(
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


def test_text_of_another_process_or_a_half_made_change_is_parsed(
    lock: Path, parsed: list[str]
) -> None:
    lock.write_text(LOCK)
    with _yaml.modify_yaml(lock) as data:
        data["stages"]["b"] = {"cmd": "b"}
    edited = lock.read_text().replace("cmd: x", "cmd: y")
    lock.write_text(edited)
    with _yaml.modify_yaml(lock) as data:
        assert data["stages"]["a@1"]["cmd"] == "y"
    with pytest.raises(KeyboardInterrupt), _yaml.modify_yaml(lock) as data:
        del data["stages"]["b"]
        raise KeyboardInterrupt
    with _yaml.modify_yaml(lock) as data:
        assert set(data["stages"]) == {"a@1", "b"}
    assert parsed == [LOCK, edited, edited]
    assert lock.read_text() == edited


AWKWARD = {
    "cmd": (
        "exec python -m stages report --and 'quotes' --and a line that is folded, since it is "
        "longer than eighty characters"
    ),
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
    text = REFERENCE.read_text()
    lock.write_text(text)
    stages = _yaml.parse_yaml(text, REFERENCE)["stages"]
    for name in stages:
        stages[name] = stages[name] | deepcopy(AWKWARD)
        with _yaml.modify_yaml(lock) as data:
            data["stages"].update({name: stages[name]})
        assert lock.read_text() == dumped({"schema": "2.0", "stages": stages}), name
    assert strictyaml.load(str(lock), COMPILED_LOCKFILE_SCHEMA)[0] == {
        "schema": "2.0",
        "stages": stages,
    }
    assert len(parsed) == 2, "its own text was parsed or validated again"
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
    for stage in ({"cmd": "new"}, AWKWARD, {"cmd": "newer"}):
        expected["stages"]["n"] = stage
        with _yaml.modify_yaml(lock) as data:
            data["stages"]["n"] = dict(stage)
        assert lock.read_text() == dumped(expected)


def test_a_new_lock_file_grows_from_nothing(lock: Path, parsed: list[str]) -> None:
    for name in "ab":
        with _yaml.modify_yaml(lock) as data:
            data.update({"schema": "2.0"} if not data else {})
            data["stages"] = data.get("stages", {})
            data["stages"][name] = {"cmd": name}
    assert lock.read_text() == "schema: '2.0'\nstages:\n  a:\n    cmd: a\n  b:\n    cmd: b\n"
    assert not parsed


def test_a_reader_may_change_its_copy(lock: Path, parsed: list[str]) -> None:
    lock.write_text(LOCK)
    with _yaml.modify_yaml(lock) as data:
        data["stages"]["b"] = {"deps": [{"path": "p"}]}
    for _ in range(2):
        read = strictyaml.load(str(lock))[0]
        assert read["stages"]["b"] == {"deps": [{"path": "p"}]}
        read["stages"]["b"]["deps"][0]["path"] = "another"
    params = lock.with_name("params.yaml")
    params.write_text("a: [1]\n")
    for _ in range(2):
        read = _yaml.load_yaml(params)
        assert read == {"a": [1]}
        read["a"].append(2)
    assert parsed == [LOCK, "a: [1]\n"]
