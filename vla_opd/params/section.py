"""The base class of the sections of `params.yaml`, and the types of their fields."""

import re
from collections.abc import Callable
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

EVALUATION_STATES = 50
"""Fixed initial states per task, numbered from 0, in every family of environments."""


def require_unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the values. PydanticCustomError for values that appear more than once."""
    repeated = [value for value in dict.fromkeys(values) if values.count(value) > 1]
    if repeated:
        raise PydanticCustomError(
            "duplicate",
            "expected each value once; {repeated} appear more than once",
            {"repeated": str(repeated)},
        )
    return values


def is_default(default: Any) -> Callable[[Any], bool]:
    """Return a test for `exclude_if`: a setting with its default value is not written.

    For settings added to a released schema: manifests without them keep their digests.
    """
    return lambda value: value == default


def _require_ascending_rates(rates: tuple[float, float]) -> tuple[float, float]:
    low, high = rates
    if not 0 < low < high < 1:
        raise PydanticCustomError(
            "rates", "expected two success rates between 0 and 1, the lower one first"
        )
    return rates


def _require_no_dots(name: str) -> str:
    """Return a name that dvc.yaml can look up: DVC reads a dot as one level down."""
    if re.fullmatch(r"[A-Za-z0-9_-]+", name) is None:
        raise PydanticCustomError(
            "name", "expected letters, digits, _ and - only: dvc.yaml can't name one with a dot"
        )
    return name


Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9]"), AfterValidator(_require_no_dots)]
Rates = Annotated[tuple[float, float], AfterValidator(_require_ascending_rates)]
Names = Annotated[tuple[str, ...], AfterValidator(require_unique)]


class Section(BaseModel):
    """A section of `params.yaml`: immutable and strict.

    Errors: an unknown key, an infinite number or NaN, and true or false in place of a number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _require_no_boolean_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, bool):
            return value
        annotation = cls.model_fields[info.field_name or ""].annotation
        accepted = {annotation, *get_args(annotation)}
        if accepted & {int, float}:  # bool is an int in Python, so pydantic would read true as 1
            raise PydanticCustomError("boolean", "expected a number, not true or false")
        return value
