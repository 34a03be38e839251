"""Heat maps of schedules and probe scores as PNG files: noise level from left to right, sites from top to bottom.

The colour maps (red-white-blue, yellow-green-blue) stay readable for colour-blind readers.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from rwopt.report.style import DPI, GREY, INK, RULE, STYLE, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize

__all__ = ["importance_heatmap", "schedule_heatmap", "split_site"]

Array = npt.NDArray[Any]
CELL = 0.35  # inches that a number in a cell needs
BRANCHES = {"self": "self-attention", "cross": "cross-attention", "ff": "feed-forward"}


class ScheduleLike(Protocol):
    """What is drawn of a schedule: `weights` [K, S] at noise levels `sigmas` [K] for `sites` [S]."""

    @property
    def sites(self) -> tuple[str, ...]: ...
    @property
    def sigmas(self) -> Array: ...
    @property
    def weights(self) -> Array: ...


class ImportanceLike(Protocol):
    """What is drawn of a probe's result: `scores` [K, S] and, if known, their interval `low`, `high` [K, S]."""

    @property
    def sites(self) -> tuple[str, ...]: ...
    @property
    def sigmas(self) -> Array: ...
    @property
    def scores(self) -> Array: ...
    @property
    def low(self) -> Array | None: ...
    @property
    def high(self) -> Array | None: ...


def schedule_heatmap(
    schedule: ScheduleLike | Mapping[str, ScheduleLike], path: str | os.PathLike[str], title: str = ""
) -> Path:
    """Draw the weights; 1 (the plain model) is white, more is red, less is blue.

    Args:
        schedule: one schedule, or several by name, drawn side by side on one colour scale.
        path: the PNG to write.
        title: heading of a single schedule.
    """
    from matplotlib.colors import TwoSlopeNorm

    panels = schedule if isinstance(schedule, Mapping) else {title: schedule}
    tables = {name: (item.sites, item.sigmas, np.asarray(item.weights, float)) for name, item in panels.items()}
    reach = max(0.05, *(float(np.abs(table - 1).max()) for _, _, table in tables.values()))
    norm = TwoSlopeNorm(vcenter=1, vmin=1 - reach, vmax=1 + reach)
    return _heatmaps(tables, norm, "RdBu_r", "weight   (1 = the plain model)", path)


