"""Drawings: SVG elements of a page, in the colors of its style sheet.

The same numbers give the same bytes.
"""

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

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
    **{color: f"series-{number}" for number, color in enumerate(SERIES)},
}
SMALL = (450, 300)  # CSS pixels
WHOLE = (-0.03, 1.03)  # the limits of an axis of success rates
DASHED = (0, (4, 3))
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

    It gets unique ids, the page's colors and font, and no namespaces.
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
    for color, variable in THEME.items():
        body = body.replace(color, f"var(--{variable})")
    return body.strip()


def show_percent(axis: "Axis") -> None:
    """Label an axis of rates in percent."""
    axis.set_major_formatter(lambda value, _: f"{value:.0%}")
