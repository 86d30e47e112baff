"""HTML pages: rendering, filters, and drawings as SVG elements coloured by the style sheet.

The same numbers give the same bytes.
"""

import io
import re
from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Protocol

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Placeholders that become CSS variables in the page, so that a drawing suits light and dark themes.
INK = "#000001"
MUTED = "#000002"
GRID = "#000003"
STUDENT = "#000004"
TEACHER = "#000005"
PAPER = "#000006"
SERIES = tuple(f"#00001{digit}" for digit in range(8))
THEME = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    STUDENT: "student",
    TEACHER: "teacher",
    PAPER: "paper",
    **{colour: f"series-{number}" for number, colour in enumerate(SERIES)},
}
DRAWN_WITH = ("jinja2", "matplotlib")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "vla-opd",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the layout is the same everywhere
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


class Interval(Protocol):
    """A confidence interval."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def render(package: str, template: str, **values: Any) -> str:
    """Render a page from a template in one of this project's packages."""
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
    style_sheet = files("vla_opd.analysis") / "page.css"
    css = Markup(style_sheet.read_text(encoding="utf-8"))  # noqa: S704 - this project's own
    source = (files(package) / template).read_text(encoding="utf-8")
    return environment.from_string(source).render(css=css, **values)


def percent(value: float) -> str:
    """Format in percent, with one decimal."""
    return f"{value:.1%}"


def interval(ends: Interval) -> str:
    """Format an interval in percent, with one decimal."""
    return f"{ends.low:.1%} – {ends.high:.1%}"  # noqa: RUF001 - intervals have an en dash


def brief(ends: Interval) -> str:
    """Format an interval in whole percent."""
    return f"{ends.low:.0%} – {ends.high:.0%}"  # noqa: RUF001 - as above


def draw(name: str, alt: str, size: tuple[int, int], paint: Callable[["Axes"], None]) -> Markup:
    """Draw an SVG element for a page.

    name: prefixed to its ids, which must be unique in a page. alt: the text alternative.
    size: in CSS pixels.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    width, height = size
    inches = (width / 72, height / 72)  # matplotlib's SVG files have 72 units per inch
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        paint(figure.subplots())
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    element = _to_element(buffer.getvalue(), name, alt)
    return Markup(element)  # noqa: S704 - drawn here; the text alternative is escaped


def _to_element(svg: str, name: str, alt: str) -> str:
    """Turn an SVG file into an element of an HTML page.

    It gets unique ids, the page's colours and font, and no namespaces.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>",
        rf'<svg class="plot" role="img" aria-label="{escape(alt)}" \1>',
        body,
        count=1,
    )
    body = re.sub(r'id="', f'id="{name}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\1{name}-", body)
    body = re.sub(r"'DejaVu Sans'", "var(--sans)", body)
    for colour, variable in THEME.items():
        body = body.replace(colour, f"var(--{variable})")
    return body.strip()
