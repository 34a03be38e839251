"""The course of a search as a PNG file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rwopt.report.style import BLUE, GREEN, GREY, INK, ORANGE, PINK, SKY, STYLE, YELLOW, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["search_history"]

Array = npt.NDArray[Any]


def search_history(
    values: Sequence[float | None],
    path: str | os.PathLike[str],
    *,
    starts: Mapping[str, int] | None = None,
    higher_is_better: bool = True,
    ylabel: str = "objective (training cases)",
    xlabel: str = "trial",
    x: Sequence[float] | None = None,
    title: str = "",
) -> Path:
    """Draw every trial's value and the best so far.

    Args:
        values: one per trial in order; None or NaN for a trial that failed or was stopped early.
        path: the PNG to write.
        starts: name -> trial index of the starts that were not proposed by the tuner ("plain", "analytic", "probe").
            A start called "plain" also gets a line across, to show what was gained.
        higher_is_better: direction of `values`.
        ylabel: what `values` are.
        xlabel: what `x` counts.
        x: position of each trial, such as U-Net calls spent; the trial number if None.
    """
    import matplotlib as mpl

    y = np.array([math.nan if value is None else float(value) for value in values], float)
    at = np.arange(len(y), dtype=float) if x is None else np.asarray(x, float)
    if len(at) != len(y):
        raise ValueError(f"{len(at)} positions for {len(y)} values")
    starts = {name: index for name, index in (starts or {}).items() if np.isfinite(y[index])}
    known = np.isfinite(y)
    with mpl.rc_context(STYLE):
        figure = new_figure(8, 4, layout="constrained")
        axes = figure.add_subplot()
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="y", color="#eceef1", lw=0.8)
        axes.set_axisbelow(True)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_title(title, loc="left")
        usual = known.copy()
        usual[list(starts.values())] = False
        axes.plot(at[usual], y[usual], "o", ms=4, mfc=GREY, mec="none", alpha=0.55, label="one trial")
        if known.any():
            _zoom(axes, y[known], higher_is_better)
            _best_so_far(axes, at, y, higher_is_better)
        if (~known).any():
            foot = axes.get_ylim()[0 if higher_is_better else 1]
            axes.plot(
                at[~known],
                np.full((~known).sum(), foot),
                "x",
                ms=5,
                color=INK,
                clip_on=False,
                label="failed or stopped",
            )
        _mark_starts(axes, at, y, starts)
        axes.margins(x=0.03)
        axes.locator_params(axis="x", integer=True)  # a tick between two trials would show the number of either again
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0))
        return save(figure, path)


def _zoom(axes: Axes, y: Array, higher_is_better: bool) -> None:
    """Let outliers on the bad side leave the picture rather than flatten the rest, and say so."""
    quarter, middle, three = np.percentile(y, [25, 50, 75])
    reach = 4 * max(three - quarter, 1e-9)
    low = max(y.min(), middle - reach) if higher_is_better else y.min()
    high = y.max() if higher_is_better else min(y.max(), middle + reach)
    pad = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - pad, high + pad)
    outside = int(((y < low) | (y > high)).sum())
    if outside:
        axes.text(
            1,
            0 if higher_is_better else 1,
            f"{outside} far worse: not shown",
            transform=axes.transAxes,
            ha="right",
            va="bottom" if higher_is_better else "top",
            fontsize=8,
            color=GREY,
        )


def _best_so_far(axes: Axes, at: Array, y: Array, higher_is_better: bool) -> None:
    filled = np.where(np.isfinite(y), y, -np.inf if higher_is_better else np.inf)
    record = np.maximum.accumulate(filled) if higher_is_better else np.minimum.accumulate(filled)
    seen = np.isfinite(record)
    axes.plot(at[seen], record[seen], drawstyle="steps-post", color=BLUE, lw=2, label="best so far")
    top = int(np.argmax(filled) if higher_is_better else np.argmin(filled))
    axes.plot(at[top], y[top], "o", ms=8, mfc="none", mec=BLUE, mew=1.8)
    axes.annotate(
        _figure(y[top]),
        (at[top], y[top]),
        xytext=(0, 8 if higher_is_better else -8),
        textcoords="offset points",
        ha="center",
        va="bottom" if higher_is_better else "top",
        color=BLUE,
        weight="bold",
    )


def _mark_starts(axes: Axes, at: Array, y: Array, starts: Mapping[str, int]) -> None:
    markers = ["s", "D", "^", "v", "P", "*"]
    colours = [ORANGE, GREEN, PINK, SKY, YELLOW, INK]
    for rank, (name, index) in enumerate(starts.items()):
        colour = colours[rank % len(colours)]
        if name == "plain":
            axes.axhline(y[index], color=colour, lw=1, ls=(0, (4, 3)))
        axes.plot(
            at[index],
            y[index],
            markers[rank % len(markers)],
            ms=7,
            color=colour,
            mec="white",
            mew=0.8,
            zorder=5,
            label=f"start: {name} ({_figure(y[index])})",
        )


def _figure(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")
