"""What the HTML pages share: style sheet, filters, and drawings as SVG elements whose colours the style sheet decides.

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

# Colours that the drawings name and the page's style sheet decides, so that one drawing serves light and dark: each becomes a CSS variable.
INK, MUTED, GRID, STUDENT, TEACHER, PAPER = (f"#00000{digit}" for digit in range(1, 7))
SERIES = tuple(f"#00001{digit}" for digit in range(8))
THEME = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    STUDENT: "student",
    TEACHER: "teacher",
    PAPER: "paper",
} | {colour: f"series-{number}" for number, colour in enumerate(SERIES)}
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
    """What has two ends."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


def render(package: str, template: str, **values: Any) -> str:
    """A page, whole, from a template of a package of ours."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "interval": interval, "brief": brief}
    css = Markup((files("vla_opd.analysis") / "page.css").read_text(encoding="utf-8"))  # noqa: S704 - our own
    return environment.from_string((files(package) / template).read_text(encoding="utf-8")).render(
        css=css, **values
    )


def percent(value: float) -> str:
    """With one digit after the point."""
    return f"{value:.1%}"


def interval(its: Interval) -> str:
    """From end to end, in percent."""
    return f"{its.low:.1%} – {its.high:.1%}"  # noqa: RUF001 - an interval is written with an en dash


def brief(its: Interval) -> str:
    """The same, in whole percents."""
    return f"{its.low:.0%} – {its.high:.0%}"  # noqa: RUF001 - as above


def draw(name: str, alt: str, size: tuple[int, int], paint: Callable[["Axes"], None]) -> Markup:
    """An SVG element of `size` CSS pixels with a text alternative, fit to stand in a page among others."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(size[0] / 72, size[1] / 72), layout="constrained"
        )  # an SVG of matplotlib's has 72 units an inch
        paint(figure.subplots())
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Markup(_inline(buffer.getvalue(), name, alt))  # noqa: S704 - drawn here; the alternative text is escaped


def _inline(svg: str, name: str, alt: str) -> str:
    """A stand-alone SVG file as an element of an HTML page: ids of its own, the page's colours and font, no namespaces."""
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
