"""What a run tells people: a terminal table, pictures, and one HTML page.

Input is plain data (`Report` and arrays); matplotlib, Pillow, rich and jinja2 are imported only when they are needed.

    terminal_table(report)                 a rich renderable
    schedule_heatmap(schedule, path)       weights over noise level and site; several schedules share one colour scale
    importance_heatmap(importance, path)   what a probe measured
    search_history(values, path)           trial values and the best so far
    image_grid(columns, path, captions)    cases x arms
    write_html(report, folder)             report.html, which shows the pictures found in `folder`
"""

from __future__ import annotations

from rwopt.report.data import Picture, Report
from rwopt.report.grid import image_grid
from rwopt.report.heatmaps import importance_heatmap, schedule_heatmap
from rwopt.report.history import search_history
from rwopt.report.html import write_html
from rwopt.report.table import terminal_table
from rwopt.results import ArmMeans, Metric, Paired

__all__ = [
    "ArmMeans",
    "Metric",
    "Paired",
    "Picture",
    "Report",
    "image_grid",
    "importance_heatmap",
    "schedule_heatmap",
    "search_history",
    "terminal_table",
    "write_html",
]
