"""How all figures look: colour-blind-safe colours (Okabe and Ito, 2008), one font, and the way to a PNG file.

Figures are drawn with the Agg backend directly, so no global matplotlib state is touched.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwopt import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
INK, GREY, RULE = "#1f2328", "#6b7280", "#d0d4da"
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
)
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so pictures look alike on every machine
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """An empty white figure of `width` x `height` inches; use it within `matplotlib.rc_context(STYLE)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return files.write_bytes(path, buffer.getvalue())
