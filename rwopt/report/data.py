"""The plain data that a report is made of, and the few rules that its table and its page share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rwopt.results import ArmMeans, Metric, Paired

__all__ = [
    "Picture",
    "Report",
    "best",
    "effect",
    "groups",
    "interval",
    "number",
    "paired_with",
    "probability",
    "signed",
]


@dataclass
class Report:
    """Everything that a table or a page says about one run.

    `split` names the cases of `arms` ("test"), `cases` counts them; `settings` may be nested; `versions` maps package
    to version; `command` repeats the run; `verdict` holds plain sentences, the most important first.
    """

    title: str
    recipe: str
    task: str
    metrics: list[Metric]
    arms: list[ArmMeans]
    paired: list[Paired]
    split: str
    cases: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    verdict: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """A PNG in the report's folder (`file` is relative to it) with a heading and a caption."""

    file: str
    title: str
    caption: str = ""


def groups(metrics: Sequence[Metric]) -> list[tuple[str, list[Metric]]]:
    """The metrics as ("optimised", [...]), ("held out", [...]), without empty groups."""
    named = [
        ("optimised", [metric for metric in metrics if metric.optimised]),
        ("held out", [metric for metric in metrics if not metric.optimised]),
    ]
    return [(name, members) for name, members in named if members]


def number(value: float | None, format: str) -> str:
    """`value` in the metric's format, with a true minus sign; a dash if there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return _minus(format_value(value, format))


def signed(value: float, format: str) -> str:
    """A difference: as `number`, always with a sign; differences of percentages are percentage points ("pp")."""
    if not math.isfinite(value):
        return "–"
    text = format_value(value, format).replace("%", " pp")
    if not text.strip("-0. p"):  # nothing but zeros: "-0.000" would claim a direction
        return text.lstrip("-")
    return _minus(text if text.startswith("-") else f"+{text}")


def interval(pair: Paired, metric: Metric) -> str:
    """ "[+0.01, +0.05]", without a unit."""
    low, high = (signed(end, metric.format).removesuffix(" pp") for end in (pair.low, pair.high))
    return f"[{low}, {high}]"


def format_value(value: float, format: str) -> str:
    try:
        return f"{value:{format}}"
    except ValueError:
        return f"{int(value):{format}}"  # "d" of a float


def _minus(text: str) -> str:
    return text.replace("-", "−") if "e" not in text else text


def probability(p: float) -> str:
    """A p value: "<0.001", "0.034", "0.41"."""
    if not math.isfinite(p):
        return "–"
    if p < 0.001:
        return "<0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def best(arms: Sequence[ArmMeans], metric: Metric) -> set[str]:
    """Names of the arms whose shown value is the best one (several if they tie in the shown digits)."""
    shown = {arm.name: arm.means[metric.name] for arm in arms if math.isfinite(arm.means.get(metric.name, math.nan))}
    if len(shown) < 2:
        return set()
    top = max(shown.values()) if metric.higher_is_better else min(shown.values())
    text = number(top, metric.format)
    return {name for name, value in shown.items() if number(value, metric.format) == text}


def effect(pair: Paired, metric: Metric) -> str:
    """ "better", "worse", or "unclear" (the interval includes zero) for `a` against `b`."""
    if not pair.low > 0 and not pair.high < 0:
        return "unclear"
    return "better" if (pair.low > 0) == metric.higher_is_better else "worse"


def paired_with(
    report: Report, a: str, metrics: Sequence[str] | None = None, split: str | None = None
) -> list[tuple[Metric, list[Paired]]]:
    """For every metric that has some, the differences of arm `a` to the other arms, in the order of the arms."""
    order = {arm.name: index for index, arm in enumerate(report.arms)}
    rows = []
    for _, members in groups(report.metrics):
        for metric in members:
            pairs = [
                pair
                for pair in report.paired
                if pair.metric == metric.name and pair.a == a and pair.split == (split or report.split)
            ]
            if pairs and (metrics is None or metric.name in metrics):
                rows.append((metric, sorted(pairs, key=lambda pair: order.get(pair.b, len(order)))))
    return rows