def importance_heatmap(importance: ImportanceLike, path: str | os.PathLike[str], title: str = "") -> Path:
    """Draw probe scores; dark is important. Scores that span more than a factor of 100 get a logarithmic colour scale,
    and scores of both signs a scale centred at 0. Cells whose interval includes 0 carry a small ring.
    """
    from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm

    scores = np.asarray(importance.scores, float)
    finite = scores[np.isfinite(scores)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    norm: Normalize
    label, colours = "importance", "YlGnBu"
    logarithmic = low > 0 and high > 100 * low
    power = math.floor(math.log10(max(-low, high))) if max(-low, high) > 0 else 0
    if not logarithmic and power < -1:  # numbers that fit their cells
        scores, low, high = scores / 10.0**power, low / 10.0**power, high / 10.0**power
        label = f"importance   (× $10^{{{power}}}$)"
    if low < 0 < high and -low > 0.02 * high:
        reach = max(-low, high)
        norm, colours = TwoSlopeNorm(vcenter=0, vmin=-reach, vmax=reach), "RdBu_r"
    elif logarithmic:
        norm, label = LogNorm(vmin=max(low, high * 1e-4), vmax=high), "importance   (logarithmic)"
    else:
        norm = Normalize(vmin=min(low, 0.0), vmax=high if high > min(low, 0.0) else 1.0)
    unsure = None
    if importance.low is not None and importance.high is not None:
        unsure = (np.asarray(importance.low) <= 0) & (np.asarray(importance.high) >= 0)
    tables = {title: (importance.sites, importance.sigmas, scores)}
    return _heatmaps(tables, norm, colours, label, path, unsure)


def split_site(site: str) -> tuple[str, str]:
    """Block and member of a site id in readable words.

    >>> split_site("down_blocks.0.attentions.1.cross")
    ('down 0', '1 cross-attention')
    >>> split_site("mid_block.attentions.0")
    ('mid', 'attention 0')
    """
    match = re.match(r"(?P<stage>down|mid|up)_blocks?(?:\.(?P<index>\d+))?\.(?P<rest>.+)", site)
    if match is None:
        return "", site
    block = match["stage"] + (f" {match['index']}" if match["index"] else "")
    branch = re.fullmatch(r"attentions\.(\d+)\.(self|cross|ff)", match["rest"])
    if branch:
        return block, f"{branch[1]} {BRANCHES[branch[2]]}"
    member = re.sub(r"\b(attention|resnet)s\.", r"\1 ", match["rest"])
    return block, member.replace(".", " ")


def _heatmaps(
    tables: Mapping[str, tuple[Sequence[str], Array, Array]],
    norm: Normalize,
    colours: str,
    label: str,
    path: str | os.PathLike[str],
    unsure: Array | None = None,
) -> Path:
    """Panels side by side with one colour bar; rows are sites in execution order, columns noise levels."""
    import matplotlib as mpl
    from matplotlib.cm import ScalarMappable

    lists = [tuple(sites) for sites, _, _ in tables.values()]
    shared = len(set(lists)) == 1
    rows = max(len(sites) for sites in lists)
    # Inches, laid out by hand: labels keep their size however many sites there are.
    row = 0.3 if rows <= 24 else max(0.13, 7.2 / rows)
    left, right, top, bottom, gap = 2.0, 1.0, 0.45 if any(tables) else 0.2, 0.68, 0.3 if shared else 2.0
    wide = max(_width(np.asarray(sigmas, float), 3.4 if len(tables) > 1 else 5.0) for _, sigmas, _ in tables.values())
    size = (
        left + len(tables) * wide + (len(tables) - 1) * gap + right,
        top + max(rows * row + bottom, 2.3),
    )  # the colour bar's label needs 2.3
    with mpl.rc_context(STYLE):
        figure = new_figure(*size)
        cmap = mpl.colormaps[colours].with_extremes(bad="#eeeeee")
        for index, (name, (sites, sigmas, table)) in enumerate(tables.items()):
            high = len(sites) * row
            x = left + index * (wide + gap)
            axes = figure.add_axes((x / size[0], (size[1] - top - high) / size[1], wide / size[0], high / size[1]))
            _heatmap(axes, sites, np.asarray(sigmas, float), table, norm, cmap, row, wide, unsure)
            axes.set_title(name, loc="left", pad=6)
            if index == 0 or not shared:
                _site_labels(axes, sites, row)
        bar_high = min(max(rows * row, 1.6), 2.6)
        box = (
            (size[0] - right + 0.2) / size[0],
            (size[1] - top - bar_high) / size[1],
            0.14 / size[0],
            bar_high / size[1],
        )
        bar = figure.colorbar(ScalarMappable(norm, cmap), cax=figure.add_axes(box))
        bar.outline.set_visible(False)
        bar.set_label(label)
        bar.ax.tick_params(length=2)
        if unsure is not None and unsure.any():
            figure.text(0.1 / size[0], 0.17 / size[1], "○ interval includes 0", fontsize=8)
        return save(figure, path)


def _heatmap(
    axes: Axes,
    sites: Sequence[str],
    sigmas: Array,
    table: Array,
    norm: Normalize,
    cmap: Colormap,
    row: float,
    wide: float,
    unsure: Array | None,
) -> None:
    from matplotlib.colors import LogNorm

    edges = _edges(np.log(sigmas))  # [K + 1], descending
    axes.pcolormesh(edges, np.arange(len(sites) + 1), table.T, norm=norm, cmap=cmap)  # [S, K]
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(len(sites), 0)
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    centres = (edges[:-1] + edges[1:]) / 2
    inches = np.abs(np.diff(edges)) / abs(edges[0] - edges[-1]) * wide  # width of each column
    _sigma_ticks(axes, centres, sigmas, inches)
    axes.set_xlabel("noise level σ   (from the first step to the last)", labelpad=6)
    if row >= 0.2 and inches.min() >= CELL - 0.01:  # all numbers or none
        for (k, s), value in np.ndenumerate(table):
            if not np.isfinite(value):
                continue
            text = _short(value, isinstance(norm, LogNorm))
            red, green, blue, _ = cmap(float(norm(value)))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            axes.text(
                float(centres[k]),
                s + 0.5,
                text,
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if dark else INK,
            )
    if unsure is not None:
        k, s = np.nonzero(unsure)
        shift = abs(edges[0] - edges[-1]) / wide * 0.06  # 0.06 inches from the cell's left edge
        axes.plot(edges[k] - shift, s + 0.17, "o", ms=2.4, mfc="white", mec=INK, mew=0.5)
    blocks = [split_site(site)[0] for site in sites]
    for s in range(1, len(sites)):
        if blocks[s] != blocks[s - 1]:
            stage = blocks[s].split(" ")[0] != blocks[s - 1].split(" ")[0]
            axes.axhline(s, color="white", lw=3.2 if stage else 1.6)
            axes.axhline(s, color=INK if stage else GREY, lw=1.0 if stage else 0.5)


def _width(sigmas: Array, least: float) -> float:
    """Inches of a panel in which the narrowest column has room for a number, between `least` and 7."""
    edges = _edges(np.log(sigmas))
    share = float(np.abs(np.diff(edges)).min() / abs(edges[0] - edges[-1]))
    return min(7.0, max(least, CELL / share))


def _edges(centres: Array) -> Array:
    """[K + 1] borders half-way between [K] knots; the outermost cells are symmetric about their knots."""
    if len(centres) == 1:
        return np.array([centres[0] + 0.5, centres[0] - 0.5])
    middle = (centres[:-1] + centres[1:]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _sigma_ticks(axes: Axes, centres: Array, sigmas: Array, inches: Array) -> None:
    """Label as many knots as have room (0.34 inches each), the first and the last ones first."""
    places = np.cumsum(inches) - inches / 2
    chosen: list[int] = []
    for k in sorted(range(len(sigmas)), key=lambda k: k not in (0, len(sigmas) - 1)):
        if all(abs(places[k] - places[other]) >= 0.34 for other in chosen):
            chosen.append(k)
    axes.set_xticks(centres[chosen], [f"{sigmas[k]:.2g}" if sigmas[k] < 100 else f"{sigmas[k]:.0f}" for k in chosen])
    axes.tick_params(axis="x", length=3)


def _site_labels(axes: Axes, sites: Sequence[str], row: float) -> None:
    """Member names beside the rows, block names once per block further left."""
    transform = axes.get_yaxis_transform()
    pixels = axes.get_window_extent().width
    size = 8.5 if row >= 0.2 else max(4.5, row * 72 * 0.62)

    def place(inches: float) -> float:
        return -inches * DPI / pixels

    start = 0
    for s, site in enumerate(sites):
        block, member = split_site(site)
        axes.text(place(0.08), s + 0.5, member, transform=transform, ha="right", va="center", fontsize=size)
        if s + 1 == len(sites) or split_site(sites[s + 1])[0] != block:
            middle = (start + s + 1) / 2
            axes.text(
                place(1.9),
                middle,
                block,
                transform=transform,
                ha="left",
                va="center",
                fontsize=8.5,
                weight="bold",
            )
            start = s + 1
            if start < len(sites):
                axes.plot([place(1.9), 0], [start, start], transform=transform, color=RULE, lw=0.8, clip_on=False)


def _short(value: float, logarithmic: bool) -> str:
    """At most five characters; small numbers keep a leading digit on a logarithmic scale only."""
    size = abs(value)
    if logarithmic and 0 < size < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    digits = 3 if logarithmic and size < 0.01 else 2 if size < 100 else 0
    return f"{value:.{digits}f}".replace("-", "−") if round(value, digits) else f"{0:.{digits}f}"
