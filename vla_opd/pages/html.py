"""HTML pages: templates, filters and the style sheet. The same numbers give the same bytes."""

from functools import cache
from importlib.resources import files
from typing import Any, Protocol

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

PACKAGES = ("jinja2", "matplotlib")  # their versions can change a page's bytes


class Interval(Protocol):
    """A confidence interval."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def render(package: str, template: str, **values: Any) -> str:
    """Render a page from a template in one of this project's packages.

    The template can include the style sheet as `css`.
    """
    style_sheet = files("vla_opd.pages") / "page.css"
    css = Markup(style_sheet.read_text(encoding="utf-8"))  # noqa: S704 - this project's own
    source = files(package) / template
    page = _environment().from_string(source.read_text(encoding="utf-8"))
    return page.render(css=css, **values)


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = percent
    environment.filters["interval"] = interval
    environment.filters["brief"] = brief
    environment.filters["count"] = count
    return environment


def percent(value: float) -> str:
    """Format in percent, with one decimal."""
    return f"{value:.1%}"


def interval(ends: Interval) -> str:
    """Format an interval in percent, with one decimal."""
    return f"{ends.low:.1%} – {ends.high:.1%}"  # noqa: RUF001 - intervals have an en dash


def brief(ends: Interval) -> str:
    """Format an interval in whole percent."""
    return f"{ends.low:.0%} – {ends.high:.0%}"  # noqa: RUF001 - as above


def count(value: float) -> str:
    """Format a count with thousands separators, without decimals."""
    return f"{value:,.0f}"
