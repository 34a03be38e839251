"""Verbs of files: show, sites, recipes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from rwopt.cli.screen import quiet


def show(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from rwopt.schedule import Schedule

    schedule = Schedule.load(args.schedule)
    console = Console()
    for name in ("model", "noise", "calibrated", "provenance"):
        about = escape(text(getattr(schedule, name))) or "-"  # escaped: an override may hold [self,ff]
        console.print(f"[bold]{name}[/bold]: {about}", highlight=False)
    table = Table(title=f"{schedule.mode} weights, {schedule.interp} in ln sigma")
    table.add_column("site")
    for sigma in schedule.sigmas:
        table.add_column(f"σ {sigma:.3g}", justify="right")
    for site, row in zip(schedule.sites, schedule.weights.T, strict=True):
        table.add_row(site, *(f"{v:.3f}" for v in row))
    console.print(table)
    if schedule.steps is not None:
        steps = schedule.steps
        calls = Table(title=f"steps: {len(steps)} calls of {steps.sampler}")
        for heading in ("call", "σ", "told σ", "guidance"):
            calls.add_column(heading, justify="right")
        for i, sigma in enumerate(steps.sigmas):
            told = f"{steps.told[i]:.4g}" if steps.told else "-"
            calls.add_row(str(i + 1), f"{sigma:.4g}", told, f"{steps.guidance[i]:.2f}" if steps.guidance else "-")
        console.print(calls)
    if args.png:
        from rwopt.report import schedule_heatmap

        print(schedule_heatmap(schedule, args.png))


def text(value: object) -> str:
    """Mappings as "key value, key (nested)", numbers without noise."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} ({text(v)})" if isinstance(v, Mapping) else f"{k} {text(v)}" for k, v in value.items())
    if isinstance(value, list) and len(value) > 12:
        return f"{len(value)} values, {text(value[0])} to {text(value[-1])}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def sites(args: argparse.Namespace) -> None:
    quiet()
    from rich.console import Console
    from rich.table import Table

    from rwopt.models.configuration import empty_unet
    from rwopt.unet.names import site_rows

    rows = site_rows(empty_unet(args.model))
    console = Console(width=None if sys.stdout.isatty() else 200)
    narrow = ("class", "stage") if console.width < 190 else ()
    columns = [n for n in rows[0] if n not in narrow and any(row[n] for row in rows)]
    table = Table(title=f"{len(rows)} sites of {args.model}, in execution order")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    console.print(table)


def recipes(args: argparse.Namespace) -> None:
    from rwopt import config
    from rwopt.config.groups import groups

    parts = {name.replace("/", "="): about for name, (_, about) in groups().items()}
    whole = {name: about for name, (_, about) in config.recipes().items()}
    width = max(map(len, [*whole, *parts]))
    for name, about in whole.items():
        print(f"{name:<{width}}  {about}")
    print("\nparts, chosen beside a recipe, as in rwopt search recipe=few-steps model=sdxl budget=card-8gb:")
    for name, about in parts.items():
        print(f"{name:<{width}}  {about}")
