"""The type of the flow's parameter `settings`: its schema follows from that of params.yaml."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, Field, WithJsonSchema, create_model
from pydantic.fields import FieldInfo

from vla_opd.params.run import Params
from vla_opd.params.section import Section


def _fields() -> Iterator[tuple[str, Any]]:
    """Yield a field `section.key` for every key of the schema's sections that have fixed keys.

    It has the key's own type and constraints.
    """
    for section, field in Params.model_fields.items():
        for key, info in _keys(field.annotation).items():
            kind: Any = info.annotation
            if info.metadata:
                kind = Annotated[(kind, *info.metadata)]
            dotted = f"{section}.{key}"
            described = Field(
                default=None, alias=dotted, title=dotted, description=info.description
            )
            yield f"{section}__{key}", (kind, described)


def _keys(annotation: Any) -> dict[str, FieldInfo]:
    """Return the keys of a section by its annotation: of `Section` or `Section | None`."""
    if get_origin(annotation) is Mapping:  # its keys are names that the user chooses
        return {}
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind.model_fields
    return {}


_MODEL = create_model("Settings", __base__=Section, **dict(_fields()))


def _checked(changes: dict[str, Any]) -> dict[str, Any]:
    return _MODEL.model_validate(changes).model_dump(mode="json", by_alias=True, exclude_unset=True)


Settings = Annotated[
    dict[str, Any], WithJsonSchema(_MODEL.model_json_schema()), AfterValidator(_checked)
]
"""`{"section.key": value}`, as a type whose JSON schema follows from that of params.yaml.

So Prefect refuses a wrong setting before there is a run."""
