"""What all sections of `params.yaml` have in common: strictness, and the types of their fields."""

import re
from collections.abc import Callable
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

EVALUATION_STATES = 50
"""Fixed initial states of a task, numbered from 0: both families have so many, and others are to have them too."""


def once_each(names: tuple[Any, ...]) -> tuple[Any, ...]:
    again = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if again:
        raise PydanticCustomError(
            "duplicate", "expected each name once; {again} come again", {"again": str(again)}
        )
    return names


def is_default(default: Any) -> Callable[[Any], bool]:
    """Of a setting that came later: it is in no manifest as long as it is as if there were none, and digests stay as they were."""
    return lambda value: value == default


def _rising(rates: tuple[float, float]) -> tuple[float, float]:
    low, high = rates
    if not 0 < low < high < 1:
        raise PydanticCustomError(
            "rates", "expected two success rates between 0 and 1, the lower one first"
        )
    return rates


def _without_dots(name: str) -> str:
    """Of a name by which dvc.yaml finds its entry: at a dot it would look one level down."""
    if re.fullmatch(r"[A-Za-z0-9_-]+", name) is None:
        raise PydanticCustomError(
            "name", "expected letters, digits, _ and - only: dvc.yaml can't name one with a dot"
        )
    return name


Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9]"), AfterValidator(_without_dots)]
Rates = Annotated[tuple[float, float], AfterValidator(_rising)]
Names = Annotated[tuple[str, ...], AfterValidator(once_each)]


class Section(BaseModel):
    """A section of `params.yaml`: immutable; an unknown key is an error, and so is a number that is infinite, NaN, or really a boolean."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and {int, float} & {
            kind,
            *get_args(kind),
        }:  # to Python, and so to pydantic, true is 1
            raise PydanticCustomError("boolean", "expected a number, not true or false")
        return value
