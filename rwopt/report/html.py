"""The report as one HTML page beside its pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from rwopt import files
from rwopt.report.data import (
    Picture,
    Report,
    best,
    effect,
    groups,
    interval,
    number,
    paired_with,
    probability,
    signed,
)
from rwopt.results import Metric, Paired

__all__ = ["KNOWN_FILES", "KNOWN_PICTURES", "flatten", "write_html"]

KNOWN_PICTURES = (
    Picture("grid.png", "The pictures", "Rows are cases, columns are arms; all arms start from the same noise."),
    Picture(
        "schedule.png",
        "The schedule",
        "How much each block counts at each noise level: 1 is the plain model, red counts more, blue less. "
        "Sampling runs from left to right.",
    ),
    Picture(
        "probe.png",
        "What the probe measured",
        "How much each block matters to the plain model at each noise level, before any search.",
    ),
    Picture("history.png", "The search", "The value of every trial on the training cases, and the best so far."),
)
KNOWN_FILES = {
    "schedule.json": "the learned schedule",
    "metrics.jsonl": "every number of the run, one JSON object per line",
}
EFFECTS = {"better": "▲ better", "worse": "▼ worse", "unclear": "· unclear"}


def write_html(
    report: Report,
    folder: str | os.PathLike[str],
    pictures: Sequence[Picture] | None = None,
    learned: str = "learned",
) -> Path:
    """Write `<folder>/report.html`; it needs nothing but the pictures beside it.

    Args:
        report: the results; all pairs are shown, those of `learned` on `report.split` first.
        folder: the run folder, into which the pictures have been written already.
        pictures: what to show, in order; those of `KNOWN_PICTURES` that exist if None.
        learned: name of the arm that the page is about.

    Raises:
        ValueError: a picture does not exist in `folder`.
    """
    import jinja2

    folder = Path(folder)
    if pictures is None:
        pictures = [picture for picture in KNOWN_PICTURES if (folder / picture.file).is_file()]
    missing = [picture.file for picture in pictures if not (folder / picture.file).is_file()]
    if missing:
        raise ValueError(f"{folder} has no {', '.join(missing)}: draw the pictures before the page")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(resources.files("rwopt.report").joinpath("template.html").read_text("utf-8"))
    arms = [learned, *dict.fromkeys(pair.a for pair in report.paired if pair.a != learned)]
    splits = [report.split, *sorted({pair.split for pair in report.paired} - {report.split})]
    page = template.render(
        report=report,
        learned=learned,
        pictures=pictures,
        files={name: about for name, about in KNOWN_FILES.items() if (folder / name).is_file()},
        groups=[(name, [_heading(metric) for metric in members]) for name, members in groups(report.metrics)],
        rows=_rows(report, learned),
        points=any(metric.format.endswith("%") for metric in report.metrics),
        differences=[
            (split, arm, table) for split in splits for arm in arms if (table := _differences(report, arm, split))
        ],
        settings=list(flatten(report.settings).items()),
    )
    return files.write_text(folder / "report.html", page)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as {"tuner.trials": "150"}, spelled as they are overridden on the command line."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _heading(metric: Metric) -> dict[str, str]:
    arrow, words = ("↑", "higher is better") if metric.higher_is_better else ("↓", "lower is better")
    return {"name": metric.name, "arrow": arrow, "words": words}


def _rows(report: Report, learned: str) -> list[dict[str, Any]]:
    """One entry per arm: its name and the cells of all metric groups (text, best, first of its group)."""
    winners = {metric.name: best(report.arms, metric) for metric in report.metrics}
    rows = []
    for arm in report.arms:
        cells = [
            {
                "text": number(arm.means.get(metric.name), metric.format),
                "best": arm.name in winners[metric.name],
                "first": index == 0,
            }
            for _, members in groups(report.metrics)
            for index, metric in enumerate(members)
        ]
        rows.append(
            {
                "name": arm.name,
                "learned": arm.name == learned,
                "cells": cells,
                "calls": arm.calls,
                "note": arm.note,
            }
        )
    return rows


def _differences(report: Report, arm: str, split: str) -> list[dict[str, Any]]:
    """One entry per metric with a row per other arm; bars share one axis within a metric."""
    entries = []
    for metric, pairs in paired_with(report, arm, split=split):
        ends = [
            0.0,
            *(end for pair in pairs for end in (pair.mean, pair.low, pair.high) if math.isfinite(end)),
        ]
        rows = [_difference(pair, metric, min(ends), max(ends)) for pair in pairs]
        entries.append({"metric": _heading(metric), "optimised": metric.optimised, "rows": rows})
    return entries


def _difference(pair: Paired, metric: Metric, least: float, most: float) -> dict[str, Any]:
    kind = effect(pair, metric)
    bar = None
    if all(math.isfinite(end) for end in (pair.mean, pair.low, pair.high)):
        # Positions in [4, 156] of a drawing that is 160 wide; the axis always includes zero.
        values = {"zero": 0.0, "mean": pair.mean, "low": pair.low, "high": pair.high}
        bar = {name: round(4 + 152 * (value - least) / ((most - least) or 1), 1) for name, value in values.items()}
    return {
        "other": pair.b,
        "mean": signed(pair.mean, metric.format),
        "interval": interval(pair, metric),
        "wins": f"{100 * pair.win_rate:.0f}\N{NARROW NO-BREAK SPACE}%",
        "p": probability(pair.p),
        "evidence": f"{pair.cases} cases × {pair.seeds} seed{'s' if pair.seeds != 1 else ''}",
        "kind": kind,
        "words": EFFECTS[kind],
        "bar": bar,
    }
