"""A cache of dvc.lock, for a DVC process that runs stage after stage.

Before a stage, DVC reads all of dvc.lock. After it, DVC parses the file again, with ruamel's slow
parser that keeps comments, and writes all of it: for the main run more than half of a stage's cost
(docs/log.md, 2026-11-26). What this process wrote last needn't be parsed, and in the next text only
the changed stage is new. The file is still read each time, and parsed if its text is another.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

FILE = "dvc.lock"
STAGE = re.compile(r"^(?=  [^ ])", re.MULTILINE)  # in DVC's layout, two spaces begin a stage
Parse = Callable[..., Any]
Dump = Callable[[Any, TextIO], object]


@dataclass
class CachedLockFile:
    """The lock file that this process wrote last.

    text:   all of it.
    data:   the text's data, as ruamel's objects: those that DVC is given to change.
    head:   the text before the first stage.
    stages: each stage's data (an object in `data`) and text, by name.
    """

    text: str = ""
    data: Any = None
    head: str = ""
    stages: dict[str, tuple[Any, str]] = field(default_factory=dict)


class LockFileCache:
    """DVC's functions for the text of a lock file, with a cache and byte-identical results.

    parse, parse_for_update, validate, dump: DVC's own.
    """

    def __init__(self, parse: Parse, parse_for_update: Parse, validate: Parse, dump: Dump) -> None:
        self._dvc_parse = parse
        self._dvc_parse_for_update = parse_for_update
        self._dvc_validate = validate
        self._dvc_dump = dump
        self._parse_once = lru_cache(maxsize=8)(parse)
        self._last = CachedLockFile()
        # Given to DVC, which may have left it half changed: not used again before it is written.
        self._given = CachedLockFile()

    def parse(self, text: str, path: object, typ: str = "safe") -> Any:
        """Return a text's data for reading; also cached for other files, such as params.yaml."""
        if typ != "safe":
            return self._dvc_parse(text, path, typ)
        if self._is_last(text):
            return _copy_plain(self._last.data)
        return _copy_plain(self._parse_once(text, path))

    def parse_for_update(self, text: str, path: object) -> Any:
        """Return a text's data, to be changed in place and dumped."""
        if self._is_last(text):
            self._given = self._last
            self._last = CachedLockFile()
            return self._given.data
        return self._dvc_parse_for_update(text, path)

    def validate(
        self, data: Any, schema: Any, text: str | None = None, *arguments: Any, **named: Any
    ) -> Any:
        """Return a text's data if the schema allows it, as it does what DVC wrote last."""
        if self._is_last(text):
            return data
        return self._dvc_validate(data, schema, text, *arguments, **named)

    def dump(self, data: Any, stream: TextIO) -> None:
        """Write data as text; of dvc.lock, only the stages that changed are formatted."""
        if Path(getattr(stream, "name", "")).name != FILE:  # an entry of the run cache
            self._dvc_dump(data, stream)
            return
        given = self._given
        self._given = CachedLockFile()
        if list(data) != ["schema", "stages"]:  # a layout that can't be split into stages
            self._last = CachedLockFile(self._format(data), data)
        elif data is given.data and given.stages:
            self._last = self._format_changes(data, given)
        else:
            self._last = self._format_all(data)
        stream.write(self._last.text)

    def _is_last(self, text: str | None) -> bool:
        return bool(text) and text == self._last.text

    def _format_all(self, data: Any) -> CachedLockFile:
        text = self._format(data)
        head, *blocks = STAGE.split(text)
        if len(blocks) != len(data["stages"]):
            return CachedLockFile(text, data)
        stages: dict[str, tuple[Any, str]] = {}
        for (name, stage), block in zip(data["stages"].items(), blocks, strict=True):
            stages[name] = (stage, block)
        return CachedLockFile(text, data, head, stages)

    def _format_changes(self, data: Any, given: CachedLockFile) -> CachedLockFile:
        stages: dict[str, tuple[Any, str]] = {}
        for name, stage in data["stages"].items():
            before = given.stages.get(name)
            if before is not None and before[0] is stage:
                stages[name] = before
            else:
                stages[name] = (stage, self._format_stage(name, stage))
        blocks = [block for _, block in stages.values()]
        return CachedLockFile(given.head + "".join(blocks), data, given.head, stages)

    def _format_stage(self, name: str, stage: Any) -> str:
        return self._format({"stages": {name: stage}}).removeprefix("stages:\n")

    def _format(self, data: Any) -> str:
        with StringIO() as stream:
            self._dvc_dump(data, stream)
            return stream.getvalue()


def _copy_plain(data: Any) -> Any:
    """Return a copy in plain dicts and lists, which the reader may change."""
    if isinstance(data, dict):
        return {key: _copy_plain(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_copy_plain(value) for value in data]
    return data


def cache_lock_file() -> None:
    """Make DVC, in this process, use a cache of dvc.lock."""
    from dvc.utils import strictyaml
    from dvc.utils.serialize import _yaml

    # Of DVC 3.67; a test fails if they have moved.
    cache = LockFileCache(
        _yaml.parse_yaml,
        _yaml.parse_yaml_for_update,
        strictyaml.validate,
        _yaml._dump,  # noqa: SLF001
    )
    _yaml.parse_yaml = cache.parse
    _yaml.parse_yaml_for_update = cache.parse_for_update
    _yaml._dump = cache.dump  # noqa: SLF001
    strictyaml.parse_yaml = cache.parse
    strictyaml.validate = cache.validate
