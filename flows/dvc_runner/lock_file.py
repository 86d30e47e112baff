"""dvc.lock from memory, in a DVC process that runs stage after stage.

DVC reads all of dvc.lock before a stage, and after it parses all of it again, by ruamel's slow way that keeps comments, and writes all of it:
for the main job more than half of what a stage cost (docs/log.md, 2026-11-26). What this process wrote last, it needn't parse, and of the
next text only the stage that changed is new. The file is still read each time, and parsed where it says anything else.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

FILE = "dvc.lock"
STAGE = re.compile(
    r"^(?=  [^ ])", re.MULTILINE
)  # what is indented by two begins a stage, in the only layout that DVC writes
Parse = Callable[..., Any]
Dump = Callable[[Any, TextIO], object]


@dataclass
class Written:
    """The lock file that this process wrote last.

    text:   all of it.
    says:   what the text says, as ruamel's objects; the very ones that DVC is given to change.
    head:   the text before the first stage.
    stages: by name, what a stage says (of `says`) and its text.
    """

    text: str = ""
    says: Any = None
    head: str = ""
    stages: dict[str, tuple[Any, str]] = field(default_factory=dict)


class Memory:
    """DVC's functions for the text of a lock file, taking what they can from memory. They give the same, byte for byte.

    parse, parse_for_update, validate, dump: DVC's own.
    """

    def __init__(self, parse: Parse, parse_for_update: Parse, validate: Parse, dump: Dump) -> None:
        self._parse, self._parse_for_update, self._validate, self._dump = (
            parse,
            parse_for_update,
            validate,
            dump,
        )
        self._read = lru_cache(maxsize=8)(parse)
        self._last = Written()
        self._given = (
            Written()
        )  # to DVC, which may have changed it by halves: not to be used again before it is written

    def parsed(self, text: str, path: object, typ: str = "safe") -> Any:
        """What a text says, for reading only; of the last few files that were read too, such as params.yaml."""
        if typ != "safe":
            return self._parse(text, path, typ)
        return _plain(
            self._last.says if text and text == self._last.text else self._read(text, path)
        )

    def parsed_for_update(self, text: str, path: object) -> Any:
        """What a text says, to be changed in place and dumped."""
        if text and text == self._last.text:
            self._given, self._last = self._last, Written()
            return self._given.says
        return self._parse_for_update(text, path)

    def validated(
        self, data: Any, schema: Any, text: str | None = None, *rest: Any, **named: Any
    ) -> Any:
        """What a text says, if the schema allows it. What DVC itself made for a lock file, it does."""
        return (
            data
            if text and text == self._last.text
            else self._validate(data, schema, text, *rest, **named)
        )

    def dumped(self, data: Any, stream: TextIO) -> None:
        """Write what `data` says; of dvc.lock only the stages that are others than in memory are put into words."""
        if Path(getattr(stream, "name", "")).name != FILE:  # an entry of the run cache
            self._dump(data, stream)
            return
        given, self._given = self._given, Written()
        if list(data) != ["schema", "stages"]:  # more than we know how to take apart
            self._last = Written(self._text(data), data)
        elif data is given.says and given.stages:
            self._last = self._again(data, given)
        else:
            self._last = self._whole(data)
        stream.write(self._last.text)

    def _whole(self, data: Any) -> Written:
        text = self._text(data)
        head, *blocks = STAGE.split(text)
        if len(blocks) != len(data["stages"]):
            return Written(text, data)
        return Written(
            text,
            data,
            head,
            {
                name: (said, block)
                for (name, said), block in zip(data["stages"].items(), blocks, strict=True)
            },
        )

    def _again(self, data: Any, given: Written) -> Written:
        stages: dict[str, tuple[Any, str]] = {}
        for name, said in data["stages"].items():
            before = given.stages.get(name)
            stages[name] = (
                before
                if before is not None and before[0] is said
                else (said, self._block(name, said))
            )
        return Written(
            given.head + "".join(text for _, text in stages.values()), data, given.head, stages
        )

    def _block(self, name: str, said: Any) -> str:
        return self._text({"stages": {name: said}}).removeprefix("stages:\n")

    def _text(self, data: Any) -> str:
        with StringIO() as whole:
            self._dump(data, whole)
            return whole.getvalue()


def _plain(said: Any) -> Any:
    """A copy in plain dicts and lists, which the reader may change."""
    if isinstance(said, dict):
        return {key: _plain(value) for key, value in said.items()}
    return [_plain(value) for value in said] if isinstance(said, list) else said


def remember() -> None:
    """Let DVC, in this process, take dvc.lock from memory where it can."""
    from dvc.utils import strictyaml
    from dvc.utils.serialize import _yaml

    # Of DVC 3.67; a test tells when they are elsewhere.
    memory = Memory(_yaml.parse_yaml, _yaml.parse_yaml_for_update, strictyaml.validate, _yaml._dump)  # noqa: SLF001
    strictyaml.parse_yaml = _yaml.parse_yaml = memory.parsed
    strictyaml.validate = memory.validated
    _yaml.parse_yaml_for_update, _yaml._dump = memory.parsed_for_update, memory.dumped  # noqa: SLF001
