"""The report as two tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rwopt.report.data import Report, best, effect, groups, interval, number, paired_with, probability, signed
from rwopt.results import Metric

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["terminal_table"]

EFFECTS = {
    "better": ("▲ better", "bold blue"),
    "worse": ("▼ worse", "bold yellow"),
    "unclear": ("· unclear", "dim"),
}  # blue and yellow stay apart for every kind of colour vision, and the words need no colour at all


def terminal_table(
    report: Report, width: int = 100, learned: str = "learned", metrics: Sequence[str] | None = None
) -> RenderableType:
    """Means of all arms, then the paired differences of the arm `learned` to every other one.

    Args:
        report: the results; only pairs of `report.split` are shown.
        width: columns of the terminal; a table with more columns than fit is continued below.
        learned: name of the arm that is compared.
        metrics: names of the metrics whose differences are shown; all if None.

    Returns:
        A rich renderable; the verdict is not in it.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [
        Text.assemble((report.title, "bold"), f"\n{report.split} split, {report.cases} cases, task {report.task}")
    ]
    parts += _means(report, width, learned)
    notes = [f"{arm.name}: {arm.note}" for arm in report.arms if arm.note]
    hint = "↑ higher is better, ↓ lower is better; bold: best; U-Net calls: what finding the arm cost"
    parts += [Text(), *(Text(line, style="dim") for line in (hint, *notes))]
    table = _differences(report, learned, metrics)
    if table is not None:
        title = f"{learned} minus each other arm: same cases and seeds, 95 % intervals, wins of {learned}"
        parts += [Text(), Text(title, style="bold"), Text(), table]
    return Group(*parts)


def _means(report: Report, width: int, learned: str) -> list[RenderableType]:
    """One table, or several with the arms repeated if the metrics need more than `width` columns."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=10_000)
    columns = [(group, metric) for group, members in groups(report.metrics) for metric in members]
    tables: list[RenderableType] = []
    start = 0
    while start < len(columns) or not tables:
        end = len(columns)
        while True:
            table = _mean_table(report, columns[start:end], learned, calls=end == len(columns))
            fits = Measurement.get(console, console.options, table).maximum <= width
            if fits or end <= start + 1:
                break
            end -= 1
        tables += ["", table]
        start = max(end, 1)
    return tables


def _mean_table(report: Report, columns: Sequence[tuple[str, Metric]], learned: str, calls: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    heads = {metric.name: _two_lines(f"{metric.name} {_arrow(metric)}") for _, metric in columns}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("\n\narm", no_wrap=True)

    def divide() -> None:
        table.add_column("│\n│\n│", style="dim", header_style="dim", no_wrap=True)

    previous = ""
    for group, metric in columns:
        if group != previous:
            divide()
        name = "" if group == previous else group
        head = Text.assemble((name, "italic"), "\n", heads[metric.name])
        table.add_column(head, justify="right", no_wrap=True)
        previous = group
    if calls:
        divide()
        table.add_column("\nU-Net\ncalls", justify="right", no_wrap=True)

    winners = {metric.name: best(report.arms, metric) for _, metric in columns}
    for arm in report.arms:
        cells: list[RenderableType] = [Text(arm.name, style="bold" if arm.name == learned else "")]
        previous = ""
        for group, metric in columns:
            if group != previous:
                cells.append("│")
            previous = group
            text = number(arm.means.get(metric.name), metric.format)
            cells.append(Text(text, style="bold" if arm.name in winners[metric.name] else ""))
        if calls:
            cells += ["│", Text(f"{arm.calls:,}")]
        table.add_row(*cells)
    return table


def _two_lines(head: str) -> str:
    """`head` on two lines as equal as its spaces allow, the arrow with the last word."""
    words = head.split(" ")
    words[-2:] = [" ".join(words[-2:])]
    cuts = [(" ".join(words[:cut]), " ".join(words[cut:])) for cut in range(len(words))]
    return "\n".join(min(cuts, key=lambda cut: max(map(len, cut))))


def _differences(report: Report, learned: str, metrics: Sequence[str] | None) -> Table | None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = paired_with(report, learned, metrics)
    if not rows:
        return None
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("metric, minus arm", no_wrap=True)
    for name in ("difference", "interval", "wins", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for metric, pairs in rows:
        group = "optimised" if metric.optimised else "held out"
        table.add_row(Text.assemble((f"{metric.name} {_arrow(metric)}", "bold"), (f"  {group}", "dim italic")))
        for pair in pairs:
            word, style = EFFECTS[effect(pair, metric)]
            table.add_row(
                Text(f"  − {pair.b}"),
                Text(signed(pair.mean, metric.format)),
                Text(interval(pair, metric)),
                Text(f"{100 * pair.win_rate:.0f} %"),
                Text(probability(pair.p)),
                Text(word, style=style),
            )
    return table


def _arrow(metric: Metric) -> str:
    return "↑" if metric.higher_is_better else "↓"
