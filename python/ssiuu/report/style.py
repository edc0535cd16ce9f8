"""One look for all figures: sizes for the width of a README, and one colour per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..runs.read import RunRecord

INK, FAINT = "#24292f", "#8c959f"
LINE_STYLES = ("-", "--", "-.", ":")
STYLE = {
    "text.parse_math": False,  # the names of runs may have dollar signs
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eaeef2",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 160,
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="png", metadata={"Software": None})


def line_of(record: RunRecord) -> dict:
    """Keyword arguments of a run's lines."""
    return {"color": record.color, "linestyle": LINE_STYLES[record.style % len(LINE_STYLES)]}


def new_figure(rows: int, columns: int, size: tuple[float, float], **options) -> tuple[Figure, np.ndarray]:
    """A figure and its axes `[rows, columns]`."""
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def from_zero(ax: Axes) -> None:
    """Both axes from 0, with whole steps."""
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(whole_numbers())


def method_legend(figure: Figure, records: Sequence[RunRecord]) -> None:
    """The runs' colours and line styles, once for all panels."""
    handles = [Line2D([], [], label=record.label, linewidth=3, **line_of(record)) for record in records]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)), fontsize=11)


def whole_numbers(count: int = 6) -> MaxNLocator:
    """Ticks at round whole numbers."""
    return MaxNLocator(count, steps=[1, 2, 5, 10], integer=True)
