"""Functions by name: one of a literal dict, or `"package.module:function"`."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def named_function(name: str, builtin: Mapping[str, Function], field: str) -> Function:
    """Return `builtin[name]`, or import the function that `"package.module:function"` names.

    ValueError names the field and the choices.
    """
    if name in builtin:
        return builtin[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f'{field} is {name!r}; expected one of {sorted(builtin)} or "package.module:function"'
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field} is {name!r}: {error}") from error
